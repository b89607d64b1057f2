"""A small gymnasium task that other processes can import by name: `gymnasium:reach:Reach-v0`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Reach(gymnasium.Env):  # type: ignore[type-arg]
    """A point [x, y] and its goal [x, y] in [-1, 1]²; an action moves it by a tenth; success within 0.8."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-2, 2, (4,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = self.np_random.uniform(-1, 1, 4)
        return self.at.astype(np.float32), {"success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.at[:2] += 0.1 * np.clip(action, -1, 1)
        success = bool(np.linalg.norm(self.at[:2] - self.at[2:]) < 0.8)
        return self.at.astype(np.float32), float(success), False, False, {"success": success}


if "Reach-v0" not in gymnasium.registry:
    gymnasium.register("Reach-v0", "reach:Reach", max_episode_steps=12)
