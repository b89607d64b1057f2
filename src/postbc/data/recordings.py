"""Raw recordings: simulator states and actions without observations, as robosuite's own collection script writes them.

::

    data         attrs: env, env_info (JSON: env_name, robots, controller_configs), repository_version; or robomimic's env_args
    data/demo_i  attrs: model_file   states (N, Ds)  actions (N, A)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from postbc.data.belonging import ROBOSUITE
from postbc.data.episodes import check_filters
from postbc.data.hdf5 import attribute, get, json_attribute, members, open_hdf5, read
from postbc.data.robomimic import find_masks, find_names
from postbc.errors import require


@dataclass(frozen=True)
class Recording:
    """A file of recordings, its arrays unread."""

    path: Path
    names: tuple[str, ...]
    environment: dict[str, Any]
    """As robomimic's `env_args`."""
    filters: dict[str, tuple[str, ...]]

    def read(self, done: frozenset[str] = frozenset()) -> Iterator[tuple[str, np.ndarray, np.ndarray, str | None]]:
        """Name, states (N, Ds) float64, actions (N, A) float64 and operator of each episode that is not `done`."""
        with open_hdf5(self.path) as file:
            for name in self.names:
                if name in done:
                    continue
                group = get(get(file, "data", h5py.Group, self.path), name, h5py.Group, self.path)
                states = read(group, "states", self.path, ndim=2).astype(np.float64)
                actions = read(group, "actions", self.path, rows=len(states), ndim=2).astype(np.float64)
                operator = attribute(group, "operator", self.path)
                yield name, states, actions, None if operator is None else str(operator)


def open_recording(path: str | Path) -> Recording:
    """Names and environment of a recording.

    Raises:
        InputError: it does not say which environment it is of, or has no states.
    """
    path = Path(path)
    with open_hdf5(path) as file:
        data = get(file, "data", h5py.Group, path)
        names, masks = find_names(data, path), find_masks(file, path)
        check_filters(masks, names, str(path))
        for name in names:
            group = get(data, name, h5py.Group, path)
            require("states" in group, "A recording without simulator states cannot be played back.", file=path,
                    key=f"data/{name}/states", found=f"data/{name} holds {members(group)[:12]}")  # fmt: skip
        environment = json_attribute(data, "env_args", path)
        if environment is None:
            info = json_attribute(data, "env_info", path)
            require(info is not None, "The recording does not say which environment it is of.", file=path,
                    key="data attribute env_info", found=f"attributes {sorted(map(str, data.attrs))}",
                    expected="robosuite's env_info, or robomimic's env_args")  # fmt: skip
            kwargs = {key: value for key, value in (info or {}).items() if key != "env_name"}
            environment = {
                "env_name": (info or {}).get("env_name", attribute(data, "env", path)),
                "env_version": attribute(data, "repository_version", path), "type": ROBOSUITE, "env_kwargs": kwargs,
            }  # fmt: skip
    return Recording(path, names, environment, masks)
