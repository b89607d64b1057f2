"""A toy task for the finetuners: a point in the plane that must reach a disc; and a policy that only sometimes gets there.

`PointReach` has the interface of `postbc.environments.make`, `ToyPolicy` the policy protocol. One vector step costs microseconds.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from postbc.demonstrations.normalization import Normalization
from postbc.nn import Generators, randn
from postbc.policies.base import NormalizationTensors

torch.set_num_threads(1)  # networks of these sizes lose by a second thread
SPEED, RADIUS = 0.1, 0.12


class PointReach(gymnasium.vector.VectorEnv):
    """Observation [position 2, goal 2] in [-1, 1]; action = velocity / SPEED in [-1, 1]²; success within RADIUS of the goal."""

    def __init__(
        self,
        num_envs: int = 1,
        chunk: int = 2,
        horizon: int = 30,
        reward: str = "negative",
        terminate_on: str = "success",
        autoreset: str = "same_step",
    ) -> None:
        self.num_envs, self.chunk, self.horizon = num_envs, chunk, horizon
        self.reward, self.terminate_on, self.autoreset = reward, terminate_on, autoreset
        mode = AutoresetMode.SAME_STEP if autoreset == "same_step" else AutoresetMode.DISABLED
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.single_action_space = gymnasium.spaces.Box(-1, 1, (chunk, 2), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        n = num_envs
        self.at, self.steps, self.seeds = np.zeros((n, 4)), np.zeros(n, int), np.zeros(n, np.int64)
        self.streams, self.episodes = np.arange(n), np.zeros(n, int)
        self.terminated, self.truncated = np.zeros(n, bool), np.zeros(n, bool)

    def _begin(self, i: int, seed: int | None = None) -> None:
        if seed is None:
            seed = int(np.random.SeedSequence([int(self.streams[i]), int(self.episodes[i])]).generate_state(1)[0])
            self.episodes[i] += 1
        self.seeds[i], self.steps[i], self.terminated[i], self.truncated[i] = seed, 0, False, False
        self.at[i] = np.random.default_rng(seed).uniform(-1, 1, 4)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs)), bool)
        if seed is not None:
            self.streams[mask] = np.broadcast_to(np.asarray(seed), self.num_envs)[mask]
            self.episodes[mask] = 0
        for i in np.flatnonzero(mask):
            self._begin(i, None if "seeds" not in options else int(options["seeds"][i]))
        return self.at.astype(np.float32), {"episode_seed": self.seeds.copy()}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        assert actions.shape == (self.num_envs, self.chunk, 2), actions.shape
        success, executed = np.zeros((self.num_envs, self.chunk), bool), np.zeros((self.num_envs, self.chunk), bool)
        running = ~(self.terminated | self.truncated)
        for t in range(self.chunk):
            on = running & (self.steps < self.horizon)
            if self.terminate_on == "success":
                on &= ~success.any(1)
            self.at[on, :2] += SPEED * np.clip(np.asarray(actions[on, t], float), -1, 1)
            self.steps[on] += 1
            success[:, t] = on & (np.linalg.norm(self.at[:, :2] - self.at[:, 2:], axis=1) < RADIUS)
            executed[:, t] = on
        rewards = np.where(executed, success - (1.0 if self.reward == "negative" else 0.0), 0.0)
        info: dict[str, Any] = {
            "success": success.any(1), "chunk_success": success.all(1), "num_steps": executed.sum(1), "step_rewards": rewards,
            "diverged": np.zeros(self.num_envs, bool), "episode_seed": self.seeds.copy(),
        }  # fmt: skip
        ends = {"success": info["success"], "chunk_success": info["chunk_success"], "never": np.zeros(self.num_envs, bool)}
        self.terminated |= running & ends[self.terminate_on]
        self.truncated |= running & ~self.terminated & (self.steps >= self.horizon)
        terminated, truncated = self.terminated.copy(), self.truncated.copy()
        ended = terminated | truncated
        if self.autoreset == "same_step" and ended.any():
            info["final_obs"], info["_final_obs"] = np.full(self.num_envs, None, object), ended
            for i in np.flatnonzero(ended):
                info["final_obs"][i] = self.at[i].astype(np.float32)
                self._begin(i)
        return self.at.astype(np.float32), rewards.sum(1), terminated, truncated, info

    def get_state(self) -> dict[str, Any]:
        names = ("at", "steps", "seeds", "streams", "episodes", "terminated", "truncated")
        return {name: getattr(self, name).copy() for name in names}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            getattr(self, name)[:] = value

    def env_args(self) -> dict[str, Any]:
        return {"env_name": "PointReach", "env_version": "1", "type": 3, "env_kwargs": {}}

    def sim_states(self) -> np.ndarray:
        return np.concatenate([self.steps[:, None], self.at], 1).astype(float)

    def model_xml(self, i: int = 0) -> str:
        return "<toy/>"


class ToyPolicy:
    """a = clip(drift·(goal − position) + noise·w), deterministic given w: w ~ N(0, I) wanders, the right w goes straight there."""

    action_dim, observation_dim = 2, 4

    def __init__(self, seeds: tuple[int, ...] = (0,), chunk: int = 2, drift: float = 0.3, noise: float = 0.6) -> None:
        self.seeds, self.members, self.chunk, self.drift, self.noise = seeds, len(seeds), chunk, drift, noise
        self.normalization = NormalizationTensors([Normalization.identity(4, 2)], self.members)
        self.about = {
            "method": "bc",
            "task": "PointReach",
            "demonstrations": 5,
            "data": "toy",
            "posterior_weight": None,
            "sigma": None,
        }
        self.seen: list[Tensor] = []  # the noises it was given

    def loss(self, observation: Tensor, chunk: Tensor, generators: Generators) -> Tensor:
        return torch.zeros(self.members)

    def sample(self, observation: Tensor, noise: Tensor | None = None, generators: Generators | None = None) -> Tensor:
        if noise is None:
            noise = randn(generators or (), observation.shape[1], self.chunk, self.action_dim)
        self.seen.append(noise)
        toward = observation[..., None, 2:] - observation[..., None, :2]
        return (self.drift * toward + self.noise * noise).clamp(-1, 1)

    def select(self, members: list[int]) -> ToyPolicy:
        return ToyPolicy(tuple(self.seeds[m] for m in members), self.chunk, self.drift, self.noise)
