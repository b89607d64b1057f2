"""A dataset from a path, whatever its format: recognised by looking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from postbc.data.episodes import Dataset
from postbc.data.folder import files_of, list_folder, read_folder
from postbc.data.lerobot import describe_lerobot, list_lerobot, read_lerobot
from postbc.data.lerobot_files import LeRobotFolder, is_lerobot
from postbc.data.libero import CAMERAS, describe_libero, is_libero, list_libero, read_libero
from postbc.data.robomimic import PARTS, Listing, describe_robomimic, list_robomimic, read_robomimic, robomimic_cameras
from postbc.data.zarr import describe_zarr, is_zarr, list_zarr, read_zarr, zarr_cameras
from postbc.errors import require


def list_dataset(path: str | Path) -> Listing:
    """Names of the episodes and filters, without reading an array."""
    if is_lerobot(path) or is_zarr(Path(path)):
        return list_lerobot(path) if is_lerobot(path) else list_zarr(path)
    if files_of(path):
        return list_folder(path, list_dataset)
    return list_libero(path) if is_libero(path) else list_robomimic(path)


def list_cameras(path: str | Path) -> tuple[str, ...]:
    """Image keys of a file, or of the first of a folder."""
    if is_lerobot(path):
        return LeRobotFolder(path).cameras
    if is_zarr(Path(path)):
        return zarr_cameras(path)
    if files := files_of(path):
        return list_cameras(files[0])
    return tuple(CAMERAS) if is_libero(path) else robomimic_cameras(path)


def describe(path: str | Path) -> str:
    """What kind of file it is, and what in it is there to be used for what: some sentences."""
    if is_lerobot(path) or is_zarr(Path(path)):
        return describe_lerobot(path) if is_lerobot(path) else describe_zarr(path)
    if files := files_of(path):
        return f"a folder of {len(files)} files, the first of which, {files[0].name}, is: {describe(files[0])}"
    return describe_libero(path) if is_libero(path) else describe_robomimic(path)


def read_dataset(
    path: str | Path,
    *,
    filter_key: str | None = None,
    names: Iterable[str] | None = None,
    observation_keys: Sequence[str] | None = None,
    image_keys: Sequence[str] = (),
    clip_actions: bool = False,
    check_actions: bool = True,
    parts: Iterable[str] = PARTS,
    environment: Mapping[str, Any] | None = None,
) -> Dataset:
    """Read demonstrations or rollouts: robomimic's HDF5 (:func:`read_robomimic`), LIBERO's (:func:`read_libero`), a folder of such
    files, diffusion_policy's zarr (:func:`read_zarr`) or a LeRobotDataset v3 (:func:`read_lerobot`).

    The arguments are theirs. InputError names file and key for whatever cannot be used.
    """
    for what, keys in (("observation_keys", observation_keys or ()), ("image_keys", image_keys)):
        require(len(set(keys)) == len(keys), "An observation is named twice.", file=path, key=what, found=list(keys))
    if is_lerobot(path) or is_zarr(Path(path)):
        read = read_lerobot if is_lerobot(path) else read_zarr
        return read(
            path, filter_key=filter_key, names=names, observation_keys=observation_keys, image_keys=image_keys, parts=parts,
            environment=environment,
        )  # fmt: skip
    if files_of(path):
        return read_folder(
            path, read_dataset, list_dataset, filter_key=filter_key, names=names, observation_keys=observation_keys,
            image_keys=image_keys, clip_actions=clip_actions, check_actions=check_actions, parts=parts, environment=environment,
        )  # fmt: skip
    read = read_libero if is_libero(path) else read_robomimic
    return read(
        path, filter_key=filter_key, names=names, observation_keys=observation_keys, image_keys=image_keys, clip_actions=clip_actions,
        check_actions=check_actions, parts=parts, environment=environment,
    )  # fmt: skip
