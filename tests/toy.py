"""A toy task: a point in the plane that must reach a disc, as states or as 32×32 pixels; and a policy that only sometimes gets there.

`PointReach` is a :class:`postbc.environments.chunk.ChunkEnv`, `ToyPolicy` a policy of the protocol. One vector step costs microseconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from postbc.data.normalization import Normalization
from postbc.environments.chunk import ChunkStep, Observations, Termination
from postbc.environments.registry import Environment

torch.set_num_threads(1)
SPEED, RADIUS, PIXELS = 0.1, 0.12, 32


def draw(at: np.ndarray) -> np.ndarray:
    """Positions and goals (N, 4) in [-1, 1] -> (N, 3, 32, 32) uint8: the point in red, the goal in green, each a soft spot."""
    grid = np.linspace(-1.2, 1.2, PIXELS)
    image = np.zeros((len(at), 3, PIXELS, PIXELS), np.uint8)
    for channel, (x, y) in enumerate(((0, 1), (2, 3))):
        distance = (grid[None, None, :] - at[:, x, None, None]) ** 2 + (grid[None, :, None] - at[:, y, None, None]) ** 2
        image[:, channel] = (255 * np.exp(-distance / 0.02)).astype(np.uint8)
    return image


class PointReach:
    """Observation "state" [position 2, goal 2] in [-1, 1], or "image.top"; action = velocity / SPEED in [-1, 1]²."""

    action_dim, chooses_episodes = 2, True

    def __init__(
        self,
        num_envs: int = 1,
        *,
        chunk: int = 2,
        horizon: int = 30,
        terminate_on: Termination = "success",
        pixels: bool = False,
        saves_state: bool = True,
    ) -> None:
        self.num_envs, self.chunk, self.horizon, self.terminate_on = num_envs, chunk, horizon, terminate_on
        self.pixels, self.saves_state = pixels, saves_state
        self.shapes: dict[str, tuple[int, ...]] = {"image.top": (3, PIXELS, PIXELS)} if pixels else {"state": (4,)}
        n = num_envs
        self.at, self.steps, self.seeds = np.zeros((n, 4)), np.zeros(n, int), np.full(n, -1, np.int64)
        self.over = np.ones(n, bool)

    def observation(self) -> Observations:
        return {"image.top": draw(self.at)} if self.pixels else {"state": self.at.astype(np.float32)}

    def reset(self, seeds: Any, mask: np.ndarray | None = None) -> Observations:
        for i in np.flatnonzero(np.ones(self.num_envs, bool) if mask is None else mask):
            self.seeds[i], self.steps[i], self.over[i] = int(seeds[i]), 0, False
            self.at[i] = np.random.default_rng(int(seeds[i])).uniform(-1, 1, 4)
        return self.observation()

    def step(self, chunks: np.ndarray) -> ChunkStep:
        n, t = self.num_envs, self.chunk
        assert chunks.shape == (n, t, 2), chunks.shape
        assert np.isfinite(chunks).all()
        success, executed = np.zeros((n, t), bool), np.zeros((n, t), bool)
        running = ~self.over
        for k in range(t):
            on = running & (self.steps < self.horizon)
            if self.terminate_on == "success":
                on &= ~success.any(1)
            self.at[on, :2] += SPEED * np.clip(np.asarray(chunks[on, k], float), -1, 1)
            self.steps[on] += 1
            success[:, k] = on & (np.linalg.norm(self.at[:, :2] - self.at[:, 2:], axis=1) < RADIUS)
            executed[:, k] = on
        ends = {"success": success.any(1), "chunk_success": success.all(1), "never": np.zeros(n, bool)}
        terminated = running & ends[self.terminate_on]
        truncated = running & ~terminated & (self.steps >= self.horizon)
        self.over |= terminated | truncated
        rewards = np.where(executed, success - 1.0, 0.0)
        return ChunkStep(self.observation(), rewards, success, executed.sum(1), terminated, truncated, np.zeros(n, bool))

    def get_state(self) -> dict[str, Any] | None:
        return {k: getattr(self, k).copy() for k in ("at", "steps", "seeds", "over")} if self.saves_state else None

    def set_state(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            getattr(self, name)[:] = value

    def close(self) -> None:
        pass


@contextlib.contextmanager
def stopped(owner: type, name: str, calls: int, error: Exception) -> Iterator[None]:
    """Inside, the method `name` of `owner` raises `error` after so many calls, which must end what is inside."""
    original, left = getattr(owner, name), [calls]

    def method(self: Any, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, method)
        with pytest.raises(type(error), match=str(error)):
            yield


def environment(**options: Any) -> Environment:
    """The toy as the registry has environments."""

    def make(num_envs: int, **arguments: Any) -> PointReach:
        return PointReach(num_envs, **{**arguments, **options})

    return Environment("toy/PointReach", make, horizon=30, chunk=2, facts=lambda: {"env_name": "PointReach"})


class ToyPolicy:
    """a = clip(drift·(goal − position) + noise·w), deterministic given w: w ~ N(0, I) wanders, the right w goes straight there."""

    action_dim, feature_dim, observation_steps = 2, 4, 1

    def __init__(self, seed: int = 0, chunk: int = 2, drift: float = 0.3, noise: float = 0.6) -> None:
        self.seed, self.chunk, self.drift, self.noise = seed, chunk, drift, noise
        self.shapes = {"state": (4,)}
        self.normalization = Normalization.identity(4, 2)
        self.seen: list[Tensor] = []  # the noises it was given

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        return observation["state"]

    def loss(self, features: Tensor, chunk: Tensor, generator: torch.Generator, weight: Tensor | None = None) -> Tensor:
        return torch.zeros(len(features))

    def sample(self, features: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        if noise is None:
            noise = torch.randn(len(features), self.chunk, self.action_dim, generator=generator)
        self.seen.append(noise)
        toward = features[:, None, 2:] - features[:, None, :2]
        return (self.drift * toward + self.noise * noise).clamp(-1, 1)
