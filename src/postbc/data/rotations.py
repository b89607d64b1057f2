"""Quaternions in a state. q and −q are one rotation, and simulators jump between them; rotation matrices have no jumps."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from postbc.data.episodes import Dataset

#: How far a quaternion's length may be from 1 (files hold float32, some robots' drivers less).
TOLERANCE = 1e-3


def find_quaternions(dataset: Dataset) -> tuple[int, ...]:
    """First columns of the state's quaternions: four numbers of a key, of length 1 at every step (or all 0: the object is not there).

    Numbers that are only ever 0 and ±1 are none: one-hot vectors have length 1, too. Of those that overlap the one is taken whose
    length is nearest to 1: beside a quaternion whose first or last number is always near 0 another number near 0 may stand.
    """
    columns = max(sum(dataset.state_dims) - 3, 0)
    off, seen, between = np.zeros(columns), np.zeros(columns, bool), np.zeros(columns + 3, bool)
    for episode in dataset if columns else ():
        squares = np.square(episode.state, dtype=np.float64)
        length = sum(squares[:, i : i + columns] for i in range(4))  # of the four numbers from each column on
        there = length > 0
        off = np.maximum(off, np.where(there, np.abs(length - 1), 0).max(0))
        seen |= there.any(0)
        between |= ~((squares == 0) | (squares == 1)).all(0)
    ends = np.cumsum(dataset.state_dims)
    inside = [first for end, width in zip(ends, dataset.state_dims) for first in range(end - width, end - 3)]
    fit = [first for first in inside if seen[first] and off[first] <= 2 * TOLERANCE and between[first : first + 4].any()]
    found: list[int] = []
    for first in sorted(fit, key=lambda first: (off[first], first)):
        if all(abs(first - other) >= 4 for other in found):
            found.append(int(first))
    return tuple(sorted(found))


def columns_of(quaternions: Iterable[int]) -> list[int]:
    """Of quaternions by their first columns, all four columns of each, one quaternion after another."""
    return [first + i for first in quaternions for i in range(4)]


def sign_jumps(dataset: Dataset, first: int) -> float:
    """Share of steps at which the quaternion in columns `first` to `first` + 3 changes its sign, not its rotation."""
    jumps = sum(
        int((np.einsum("ij,ij->i", q[1:], q[:-1]) < -0.5).sum()) for q in (e.state[:, first : first + 4] for e in dataset)
    )
    return jumps / max(dataset.num_steps - len(dataset), 1)


def rotation_6d(quaternions: Tensor) -> Tensor:
    """(..., 4) quaternions x, y, z, w -> (..., 6) two columns of their rotation matrices (Zhou et al. 2019); 0 -> identity."""
    x, y, z, w = (quaternions / quaternions.norm(dim=-1, keepdim=True).clamp(min=1e-6)).unbind(-1)
    one = 1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)
    two = 2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w)
    return torch.stack((*one, *two), -1)
