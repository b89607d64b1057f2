"""Demonstrations: types, robomimic files, action-chunk windows, normalisation, scripted operators."""

from postbc.demonstrations.chunks import Windows, chunk_windows
from postbc.demonstrations.normalization import Normalization, fit_normalization
from postbc.demonstrations.robomimic import read_robomimic, write_robomimic
from postbc.demonstrations.types import LOW_DIM_KEYS, Demonstrations, Trajectory

__all__ = [
    "LOW_DIM_KEYS",
    "Demonstrations",
    "Normalization",
    "Trajectory",
    "Windows",
    "chunk_windows",
    "fit_normalization",
    "read_robomimic",
    "write_robomimic",
]
