"""Quaternions in a state. q and −q are one rotation, and simulators jump between them; rotation matrices have no jumps."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from postbc.data.episodes import Dataset

#: How far a quaternion's length may be from 1 (files hold float32, some robots' drivers less).
TOLERANCE = 1e-3


def find_quaternions(states: NDArray[np.floating]) -> tuple[int, ...]:
    """(N, S) -> first columns of its quaternions: four numbers of length 1 at every step (or all 0: that object is not there).

    Numbers that are only ever 0 and ±1 are none: one-hot vectors have length 1, too.
    """
    squares = np.square(states, dtype=np.float64)
    found: list[int] = []
    for first in range(states.shape[1] - 3):
        if found and first < found[-1] + 4:
            continue
        length = squares[:, first : first + 4].sum(1)
        there = length > 0
        if not there.any() or np.abs(length[there] - 1).max() > 2 * TOLERANCE:
            continue
        if not np.isin(squares[:, first : first + 4], (0.0, 1.0)).all():
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
