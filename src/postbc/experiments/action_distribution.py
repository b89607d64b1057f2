"""The action distribution of pretrained policies at dense and at sparse states: what PostBC changes, made visible.

**Dense and sparse** are defined on demonstrated states. Given a posterior, a state's uncertainty is the posterior standard deviation of
the chunk's first action, averaged over its dimensions; without one, the mean distance to the 10 nearest demonstrated states of *other*
trajectories (features). Dense are the tenth of the states with the lowest, sparse the tenth with the highest uncertainty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from postbc.data.episodes import COORDINATES
from postbc.data.training_set import TrainingSet, TrainingSetConfig, load_training_set
from postbc.data.windows import Windows
from postbc.errors import InputError, require
from postbc.experiments.material import Stage
from postbc.experiments.summary import PRETRAINING, label
from postbc.policies.base import Policy, load_policy
from postbc.posterior.factor import Factor
from postbc.pretraining import with_coordinates
from postbc.schemas import parse
from postbc.seeding import make_generator
from postbc.stages.posterior import posterior_at

NEIGHBOURS = 10
MOST_STATES = 20_000
"""Of larger training sets so many states are looked at, evenly spaced."""


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


def uncertainty(features: Tensor, episode: np.ndarray, chunk: int, factor: Factor | None = None) -> np.ndarray:
    """(N,) a state's uncertainty, as this module defines it.

    Args:
        features: (N, F) of the windows' observations.
        episode: (N,) trajectory of each window.
        chunk: T.
        factor: the posterior's, at every window.
    """
    if factor is not None:
        std = factor.std()
        first: np.ndarray = std[:, : std.shape[1] // chunk].mean(1).cpu().numpy()
        return first
    trajectory = torch.as_tensor(episode)
    found = []
    for rows, of in zip(features.split(1024), trajectory.split(1024)):
        distance = torch.cdist(rows, features)
        distance[of[:, None] == trajectory[None]] = torch.inf
        nearest = distance.topk(min(NEIGHBOURS, len(features)), largest=False).values
        finite = torch.isfinite(nearest)
        found.append(torch.where(finite, nearest, 0).sum(1) / finite.sum(1).clamp(min=1))
    return torch.cat(found).numpy()


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
        policies: name -> policy; the actions of `windows` are shown in the first one's normalised units.
        windows: the demonstrations that they were trained on.
        factor: posterior covariance at every window.
        samples: drawn at the one state that is pictured.
        states: at most so many of each kind for the spread, 64 samples at each.
    """
    reference = next(iter(policies.values()))
    kept = np.linspace(0, len(windows) - 1, min(len(windows), MOST_STATES)).astype(int)
    index = torch.as_tensor(kept)
    first = reference.normalization.normalize_action(windows.chunk(index)[:, 0]).numpy()
    some_factor = None if factor is None else Factor(factor.rows[index])
    features = torch.cat([reference.encode(_observation(reference, windows, rows)) for rows in index.split(256)])
    level = uncertainty(features, windows.episode[kept], reference.chunk, some_factor)
    order = np.argsort(level, kind="stable")
    tenth = max(1, len(order) // 10)
    kinds = {"dense": order[:tenth], "sparse": order[-tenth:]}
    drawn: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in kinds}
    spread: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    middle = {kind: int(rows[len(rows) // 2]) for kind, rows in kinds.items()}
    moving = ~switches(first)
    for kind, rows in kinds.items():
        some = rows[np.linspace(0, len(rows) - 1, min(states, len(rows))).astype(int)]
        for name, policy in policies.items():
            drawn[kind][name] = _first_actions(policy, windows, kept[[middle[kind]]], samples, seed, 0)[0]
            many = _first_actions(policy, windows, kept[some], 64, seed, 1)
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
    std = {} if some_factor is None else {k: some_factor.std()[i, : first.shape[1]].numpy() for k, i in middle.items()}
    return ActionDistribution(
        drawn, {kind: first[i] for kind, i in middle.items()}, std, spread, axes,
        f"dense: the tenth of the demonstrated states with the lowest {what}; sparse: the tenth with the highest",
    )  # fmt: skip


def _observation(
    policy: Policy, windows: Windows, rows: torch.Tensor, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """Windows (B,) as the policy observes them; a coherent one's coordinates drawn, or 0 without a generator."""
    observation, size = windows.observation(rows), policy.shapes.get(COORDINATES, (0,))[0]
    if size:
        g = torch.zeros(len(rows), size) if generator is None else torch.randn(len(rows), size, generator=generator)
        observation = with_coordinates(observation, g, windows.observation_steps)
    return observation


def _first_actions(policy: Policy, windows: Windows, rows: np.ndarray, samples: int, seed: int, use: int) -> np.ndarray:
    """Windows (n,) -> (n, samples, A): first actions of samples at each."""
    generator = make_generator(seed, "report/actions", offset=use)
    if COORDINATES in policy.shapes:
        features = policy.encode(_observation(policy, windows, torch.as_tensor(rows).repeat_interleave(samples), generator))
    else:
        features = policy.encode(windows.observation(torch.as_tensor(rows))).repeat_interleave(samples, 0)
    chunks = policy.sample(features, generator=generator)
    return chunks[:, 0].reshape(len(rows), samples, -1).numpy()


# -- of run directories --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pictured:
    """An action distribution and what it is of."""

    distribution: ActionDistribution
    methods: dict[str, str]
    """Label -> pretraining."""
    seed: int
    data: str


def pictured(stages: Sequence[Stage]) -> tuple[list[Pictured], list[str]]:
    """The action distributions of the pretrained policies that share their demonstrations, one a training set; and notes.

    Of a training set the policies of the lowest seed that all methods have are taken,
    with the posterior of their windows if there is one.
    """
    lots: dict[str, list[Stage]] = {}
    for stage in stages:
        if stage.kind == "pretraining":
            data = {k: v for k, v in stage.config.items() if k.startswith("data.")}
            lots.setdefault(json.dumps(data, sort_keys=True, default=str), []).append(stage)
    posteriors = [s.path for s in stages if s.kind == "posterior"]
    found, notes = [], []
    for lot in lots.values():
        try:
            found.append(_picture(lot, posteriors))
        except (InputError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
            names = ", ".join(s.name for s in lot[:6]) + (", …" if len(lot) > 6 else "")
            notes.append(f"The actions of {names} are not pictured: {str(error).splitlines()[0][:200]}")
    return found, notes


def _picture(lot: Sequence[Stage], posteriors: Sequence[Path]) -> Pictured:
    by_method: dict[Path, dict[int, Stage]] = {}
    for stage in lot:
        name = stage.path.name.removeprefix("seed_")
        by_method.setdefault(stage.path.parent, {})[int(name) if name.isdecimal() else 0] = stage
    seeds = set.intersection(*(set(by_seed) for by_seed in by_method.values()))
    require(seeds, "They have no seed in common.")
    seed = min(seeds)
    config = parse(TrainingSetConfig, lot[0].values.get("data"))
    data = load_training_set(config, seed)
    named: dict[str, Policy] = {}
    methods: dict[str, str] = {}
    for by_seed in by_method.values():
        policy = load_policy(by_seed[seed].path)
        about = policy.about
        if about.method is not None:
            name = label(about.method, about.posterior_weight if about.method == "postbc" else about.sigma, about.variant)
            named.setdefault(name, policy)
            methods.setdefault(name, about.method)
    rank = {method: i for i, method in enumerate(PRETRAINING)}
    order = sorted(named, key=lambda n: (rank.get(methods[n], len(rank)), n))[:4]
    require(order, "They do not say by which method they were pretrained.")
    factor = next(filter(None, (_factor(path, data, seed) for path in posteriors)), None)
    found = action_distribution({n: named[n] for n in order}, data.windows, factor)
    return Pictured(found, {n: methods[n] for n in order}, seed, config.demonstrations.name)


def _factor(posterior: Path, data: TrainingSet, seed: int) -> Factor | None:
    try:
        return posterior_at(posterior, data, seed).factor()
    except InputError:  # of other windows
        return None
