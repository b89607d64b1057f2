"""Policies: the protocol, DDPM and DDIM, and the diffusion MLP policy."""

from postbc.policies.base import NormalizationTensors, Policy
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy

__all__ = ["DiffusionConfig", "DiffusionPolicy", "NormalizationTensors", "Policy"]
