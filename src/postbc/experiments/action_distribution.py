"""The action distribution of pretrained policies at dense and at sparse states: what PostBC changes, made visible.

**Dense and sparse** are defined on demonstrated states. Given a posterior, a state's uncertainty is the posterior standard deviation of
the chunk's first action, averaged over its dimensions; without one, the mean distance to the 10 nearest demonstrated states of *other*
trajectories (normalised units). Dense are the tenth of the states with the lowest, sparse the tenth with the highest uncertainty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from postbc.demonstrations.chunks import Windows
from postbc.nn import make_generators
from postbc.policies.base import Policy
from postbc.posterior.factor import Factor

STREAM = 7_500
NEIGHBOURS = 10


@dataclass(frozen=True)
class ActionDistribution:
    """Samples of the first action of a chunk, normalised units. Kinds are "dense" and "sparse"."""

    samples: dict[str, dict[str, np.ndarray]]
    """kind -> policy -> (n, A) at one state: the median one of its kind."""
    demonstrated: dict[str, np.ndarray]
    """kind -> (A,) the demonstrated action at that state."""
    posterior_std: dict[str, np.ndarray]
    """kind -> (A,) posterior standard deviation at that state; empty without a posterior."""
    spread: dict[str, dict[str, float]]
    """kind -> policy -> standard deviation of the samples at a state, averaged over action dimensions (no switches) and states."""
    axes: tuple[int, int]
    """The two action dimensions to draw: those in which all policies' samples vary most at the sparse state."""
    definition: str
    """How dense and sparse were told apart here."""


def uncertainty(windows: Windows, factor: Factor | None = None) -> np.ndarray:
    """(N,) a state's uncertainty, as this module defines it (`factor`: the posterior's, at every window)."""
    if factor is not None:
        std: np.ndarray = factor.std()[:, : windows.chunks.shape[2]].mean(1).numpy()
        return std
    x = torch.as_tensor(windows.observations)
    distance = torch.cdist(x, x)
    trajectory = torch.as_tensor(windows.trajectory)
    distance[trajectory[:, None] == trajectory[None]] = torch.inf
    nearest = distance.topk(min(NEIGHBOURS, len(x)), largest=False).values
    finite = torch.isfinite(nearest)
    return (torch.where(finite, nearest, 0).sum(1) / finite.sum(1).clamp(min=1)).numpy()


def switches(actions: np.ndarray) -> np.ndarray:
    """(N, A) normalised -> (A,) bool: dimensions that sit at an end of their range nine times in ten, such as a gripper's.

    Their samples say which end, not how wide a choice is; they are left out of spreads and pictures (unless all are switches).
    """
    found: np.ndarray = (np.abs(actions) > 0.95).mean(0) > 0.9
    return found & ~found.all()


@torch.inference_mode()
def action_distribution(
    policies: Mapping[str, Policy],
    windows: Windows,
    factor: Factor | None = None,
    *,
    samples: int = 300,
    states: int = 48,
    seed: int = 0,
) -> ActionDistribution:
    """Sample every policy at dense and at sparse demonstrated states, all from the same latent noise.

    Args:
        policies: name -> policy; the first member of each is used. In the normalised units of `windows`.
        windows: the demonstrations that they were trained on.
        factor: posterior covariance at every window.
        samples: drawn at the one state that is pictured.
        states: at most so many of each kind for the spread, 64 samples at each.
    """
    level = uncertainty(windows, factor)
    order = np.argsort(level, kind="stable")
    tenth = max(1, len(order) // 10)
    kinds = {"dense": order[:tenth], "sparse": order[-tenth:]}
    drawn: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in kinds}
    spread: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    middle = {kind: int(rows[len(rows) // 2]) for kind, rows in kinds.items()}
    moving = ~switches(windows.chunks[:, 0])
    for kind, rows in kinds.items():
        some = rows[np.linspace(0, len(rows) - 1, min(states, len(rows))).astype(int)]
        for name, policy in policies.items():
            drawn[kind][name] = _first_actions(policy, windows.observations[[middle[kind]]], samples, seed)[0]
            many = _first_actions(policy, windows.observations[some], 64, seed + 1)
            spread[kind][name] = float(many.std(1, ddof=1)[:, moving].mean())
    variation = np.concatenate([v - v.mean(0) for v in drawn["sparse"].values()]).std(0)
    variation[~moving] = -1.0
    widest = np.argsort(-variation, kind="stable")[:2]
    axes = (int(widest.min()), int(widest.max()))
    what = (
        "posterior standard deviation of the first action"
        if factor is not None
        else f"mean distance to the {NEIGHBOURS} nearest demonstrated states of other trajectories"
    )
    first = windows.chunks[:, 0]
    std = {} if factor is None else {k: factor.std()[i, : first.shape[1]].numpy() for k, i in middle.items()}
    return ActionDistribution(
        drawn, {kind: first[i] for kind, i in middle.items()}, std, spread, axes,
        f"dense: the tenth of the demonstrated states with the lowest {what}; sparse: the tenth with the highest",
    )  # fmt: skip


def _first_actions(policy: Policy, observations: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(n, S) -> (n, samples, A): the first member's first actions."""
    rows = torch.as_tensor(observations, dtype=torch.float32).repeat_interleave(samples, 0)
    generators = make_generators([seed] * policy.members, STREAM)
    chunks = policy.sample(rows.expand(policy.members, -1, -1), generators=generators)
    return chunks[0, :, 0].reshape(len(observations), samples, -1).numpy()
