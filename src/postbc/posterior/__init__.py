"""Algorithm 1: bootstrap → ensemble → factor of the posterior covariance."""

from postbc.posterior.bootstrap import bootstrap_counts
from postbc.posterior.ensemble import Ensemble, EnsembleConfig, fit_ensemble
from postbc.posterior.factor import Factor
from postbc.posterior.features import state_features, window_features
from postbc.posterior.saved import Posterior

__all__ = [
    "Ensemble",
    "EnsembleConfig",
    "Factor",
    "Posterior",
    "bootstrap_counts",
    "fit_ensemble",
    "state_features",
    "window_features",
]
