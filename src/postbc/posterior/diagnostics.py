"""Pictures of the posterior: where it is uncertain along each demonstration, between demonstrations and beyond them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postbc.data.training_set import TrainingSet
from postbc.files import atomic_path
from postbc.posterior.calibration import LEVELS, Calibration
from postbc.posterior.closed_form import ClosedForm
from postbc.posterior.ensemble import Ensemble


def first_action_std(posterior: Ensemble | ClosedForm, features: Tensor) -> np.ndarray:
    """(N, F) -> (N, A): posterior standard deviation of the chunk's first action, normalised units."""
    std: np.ndarray = posterior.factor(features).std()[:, : posterior.action_dim].cpu().numpy()
    return std


def between_and_beyond(features: Tensor, episode: np.ndarray, rng: np.random.Generator, count: int = 400) -> dict[str, Tensor]:
    """Features off the demonstrations: {"between": (count, F), "beyond": (count, F)}.

    "between" lies half way between states of two different demonstrations at the same share of their length; "beyond" moves a
    demonstrated state away from the mean by as much again as it already is (the box of the data doubled).
    """
    names = np.unique(episode)
    first, second = (rng.choice(names, count) for _ in range(2))
    if len(names) > 1:
        second = np.where(first == second, names[(np.searchsorted(names, second) + 1) % len(names)], second)
    share = rng.random(count)

    def at(which: np.ndarray) -> Tensor:
        rows = [np.flatnonzero(episode == e) for e in which]
        return features[torch.as_tensor([int(r[int(s * len(r))]) for r, s in zip(rows, share)], device=features.device)]

    a, b = at(first), at(second)
    return {"between": 0.5 * (a + b), "beyond": a + (a - features.mean(0))}


def summarise(posterior: Ensemble | ClosedForm, features: Tensor, episode: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Mean and median posterior std (all dimensions of the chunk, normalised units) on, between and beyond the demonstrations."""
    result: dict[str, Any] = {}
    for name, values in {"on": features, **between_and_beyond(features, episode, np.random.default_rng(seed))}.items():
        std = posterior.factor(values).std()
        result[name] = {"mean": std.mean().item(), "median": std.median().item(), "maximum": std.max().item()}
    return result


def plot(posterior: Ensemble | ClosedForm, features: Tensor, data: TrainingSet, path: str | Path, title: str = "") -> None:
    """Draw the diagnostics as one PNG: std along each demonstration, on a map of the gripper's path, and its distribution."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    w = data.windows
    std = first_action_std(posterior, features)
    level = std.mean(1)
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    along, paths, spread, dims = figure.subplots(2, 2).ravel()
    for k, e in enumerate(np.unique(w.episode)[:10].tolist()):
        rows = w.episode == e
        name = data.dataset[e].name.replace("$", r"\$")
        along.plot(w.step[rows], level[rows], lw=1.2, color=f"C{k % 10}", label=f"demonstration {name}")
    along.set(xlabel="step of the demonstration", ylabel="posterior std (normalised)", title="Along each demonstration",
              ylim=(0, None))  # fmt: skip
    along.legend(fontsize=7, ncols=2)
    where, words = features.cpu().numpy(), ("first feature", "third feature")
    if "state" in w.shapes:
        state = w.observation(torch.arange(len(w)))["state"].cpu().numpy()
        where = state[:, -1] if state.ndim == 3 else state
        words = ("first dimension of the state (end effector x, m)", "third (end effector z, m)")
    points = paths.scatter(where[:, 0], where[:, min(2, where.shape[1] - 1)], c=level, s=9, cmap="viridis")
    paths.set(xlabel=words[0], ylabel=words[1], title="Where it is uncertain")
    figure.colorbar(points, ax=paths, label="posterior std")
    off = between_and_beyond(features, w.episode, np.random.default_rng(0))
    states = {"on the demonstrations": features, "between them": off["between"], "beyond them": off["beyond"]}
    values = [first_action_std(posterior, s).mean(1) for s in states.values()]
    bins = np.linspace(0, max(v.max() for v in values) + 1e-9, 40).tolist()
    for name, v in zip(states, values):
        spread.hist(v, bins, histtype="step", lw=1.8, density=True, label=f"{name} (mean {v.mean():.2f})")
    spread.set(xlabel="posterior std (normalised)", ylabel="density", title="On, between and beyond the demonstrations")
    spread.legend(fontsize=8)
    dims.boxplot([std[:, i] for i in range(std.shape[1])], showfliers=False)
    dims.set(xlabel="action dimension", ylabel="posterior std (normalised)", title="By action dimension, on the demonstrations")
    if title:
        figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def plot_calibration(calibration: Calibration, path: str | Path, title: str = "") -> None:
    """Draw how α was found as one PNG: likelihood of trajectories left out, coverage, probability integral transform, dimensions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    c = calibration
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    likelihood, coverage, pit, dims = figure.subplots(2, 2).ravel()
    alphas, values = np.array(c.curve).T
    likelihood.plot(alphas, values, lw=1.8)
    likelihood.axvspan(c.chunk.low, c.chunk.high, color="C0", alpha=0.15, label="90 % interval (trajectories resampled)")
    likelihood.axvline(c.posterior_weight, color="C3", lw=1.5, label=f"taken: {c.posterior_weight:.2f} ({c.source})")
    if c.safe is not None:
        likelihood.axvline(c.safe, color="C2", ls="--", lw=1.2, label=f"largest shown no worse than BC: {c.safe:.2f}")
    inside = values[alphas <= max(4.0, 1.5 * c.chunk.high)]
    likelihood.set(xlabel="posterior weight α", ylabel="log-likelihood (nats a number)", title="Trajectories left out",
                   xlim=(0, max(4.0, 1.5 * c.chunk.high)), ylim=(inside.min() - 0.02, inside.max() + 0.02))  # fmt: skip
    likelihood.legend(fontsize=8)
    coverage.plot((0, 1), (0, 1), color="0.7", lw=1)
    for row in c.coverage:
        coverage.plot(LEVELS, row.shares, "o-", lw=1.4, label=f"α = {row.alpha:.2f}")
    coverage.set(
        xlabel="ellipsoid of the whole chunk that should hold", ylabel="holds", title="Coverage", xlim=(0, 1), ylim=(0, 1)
    )
    coverage.legend(fontsize=8)
    pit.bar(np.arange(10) / 10 + 0.05, c.pit, width=0.095)
    pit.axhline(0.1, color="0.4", lw=1)
    pit.set(xlabel="probability integral transform", ylabel="share", title=f"Single numbers, α = {c.chunk.alpha:.2f}")
    middle = np.array([d.alpha for d in c.dimensions])
    ends = np.array([(d.low, d.high) for d in c.dimensions]).T
    dims.vlines(range(len(middle)), *ends, lw=1.6)
    dims.plot(range(len(middle)), middle, "o")
    dims.axhline(c.chunk.alpha, color="C3", lw=1.2, label="whole chunk")
    dims.set(xlabel="action dimension", ylabel="α", title="By action dimension, with 90 % intervals", ylim=(0, None))
    dims.legend(fontsize=8)
    if title:
        figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
