"""A dataset from a path, whatever its format: recognised by looking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from postbc.data.episodes import Dataset
from postbc.data.folder import files_of, list_folder, read_folder
from postbc.data.lerobot import describe_lerobot, list_lerobot, read_lerobot
from postbc.data.lerobot_files import LeRobotFolder, is_lerobot
from postbc.data.libero import CAMERAS, describe_libero, is_libero, list_libero, read_libero
from postbc.data.robomimic import PARTS, Listing, describe_robomimic, list_robomimic, read_robomimic, robomimic_cameras
from postbc.data.zarr import describe_zarr, is_zarr, list_zarr, read_zarr, zarr_cameras
from postbc.errors import require


class _Format(NamedTuple):
    list: Callable[[str | Path], Listing]
    cameras: Callable[[str | Path], tuple[str, ...]]
    describe: Callable[[str | Path], str]
    read: Callable[..., Dataset]


def _format(path: str | Path) -> _Format:
    """How a path is read, by looking at it; what is nothing else is robomimic's, whose reader says what is wrong."""
    if is_lerobot(path):
        return _Format(list_lerobot, lambda path: LeRobotFolder(path).cameras, describe_lerobot, read_lerobot)
    if is_zarr(Path(path)):
        return _Format(list_zarr, zarr_cameras, describe_zarr, read_zarr)
    if files_of(path):
        return _FOLDER
    if is_libero(path):
        return _Format(list_libero, lambda _: tuple(CAMERAS), describe_libero, read_libero)
    return _Format(list_robomimic, robomimic_cameras, describe_robomimic, read_robomimic)


def _describe_folder(path: str | Path) -> str:
    files = files_of(path)
    return f"a folder of {len(files)} files, the first of which, {files[0].name}, is: {describe(files[0])}"


def list_dataset(path: str | Path) -> Listing:
    """Names of the episodes and filters, without reading an array."""
    return _format(path).list(path)


def list_cameras(path: str | Path) -> tuple[str, ...]:
    """Image keys of a file, or of the first of a folder."""
    return _format(path).cameras(path)


def describe(path: str | Path) -> str:
    """What kind of file it is, and what in it is there to be used for what: some sentences."""
    return _format(path).describe(path)


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
    read, of_hdf5 = _format(path).read, {"clip_actions": clip_actions, "check_actions": check_actions}
    return read(
        path, filter_key=filter_key, names=names, observation_keys=observation_keys, image_keys=image_keys, parts=parts,
        environment=environment, **({} if read in (read_lerobot, read_zarr) else of_hdf5),
    )  # fmt: skip


_FOLDER = _Format(
    partial(list_folder, list_one=list_dataset), lambda path: list_cameras(files_of(path)[0]), _describe_folder,
    partial(read_folder, read_one=read_dataset, list_one=list_dataset),
)  # fmt: skip
