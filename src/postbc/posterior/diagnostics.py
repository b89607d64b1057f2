"""Pictures of the posterior: where it is uncertain along each demonstration, between and beyond them; and what is seen there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postbc.data.episodes import is_image
from postbc.data.training_set import TrainingSet
from postbc.files import atomic_path
from postbc.posterior.calibration import LEVELS, Calibration
from postbc.posterior.features import Encode, window_features
from postbc.posterior.saved import Posterior
from postbc.posterior.seeing import SeeingEnsemble


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


def spreads(posterior: Posterior, data: TrainingSet, encode: Encode | None) -> dict[str, Tensor]:
    """Posterior std (n, D), normalised units: "on" every window, and of features "between" and "beyond" them.

    Half way between what two images show is no image, so there is nothing off the demonstrations for members that see.
    """
    if encode is None or isinstance(posterior.model, SeeingEnsemble):
        return {"on": posterior.of_windows(data.windows).std()}
    features = window_features(data.windows, encode)
    off = between_and_beyond(features, data.windows.episode, np.random.default_rng(0))
    return {name: posterior.factor(values).std() for name, values in {"on": features, **off}.items()}


def summarise(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Mean, median and largest posterior std (all dimensions of the chunk) of each of :func:`spreads`."""
    return {
        name: {"mean": std.mean().item(), "median": std.median().item(), "maximum": std.max().item()}
        for name, std in found.items()
    }


def plot(found: Mapping[str, Tensor], data: TrainingSet, path: str | Path, title: str = "") -> None:
    """Draw :func:`spreads` as one PNG: std of the chunk's first action along each demonstration, where it is, its distribution."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    w = data.windows
    stds = {name: std[:, : w.action_dim].cpu().numpy() for name, std in found.items()}
    std = stds["on"]
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
    where, words = np.stack([w.step, w.episode], 1), ("step of the demonstration", "demonstration")
    if w.shapes.get("state", (0,))[0]:
        state = np.concatenate([e.state for e in data.dataset])[w.rows]
        where, words = state[:, [0, min(2, state.shape[1] - 1)]], (
            "first dimension of the state (end effector x, m)", "third (end effector z, m)",
        )  # fmt: skip
    points = paths.scatter(where[:, 0], where[:, 1], c=level, s=9, cmap="viridis")
    paths.set(xlabel=words[0], ylabel=words[1], title="Where it is uncertain")
    figure.colorbar(points, ax=paths, label="posterior std")
    values = {name: of.mean(1) for name, of in stds.items()}
    bins = np.linspace(0, max(v.max() for v in values.values()) + 1e-9, 40).tolist()
    for name, v in values.items():
        words_of = f"{name} {'the demonstrations' if name == 'on' else 'them'} (mean {v.mean():.2f})"
        spread.hist(v, bins, histtype="step", lw=1.8, density=True, label=words_of)
    spread.set(
        xlabel="posterior std (normalised)", ylabel="density", title=", ".join(values).capitalize() + " the demonstrations"
    )
    spread.legend(fontsize=8)
    dims.boxplot([std[:, i] for i in range(std.shape[1])], showfliers=False)
    dims.set(xlabel="action dimension", ylabel="posterior std (normalised)", title="By action dimension, on the demonstrations")
    if title:
        figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def extremes(
    level: np.ndarray, episode: np.ndarray, step: np.ndarray, count: int, apart: int = 10
) -> tuple[list[int], list[int]]:
    """Windows of the lowest and of the highest `level` (N,), up to `count` each, `apart` steps from one another."""

    def first(order: np.ndarray) -> list[int]:
        chosen: list[int] = []
        for n in order.tolist():
            if all(episode[n] != episode[m] or abs(step[n] - step[m]) >= apart for m in chosen):
                chosen.append(n)
            if len(chosen) == count:
                break
        return chosen

    order = np.argsort(level, kind="stable")
    return first(order), first(order[::-1])


def plot_frames(std: Tensor, data: TrainingSet, path: str | Path, title: str = "", count: int = 4) -> None:
    """What the cameras saw where the posterior std (N, D) of the chunk's first action is lowest and highest, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    w = data.windows
    level = std[:, : w.action_dim].mean(1).cpu().numpy()
    low, high = extremes(level, w.episode, w.step, count)
    chosen = low + high[::-1]
    observed = w.observation(torch.as_tensor(chosen))
    cameras = [name for name in w.shapes if is_image(name)]
    figure = Figure(figsize=(1.5 * len(chosen), 0.8 + 1.6 * len(cameras)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cameras), len(chosen), squeeze=False)
    for row, camera in zip(axes, cameras):
        frames = observed[camera].cpu().numpy()
        frames = frames[:, -1] if frames.ndim == 5 else frames  # the newest
        for ax, frame, n in zip(row, frames, chosen):
            picture = np.moveaxis(frame, 0, -1)
            ax.imshow(picture[..., :3] if picture.shape[-1] >= 3 else picture[..., 0], cmap="gray")
            ax.set(xticks=[], yticks=[])
            if ax in axes[0]:
                name = data.dataset[int(w.episode[n])].name.replace("$", r"\$")
                ax.set_title(f"std {level[n]:.3f}\n{name}, step {w.step[n]}", fontsize=7)
        row[0].set_ylabel(camera.removeprefix("image."), fontsize=8)
    figure.suptitle(title or "Least and most uncertain frames", fontsize=9)
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
    likelihood.axvspan(c.chunk.low, c.chunk.high, color="C0", alpha=0.15, label="90 % interval")
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
