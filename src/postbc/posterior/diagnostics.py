"""Pictures of the posterior: where the ensemble is uncertain along each demonstration, between demonstrations and beyond them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from postbc.demonstrations.training_set import TrainingSet
from postbc.posterior.ensemble import Ensemble
from postbc.runs import atomic_path


def first_action_std(ensemble: Ensemble, observations: torch.Tensor) -> torch.Tensor:
    """(N, S) normalised -> (N, A): posterior standard deviation of the chunk's first action, normalised units."""
    return ensemble.factor(observations).std()[:, : ensemble.action_dim]


def between_and_beyond(data: TrainingSet, rng: np.random.Generator, count: int = 400) -> dict[str, np.ndarray]:
    """States off the demonstrations, normalised: {"between": (count, S), "beyond": (count, S)}.

    "between" lies half way between states of two different demonstrations at the same share of their length; "beyond" moves a
    demonstrated state away from the mean by as much again as it already is (the box of the data doubled).
    """
    w = data.windows
    names = np.unique(w.trajectory)
    first, second = (rng.choice(names, count) for _ in range(2))
    if len(names) > 1:
        second = np.where(first == second, names[(np.searchsorted(names, second) + 1) % len(names)], second)
    share = rng.random(count)

    def at(trajectory: np.ndarray) -> np.ndarray:
        rows = [np.flatnonzero(w.trajectory == t) for t in trajectory]
        return w.observations[[r[int(s * len(r))] for r, s in zip(rows, share)]]

    a, b = at(first), at(second)
    return {"between": 0.5 * (a + b), "beyond": a + (a - w.observations.mean(0))}


def summarise(ensemble: Ensemble, data: TrainingSet, seed: int = 0) -> dict[str, Any]:
    """Mean and median posterior std (all dimensions of the chunk, normalised units) on, between and beyond the demonstrations."""
    states = {"on": data.windows.observations, **between_and_beyond(data, np.random.default_rng(seed))}
    result: dict[str, Any] = {}
    for name, observations in states.items():
        std = ensemble.factor(torch.as_tensor(observations)).std()
        result[name] = {"mean": std.mean().item(), "median": std.median().item(), "maximum": std.max().item()}
    return result


def plot(ensemble: Ensemble, data: TrainingSet, path: str | Path, title: str = "") -> None:
    """Draw the diagnostics as one PNG: std along each demonstration, on a map of the gripper's path, and its distribution."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    w = data.windows
    observations = torch.as_tensor(w.observations)
    std = first_action_std(ensemble, observations).numpy()
    level = std.mean(1)
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    along, paths, spread, dims = figure.subplots(2, 2).ravel()
    names = np.unique(w.trajectory)
    for k, t in enumerate(names[:10]):
        rows = w.trajectory == t
        along.plot(w.step[rows], level[rows], lw=1.2, color=f"C{k % 10}", label=data.demonstrations[int(t)].name)
    along.set(
        xlabel="step of the demonstration",
        ylabel="posterior std (normalised)",
        title="Along each demonstration",
        ylim=(0, None),
    )
    along.legend(fontsize=7, ncols=2)
    raw = np.asarray(data.normalization.unnormalize_observation(w.observations))
    points = paths.scatter(raw[:, 0], raw[:, 2] if raw.shape[1] > 2 else raw[:, -1], c=level, s=9, cmap="viridis")
    paths.set(
        xlabel="first observation dimension (end effector x, m)",
        ylabel="third (end effector z, m)",
        title="Where it is uncertain",
    )
    figure.colorbar(points, ax=paths, label="posterior std")
    states = {"on the demonstrations": w.observations}
    off = between_and_beyond(data, np.random.default_rng(0))
    states.update({"between them": off["between"], "beyond them": off["beyond"]})
    values = [first_action_std(ensemble, torch.as_tensor(s)).mean(1).numpy() for s in states.values()]
    bins = np.linspace(0, max(v.max() for v in values) + 1e-9, 40).tolist()
    for (name, _), v in zip(states.items(), values):
        spread.hist(v, bins, histtype="step", lw=1.8, density=True, label=f"{name} (mean {v.mean():.2f})")
    spread.set(xlabel="posterior std (normalised)", ylabel="density", title="On, between and beyond the demonstrations")
    spread.legend(fontsize=8)
    dims.boxplot([std[:, i] for i in range(std.shape[1])], showfliers=False)
    dims.set(xlabel="action dimension", ylabel="posterior std (normalised)", title="By action dimension, on the demonstrations")
    if title:
        figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
