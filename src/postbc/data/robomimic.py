"""Reader of robomimic's low-dimensional HDF5 layout with h5py alone (robomimic itself is not needed).

::

    data            attrs: total, env_args (JSON: env_name, env_version, type, env_kwargs)
    data/demo_i     attrs: num_samples, model_file (MJCF), operator, episode_seed (these two ours, optional)
      actions (N, A)  rewards (N,)  dones (N,)  states (N, Ds)  obs/<key> (N, d)  next_obs/<key> (N, d)
    mask/<filter>   names of demonstrations
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from postbc.demonstrations.robomimic_write import write_robomimic
from postbc.demonstrations.types import LOW_DIM_KEYS, Demonstrations, Trajectory
from postbc.errors import InputError

__all__ = ["expected_action_dim", "read_robomimic", "write_robomimic"]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    expected = "a robomimic HDF5 file"
    if not path.exists():
        raise InputError(
            "There is no such demonstration file.",
            file=path,
            expected=expected,
            remedy="`postbc demos collect` or `demos download` makes one",
        )
    if path.is_dir():
        raise InputError(
            "The demonstrations are a directory, not a file.", file=path, expected=expected, remedy="name the file inside it"
        )
    try:
        file = h5py.File(path, "r")
    except PermissionError as error:
        raise InputError("The demonstration file may not be read.", file=path, found=error.strerror) from error
    except OSError as error:
        with path.open("rb") as raw:
            head = raw.read(8)
        signed = head == b"\x89HDF\r\n\x1a\n"
        raise InputError(
            "The demonstration file is truncated or damaged." if signed else "The demonstration file is not HDF5.",
            file=path,
            found=str(error) if signed else f"{path.stat().st_size} bytes that begin with {head!r}",
            expected=expected,
            remedy="copy or download it again" if signed else "name a robomimic .hdf5 file",
        ) from error
    try:
        yield file
    except InputError:
        raise
    except (OSError, RuntimeError) as error:  # h5py's words for a block that cannot be read
        raise InputError(
            "The demonstration file is damaged.", file=path, found=str(error), remedy="copy or download it again"
        ) from error
    finally:
        file.close()


def _get(group: h5py.Group, key: str, kind: type, path: Path) -> Any:
    """``group[key]`` of the given kind, or an InputError that lists what is there."""
    item = group.get(key)
    if not isinstance(item, kind):
        word = "group" if kind is h5py.Group else "dataset"
        raise InputError(
            f"The file lacks a {word}." if item is None else f"The file has something else in place of a {word}.",
            file=path,
            key=f"{group.name}/{key}".replace("//", "/").lstrip("/"),
            found=f"{group.name} holds {sorted(group)[:12]}",
            expected="robomimic's layout: data/demo_i/{obs/<key>, actions, rewards, dones, states}, mask/<filter>",
            remedy="convert the file with robomimic's dataset_states_to_obs.py if it has states only",
        )
    return item


def _values(group: h5py.Group, key: str, path: Path, demo: str) -> np.ndarray:
    dataset = _get(group, key, h5py.Dataset, path)
    if not (np.issubdtype(dataset.dtype, np.number) or dataset.dtype == bool):
        raise InputError(
            "The dataset does not hold numbers.", file=path, key=dataset.name.lstrip("/"), found=str(dataset.dtype)
        )
    try:
        return np.asarray(dataset[()])
    except (OSError, RuntimeError) as error:
        raise InputError(
            "A dataset cannot be read.",
            file=path,
            key=f"data/{demo}/{key}",
            found=str(error),
            remedy="copy or download the file again",
        ) from error


def _environment(data: h5py.Group, path: Path) -> dict[str, Any]:
    if "env_args" not in data.attrs:
        raise InputError(
            "The file does not say which environment it was recorded in.",
            file=path,
            key="data attribute env_args",
            found=f"attributes {sorted(data.attrs)}",
            expected="JSON with env_name, env_version, type, env_kwargs",
            remedy="add it, or read the file from Python with read_robomimic(path, environment={...}), {} for a real robot",
        )
    try:
        environment = json.loads(data.attrs["env_args"])
        if not isinstance(environment, dict):
            raise TypeError(f"a JSON {type(environment).__name__}")
    except (ValueError, TypeError) as error:
        raise InputError(
            "The environment's description is not a JSON object.", file=path, key="data attribute env_args", found=str(error)
        ) from error
    return environment


def expected_action_dim(environment: Mapping[str, Any]) -> int | None:
    """7 a robot for OSC_POSE with a gripper (x y z, axis-angle, gripper) if ``env_args`` says so; None when it cannot be told."""
    kwargs = environment.get("env_kwargs") or {}
    controller = kwargs.get("controller_configs") or {}
    if not isinstance(controller, Mapping):
        return None
    parts = controller.get("body_parts") or {}  # robosuite 1.5: a composite controller with one part an arm
    types = {controller.get("type")} | {part.get("type") for part in parts.values() if isinstance(part, Mapping)}
    robots = kwargs.get("robots") or []
    return 7 * (1 if isinstance(robots, str) else len(robots)) or None if "OSC_POSE" in types else None


def _masks(file: h5py.File) -> dict[str, tuple[str, ...]]:
    masks: dict[str, tuple[str, ...]] = {}
    if isinstance(file.get("mask"), h5py.Group):
        for key, names in file["mask"].items():
            masks[key] = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(names).ravel())
    return masks


def _check_actions(actions: np.ndarray, demo: str, width: int | None, bounds: tuple[float, float] | None, path: Path) -> None:
    if width is not None and actions.ndim == 2 and actions.shape[1] != width:
        raise InputError(
            "The actions have the wrong width.",
            file=path,
            key=f"data/{demo}/actions",
            found=f"shape {actions.shape}",
            expected=f"(N, {width}) for this robot and controller",
            remedy="use data of an OSC_POSE controller (x y z, axis-angle, gripper)",
        )
    if bounds is None or not np.isfinite(actions).all():  # Trajectory says what is not finite
        return
    outside = (actions < bounds[0]) | (actions > bounds[1])
    if outside.any():
        dimensions = sorted(set(np.argwhere(outside)[:, -1].tolist()))
        worst = actions[outside][np.argmax(np.abs(actions[outside]))]
        raise InputError(
            "Actions lie outside the controller's range.",
            file=path,
            key=f"data/{demo}/actions",
            found=f"{int(outside.sum())} of {actions.size} values in dimensions {dimensions}, the farthest {worst:.4g}",
            expected=f"[{bounds[0]:g}, {bounds[1]:g}]",
            remedy="rescale, or clip them if the controller clipped them while recording (robosuite does)",
        )


def read_robomimic(
    path: str | Path,
    *,
    filter_key: str | None = None,
    observation_keys: Sequence[str] | None = None,
    action_range: tuple[float, float] | None = (-1.0, 1.0),
    action_dim: int | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Demonstrations:
    """Read a robomimic file; demonstrations are ordered by their number, observation keys concatenated in the order given.

    Args:
        path: HDF5 file.
        filter_key: read only ``mask/<filter_key>``.
        observation_keys: datasets under ``obs``; default robomimic's four low-dimensional ones, :data:`LOW_DIM_KEYS`.
        action_range: accepted raw actions, None to accept any.
        action_dim: A that is expected; default what ``env_args`` implies (7 a robot under OSC_POSE), else unchecked.
        environment: stands in for ``env_args`` in a file without one.

    ``operator`` is the demonstration's attribute of that name, or else the name of a filter with "operator" in it that lists the
    demonstration (the official multi-human files name their six people so). InputError names file and key for whatever cannot be used.
    """
    path = Path(path)
    keys = tuple(LOW_DIM_KEYS if observation_keys is None else observation_keys)
    with _open(path) as file:
        data = _get(file, "data", h5py.Group, path)
        args = _environment(data, path) if environment is None or "env_args" in data.attrs else dict(environment)
        masks = _masks(file)
        demos = [name for name in data if isinstance(data[name], h5py.Group)]
        if not demos:
            raise InputError(
                "The file holds no demonstrations.", file=path, key="data", found="no groups", expected="data/demo_0, …"
            )
        demos.sort(key=lambda name: (int(name.rpartition("_")[2]) if name.rpartition("_")[2].isdecimal() else 1 << 62, name))
        for key, names in masks.items():
            for name in names:
                if name not in data:
                    raise InputError(
                        "A filter names a demonstration that is not there.",
                        file=path,
                        key=f"mask/{key}",
                        found=repr(name),
                        expected=f"one of the {len(demos)} demonstrations, {demos[0]} to {demos[-1]}",
                        remedy="remove the name from the mask, or restore the demonstration",
                    )
        wanted = demos if filter_key is None else [name for name in demos if name in set(masks.get(filter_key, ()))]
        width = expected_action_dim(args) if action_dim is None else action_dim
        dims: tuple[int, ...] = ()
        trajectories = []
        for name in wanted or demos[:1]:  # an unknown or empty filter is reported by select() below, with what there is
            group = data[name]
            actions = _values(group, "actions", path, name)
            _check_actions(actions, name, width, action_range, path)
            obs = _get(group, "obs", h5py.Group, path)
            parts = [_values(obs, key, path, name) for key in keys]
            for key, part in zip(keys, parts):
                if part.ndim != 2 or len(part) != len(actions):
                    raise InputError(
                        "An observation does not have one row of numbers a step.",
                        file=path,
                        key=f"data/{name}/obs/{key}",
                        found=f"shape {part.shape}",
                        expected=f"({len(actions)}, d), as many rows as actions",
                        remedy="choose low-dimensional observation keys; drop the demonstration if its arrays disagree",
                    )
            dims = dims or tuple(part.shape[1] for part in parts)
            for key, part, dim in zip(keys, parts, dims):
                if part.shape[1] != dim:
                    raise InputError(
                        "Demonstrations differ in the width of an observation.",
                        file=path,
                        key=f"data/{name}/obs/{key}",
                        found=f"width {part.shape[1]}",
                        expected=f"width {dim}, as in {wanted[0]}",
                    )
            operator = group.attrs.get("operator") or next(
                (key for key, who in masks.items() if "operator" in key and name in who), None
            )
            rewards, dones = _values(group, "rewards", path, name), _values(group, "dones", path, name)
            states = _values(group, "states", path, name) if "states" in group else None
            seed = group.attrs.get("episode_seed")
            try:
                trajectories.append(
                    Trajectory(
                        observations=np.concatenate(parts, axis=1),
                        actions=actions,
                        rewards=rewards,
                        dones=dones,
                        states=states,
                        name=name,
                        operator=None if operator is None else str(operator),
                        episode_seed=None if seed is None else int(seed),
                    )
                )
            except InputError as error:
                raise InputError(f"{error}\n  file: {path}") from error
        read = {trajectory.name for trajectory in trajectories}
        filters = {key: tuple(name for name in names if name in read) for key, names in masks.items()}
        filters = {key: names for key, names in filters.items() if names or not masks[key] or key == filter_key}
    demonstrations = Demonstrations(tuple(trajectories), keys, dims, args, filters, str(path))
    return demonstrations if filter_key is None else demonstrations.select(filter_key)
