"""A small gymnasium task that other processes can import by name: `gymnasium:reach:Reach-v0`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Reach(gymnasium.Env):  # type: ignore[type-arg]
    """A point [x, y] and its goal [x, y] in [-1, 1]²; an action moves it by a tenth; success within 0.8."""

    metadata = {"render_modes": [], "simulated": True}  # noqa: RUF012

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


class Pixels(Reach):
    """Seen from above: the point in red, the goal in green, 8×8."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gymnasium.spaces.Dict({"image.top": gymnasium.spaces.Box(0, 255, (3, 8, 8), np.uint8)})  # type: ignore[assignment]

    def see(self) -> dict[str, np.ndarray]:
        image = np.zeros((3, 8, 8), np.uint8)
        for channel, (x, y) in enumerate(self.at.reshape(2, 2)):
            image[channel, round(np.clip(y + 1, 0, 2) * 3.5), round(np.clip(x + 1, 0, 2) * 3.5)] = 255
        return {"image.top": image}

    def reset(self, **options: Any) -> Any:
        _, info = super().reset(**options)
        return self.see(), info

    def step(self, action: np.ndarray) -> Any:
        _, *rest = super().step(action)
        return self.see(), *rest


if "Reach-v0" not in gymnasium.registry:
    gymnasium.register("Reach-v0", "reach:Reach", max_episode_steps=12)
    gymnasium.register("ReachPixels-v0", "reach:Pixels", max_episode_steps=12)
