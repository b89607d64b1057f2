"""Our environments as `lerobot-eval` steps them: N at once in this process, one action at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from postbc.environments.chunk import tasks_of
from postbc.environments.registry import Environment
from postbc.errors import InputError, require
from postbc.lerobot.features import features_of_environment
from postbc.seeding import EVALUATION_SEED

FRAME = 256


class LeRobotVectorEnv(VectorEnv):
    """N of an environment, in LeRobot's names: agent_pos, environment_state, pixels (a camera each), language; `is_success` in info.

    An episode ends at its first success, or at the horizon, and then waits for the next reset: stepping it does nothing. A seed decides
    an episode's first state, as in `postbc evaluate`; those of evaluation are 10⁹ and up.

    Args:
        environment: of the registry.
        num_envs: N.
        horizon: actions of an episode; default the environment's.
        task_description: what policies with language are told; default the task's name where there are several, else nothing.
        render: whether videos show the environment; otherwise they are black, and evaluation is faster.

    Raises:
        InputError: the environment cannot run here.
    """

    def __init__(self, environment: Environment, num_envs: int = 1, *, horizon: int | None = None, task_description: str = "",
                 render: bool = True) -> None:  # fmt: skip
        environment.check()
        self.num_envs, self._max_episode_steps = num_envs, environment.horizon if horizon is None else horizon
        self.task, self.task_description, self._render = environment.name, task_description, render
        self.env = environment.make(num_envs, chunk=1, horizon=self._max_episode_steps, terminate_on="success")
        self.features = features_of_environment(environment, self.env)
        self.render_mode = "rgb_array"
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": environment.fps, "autoreset_mode": AutoresetMode.DISABLED}
        blank = {n: np.zeros((1, *s), np.uint8 if n.startswith("image.") else np.float32) for n, s in self.env.shapes.items()}
        self.single_observation_space = _space(self.features.write(blank))
        self.single_action_space = spaces.Box(-np.inf, np.inf, (self.env.action_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin episodes in all environments, or in those of options["reset_mask"] (N,).

        Args:
            seed: s: environment i's episode is s + i; a list: one each; None: episodes of their own, below evaluation's.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        mask = (options or {}).get("reset_mask")
        if isinstance(seed, int):
            seed = [seed + i for i in range(self.num_envs)]
        given = [None] * self.num_envs if seed is None else list(seed)
        require(
            len(given) == self.num_envs,
            "Seeds need one entry an environment.",
            key="seed",
            found=len(given),
            expected=self.num_envs,
        )
        seeds = [int(self.np_random.integers(EVALUATION_SEED)) if s is None else int(s) for s in given]
        observation = self.env.reset(seeds, mask)
        return self.features.write(observation), {"is_success": np.zeros(self.num_envs, bool)}

    def step(
        self, actions: NDArray[np.floating[Any]]
    ) -> tuple[dict[str, Any], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Play one raw action (N, A) in each environment that is not waiting."""
        step = self.env.step(np.asarray(actions)[:, None])
        return (
            self.features.write(step.observation),
            step.rewards[:, 0],
            step.terminated,
            step.truncated,
            {"is_success": step.success},
        )

    # -- what gymnasium's own vector environments of single ones have, and LeRobot asks for -------------------------------------------
    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """(N,) what each environment has under this name; of "render" its frame."""
        return tuple(self.render()) if name == "render" else self.get_attr(name)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """(N,) `_max_episode_steps`, `task` or `task_description` of each environment."""
        if name == "task_description" and not self.task_description:
            return tuple(task or "" for task in tasks_of(self.env))
        if name not in ("_max_episode_steps", "task", "task_description"):
            raise AttributeError(name)
        return (getattr(self, name),) * self.num_envs

    def render(self) -> tuple[NDArray[np.uint8], ...]:  # type: ignore[override]
        """(N,) frames (H, W, 3); black where nothing can be drawn, or is to be."""
        if self._render:
            draw = getattr(self.env, "render_frame", None)
            try:
                require(draw is not None, "This environment has no pictures.", found=self.task)
                return tuple(draw(i, FRAME, FRAME) for i in range(self.num_envs))  # type: ignore[misc]
            except InputError as error:
                warnings.warn(f"{self.task} cannot be drawn here, so videos are black: {error}", UserWarning, stacklevel=2)
                self._render = False
        return (np.zeros((FRAME, FRAME, 3), np.uint8),) * self.num_envs

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close()


def _space(example: Any) -> spaces.Space[Any]:
    """The space of what (1, …) arrays are examples of."""
    if isinstance(example, dict):
        return spaces.Dict({name: _space(value) for name, value in example.items()})
    bytes_ = example.dtype == np.uint8
    return spaces.Box(0 if bytes_ else -np.inf, 255 if bytes_ else np.inf, example.shape[1:], example.dtype)
