"""robosuite's environment objects: built with our arguments, and what of them the compiled loop reads."""

from __future__ import annotations

import copy
import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from postbc.environments.robosuite.loading import import_robosuite
from postbc.environments.robosuite.sensing import Sensors, sensors_of
from postbc.environments.robosuite.tasks import CONTROL_FREQ, Task
from postbc.errors import require

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
    rate = arguments["control_freq"]
    require(rate == CONTROL_FREQ, "The tasks run at 20 Hz.", key="control_freq", found=rate, expected=CONTROL_FREQ)
    controllers = arguments["controller_configs"]
    if isinstance(controllers, list | tuple) and len(controllers) == 1:  # robosuite takes one a robot, in a list or not
        arguments["controller_configs"] = controllers = controllers[0]
    require(isinstance(controllers, Mapping), "One robot has one controller.", key="controller_configs", found=controllers,
            expected="robosuite's controller configuration, such as {'type': 'OSC_POSE', …}")  # fmt: skip
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
