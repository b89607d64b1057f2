"""Reader of robomimic's HDF5 layout with h5py alone: it reads what is asked for, and looks before it reads.

::

    data            attrs: total, env_args (JSON: env_name, env_version, type, env_kwargs), state_keys, tasks (ours, JSON, optional)
    data/demo_i     attrs: num_samples, model_file (MJCF), operator, episode_seed, task (these three ours, optional)
      actions (N, A)  rewards (N,)  dones (N,)  states (N, Ds)  obs/<key> (N, d)  obs/<camera>_image (N, H, W, C)  next_obs/<key>
                  (ours, attribute every = k of a camera: only every k-th step's frame, the first included)
    mask/<filter>   names of demonstrations

rewards, dones, states and masks may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from postbc.data.belonging import ROBOSUITE, controller_of
from postbc.data.episodes import LOW_DIM_KEYS, Dataset, Episode, check_filters, choose
from postbc.data.hdf5 import attribute, check_dataset, get, get_group, heap_checked, json_attribute, members, open_hdf5, read
from postbc.data.lazy import LazyArray, SparseFrames
from postbc.data.robomimic_write import write_robomimic
from postbc.errors import InputError, require

__all__ = ["Listing", "action_bounds", "expected_action_dim", "list_robomimic", "read_robomimic", "write_robomimic"]

PARTS = ("rewards", "dones", "states")
CONVERT = "`postbc demos convert FILE --output NEW.hdf5` plays its states back in the simulator and writes the observations"
KEYS = "name the ones to use: --data.observation-keys KEY … (demos inspect: --observation-keys)"


@dataclass(frozen=True)
class Listing:
    """What a file holds, found without reading any of its arrays."""

    names: tuple[str, ...]
    """Demonstrations, ordered by their number."""
    filters: dict[str, tuple[str, ...]]
    task_of: dict[str, str] = field(default_factory=dict)
    """Demonstration -> its task, where the file says so."""


def _order(name: str) -> tuple[int, str]:
    number = name.rpartition("_")[2]
    return (int(number) if number.isdecimal() and len(number) < 19 else 1 << 62, name)


def _is_group(data: h5py.Group, name: str) -> bool:
    try:
        return bool(h5py.h5o.get_info(data.id, name.encode()).type == h5py.h5o.TYPE_GROUP)
    except (KeyError, RuntimeError):
        return True  # a broken link: said when it is asked for


def find_names(data: h5py.Group, path: Path) -> tuple[str, ...]:
    try:
        names = sorted((name for name in data if isinstance(name, str) and _is_group(data, name)), key=_order)
    except (KeyError, OSError, RuntimeError) as error:
        raise InputError("The demonstrations cannot be listed.", file=path, key="data", found=str(error)[:300],
                         remedy="copy or download the file again") from None  # fmt: skip
    require(names, "The file holds no demonstrations.", file=path, key="data", found="no groups", expected="data/demo_0, …")
    return tuple(names)


def find_masks(file: h5py.File, path: Path) -> dict[str, tuple[str, ...]]:
    masks: dict[str, tuple[str, ...]] = {}
    if "mask" not in file:
        return masks
    group = get(file, "mask", h5py.Group, path)
    for key in group:
        dataset = get(group, key, h5py.Dataset, path)
        kind = dataset.dtype
        text = kind.kind == "S" or h5py.check_string_dtype(kind) is not None
        require(dataset.shape is not None and (text or dataset.size == 0), "A filter does not hold names.", file=path,
                key=f"mask/{key}", found=str(kind), expected="names of demonstrations")  # fmt: skip
        require(dataset.size <= 10**8 and dataset.id.get_create_plist().get_external_count() == 0 and not dataset.is_virtual,
                "A filter cannot be read.", file=path, key=f"mask/{key}", found=f"shape {dataset.shape}")  # fmt: skip
        with heap_checked(dataset) as checked:
            values = checked[()] if dataset.size else np.array([])
        masks[key] = tuple(
            name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in np.asarray(values).ravel()
        )
    return masks


def find_wanted(
    found: Sequence[str], masks: Mapping[str, tuple[str, ...]], filter_key: str | None, names: Iterable[str] | None, path: Path
) -> list[str]:
    """Those of a file's demonstrations that are in a filter and have one of the names, in the file's order. InputError for none."""
    wanted = list(found) if filter_key is None else choose(found, masks, filter_key, str(path))
    if names is not None:
        asked = set(names)
        unknown = sorted(asked - set(found))
        require(not unknown, "There is no such demonstration.", file=path, key="names", found=unknown[:5])
        wanted = [name for name in wanted if name in asked]
    require(wanted, "There are no episodes.", file=path, found=0, expected="at least 1")
    return wanted


def list_robomimic(path: str | Path) -> Listing:
    """Names and filters of a file. InputError if it cannot be used."""
    path = Path(path)
    with open_hdf5(path) as file:
        data = get(file, "data", h5py.Group, path)
        names, task_of = find_names(data, path), {}
        if "tasks" in data.attrs:
            told = {name: attribute(get_group(data, name, path), "task", path) for name in names}
            task_of = {name: str(task) for name, task in told.items() if task is not None}
        return Listing(names, find_masks(file, path), task_of)


def _observed(data: h5py.Group, name: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a demonstration observes."""
    group = get(data, name, h5py.Group, path)
    obs = get(group, "obs", h5py.Group, path) if "obs" in group else {}
    return {key: obs[key].shape or () for key in members(obs) if isinstance(obs.get(key), h5py.Dataset)}


def robomimic_cameras(path: str | Path) -> tuple[str, ...]:
    """Observations that are frames."""
    path = Path(path)
    with open_hdf5(path) as file:
        data = get(file, "data", h5py.Group, path)
        observed = _observed(data, find_names(data, path)[0], path)
    return tuple(key for key, shape in observed.items() if len(shape) == 4)


def describe_robomimic(path: str | Path) -> str:
    """What of the file is there to be used for what."""
    path = Path(path)
    with open_hdf5(path) as file:
        data = get(file, "data", h5py.Group, path)
        name = find_names(data, path)[0]
        observed, group = _observed(data, name, path), get(data, name, h5py.Group, path)
        there = ", ".join(part for part in PARTS if part in group)
    numbers = ", ".join(key for key, shape in observed.items() if len(shape) != 4)
    cameras = ", ".join(key for key, shape in observed.items() if len(shape) == 4)
    return (
        f"robomimic HDF5; observations: {numbers or 'none'}; cameras: {cameras or 'none'}; beside actions: {there or 'nothing'}"
    )


def expected_action_dim(environment: Mapping[str, Any]) -> int | None:
    """7 a robot for OSC_POSE with a gripper (x y z, axis-angle, gripper) if `env_args` says so; None when it cannot be told."""
    kwargs = environment.get("env_kwargs")
    kwargs = kwargs if isinstance(kwargs, Mapping) else {}
    controller = controller_of(kwargs)
    if not isinstance(controller, Mapping) or controller.get("type") != "OSC_POSE":
        return None
    robots = kwargs.get("robots") or []
    count = 1 if isinstance(robots, str) else len(robots) if isinstance(robots, list) else 0
    return 7 * count or None


def action_bounds(environment: Mapping[str, Any]) -> tuple[float, float] | None:
    """The range of commands that the controller takes: robosuite clips delta commands to it. None: unknown or unlimited."""
    if environment.get("type") != ROBOSUITE:
        return None
    kwargs = environment.get("env_kwargs")
    controller = controller_of(kwargs) if isinstance(kwargs, Mapping) else None
    if isinstance(controller, Mapping) and controller.get("control_delta") is False:
        return None  # absolute poses in metres and radians
    return (-1.0, 1.0)


def read_actions(
    group: h5py.Group, path: Path, width: int | None, bounds: tuple[float, float] | None, clip: bool
) -> np.ndarray:
    """A demonstration's actions (N, A): of this width where it is given, and within bounds, or clipped to them."""
    key = f"{group.name}/actions".lstrip("/")
    actions = read(group, "actions", path, ndim=2)
    require(width is None or actions.shape[1] == width, "The actions have the wrong width.", file=path, key=key,
            found=f"shape {actions.shape}", expected=f"(N, {width}) for this robot and controller",
            remedy="use data of an OSC_POSE controller (x y z, axis-angle, gripper)")  # fmt: skip
    if bounds is None or not np.isfinite(actions).all():  # Episode says what is not finite
        return actions
    outside = (actions < bounds[0]) | (actions > bounds[1])
    if outside.any() and clip:
        return np.clip(actions, *bounds)
    if outside.any():
        dimensions = sorted(set(np.argwhere(outside)[:, -1].tolist()))
        worst = actions[outside][np.argmax(np.abs(actions[outside]))]
        raise InputError(
            "Actions lie outside the controller's range.", file=path, key=key,
            found=f"{int(outside.sum())} of {actions.size} values in dimensions {dimensions}, the farthest {worst:.4g}",
            expected=f"[{bounds[0]:g}, {bounds[1]:g}]",
            remedy="--data.clip-actions (demos: --clip-actions) clips them, as robosuite did when it executed them; or rescale them",
        )  # fmt: skip
    return actions


def image_keys_of(key: str) -> tuple[str, tuple[str, ...]]:
    """Our name of a camera's frames, and what they may be called in a file: "image.top" or "top_image" -> "image.top", (…)."""
    camera = key.removeprefix("image.").removesuffix("_image")
    return f"image.{camera}", (f"{camera}_image", camera) if key.startswith("image.") else (key,)


def _frames(obs: h5py.Group, key: str, path: Path, rows: int) -> tuple[str, LazyArray | SparseFrames]:
    name, candidates = image_keys_of(key)
    found = next((k for k in candidates if k in obs), candidates[0])
    dataset = get(obs, found, h5py.Dataset, path)
    shape: tuple[int, ...] = dataset.shape or ()
    every = attribute(dataset, "every", path)
    require(every is None or (type(every) is int and every >= 1), "A number of steps is at least 1.", file=path,
            key=f"{dataset.name.lstrip('/')} attribute every", found=repr(every)[:50])  # fmt: skip
    drawn = -(-rows // (every or 1))
    last = len(shape) == 4 and shape[3] in (1, 3, 4)
    good = dataset.dtype == np.uint8 and len(shape) == 4 and shape[0] == drawn and min(shape[1:]) > 0
    require(good and (last or shape[1] in (1, 3, 4)), "An image observation has one frame a step.", file=path,
            key=dataset.name.lstrip("/"), found=f"{dataset.dtype} of shape {shape}",
            expected=f"uint8 of shape ({drawn}, H, W, C) or ({drawn}, C, H, W)")  # fmt: skip
    check_dataset(dataset, path, frames=True)
    frames = LazyArray(path, dataset.name, channels_last=last, shape=shape)
    return name, frames if every in (None, 1) else SparseFrames(frames, rows, every)


def _default_keys(data: h5py.Group, name: str, path: Path) -> tuple[str, ...]:
    """The file's own choice (what we wrote), or robomimic's four."""
    own = _names(data, "state_keys", path)
    if own is not None:
        return own
    group = get(data, name, h5py.Group, path)
    obs = group.get("obs") if "obs" in group else None
    if not isinstance(obs, h5py.Group):
        return LOW_DIM_KEYS
    there = members(obs)
    if not set(LOW_DIM_KEYS) & set(there):
        for key in ("state", "observation"):
            if key in there:
                return (key,)
        raise InputError("The observations have other names than robomimic's.", file=path, key=obs.name.lstrip("/"), found=there[:20],
                         expected=", ".join(LOW_DIM_KEYS), remedy=KEYS)  # fmt: skip
    missing = [key for key in LOW_DIM_KEYS if key not in there]
    require(not missing, "The file lacks a dataset.", file=path, key=f"{obs.name}/{missing[0] if missing else ''}".lstrip("/"),
            found=f"{obs.name} holds {there[:20]}", expected=f"observations {', '.join(LOW_DIM_KEYS)}", remedy=KEYS)  # fmt: skip
    return LOW_DIM_KEYS


def _names(data: h5py.Group, name: str, path: Path) -> tuple[str, ...] | None:
    """An attribute that is a JSON list of names; None where it is not there."""
    own = attribute(data, name, path)
    if own is None:
        return None
    try:
        names = json.loads(own)
        if isinstance(names, list) and all(isinstance(key, str) for key in names):
            return tuple(names)
    except (TypeError, ValueError, RecursionError):
        pass
    raise InputError(f"The file's list of {name.replace('_', ' ')} is not one.", file=path, key=f"data attribute {name}",
                     found=str(own)[:100], expected="a JSON list of names")  # fmt: skip


def _environment(data: h5py.Group, path: Path, stands_in: Mapping[str, Any] | None) -> dict[str, Any]:
    args = json_attribute(data, "env_args", path)
    return dict(stands_in or {}) if args is None else args


def is_recording(data: h5py.Group) -> bool:
    """Whether this is what robosuite's own collection script writes: states and actions, no observations."""
    return "env_args" not in data.attrs and ("env_info" in data.attrs or "repository_version" in data.attrs)


def _episode(
    data: h5py.Group, name: str, path: Path, keys: Sequence[str], image_keys: Sequence[str], parts: Iterable[str],
    masks: Mapping[str, set[str]], actions: tuple[int | None, tuple[float, float] | None, bool],
) -> tuple[Episode, tuple[int, ...]]:  # fmt: skip
    """One demonstration and the width of each of its observation keys."""
    group = get_group(data, name, path)
    require("obs" in group or not {"states", "actions"} <= set(group), "The demonstrations hold states, but no observations.",
            file=path, key=f"data/{name}/obs", found=f"{members(group)[:12]}", remedy=CONVERT)  # fmt: skip
    played = read_actions(group, path, *actions)
    promised = attribute(group, "num_samples", path)
    require(promised is None or (isinstance(promised, (int, float)) and promised == len(played)),
            "A demonstration has another length than it says.", file=path,
            key=f"data/{name} attribute num_samples", found=f"{len(played)} actions", expected=f"{promised}",
            remedy="it was cut while it was written or copied: drop it, or copy the file again")  # fmt: skip
    obs = get_group(group, "obs", path)
    columns = [read(obs, key, path, rows=len(played)) for key in keys]
    for key, column in zip(keys, columns):
        require(column.ndim == 2, "An observation does not have one row of numbers a step.", file=path, key=f"data/{name}/obs/{key}",
                found=f"shape {column.shape}", expected=f"({len(played)}, d)",
                remedy="choose low-dimensional observation keys; frames are named by image keys")  # fmt: skip
    observations: dict[str, Any] = {}
    if keys:
        observations["state"] = np.concatenate(columns, axis=1)
    observations.update(_frames(obs, key, path, len(played)) for key in image_keys)
    operator = attribute(group, "operator", path)
    if operator is None or operator == "":
        operator = next((key for key, who in masks.items() if "operator" in key and name in who), None)
    seed = attribute(group, "episode_seed", path)
    require(seed is None or (type(seed) is int and seed >= 0), "An episode seed is a non-negative integer.", file=path,
            key=f"data/{name} attribute episode_seed", found=repr(seed)[:50])  # fmt: skip
    task = attribute(group, "task", path)
    optional = {part: read(group, part, path, rows=len(played)) for part in parts if part in group}
    try:
        episode = Episode(
            observations, played, **optional, name=name, operator=None if operator is None else str(operator), episode_seed=seed,
            task=None if task is None else str(task),
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"{error}\n  file: {path}") from None
    return episode, tuple(column.shape[1] for column in columns)


def read_robomimic(
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
    """Read a robomimic file; demonstrations are ordered by their number, observation keys concatenated in the order given.

    Args:
        path: HDF5 file.
        filter_key: read only `mask/<filter_key>`.
        names: read only these demonstrations.
        observation_keys: datasets under `obs` that make "state", () for none; default those that the file was written with by us, or
            robomimic's four low-dimensional ones, `LOW_DIM_KEYS`.
        image_keys: frames, as the file calls them ("agentview_image") or as we do ("image.agentview"); they stay in the file.
        clip_actions: clip commands to [-1, 1], as robosuite's delta controllers do when they execute them.
        check_actions: refuse commands outside that range where the controller is known to be robosuite's.
        parts: which of rewards, dones and states to read where they are there.
        environment: stands in for `env_args` in a file without them; default {}: unknown.

    `operator` is the demonstration's attribute of that name, or else the name of a filter with "operator" in it that lists the
    demonstration (the official multi-human files name their six people so). InputError names file and key for whatever cannot be used.
    """
    path = Path(path)
    with open_hdf5(path) as file:
        data = get(file, "data", h5py.Group, path)
        found, masks = find_names(data, path), find_masks(file, path)
        if filter_key is None:
            check_filters(masks, found, str(path))
        wanted = find_wanted(found, masks, filter_key, names, path)
        first = get(data, wanted[0], h5py.Group, path)
        require(not is_recording(data) or "obs" in first, "This is a raw robosuite recording: states and actions, no observations.",
                file=path, key=f"data/{wanted[0]}/obs", found=f"attributes {sorted(map(str, data.attrs))}", remedy=CONVERT)  # fmt: skip
        args, tasks = _environment(data, path, environment), _names(data, "tasks", path) or ()
        keys = tuple(observation_keys) if observation_keys is not None else _default_keys(data, wanted[0], path)
        require(keys or image_keys, "There is nothing to observe.", file=path, key="observation_keys", remedy=KEYS)
        bounds = action_bounds(args) if check_actions or clip_actions else None
        if clip_actions and bounds is None:
            require(args.get("type") != ROBOSUITE, "Absolute commands are not clipped by their controller.", file=path,
                    key="clip_actions", found="control_delta: false", remedy="leave it out")  # fmt: skip
            bounds = (-1.0, 1.0)
        sets = {key: set(members) for key, members in masks.items()}
        episodes, dims = [], None
        for name in wanted:
            episode, widths = _episode(
                data, name, path, keys, image_keys, parts, sets, (expected_action_dim(args), bounds, clip_actions)
            )
            dims = dims or widths
            for key, width, dim in zip(keys, widths, dims):
                require(width == dim, "Demonstrations differ in the width of an observation.", file=path,
                        key=f"data/{name}/obs/{key}", found=f"width {width}", expected=f"width {dim}, as in {wanted[0]}")  # fmt: skip
            episodes.append(episode)
    read_names = set(wanted)
    filters = {key: tuple(name for name in members if name in read_names) for key, members in masks.items()}
    filters = {key: members for key, members in filters.items() if members or not masks[key]}
    return Dataset(tuple(episodes), keys, dims or (), args, filters, str(path), tasks)
