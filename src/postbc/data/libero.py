"""Reader of LIBERO's own demonstrations: a file a task, which is in the file's name.

::

    data          attrs: problem_info, bddl_file_name, env_args (JSON), macros_image_convention
    data/demo_i   attrs: num_samples, model_file (MJCF), init_state
      actions (N, 7)  rewards (N,)  dones (N,)  states (N, Ds)  robot_states (N, 9)
      obs/agentview_rgb, eye_in_hand_rgb (N, 128, 128, 3)  obs/ee_states (N, 6)  gripper_states (N, 2)  joint_states (N, 7)

Two things are otherwise than here. A row's observation is what LIBERO saw *after* the row's action (its `create_dataset.py` steps, then
records), its state is from before it: action t is put together with observation t − 1, and each demonstration loses its first action.
And frames are upside down, as OpenGL has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from postbc.data.episodes import LOW_DIM_KEYS, Dataset, Episode, check_filters
from postbc.data.hdf5 import attribute, check_dataset, get, json_attribute, open_hdf5, read
from postbc.data.lazy import LazyArray
from postbc.data.libero_tasks import KITCHEN, SUITES, find_tasks, vocabulary
from postbc.data.robomimic import PARTS, Listing, find_masks, find_names, find_wanted, read_actions
from postbc.errors import InputError, require

HAND = LOW_DIM_KEYS[:3]
#: Our name of a camera's frames -> LIBERO's.
CAMERAS = {"image.agentview": "agentview_rgb", "image.wrist": "eye_in_hand_rgb"}
ACTION_DIM = 7
MADE_WITH = "1.4.0"
"""Of robosuite: what LIBERO requires; its files do not say."""


def is_libero(path: str | Path) -> bool:
    """Whether an HDF5 file is one of LIBERO's own."""
    with contextlib.suppress(InputError), open_hdf5(Path(path)) as file:
        data = file.get("data")
        return isinstance(data, h5py.Group) and "bddl_file_name" in data.attrs and "problem_info" in data.attrs
    return False


def task_of(data: h5py.Group, path: Path) -> tuple[str, tuple[str, ...]]:
    """A file's task, and the tasks that "language" tells apart with it; of one that is not known here, itself alone."""
    bddl = Path(str(attribute(data, "bddl_file_name", path)))
    name, suite = bddl.stem, bddl.parent.name
    with contextlib.suppress(InputError):
        return name, vocabulary(find_tasks(f"{suite}/{name}" if suite in SUITES else name))
    return name, (name,)


def model_xml(path: str | Path, name: str) -> str:
    """The MJCF of a demonstration: where its fixtures stand is nowhere else. InputError where there is none."""
    path = Path(path)
    with open_hdf5(path) as file:
        text = attribute(get(get(file, "data", h5py.Group, path), name, h5py.Group, path), "model_file", path)
    require(isinstance(text, str), "The demonstration does not say where its fixtures stand.", file=path,
            key=f"data/{name} attribute model_file", expected="MJCF, or an episode_seed")  # fmt: skip
    return str(text)


def list_libero(path: str | Path) -> Listing:
    """Names and filters of a file, and that all are of its task."""
    path = Path(path)
    with open_hdf5(path) as file:
        data = get(file, "data", h5py.Group, path)
        names = find_names(data, path)
        return Listing(names, find_masks(file, path), dict.fromkeys(names, task_of(data, path)[0]))


def describe_libero(path: str | Path) -> str:
    """What of the file is there to be used for what."""
    path = Path(path)
    with open_hdf5(path) as file:
        task = task_of(get(file, "data", h5py.Group, path), path)[0]
    return (
        f"LIBERO's own HDF5, of the task {task}; observations: {', '.join(HAND)}; cameras: {', '.join(CAMERAS)}; beside actions: "
        "rewards, dones, states"
    )


def environment_name(tasks: Sequence[str], known: Sequence[str]) -> str:
    """The environment here of tasks, of which `known` are told apart: one of LIBERO's, some or all of the kitchens', or a suite."""
    if len(set(tasks)) == 1:
        return f"libero/{tasks[0]}"
    if tuple(known) == KITCHEN:
        some = sorted(KITCHEN.index(task) for task in set(tasks))
        return "libero/kitchen" + ("" if len(some) == len(KITCHEN) else "/" + "+".join(map(str, some)))
    for suite in SUITES:
        with contextlib.suppress(InputError):
            if vocabulary(find_tasks(suite)) == tuple(known):
                return f"libero/{suite}"
    return f"libero/{tasks[0]} and others"


def quaternion(axis_angle: np.ndarray) -> np.ndarray:
    """(N, 3) rotation vectors of angles from 0 to 2π, as robosuite makes them -> (N, 4) the quaternions x, y, z, w that they were."""
    angle = np.linalg.norm(axis_angle, axis=1, keepdims=True)
    return np.concatenate([axis_angle * np.sinc(angle / (2 * np.pi)) / 2, np.cos(angle / 2)], 1)


def _numbers(obs: h5py.Group, key: str, path: Path, rows: int) -> np.ndarray:
    """An observation by our name of it, or by LIBERO's."""
    if key == HAND[2]:
        return read(obs, "gripper_states", path, rows=rows, ndim=2)
    if key in HAND:
        poses = read(obs, "ee_states", path, rows=rows, ndim=2)
        require(poses.shape[1] == 6, "The hand's pose has another width.", file=path, key=f"{obs.name}/ee_states".lstrip("/"),
                found=poses.shape, expected="(N, 6): position, axis-angle")  # fmt: skip
        return poses[:, :3] if key == HAND[0] else quaternion(poses[:, 3:])
    return read(obs, key, path, rows=rows, ndim=2)


def _frames(obs: h5py.Group, key: str, path: Path, rows: int, upside_down: bool) -> tuple[str, LazyArray]:
    names = {name: name for name in CAMERAS} | {theirs: name for name, theirs in CAMERAS.items()}
    names |= {f"{name.removeprefix('image.')}_image": name for name in CAMERAS}
    require(key in names, "LIBERO has no such camera.", file=path, key=key, expected=", ".join(CAMERAS))
    dataset = get(obs, CAMERAS[names[key]], h5py.Dataset, path)
    shape: tuple[int, ...] = dataset.shape or ()
    require(dataset.dtype == np.uint8 and len(shape) == 4 and shape[0] == rows and shape[3] == 3 and min(shape[1:]) > 0,
            "An image observation has one frame a step.", file=path, key=dataset.name.lstrip("/"),
            found=f"{dataset.dtype} of shape {shape}", expected=f"uint8 of shape ({rows}, H, W, 3)")  # fmt: skip
    check_dataset(dataset, path, frames=True)
    return names[key], LazyArray(path, dataset.name, rows=(0, rows - 1), shape=shape, upside_down=upside_down)


def _episode(
    data: h5py.Group, name: str, path: Path, keys: Sequence[str], image_keys: Sequence[str], parts: Iterable[str], task: str,
    bounds: tuple[float, float] | None, clip: bool,
) -> tuple[Episode, tuple[int, ...]]:  # fmt: skip
    group = get(data, name, h5py.Group, path)
    actions, obs = read_actions(group, path, ACTION_DIM, bounds, clip), get(group, "obs", h5py.Group, path)
    rows = len(actions)
    require(
        rows > 1, "A demonstration is too short.", file=path, key=f"data/{name}", found=f"{rows} steps", expected="at least 2"
    )
    columns = [_numbers(obs, key, path, rows)[:-1] for key in keys]
    upright = attribute(data, "macros_image_convention", path) == "opencv"
    observations: dict[str, Any] = {"state": np.concatenate(columns, 1)} if columns else {}
    observations |= dict(_frames(obs, key, path, rows, not upright) for key in image_keys)
    optional: dict[str, Any] = {part: read(group, part, path, rows=rows)[1:] for part in parts if part in group}
    try:
        episode = Episode(observations, actions[1:], **optional, name=name, task=task)
    except InputError as error:
        raise InputError(f"{error}\n  file: {path}") from None
    return episode, tuple(column.shape[1] for column in columns)


def read_libero(
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
    """Read one of LIBERO's files; the arguments are those of :func:`postbc.data.robomimic.read_robomimic`.

    By default "state" is what `libero/…-pixels` observes of it: robot0_eef_pos 3, robot0_eef_quat 4, robot0_gripper_qpos 2. Frames stay
    in the file: agentview_rgb is "image.agentview", eye_in_hand_rgb "image.wrist", upright.

    Raises:
        InputError: names file and key for whatever cannot be used.
    """
    path = Path(path)
    keys = tuple(HAND if observation_keys is None else observation_keys)
    require(keys or image_keys, "There is nothing to observe.", file=path, key="observation_keys", expected=", ".join(HAND))
    with open_hdf5(path) as file:
        data = get(file, "data", h5py.Group, path)
        found, masks = find_names(data, path), find_masks(file, path)
        check_filters(masks, found, str(path))
        wanted = find_wanted(found, masks, filter_key, names, path)
        task, known = task_of(data, path)
        theirs = json_attribute(data, "env_args", path) or {}
        facts = {"env_name": environment_name([task], known), "env_version": MADE_WITH, "type": 1}
        bounds = (-1.0, 1.0) if check_actions or clip_actions else None
        read_ones = [_episode(data, name, path, keys, image_keys, parts, task, bounds, clip_actions) for name in wanted]
    args = {**facts, "env_kwargs": theirs.get("env_kwargs") or {}} if theirs or environment is None else dict(environment)
    filters = {key: tuple(name for name in members if name in set(wanted)) for key, members in masks.items()}
    episodes, widths = tuple(episode for episode, _ in read_ones), read_ones[0][1]
    return Dataset(episodes, keys, widths, args, {k: v for k, v in filters.items() if v}, str(path), known)
