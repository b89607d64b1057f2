"""From a file to what the posterior and the policies are trained on: subset, normalisation, windows; the same for every method."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from postbc.demonstrations.chunks import Windows, chunk_windows
from postbc.demonstrations.normalization import Normalization, fit_normalization
from postbc.demonstrations.robomimic import read_robomimic
from postbc.demonstrations.types import Demonstrations
from postbc.demonstrations.versions import check_simulator_version
from postbc.errors import InputError

ROBOSUITE = 1  # robomimic's EnvType.ROBOSUITE_TYPE


@dataclass(frozen=True)
class TrainingSetConfig:
    """Which demonstrations, and how they become windows."""

    demonstrations: Path
    """Demonstrations in robomimic's HDF5 layout."""
    num_trajectories: int | None = None
    """Random subset of this size (paper: 5 Lift, 10 Can, 30 Square); all by default."""
    subset_seed: int | None = None
    """Seed of the subset, the same for every member; by default each member's own seed, so that seeds differ in data too."""
    filter_key: str | None = None
    """Use only the trajectories of this robomimic filter (mask/<filter_key>)."""
    chunk: int = 4
    """T, actions in a chunk."""
    tail: Literal["drop", "pad"] = "drop"
    """Windows at the end of a trajectory: drop those that do not fit (DPPO), or pad with the last action."""
    statistics: Literal["full", "subset"] = "full"
    """Normalise by the whole file's range (inherited from DPPO) or by the subset's (all that is known with 5 demonstrations)."""
    allow_version_mismatch: bool = False
    """Train on demonstrations of another robosuite version than the installed one (success may be near 0 % without any error)."""


@dataclass(frozen=True)
class TrainingSet:
    """One seed's demonstrations.

    Attributes:
        demonstrations: the subset, raw units.
        normalization: its ranges.
        windows: its chunk windows, normalised.
    """

    demonstrations: Demonstrations
    normalization: Normalization
    windows: Windows

    @property
    def fingerprint(self) -> str:
        """Identifies the windows: a posterior is only used with those that it was fitted on."""
        digest = hashlib.sha256()
        for array in (self.windows.observations, self.windows.chunks):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array, dtype=np.float32).tobytes())
        return digest.hexdigest()[:16]


def load_training_sets(
    config: TrainingSetConfig, seeds: Sequence[int], full: Demonstrations | None = None
) -> list[TrainingSet]:
    """One training set a seed (shared where `subset_seed` is given).

    Args:
        config: file, subset, windows.
        seeds: of the members.
        full: demonstrations already in memory, instead of the file.

    Raises:
        InputError: whatever is wrong with the file, the filter or the numbers; repeated seeds; data of another simulator version.
    """
    if len(set(seeds)) != len(seeds) or not seeds or min(seeds) < 0:
        raise InputError(
            "Seeds must be distinct non-negative integers.", key="seeds", found=list(seeds), expected="for example 0 1 2 3 4"
        )
    full = full if full is not None else read_robomimic(config.demonstrations)
    simulated = full.environment.get("type") == ROBOSUITE and full.environment.get("env_version")
    if simulated and not config.allow_version_mismatch and importlib.util.find_spec("robosuite"):
        check_simulator_version(full.environment, source=full.source)
    chosen = full.select(config.filter_key) if config.filter_key else full

    def build(seed: int) -> TrainingSet:
        subset = chosen if config.num_trajectories is None else chosen.subset(config.num_trajectories, seed)
        normalization = fit_normalization(subset, full, config.statistics)
        return TrainingSet(
            subset, normalization, chunk_windows(subset, config.chunk, tail=config.tail, normalization=normalization)
        )

    if config.subset_seed is not None or config.num_trajectories is None:
        return [build(config.subset_seed or 0)] * len(seeds)
    return [build(seed) for seed in seeds]


def describe(config: TrainingSetConfig, sets: Sequence[TrainingSet]) -> dict[str, Any]:
    """What a policy's file says about its data: task, environment, number of demonstrations, the file's name."""
    environment = sets[0].demonstrations.environment
    return {
        "task": environment.get("env_name"),
        "environment": environment,
        "data": Path(config.demonstrations).name,
        "demonstrations": len(sets[0].demonstrations),
        "trajectories": [[t.name for t in s.demonstrations] for s in sets],
        "windows": [len(s.windows) for s in sets],
    }
