"""Writer of robomimic's low-dimensional HDF5 layout (see :mod:`postbc.demonstrations.robomimic` for the layout)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from postbc.demonstrations.types import Demonstrations
from postbc.errors import InputError


def _atomic_write(path: Path, content: memoryview | bytes) -> None:
    """Write a file so that at every moment ``path`` is either the old one or the whole new one; InputError when the disk refuses."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes it private
        os.replace(temporary, path)
        temporary = None
        directory = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise InputError(
            "The file cannot be written.",
            file=path,
            found=error.strerror or str(error),
            expected=f"a writable directory with {len(content):,} bytes free",
            remedy="free space or choose another place; what was there before is untouched",
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def check_writable(path: Path) -> None:
    """InputError if a file of this name could not be made: it is a directory, or its directory cannot be made or written."""
    if path.is_dir():
        raise InputError("The output is a directory.", file=path, expected="a file name ending in .hdf5")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(
            "The file cannot be written.",
            file=path,
            found=f"{above} is not a directory that may be written",
            remedy="choose another place",
        )


def write_robomimic(
    path: str | Path,
    demonstrations: Demonstrations,
    *,
    model_xml: str | Mapping[str, str] | None = None,
    next_observations: bool = False,
) -> Path:
    """Write a robomimic file atomically (temporary file, fsync, rename; an existing file is replaced) and return its path.

    Args:
        path: destination; parent directories are made.
        demonstrations: written with ``obs`` split into its keys, so that reading gives the same arrays bit for bit.
        model_xml: MJCF of the simulator model, one for all or one a trajectory name (attribute ``model_file``).
        next_observations: also write ``next_obs``: the observation one step later, the last one repeated.

    The same demonstrations give the same bytes. InputError when the file cannot be written (full disk, no permission).
    """
    path = Path(path)
    check_writable(path)
    # Built in memory first: HDF5's own writer answers a full disk with an unclosable file, a plain write with a clean error.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("earliest", "v108")) as file:
        data = file.create_group("data")
        data.attrs["total"] = demonstrations.num_steps
        data.attrs["env_args"] = json.dumps(demonstrations.environment)
        ends = np.cumsum(demonstrations.observation_dims)
        for trajectory in demonstrations:
            group = data.create_group(trajectory.name)
            group.attrs["num_samples"] = len(trajectory)
            xml = model_xml.get(trajectory.name) if isinstance(model_xml, Mapping) else model_xml
            if xml is not None:
                group.attrs["model_file"] = xml
            if trajectory.operator is not None:
                group.attrs["operator"] = trajectory.operator
            if trajectory.episode_seed is not None:
                group.attrs["episode_seed"] = trajectory.episode_seed
            group["actions"] = trajectory.actions
            group["rewards"] = trajectory.rewards
            group["dones"] = trajectory.dones.astype(np.int64)  # robomimic's type for them
            if trajectory.states is not None:
                group["states"] = trajectory.states
            for key, end, width in zip(demonstrations.observation_keys, ends, demonstrations.observation_dims):
                values = trajectory.observations[:, end - width : end]
                group[f"obs/{key}"] = values
                if next_observations:
                    group[f"next_obs/{key}"] = np.concatenate([values[1:], values[-1:]])
        for key, names in demonstrations.filters.items():
            file[f"mask/{key}"] = np.array([name.encode() for name in names])
    _atomic_write(path, buffer.getbuffer())
    return path
