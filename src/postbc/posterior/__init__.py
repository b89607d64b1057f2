"""Algorithm 1: bootstrap → ensemble → factor of the posterior covariance; the closed form; α from trajectories left out."""

from postbc.posterior.bootstrap import bootstrap_counts
from postbc.posterior.calibration import Calibration, OutOfBag, calibrate
from postbc.posterior.closed_form import ClosedForm, ClosedFormConfig, fit_closed_form
from postbc.posterior.ensemble import Ensemble, EnsembleConfig, fit_ensemble
from postbc.posterior.factor import Factor
from postbc.posterior.features import state_features, window_features
from postbc.posterior.saved import Posterior
from postbc.posterior.seeing import SeeingEnsemble, fit_seeing_ensemble

__all__ = [
    "Calibration",
    "ClosedForm",
    "ClosedFormConfig",
    "Ensemble",
    "EnsembleConfig",
    "Factor",
    "OutOfBag",
    "Posterior",
    "SeeingEnsemble",
    "bootstrap_counts",
    "calibrate",
    "fit_closed_form",
    "fit_ensemble",
    "fit_seeing_ensemble",
    "state_features",
    "window_features",
]
