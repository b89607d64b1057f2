"""The product's own simulated robot: a robosuite task in the native simulator, with what real robots have: latency, lost frames,
observations that stop, and a scene that a person has to reset."""

from __future__ import annotations

from collections import deque
from typing import Annotated, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from postbc.data.episodes import is_image
from postbc.environments.robosuite import HAND, make
from postbc.environments.robosuite.tasks import CONTROL_FREQ, STATE_KEYS
from postbc.schemas import CountOrZero, NonNegative, Share, schema


@schema
class SimulatedConfig:
    """What is wrong with the simulated robot (`--robot-config FILE.yaml`)."""

    latency: NonNegative = 0.0
    """Seconds, in whole control steps, that an observation is old when it comes."""
    dropped_frames: Share = 0.0
    """Share of control steps in which no camera's frame comes, so that the one before is seen again."""
    silent_from: CountOrZero | None = None
    """Control step of every episode from which on no observation comes: to rehearse the watchdog."""
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Pixels of a side of the cameras; default robomimic's 84."""


class SimulatedRobot(gymnasium.Env[dict[str, NDArray[Any]], NDArray[np.float32]]):
    """A robosuite task as a robot (see :mod:`postbc.environments.robot` for what that is).

    An episode's seed decides its scene and what goes wrong; success ends it.

    Args:
        task: Lift, Can or Square.
        images: two cameras instead of the object.
        config: what is wrong with it.
    """

    metadata = {"render_modes": [], "render_fps": CONTROL_FREQ}  # noqa: RUF012

    def __init__(self, task: str, images: bool = False, config: SimulatedConfig | None = None) -> None:
        self.config = config or SimulatedConfig()
        sized = {"image_size": self.config.image_size} if images and self.config.image_size is not None else {}
        self._env = make(task, 1, chunk=1, horizon=10**9, terminate_on="success", images=images, **sized)
        total = self._env.shapes["state"][0]
        self._dims = (3, 4, 2) if total == HAND else (3, 4, 2, total - HAND)
        vectors = [(key, gymnasium.spaces.Box(-np.inf, np.inf, (n,), np.float32)) for key, n in zip(STATE_KEYS, self._dims)]
        cameras = [
            (name, gymnasium.spaces.Box(0, 255, shape, np.uint8)) for name, shape in self._env.shapes.items() if is_image(name)
        ]
        self.observation_space: gymnasium.spaces.Space[Any] = gymnasium.spaces.Dict([*vectors, *cameras])
        limit = self._env.action_limit.astype(np.float32)
        self.action_space: gymnasium.spaces.Space[Any] = gymnasium.spaces.Box(-limit, limit, dtype=np.float32)
        self._delay = round(self.config.latency * CONTROL_FREQ)
        self._line: deque[dict[str, NDArray[Any]]] = deque(maxlen=self._delay + 1)
        self._rng = np.random.default_rng(0)
        self._step, self._lost = 0, 0
        self._last: dict[str, NDArray[Any]] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        self._rng = np.random.default_rng((number, 17))
        self._line.clear()
        self._step, self._lost, self._last = 0, 0, {}
        observation = self._named(self._env.reset([number]))
        self._line.extend([observation] * (self._delay + 1))
        self._last = observation
        return observation, {"observation_age": 0.0, "command": np.zeros(self._env.action_dim), "success": False}

    def step(self, action: NDArray[np.floating[Any]]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        played = self._env.step(np.asarray(action, np.float64)[None, None])
        self._step += 1
        self._line.append(self._named(played.observation))
        seen, old = dict(self._line[0]), min(self._delay, self._step)
        silent = self.config.silent_from is not None and self._step >= self.config.silent_from
        if silent or self._rng.random() < self.config.dropped_frames:
            self._lost += 1
            seen |= {name: value for name, value in self._last.items() if silent or is_image(name)}
        else:
            self._lost = 0
        self._last = seen
        info = {"observation_age": (old + self._lost) / CONTROL_FREQ, "success": bool(played.success[0])}
        return seen, float(played.rewards[0, 0]), bool(played.terminated[0]), bool(played.diverged[0]), info

    def _named(self, observation: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        parts = np.split(observation["state"][0], np.cumsum(self._dims)[:-1])
        return {**dict(zip(STATE_KEYS, parts)), **{k: v[0] for k, v in observation.items() if is_image(k)}}

    def hold(self) -> None:
        """Its time stands still between two steps: nothing moves."""

    def close(self) -> None:
        self._env.close()
