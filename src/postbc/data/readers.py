"""A dataset from a path, whatever its format: recognised by looking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from postbc.data.episodes import Dataset
from postbc.data.robomimic import PARTS, Listing, list_robomimic, read_robomimic
from postbc.data.zarr import is_zarr, list_zarr, read_zarr


def list_dataset(path: str | Path) -> Listing:
    """Names of the episodes and filters, without reading an array."""
    return list_zarr(path) if is_zarr(Path(path)) else list_robomimic(path)


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
    """Read demonstrations or rollouts: robomimic's HDF5 (:func:`read_robomimic`) or diffusion_policy's zarr (:func:`read_zarr`).

    The arguments are theirs. InputError names file and key for whatever cannot be used.
    """
    if is_zarr(Path(path)):
        return read_zarr(
            path, filter_key=filter_key, names=names, observation_keys=observation_keys, image_keys=image_keys, parts=parts,
            environment=environment,
        )  # fmt: skip
    return read_robomimic(
        path, filter_key=filter_key, names=names, observation_keys=observation_keys, image_keys=image_keys, clip_actions=clip_actions,
        check_actions=check_actions, parts=parts, environment=environment,
    )  # fmt: skip
