"""Algorithm 1: bootstrap → ensemble → factor of the posterior covariance."""

from postbc.posterior.bootstrap import bootstrap_counts
from postbc.posterior.ensemble import Ensemble, EnsembleConfig, fit_ensemble
from postbc.posterior.factor import Factor
from postbc.posterior.features import state_features, window_features
from postbc.posterior.saved import Posterior
from postbc.posterior.seeing import SeeingEnsemble, fit_seeing_ensemble

__all__ = [
    "Ensemble",
    "EnsembleConfig",
    "Factor",
    "Posterior",
    "SeeingEnsemble",
    "bootstrap_counts",
    "fit_ensemble",
    "fit_seeing_ensemble",
    "state_features",
    "window_features",
]
