"""MetaWorld's fifty tasks of a Sawyer arm, by states: "metaworld/push-v3", … (metaworld 3.0, the version of LeRobot)."""

from __future__ import annotations

import difflib
import importlib
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from postbc.environments.registry import Environment, from_vector_env
from postbc.errors import InputError, require

HORIZON, FPS, VERSION = 500, 80, "3.0"
#: Hand and gripper, as in LeRobot's datasets; objects, the frame before, and the goal.
STATE_KEYS, STATE_DIMS = ("robot_hand", "objects"), (4, 35)
PREFIX = "metaworld/"


def import_metaworld(module: str = "metaworld") -> Any:
    """A module of MetaWorld. InputError: it is not installed, or cannot be imported here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:  # MuJoCo and OpenGL fail with exceptions of their own
        raise InputError("MetaWorld cannot be imported.", found=f"{type(error).__name__}: {error}"[:300],
                         remedy="pip install 'postbc[metaworld]'") from error  # fmt: skip


def task_class(task: str) -> Any:
    """MetaWorld's class of a task. InputError: there is no such task, or no MetaWorld."""
    known: dict[str, Any] = import_metaworld("metaworld.env_dict").ALL_V3_ENVIRONMENTS
    close = difflib.get_close_matches(task, list(known), 3, 0.3)
    require(task in known, "MetaWorld has no such task.", key="environment", found=task, expected=f"one of {len(known)}",
            remedy=f"close ones: {', '.join(close) or ', '.join(sorted(known)[:5])}")  # fmt: skip
    return known[task]


def facts(task: str) -> dict[str, Any]:
    """Of a task, as robomimic's `env_args`."""
    return {"env_name": PREFIX + task, "env_version": VERSION, "type": 2, "env_kwargs": {"control_freq": FPS}}


class MetaWorldTask(gymnasium.Env[np.ndarray, np.ndarray]):
    """One task whose reset(seed=…) decides where objects and goal are, and which shows the goal.

    Observations (39,) in metres, actions (4,) in [−1, 1] at 80 Hz: where the hand goes, and the gripper. `success` in info.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012

    def __init__(self, task: str, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        env = self._env = task_class(task)(render_mode=render_mode, camera_name="corner3")
        env._partially_observable, env._set_task_called = False, True
        env.__dict__.pop("sawyer_observation_space", None)  # made while the goal was hidden: what is observed is clipped to it
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        env.reset()
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (39,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._env.seed(seed)
        observation, _ = self._env.reset()
        return np.asarray(observation), {"success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, _, truncated, info = self._env.step(action)
        return np.asarray(observation), float(reward), False, bool(truncated), {"success": bool(info["success"])}

    def render(self) -> Any:
        return self._env.render()

    def close(self) -> None:
        self._env.close()


def metaworld_environment(task: str) -> Environment:
    """MetaWorld's task of that name (push-v3); imports no simulator."""

    def factory(num_envs: int, render_mode: str | None = None) -> VectorEnv:
        make = partial(MetaWorldTask, task, render_mode)
        return SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.DISABLED)

    def check() -> None:
        task_class(task)

    made = from_vector_env(
        factory, name=PREFIX + task, horizon=HORIZON, fps=FPS, facts=facts(task), scene=partial(factory, 1, "rgb_array")
    )
    return replace(made, check=check, state_keys=STATE_KEYS)
