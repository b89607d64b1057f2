"""Action-chunk windows: what a chunked policy is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from postbc.demonstrations.normalization import Normalization
from postbc.demonstrations.types import Demonstrations
from postbc.errors import InputError


@dataclass(frozen=True, eq=False)
class Windows:
    """N windows: an observation and the T actions from there on, normalised if a normalisation was given."""

    observations: np.ndarray
    """(N, S) float32."""
    chunks: np.ndarray
    """(N, T, A) float32."""
    trajectory: np.ndarray
    """(N,) int64 index of the window's trajectory within the demonstrations."""
    step: np.ndarray
    """(N,) int64 time step of the window's observation and first action."""

    def __len__(self) -> int:
        return len(self.step)


def chunk_windows(
    demonstrations: Demonstrations, chunk: int, *, tail: str = "drop", normalization: Normalization | None = None
) -> Windows:
    """Every window of ``chunk`` consecutive actions, trajectory after trajectory; no window crosses from one into another.

    Args:
        demonstrations: in raw units.
        chunk: T >= 1.
        tail: ``"drop"`` keeps only windows that fit, N_i - T + 1 a trajectory (DPPO's ``StitchedSequenceDataset``);
            ``"pad"`` starts a window at every step and repeats the trajectory's last action where it runs out.
        normalization: applied to observations and actions if given.

    Raises InputError when a trajectory is shorter than the chunk under ``"drop"`` (it would vanish without a word).
    """
    if tail not in ("drop", "pad"):
        raise InputError("Unknown tail rule.", key="tail", found=repr(tail), expected="'drop' or 'pad'")
    if chunk < 1:
        raise InputError("A chunk has at least one action.", key="chunk", found=chunk, expected=">= 1")
    observations, chunks, trajectories, steps = [], [], [], []
    for index, trajectory in enumerate(demonstrations):
        count = len(trajectory) - chunk + 1 if tail == "drop" else len(trajectory)
        if count < 1:
            raise InputError(
                "A trajectory is shorter than the action chunk.",
                file=demonstrations.source,
                key=trajectory.name,
                found=f"{len(trajectory)} steps",
                expected=f"at least {chunk}",
                remedy="choose a smaller chunk, the tail rule 'pad', or leave this trajectory out",
            )
        start = np.arange(count)
        within = np.minimum(start[:, None] + np.arange(chunk), len(trajectory) - 1)
        observations.append(trajectory.observations[:count])
        chunks.append(trajectory.actions[within])
        trajectories.append(np.full(count, index, dtype=np.int64))
        steps.append(start.astype(np.int64))
    x, a = np.concatenate(observations), np.concatenate(chunks)
    if normalization is not None:
        x, a = normalization.normalize_observation(x), normalization.normalize_action(a)
    return Windows(x, a, np.concatenate(trajectories), np.concatenate(steps))
