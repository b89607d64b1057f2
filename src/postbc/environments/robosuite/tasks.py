"""The tasks: robosuite 1.4.0's Lift, PickPlaceCan and NutAssemblySquare with one Panda arm, as robomimic has them."""

from __future__ import annotations

import copy
import functools
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from postbc.environments.sensing import Sensors, sensors_of
from postbc.errors import InputError

CONTROL_FREQ = 20
VERSION = "1.4.0"


@dataclass(frozen=True)
class Task:
    """One robosuite task.

    Attributes:
        name: our name.
        robosuite_name: robosuite's.
        observation_dim: length of the observation, 9 + `object_dim`.
        object_dim: length of its object part.
        horizon: control steps of an episode, unless told otherwise (DPPO's and DSRL's).
        action_dim: length of an action: OSC_POSE's six and the gripper.
    """

    name: str
    robosuite_name: str
    observation_dim: int
    object_dim: int
    horizon: int
    action_dim: int = 7


TASKS: dict[str, Task] = {
    "Lift": Task("Lift", "Lift", 19, 10, 300),
    "Can": Task("Can", "PickPlaceCan", 23, 14, 300),
    "Square": Task("Square", "NutAssemblySquare", 23, 14, 400),
}

_random_lock = threading.RLock()


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """robosuite draws from NumPy's global generator: seed it, and give it back as it was."""
    with _random_lock:
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def import_robosuite() -> ModuleType:
    """robosuite, without its advice on macro files.

    Raises:
        InputError: not installed, or not version 1.4.0 (others step differently without saying so).
    """
    logger = logging.getLogger("robosuite_logs")
    if not logger.filters:
        logger.addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        import robosuite
    except ImportError as error:
        system = "libGL" in str(error)  # its OpenCV wants it, even where nothing is drawn
        remedy = "apt install libgl1, or pip install opencv-python-headless" if system else "pip install 'postbc[robosuite]'"
        raise InputError(f"robosuite cannot be imported: {error}", expected=f"robosuite {VERSION}", remedy=remedy) from error
    if robosuite.__version__ != VERSION:
        raise InputError(
            "another version of robosuite is installed", found=robosuite.__version__, expected=VERSION,
            remedy="pip install 'postbc[robosuite]'",
        )  # fmt: skip
    return robosuite


def environment_arguments(env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `robosuite.make`: ours, overridden by `env_kwargs`."""
    import_robosuite()
    from robosuite.controllers import load_controller_config

    ours: dict[str, Any] = {
        "robots": ["Panda"],
        "controller_configs": load_controller_config(default_controller="OSC_POSE"),
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "use_camera_obs": False,
        "use_object_obs": True,
        "reward_shaping": False,
        "control_freq": CONTROL_FREQ,
        "ignore_done": True,
    }
    arguments = ours | copy.deepcopy(dict(env_kwargs))
    for key in ("has_renderer", "has_offscreen_renderer", "use_camera_obs"):
        arguments[key] = False  # frames come from `render_frame`
    if arguments["control_freq"] != CONTROL_FREQ:
        raise InputError("the tasks run at 20 Hz", key="control_freq", found=arguments["control_freq"], expected=CONTROL_FREQ)
    return arguments


def build(task: Task, env_kwargs: Mapping[str, Any]) -> Any:
    """A robosuite environment of a task, the same at every call (its object sizes are drawn under seed 0)."""
    robosuite = import_robosuite()
    with numpy_seeded(0):
        env = robosuite.make(task.robosuite_name, hard_reset=False, **environment_arguments(env_kwargs))
        env.reset()
    return env


def template(task: Task, env_kwargs: Mapping[str, Any]) -> Any:
    """An environment to read from, never to step: compiling a model takes a second, so equal ones are built once a process."""
    try:
        return _template(task, json.dumps(env_kwargs, sort_keys=True))
    except TypeError:  # objects among the arguments
        return build(task, env_kwargs)


@functools.cache
def _template(task: Task, env_kwargs: str) -> Any:
    return build(task, json.loads(env_kwargs))


def _lift(env: Any) -> Sensors:
    low = np.array([-np.inf, -np.inf, env.model.mujoco_arena.table_offset[2] + 0.04])
    return sensors_of(env, env.cube_body_id, low, np.full(3, np.inf), released=False, relative_pose=False)


def _can(env: Any) -> Sensors:
    low = np.array(env.bin2_pos, float)  # `not_in_bin` of object 3
    high = low + np.array([env.bin_size[0] / 2, env.bin_size[1] / 2, 0.1])
    return sensors_of(env, env.obj_body_id["Can"], low, high, released=True, relative_pose=True)


def _square(env: Any) -> Sensors:
    peg = np.array(env.sim.data.body_xpos[env.peg1_body_id])  # `on_peg`
    low = np.array([peg[0] - 0.03, peg[1] - 0.03, -np.inf])
    high = np.array([peg[0] + 0.03, peg[1] + 0.03, env.table_offset[2] + 0.05])
    return sensors_of(env, env.obj_body_id["SquareNut"], low, high, released=True, relative_pose=True)


#: What is observed and when it is solved, by robosuite's name of the task: its `_check_success`, as data.
SENSORS: dict[str, Callable[[Any], Sensors]] = {"Lift": _lift, "PickPlaceCan": _can, "NutAssemblySquare": _square}
