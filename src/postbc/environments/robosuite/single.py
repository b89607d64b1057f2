"""One environment by gymnasium's single interface: a vector of one, seen from inside."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from postbc.environments.robosuite import CONTROL_FREQ, Task
from postbc.environments.vector import RobosuiteVectorEnv
from postbc.errors import InputError


class RobosuiteEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """`RobosuiteVectorEnv` with one environment: observations (S,) float32, actions (T, 7) float32.

    Args:
        task: a name in `TASKS`, or a `Task`.
        render_mode: None or "rgb_array".
        kwargs: `RobosuiteVectorEnv`'s, without num_envs and autoreset.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_FREQ}  # noqa: RUF012  gymnasium's attribute

    def __init__(self, task: str | Task, render_mode: str | None = None, **kwargs: Any) -> None:
        if render_mode not in (None, "rgb_array"):
            raise InputError("unknown render_mode", found=render_mode, expected="rgb_array")
        self.render_mode = render_mode
        self.vector = RobosuiteVectorEnv(task, 1, autoreset="disabled", **kwargs)
        self.observation_space, self.action_space = self.vector.single_observation_space, self.vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        observation, info = self.vector.reset(seed=seed, options=options)
        return observation[0], _first(info)

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.vector.step(np.asarray(action)[None])
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), _first(info)

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        return self.vector.render_frame(0) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.vector.close()


def _first(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value[0] for key, value in info.items() if not key.startswith("_")}
