"""Algorithm 1: bootstrap → ensemble → factor of the posterior covariance."""

from postbc.posterior.bootstrap import bootstrap_counts
from postbc.posterior.ensemble import Ensemble, EnsembleConfig, Posterior, fit_ensemble
from postbc.posterior.factor import Factor

__all__ = ["Ensemble", "EnsembleConfig", "Factor", "Posterior", "bootstrap_counts", "fit_ensemble"]
