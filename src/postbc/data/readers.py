"""A dataset from a path, whatever its format: recognised by looking."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from postbc.data.episodes import Dataset
from postbc.data.folder import files_of, list_folder, read_folder
from postbc.data.libero import is_libero, list_libero, read_libero
from postbc.data.robomimic import PARTS, Listing, list_robomimic, read_robomimic
from postbc.data.zarr import is_zarr, list_zarr, read_zarr
from postbc.errors import require


def _is_zarr(path: str | Path) -> bool:
    """Whether it is zarr (else HDF5). InputError for a LeRobot dataset, which is neither."""
    require(not os.path.exists(Path(path) / "meta/info.json"), "LeRobot datasets are not read yet.", file=path, found="meta/info.json",
            expected="robomimic HDF5, or zarr as diffusion_policy writes it", remedy="convert it to one of them")  # fmt: skip
    return is_zarr(Path(path))


def list_dataset(path: str | Path) -> Listing:
    """Names of the episodes and filters, without reading an array."""
    if _is_zarr(path):
        return list_zarr(path)
    if files_of(path):
        return list_folder(path, list_dataset)
    return list_libero(path) if is_libero(path) else list_robomimic(path)


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
    files, or diffusion_policy's zarr (:func:`read_zarr`).

    The arguments are theirs. InputError names file and key for whatever cannot be used.
    """
    if not _is_zarr(path) and files_of(path):
        return read_folder(
            path, read_dataset, list_dataset, filter_key=filter_key, names=names, observation_keys=observation_keys,
            image_keys=image_keys, clip_actions=clip_actions, check_actions=check_actions, parts=parts, environment=environment,
        )  # fmt: skip
    if _is_zarr(path):
        return read_zarr(
            path, filter_key=filter_key, names=names, observation_keys=observation_keys, image_keys=image_keys, parts=parts,
            environment=environment,
        )  # fmt: skip
    read = read_libero if is_libero(path) else read_robomimic
    return read(
        path, filter_key=filter_key, names=names, observation_keys=observation_keys, image_keys=image_keys, clip_actions=clip_actions,
        check_actions=check_actions, parts=parts, environment=environment,
    )  # fmt: skip
