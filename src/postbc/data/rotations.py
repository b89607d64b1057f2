"""Quaternions in a state. q and −q are one rotation, and simulators jump between them; rotation matrices have no jumps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from postbc.data.episodes import Dataset

#: How far a quaternion's length may be from 1 (files hold float32, some robots' drivers less).
TOLERANCE = 1e-3


def find_quaternions(dataset: Dataset) -> tuple[int, ...]:
    """First columns of the state's quaternions: four numbers of length 1 at every step (or all 0: that object is not there).

    Numbers that are only ever 0 and ±1 are none: one-hot vectors have length 1, too.
    """
    columns = max(sum(dataset.state_dims) - 3, 0)
    unit, seen, between = np.ones(columns, bool), np.zeros(columns, bool), np.zeros(columns + 3, bool)
    for episode in dataset if columns else ():
        squares = np.square(episode.state, dtype=np.float64)
        length = sum(squares[:, i : i + columns] for i in range(4))  # of the four numbers from each column on
        there = length > 0
        unit &= ~(there & (np.abs(length - 1) > 2 * TOLERANCE)).any(0)
        seen |= there.any(0)
        between |= ~((squares == 0) | (squares == 1)).all(0)
    found: list[int] = []
    for first in np.flatnonzero(unit & seen).tolist():
        if between[first : first + 4].any() and (not found or first >= found[-1] + 4):
            found.append(first)
    return tuple(found)


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
