"""The posterior's coordinates as an observation: drawn from an episode's seed, and the same for the whole episode.

A policy that was pretrained with `coherent` reads them under the name "posterior" and plays accordingly: one hypothesis of what the
demonstrator would do, all along, instead of another one at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postbc.data.episodes import COORDINATES
from postbc.environments.chunk import ChunkEnv, ChunkStep, Observations

STREAM = 16_001  # of the coordinates, beside the episode's seed


def coordinates_of_episode(episode_seed: int, size: int) -> NDArray[np.float32]:
    """(R,) standard normal numbers, a function of the episode's seed."""
    return np.random.default_rng((STREAM, int(episode_seed))).standard_normal(size, np.float32)


class CoordinatesEnv:
    """An environment whose observations also hold the coordinates of each running episode (N, R).

    Args:
        env: N environments.
        size: R.
    """

    def __init__(self, env: ChunkEnv, size: int) -> None:
        self.env, self.num_envs, self.chunk, self.action_dim = env, env.num_envs, env.chunk, env.action_dim
        self.horizon, self.chooses_episodes = env.horizon, env.chooses_episodes
        self.shapes: Mapping[str, tuple[int, ...]] = {**env.shapes, COORDINATES: (size,)}
        self._coordinates = np.zeros((env.num_envs, size), np.float32)

    def __getattr__(self, name: str) -> Any:  # the simulator's states, where it has them
        return getattr(self.env, name)

    def _with(self, observation: Observations) -> Observations:
        return {**observation, COORDINATES: self._coordinates.copy()}

    def reset(self, seeds: Sequence[int] | np.ndarray, mask: NDArray[np.bool_] | None = None) -> Observations:
        observation = self.env.reset(seeds, mask)
        for i, seed in enumerate(seeds):
            if mask is None or mask[i]:
                self._coordinates[i] = coordinates_of_episode(seed, self._coordinates.shape[1])
        return self._with(observation)

    def step(self, chunks: NDArray[np.floating[Any]]) -> ChunkStep:
        step = self.env.step(chunks)
        step.observation = self._with(step.observation)
        return step

    def get_state(self) -> dict[str, Any] | None:
        inner = self.env.get_state()
        return None if inner is None else {"inner": inner, "coordinates": self._coordinates.copy()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.env.set_state(state["inner"])
        self._coordinates[:] = state["coordinates"]

    def close(self) -> None:
        self.env.close()
