"""The three ways to estimate a demonstrator from counts, and how well an estimate covers the demonstrator's actions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from postbc.theory.tabular import Array, Counts


def behavioral_cloning(counts: Counts) -> Array:
    """π^bc_h(a|s) = T_h(s, a) / T_h(s), and uniform where s was not visited: (..., S, A) -> (..., S, A)."""
    visits = counts.sum(-1, keepdims=True)
    return np.where(visits > 0, counts / np.maximum(visits, 1), 1.0 / counts.shape[-1])


def uniform_mixture(counts: Counts, weight: float | Array) -> Array:
    """π^{u,α} = (1 − α)·π^bc + α·unif(A).

    Args:
        counts: T_h(s, a), (..., H, S, A).
        weight: α, one number or one a repetition.
    """
    alpha = _per_repetition(weight)
    return (1.0 - alpha) * behavioral_cloning(counts) + alpha / counts.shape[-1]


def posterior_demonstrator(counts: Counts, pseudo_count: float) -> Array:
    """(T_h(s, a) + λ/A) / (T_h(s) + λ): what the demonstrator is expected to do under a Dirichlet(λ/A, …, λ/A) prior.

    λ = A is the uniform prior. Where s was not visited this is uniform by itself.
    """
    actions = counts.shape[-1]
    return (counts + pseudo_count / actions) / (counts.sum(-1, keepdims=True) + pseudo_count)


def posterior_mixture(counts: Counts, weight: float | Array, pseudo_count: float) -> Array:
    """π̃ = (1 − α)·π^bc + α·(posterior demonstrator policy with pseudo-count λ)."""
    alpha = _per_repetition(weight)
    return (1.0 - alpha) * behavioral_cloning(counts) + alpha * posterior_demonstrator(counts, pseudo_count)


def _per_repetition(weight: float | Array) -> Array:
    weight = np.asarray(weight, dtype=np.float64)
    return weight[..., None, None, None] if weight.ndim else weight


@dataclass(frozen=True)
class Parameters:
    """The parameters at which the main theorem is stated."""

    weight: float
    """α = 1 / max{A, H, log(HT)}."""
    pseudo_count: float
    """λ = max{A, 4·log(HT)}."""

    @classmethod
    def of_theorem(cls, actions: int, horizon: int, trajectories: int) -> Parameters:
        log = math.log(horizon * trajectories)
        return cls(weight=1.0 / max(actions, horizon, log), pseudo_count=max(actions, 4.0 * log))


def action_coverage(policy: Array, demonstrator: Array) -> Array:
    """The largest γ with π_h(a|s) ≥ γ·π^β_h(a|s) for all (s, a, h): (..., H, S, A) -> (...).

    Actions that the demonstrator never plays ask for nothing. γ lies in [0, 1], because both sides are distributions.
    """
    ratio = np.full(np.broadcast_shapes(policy.shape, demonstrator.shape), np.inf)
    np.divide(policy, demonstrator, out=ratio, where=np.broadcast_to(demonstrator > 0, ratio.shape))
    return np.minimum(ratio.min((-3, -2, -1)), 1.0)


def coverage_guarantee(demonstrator: Array, parameters: Parameters, failure: float, constant: float = 64.0) -> Array:
    """The main theorem's floor under π̃_h(a|s): α·min{π^β_h(a|s) / (64·log(SH/δ)), 1/(2λ)}, (..., H, S, A)."""
    steps, states = demonstrator.shape[-3:-1]
    log = math.log(states * steps / failure)
    return parameters.weight * np.minimum(demonstrator / (constant * log), 0.5 / parameters.pseudo_count)


def constant_needed(policy: Array, demonstrator: Array, parameters: Parameters, failure: float) -> Array:
    """The smallest number that could stand in for 64 in :func:`coverage_guarantee` on each dataset: (...).

    Where π̃ ≥ α/(2λ) the guarantee holds whatever the constant; elsewhere it needs α·π^β / (log(SH/δ)·π̃).
    """
    steps, states = demonstrator.shape[-3:-1]
    log = math.log(states * steps / failure)
    binding = policy < 0.5 * parameters.weight / parameters.pseudo_count
    needed = np.zeros(policy.shape)
    np.divide(parameters.weight * demonstrator, log * policy, out=needed, where=binding)
    return needed.max((-3, -2, -1))
