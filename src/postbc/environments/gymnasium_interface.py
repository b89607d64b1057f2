"""Our environments as gymnasium users meet them: `gymnasium.make_vec("postbc/Lift-v0", num_envs=8, chunk=4)`.

An action is a chunk. The product itself plays :class:`postbc.environments.chunk.ChunkEnv`, which this wraps.
"""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from postbc.environments.chunk import ChunkEnv, ChunkStep, Observations
from postbc.environments.episode_seeds import EpisodeSeeds, Seed
from postbc.errors import require

Reward = Literal["negative", "environment"]


class GymnasiumVectorEnv(VectorEnv):
    """A `ChunkEnv` of states as a gymnasium `VectorEnv` that begins the next episode in the step that ends one.

    Observations (N, S) float32, actions (N, T, A). Rewards are sums over the executed actions of a chunk. `step`'s info holds,
    with gymnasium's masks: success (N,) any action was successful; chunk_success (N,) all T were; num_steps (N,) executed;
    step_rewards (N, T); diverged (N,); episode_seed (N,) of the episode that was stepped; final_obs and final_info where one ended.

    Args:
        env: what plays.
        reward: an action earns success − 1 ("negative"), or what the environment says.
        low, high: (A,) bounds of an action.
        fps: frames a second of :meth:`render`.
    """

    def __init__(self, env: ChunkEnv, *, low: Any, high: Any, reward: Reward = "negative", fps: int = 20) -> None:
        require(reward in ("negative", "environment"), "There is no such reward.", key="reward", found=reward,
                expected="negative, environment")  # fmt: skip
        self.env, self.reward, self.num_envs, self.chunk, self.horizon = env, reward, env.num_envs, env.chunk, env.horizon
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.render_mode = "rgb_array"
        lowest, highest = (np.tile(np.asarray(bound, np.float32), (self.chunk, 1)) for bound in (low, high))
        self.single_action_space = gymnasium.spaces.Box(lowest, highest, dtype=np.float32)
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, env.shapes["state"], np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._seeds = EpisodeSeeds(self.num_envs)

    def reset(self, *, seed: Seed = None, options: dict[str, Any] | None = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin new episodes.

        Args:
            seed: s: environment i's episodes k = 0, 1, … get seeds derived from (s, i, k); a list: from (seed[i], k); None: go on.
            options: `reset_mask` (N,) bool, which environments to reset (all by default); `seeds` (N,), the very seeds of the
                episodes that begin.
        """
        options = options or {}
        mask = np.array(options.get("reset_mask", np.ones(self.num_envs)), bool)
        require(
            mask.shape == (self.num_envs,),
            "reset_mask needs one entry an environment.",
            found=mask.shape,
            expected=self.num_envs,
        )
        self._seeds.restart(seed, mask)
        seeds = options.get("seeds")
        count = self.num_envs if seeds is None else len(seeds)
        require(count == self.num_envs, "seeds needs one entry an environment.", found=count, expected=self.num_envs)
        return self._begin(mask, seeds), self._masked({"episode_seed": self._seeds.current.copy()}, mask)

    def _begin(self, mask: NDArray[np.bool_], seeds: Any = None) -> NDArray[np.float32]:
        for i in np.flatnonzero(mask):
            if seeds is None:
                self._seeds.advance(int(i))
            else:
                self._seeds.choose(int(i), int(seeds[i]))
        return self._vector(self.env.reset(self._seeds.current, mask))

    @staticmethod
    def _vector(observation: Observations) -> NDArray[np.float32]:
        return np.array(observation["state"], np.float32)

    def step(
        self, actions: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Play one chunk (T, A) in each environment."""
        step = self.env.step(actions)
        rewards, info = self._rewards(step), {}
        info = self._masked(
            {
                "success": step.success, "chunk_success": step.chunk_success, "num_steps": step.num_steps,
                "step_rewards": rewards.astype(np.float32), "diverged": step.diverged, "episode_seed": self._seeds.current.copy(),
            },
            np.ones(self.num_envs, bool),
        )  # fmt: skip
        observation, ended = self._vector(step.observation), step.ended
        if ended.any():
            final_obs = np.full(self.num_envs, None, object)
            for i in np.flatnonzero(ended):
                final_obs[i] = observation[i].copy()
            final_info = {key: value.copy() for key, value in info.items() if not key.startswith("_")}
            observation = np.where(ended[:, None], self._begin(ended), observation)
            info |= self._masked({"final_obs": final_obs, "final_info": self._masked(final_info, ended)}, ended)
        return observation, rewards.sum(1), step.terminated, step.truncated, info

    def _rewards(self, step: ChunkStep) -> NDArray[np.float64]:
        happened = np.arange(self.chunk) < step.num_steps[:, None]
        return step.rewards if self.reward == "environment" else np.where(happened, step.successes - 1.0, 0.0)

    @staticmethod
    def _masked(values: dict[str, Any], mask: NDArray[np.bool_]) -> dict[str, Any]:
        return values | {f"_{key}": mask.copy() for key in values}

    def render(self) -> tuple[NDArray[np.uint8], ...]:
        """A frame of each environment."""
        return tuple(self.env.render_frame(i) for i in range(self.num_envs))  # type: ignore[attr-defined]

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close()


class GymnasiumEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One environment by gymnasium's single interface: observations (S,) float32, actions (T, A) float32.

    Args:
        vector: of one environment.
        render_mode: None or "rgb_array".
    """

    def __init__(self, vector: GymnasiumVectorEnv, render_mode: str | None = None) -> None:
        require(render_mode in (None, "rgb_array"), "There is no such render_mode.", found=render_mode, expected="rgb_array")
        self.render_mode, self.vector = render_mode, vector
        self.metadata = {key: vector.metadata[key] for key in ("render_modes", "render_fps")}
        self.observation_space, self.action_space = vector.single_observation_space, vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        observation, info = self.vector.reset(seed=seed, options=options)
        return observation[0], _first(info)

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.vector.step(np.asarray(action)[None])
        last = info.pop("final_obs", observation)[0]
        for key in ("final_info", "_final_info", "_final_obs"):
            info.pop(key, None)
        return last, float(reward[0]), bool(terminated[0]), bool(truncated[0]), _first(info)

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        return self.vector.render()[0] if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.vector.close()


def _first(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value[0] for key, value in info.items() if not key.startswith("_")}


def make_robosuite_vector(task: str, num_envs: int = 1, reward: Reward = "negative", **options: Any) -> GymnasiumVectorEnv:
    """gymnasium's vector entry point of a robosuite task; `options` are `postbc.environments.robosuite.make`'s."""
    from postbc.environments.robosuite import make

    env = make(task, num_envs, **options)
    return GymnasiumVectorEnv(env, low=-env.action_limit, high=env.action_limit, reward=reward, fps=env.fps)


def make_robosuite(task: str, render_mode: str | None = None, **options: Any) -> GymnasiumEnv:
    """gymnasium's single entry point of a robosuite task."""
    return GymnasiumEnv(make_robosuite_vector(task, 1, **options), render_mode)


def register() -> None:
    """Let gymnasium know "postbc/Lift-v0", "postbc/Can-v0" and "postbc/Square-v0"; imports no simulator."""
    from postbc.environments.robosuite.tasks import TASKS

    for name in TASKS:
        if f"postbc/{name}-v0" not in gymnasium.registry:
            gymnasium.register(
                f"postbc/{name}-v0",
                entry_point="postbc.environments.gymnasium_interface:make_robosuite",
                vector_entry_point="postbc.environments.gymnasium_interface:make_robosuite_vector",
                kwargs={"task": name},
            )
