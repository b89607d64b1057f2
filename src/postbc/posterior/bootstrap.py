"""Line 3 of Algorithm 1: what each member of the ensemble is trained on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Resampling = Literal["trajectory", "pair", "none"]


def bootstrap_counts(trajectory: Tensor, members: int, by: Resampling, generator: torch.Generator) -> Tensor:
    """How often each window stands in each member's bootstrap sample.

    Args:
        trajectory: (N,) int64, the trajectory that each window comes from.
        members: K.
        by: "trajectory" draws as many trajectories as there are, with replacement, and all windows of each (Robomimic);
            "pair" draws N windows with replacement (LIBERO); "none" gives every member all windows once (for noised targets).
        generator: source of the draws.

    Returns:
        (K, N) int64 counts.
    """
    windows = len(trajectory)
    if by == "none":
        return torch.ones(members, windows, dtype=torch.int64)
    if by == "pair":
        return _counts(torch.randint(windows, (members, windows), generator=generator), windows)
    names, which = torch.unique(trajectory, return_inverse=True)
    drawn = _counts(torch.randint(len(names), (members, len(names)), generator=generator), len(names))
    return drawn[:, which]


def _counts(drawn: Tensor, classes: int) -> Tensor:
    return torch.zeros(len(drawn), classes, dtype=torch.int64).scatter_add_(1, drawn, torch.ones_like(drawn))


class BootstrapSampler:
    """Draws batches from K bootstrap samples at once.

    Drawing uniformly with replacement from a bootstrap sample is drawing window i with probability counts_i / Σ counts.

    Args:
        counts: (K, N) from :func:`bootstrap_counts`.
    """

    def __init__(self, counts: Tensor) -> None:
        copies = counts.sum(1)
        # row k lists member k's sample explicitly, window i `counts[k, i]` times: a draw is then one gather
        table = torch.zeros(len(counts), int(copies.max()), dtype=torch.int64)
        for member, row in enumerate(counts):
            table[member, : copies[member]] = torch.repeat_interleave(torch.arange(counts.shape[1]), row)
        self.table, self.copies = table, copies[:, None]

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """(K, B) int64 window indices."""
        uniform = torch.rand(len(self.table), batch, generator=generator, dtype=torch.float64)
        return self.table.gather(1, (uniform * self.copies).long())
