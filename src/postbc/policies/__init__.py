"""Policies: the protocol, the registry and the files; diffusion (DDPM, DDIM) and flow matching."""

from postbc.policies.base import (
    POLICIES,
    About,
    Observation,
    Policy,
    load_policy,
    policy_class,
    policy_fingerprint,
    save_policy,
)
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.policies.flow import FlowConfig, FlowPolicy

__all__ = [
    "POLICIES",
    "About",
    "DiffusionConfig",
    "DiffusionPolicy",
    "FlowConfig",
    "FlowPolicy",
    "Observation",
    "Policy",
    "load_policy",
    "policy_class",
    "policy_fingerprint",
    "save_policy",
]
