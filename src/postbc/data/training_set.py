"""From a file to what the posterior and the policies are trained on: subset, normalisation, windows; the same for every method."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from postbc.data.belonging import Facts, check_simulator
from postbc.data.episodes import LOW_DIM_KEYS, Dataset, choose, draw
from postbc.data.language import read_vectors, with_language
from postbc.data.normalization import Normalization, Rotations, fit_normalization
from postbc.data.readers import list_dataset, read_dataset
from postbc.data.robomimic import Listing
from postbc.data.rotations import columns_of, find_quaternions, sign_jumps
from postbc.data.windows import Windows
from postbc.errors import require
from postbc.progress import say
from postbc.schemas import Count, NonNegative, Seed, later, schema

#: A dimension whose values span less is called narrow; raw units (metres, quaternion components, commands).
NARROW = 1e-3
#: A quaternion whose sign changes at more than this share of the steps is said to jump (one jump in an episode is a turn beyond 180°).
JUMPS = 0.02


@schema
class TrainingSetConfig:
    """Which demonstrations, and how they become windows."""

    demonstrations: Path
    """Demonstrations: robomimic's or LIBERO's HDF5 (a file, or a folder of them), a LeRobotDataset v3 (a folder), or diffusion_policy's
    zarr (a folder or .zarr.zip)."""
    num_trajectories: Count | None = None
    """Random subset of this size (paper: 5 Lift, 10 Can, 30 Square), of several tasks equally many each; all by default."""
    subset_seed: Seed | None = None
    """Seed of the subset, the same for every seed; by default each seed's own, so that seeds differ in data too."""
    filter_key: str | None = None
    """Use only the demonstrations of this robomimic filter (mask/<filter_key>)."""
    chunk: Count = 4
    """T, actions in a chunk."""
    tail: Literal["drop", "pad", "mask"] = "drop"
    """Windows at the end of a demonstration: drop those that do not fit (DPPO), pad with the last action, or pad and leave the padding
    out of the loss (LeRobot)."""
    statistics: Literal["full", "subset"] = "full"
    """Normalise by the whole file's range (inherited from DPPO) or by the subset's (all that is known with 5 demonstrations)."""
    observation_steps: Count = 1
    """To, newest observations that the policy sees."""
    observation_keys: tuple[str, ...] | None = None
    """Observations that make the state, in this order; by default robomimic's four low-dimensional ones (zarr, LeRobot: their own)."""
    image_keys: tuple[str, ...] = ()
    """Cameras whose frames the policy sees, as the file names them (agentview_image); none by default."""
    language: Literal["one-hot"] | Path | None = later(None)
    """Tell the policy which of several tasks it is in: one-hot, or by the vectors of a safetensors file, one under each task's name,
    which the policy keeps. None: it is not told (states of libero/kitchen say it themselves)."""
    clip_actions: bool = False
    """Clip commands to the controller's [-1, 1], as robosuite did when it executed them; otherwise others are refused."""
    minimum_range: NonNegative = 0.0
    """Raw units: a dimension that is narrower in the data is normalised as if it were this wide. 0: DPPO's rule."""
    rotations: Rotations = later("as-recorded")
    """Quaternions of the state: as recorded (the paper's, robomimic's), or each as two columns of its rotation matrix (6d), which do
    not jump as quaternions' signs do."""
    allow_version_mismatch: bool = False
    """Train on demonstrations of another robosuite version than the installed one (success may be near 0 % without any error)."""


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """One seed's demonstrations."""

    dataset: Dataset
    """The subset, raw units."""
    normalization: Normalization
    """On the device."""
    windows: Windows
    facts: Facts
    vectors: torch.Tensor | None = None
    """(E, V) float32 what the policy reads in place of the one-hot "language"."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of one observation."""
        return self.dataset.shapes

    @property
    def fingerprint(self) -> str:
        """Identifies the normalised windows: a posterior is only used with those that it was fitted on."""
        values = json.dumps(self.normalization.to_dict(), sort_keys=True)
        return hashlib.sha256(f"{self.windows.fingerprint} {values}".encode()).hexdigest()[:16]


def load_training_set(
    config: TrainingSetConfig, seed: int, device: str | torch.device = "cpu", full: Dataset | None = None
) -> TrainingSet:
    """One seed's training set; what the configuration leaves out of the file is not read.

    Args:
        config: file, subset, windows.
        seed: of the run; draws the subset unless `subset_seed` does.
        device: of windows and normalisation.
        full: a dataset already in memory, instead of the file.

    Warns of dimensions that are constant, and of what is unknown about the simulator.

    Raises:
        InputError: whatever is wrong with the file, the filter or the numbers; data of another simulator version.
    """
    require(seed >= 0, "A seed is a non-negative integer.", key="seed", found=seed)
    listing, source = _listing(config, full)
    chosen = list(listing.names)
    if config.filter_key is not None:
        chosen = choose(listing.names, listing.filters, config.filter_key, source)
    if config.num_trajectories is not None:
        drawn = config.subset_seed if config.subset_seed is not None else seed
        chosen = draw(chosen, config.num_trajectories, drawn, source, listing.task_of)
    if full is None:
        full = read_dataset(
            config.demonstrations, names=None if config.statistics == "full" else chosen, parts=(),
            observation_keys=config.observation_keys, image_keys=config.image_keys, clip_actions=config.clip_actions,
        )  # fmt: skip
    if config.language is not None:
        full = with_language(full)
    vectors = None
    if isinstance(config.language, Path):
        told = read_vectors(config.language, full.tasks, sorted({str(episode.task) for episode in full}))
        vectors = torch.as_tensor(told, device=device)
    subset = full if len(chosen) == len(full) else full.keep(chosen)
    ranges = full if config.statistics == "full" else subset
    normalization = fit_normalization(subset, full, config.statistics, config.minimum_range, config.rotations).to(device)
    notes = (
        *check_simulator(full, config.allow_version_mismatch),
        *_narrow(ranges, config, normalization),
        *_jumps(ranges, config),
    )
    for message in notes:
        warnings.warn(message, UserWarning, stacklevel=2)
    if config.rotations == "6d":
        found = ", ".join(_quaternion_name(full, first) for first in normalization.quaternions)
        say(f"Read as rotations: {found or 'nothing, as no four numbers of the state are of length 1 throughout'}")
    windows = Windows(subset, config.chunk, tail=config.tail, observation_steps=config.observation_steps, device=device)
    return TrainingSet(subset, normalization, windows, Facts.of_dataset(subset), vectors)


def _listing(config: TrainingSetConfig, full: Dataset | None) -> tuple[Listing, str]:
    if full is not None:
        return Listing(full.names, dict(full.filters), full.task_of), full.source
    return list_dataset(config.demonstrations), str(config.demonstrations)


def dimension_names(dataset: Dataset) -> tuple[list[str], list[str]]:
    """Names of the S state and A action dimensions."""
    states = [f"{key}[{i}]" for key, width in zip(dataset.state_keys, dataset.state_dims) for i in range(width)]
    osc = ["x", "y", "z", "turn x", "turn y", "turn z", "gripper"]
    robosuite = dataset.action_dim == 7 and dataset.state_keys == LOW_DIM_KEYS
    return states, osc if robosuite else [f"action[{i}]" for i in range(dataset.action_dim)]


def narrow_dimensions(dataset: Dataset, least: float = NARROW, quaternions: Sequence[int] = ()) -> list[str]:
    """Names of the dimensions whose values span less than `least`; without those of quaternions that are read as rotations."""
    names = []
    left_out: tuple[list[int], list[int]] = columns_of(quaternions), []
    for values, words, rotated in zip((dataset.states, dataset.actions), dimension_names(dataset), left_out):
        names += [words[i] for i in np.flatnonzero(np.ptp(values, axis=0) < least).tolist() if i not in rotated]
    return names


def _quaternion_name(dataset: Dataset, first: int) -> str:
    names, _ = dimension_names(dataset)
    return f"{names[first]} to {names[first + 3]}"


def jumping_quaternions(dataset: Dataset, least: float = JUMPS) -> dict[str, float]:
    """Name -> share of steps at which its sign jumps, of the state's quaternions where that is more than `least`."""
    shares = {_quaternion_name(dataset, first): sign_jumps(dataset, first) for first in find_quaternions(dataset)}
    return {name: share for name, share in shares.items() if share > least}


def _jumps(dataset: Dataset, config: TrainingSetConfig) -> list[str]:
    jumping = {} if config.rotations == "6d" else jumping_quaternions(dataset)
    return [
        f"The quaternion {name} changes its sign at {share:.1%} of the steps, where the rotation does not change: hard to learn from. "
        "--data.rotations 6d reads rotations without signs."
        for name, share in jumping.items()
    ]


def _narrow(dataset: Dataset, config: TrainingSetConfig, normalization: Normalization) -> list[str]:
    names = [] if config.minimum_range >= NARROW else narrow_dimensions(dataset, quaternions=normalization.quaternions)
    if not names:
        return []
    return [
        f"Constant or nearly so in the data: {', '.join(names)}. Normalisation divides by their range, so that any other value met "
        "later becomes huge; --data.minimum-range (raw units) widens them."
    ]
