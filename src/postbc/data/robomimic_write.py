"""Writer of robomimic's HDF5 layout (see :mod:`postbc.data.robomimic` for the layout)."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np

from postbc.data.episodes import LOW_DIM_KEYS, Dataset, is_image
from postbc.data.lazy import SparseFrames
from postbc.errors import require
from postbc.files import atomic_path, write_bytes

#: Bytes of observations from which on a file is written piece by piece, not built in memory first.
LARGE = 2**30


def check_writable(path: Path) -> None:
    """InputError if a file of this name could not be made: it is a directory, or its directory cannot be made or written."""
    require(not path.is_dir(), "The output is a directory.", file=path, expected="a file name")
    above = next((parent for parent in path.absolute().parents if parent.exists()), None)
    require(above is not None and above.is_dir() and os.access(above, os.W_OK), "The file cannot be written.", file=path,
            found=f"{above} is not a directory that may be written", remedy="choose another place")  # fmt: skip


def write_robomimic(
    path: str | Path,
    dataset: Dataset,
    *,
    model_xml: str | Mapping[str, str] | None = None,
    attributes: Mapping[str, Mapping[str, float]] | None = None,
    next_observations: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write a robomimic file atomically (temporary file, fsync, rename; an existing file is replaced) and return its path.

    Args:
        path: destination; parent directories are made.
        dataset: written with `obs` split into its keys, so that reading gives the same arrays bit for bit; frames as (N, H, W, C), of
            `SparseFrames` those that were drawn, with the attribute `every`.
        model_xml: MJCF of the simulator model, one for all or one an episode name (attribute `model_file`).
        attributes: episode name -> name -> number, attributes of the episode's group.
        progress: called with the number of episodes that are done.
        next_observations: also write `next_obs`: the observation one step later, the last one repeated.

    The same dataset gives the same bytes. InputError when the file cannot be written (full disk, no permission).
    """
    path = Path(path)
    told = {"language"} if all(e.task is not None for e in dataset) else set()  # the task says it
    others = sorted({key for e in dataset for key in e.observations if key != "state" and not is_image(key)} - told)
    require(not others, "The layout has no place for these observations.", file=path, key=", ".join(others),
            expected="state, image.<camera>, and language of episodes whose task is known")  # fmt: skip
    check_writable(path)
    if sum(e.observations[key].nbytes for e in dataset for key in e.observations) > LARGE:
        with atomic_path(path) as whole:
            _write(whole, dataset, model_xml, attributes or {}, next_observations, progress)
        return path
    # Built in memory: HDF5's own writer answers a full disk with an unclosable file, a plain write with a clean error.
    buffer = io.BytesIO()
    _write(buffer, dataset, model_xml, attributes or {}, next_observations, progress)
    write_bytes(path, buffer.getbuffer())
    return path


def _write(
    target: Path | io.BytesIO, dataset: Dataset, model_xml: str | Mapping[str, str] | None,
    attributes: Mapping[str, Mapping[str, float]], next_observations: bool, progress: Callable[[int], object] | None,
) -> None:  # fmt: skip
    with h5py.File(target, "w", libver=("earliest", "v108")) as file:
        data = file.create_group("data")
        data.attrs["total"] = dataset.num_steps
        if dataset.environment:
            data.attrs["env_args"] = json.dumps(dict(dataset.environment))
        if dataset.state_keys != LOW_DIM_KEYS:
            data.attrs["state_keys"] = json.dumps(list(dataset.state_keys))
        if dataset.tasks:
            data.attrs["tasks"] = json.dumps(list(dataset.tasks))
        ends = np.cumsum(dataset.state_dims)
        for done, episode in enumerate(dataset, 1):
            group = data.create_group(episode.name)
            group.attrs["num_samples"] = len(episode)
            xml = model_xml.get(episode.name) if isinstance(model_xml, Mapping) else model_xml
            if xml is not None:
                group.attrs["model_file"] = xml
            if episode.operator is not None:
                group.attrs["operator"] = episode.operator
            if episode.task is not None:
                group.attrs["task"] = episode.task
            if episode.episode_seed is not None:
                group.attrs["episode_seed"] = episode.episode_seed
            group.attrs.update(attributes.get(episode.name, {}))
            group["actions"] = episode.actions
            if episode.rewards is not None:
                group["rewards"] = episode.rewards
            if episode.dones is not None:
                group["dones"] = episode.dones.astype(np.int64)  # robomimic's type for them
            if episode.states is not None:
                group["states"] = episode.states
            parts = {
                key: episode.state[:, end - width : end]
                for key, end, width in zip(dataset.state_keys, ends, dataset.state_dims)
            }
            every: dict[str, int] = {}
            for key, frames in episode.observations.items():
                if is_image(key):
                    name = f"{key.removeprefix('image.')}_image"
                    if isinstance(frames, SparseFrames) and not next_observations:  # the next steps' were not drawn
                        every[name] = frames.every
                        frames = frames.drawn
                    parts[name] = np.moveaxis(np.asarray(frames[:]), 1, -1)
            for key, values in parts.items():
                group[f"obs/{key}"] = values
                if every.get(key, 1) > 1:
                    group[f"obs/{key}"].attrs["every"] = every[key]
                if next_observations:
                    group[f"next_obs/{key}"] = np.concatenate([values[1:], values[-1:]])
            if progress is not None:
                progress(done)
        for key, names in dataset.filters.items():
            file[f"mask/{key}"] = np.array([name.encode() for name in names])
