"""How far the closed form agrees with an ensemble, and α with it: `python -m benchmarks.check_closed_form FILE --seeds 0 1`.

FILE holds demonstrations of Lift (`postbc demos collect --output FILE --num 60 --operators better`), of which a seed takes some; sizes
of lift-laptop. Prints a Markdown table.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro

from postbc.data.training_set import TrainingSetConfig, load_training_set
from postbc.devices import Compute
from postbc.posterior import (
    EnsembleConfig,
    Factor,
    calibrate,
    fit_closed_form,
    fit_ensemble,
    state_features,
    window_features,
)

LEADING = 3
"""Directions of a state's covariance that are compared."""


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's, of all their numbers."""
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


def shared_directions(a: Factor, b: Factor) -> float:
    """Mean share of a's variance that lies in b's leading directions."""
    leading = torch.linalg.svd(b.rows, full_matrices=False).Vh[:, :LEADING]
    inside = (a.rows @ leading.transpose(1, 2)).square().sum((1, 2))
    return (inside / a.rows.square().sum((1, 2)).clamp(min=1e-12)).mean().item()


def main(path: tyro.conf.Positional[Path], seeds: tuple[int, ...] = (0, 1), members: int = 100, trajectories: int = 5) -> None:
    """Fit both on `trajectories` demonstrations of each seed, and a second ensemble of other members for comparison."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    compute = Compute(device="cpu", precision="auto")
    print("| seed | posterior | s | α [90 %] | mean std | α·std | √ mean variance | per state | per entry | 3 directions |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for seed in seeds:
        data = load_training_set(TrainingSetConfig(path, num_trajectories=trajectories), seed)
        features = window_features(data.windows, state_features(data.shapes, data.normalization))
        chunks = data.normalization.normalize_action(data.windows.chunk(torch.arange(len(data.windows))))
        episode = torch.as_tensor(data.windows.episode)
        config = EnsembleConfig(ensemble_size=members, hidden=256, steps=2000, batch_size=128, learning_rate=3e-4)
        reference: Factor | None = None
        for name in (f"K = {members}", "closed form", "K = 20, another seed"):
            begin, own = time.perf_counter(), seed + 1000 * (name.endswith("seed"))
            if name == "closed form":
                model = fit_closed_form(features, chunks, episode, config, None, seed, compute)
                name += f" (layer {model.choice.layer}, λ {model.choice.ridge:g})"
            else:
                size = 20 if own != seed else members
                model = fit_ensemble(features, chunks, episode, replace(config, ensemble_size=size), own, compute)
            seconds, factor = time.perf_counter() - begin, model.factor(features)
            reference = reference or factor
            chunk = calibrate(model.out_of_bag(features, chunks, episode, own)).chunk
            a, b = factor.std(), reference.std()
            print(
                f"| {seed} | {name} | {seconds:.0f} | {chunk.alpha:.2f} [{chunk.low:.2f}, {chunk.high:.2f}] | {a.mean():.3f} | "
                f"{chunk.alpha * a.mean():.3f} | {a.square().mean().sqrt():.3f} | "
                f"{correlation(a.mean(1), b.mean(1)):.2f} | {correlation(a, b):.2f} | "
                f"{shared_directions(factor, reference):.2f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
