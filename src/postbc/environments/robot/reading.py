"""A robot's observations as an agent reads them: its vectors in the order of the agent's data, the newest few steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from postbc.data.episodes import COORDINATES, is_image
from postbc.environments.coordinates import coordinates_of_episode
from postbc.environments.spaces import ObservationReader
from postbc.errors import require


class RobotReader:
    """Observations of a gymnasium space as {"state": (S,) float32, "image.<camera>": (C, H, W) uint8}.

    Args:
        space: a Box, or a Dict of vectors and cameras.
        state_keys: names of the vectors that make "state", in order, as the agent's data have them; where the robot has not all of
            them by these names, all its vectors in the order of its space.

    Attributes:
        shapes: name -> shape.
        state_keys, state_dims: parts of "state", and their widths.
    """

    def __init__(self, space: gymnasium.spaces.Space[Any], state_keys: Sequence[str] = ()) -> None:
        self._reader = ObservationReader(space)
        parts: Mapping[str, Any] = space.spaces if isinstance(space, gymnasium.spaces.Dict) else {}
        vectors = [key for key, part in parts.items() if len(part.shape or ()) <= 1]
        self.state_keys: tuple[str, ...] = tuple(vectors or (["state"] if "state" in self._reader.shapes else []))
        self._chosen: gymnasium.spaces.Dict | None = None
        if state_keys and set(state_keys) <= set(vectors):
            self.state_keys = tuple(state_keys)
            chosen = {**{key: parts[key] for key in state_keys}, **{k: p for k, p in parts.items() if k not in vectors}}
            self._chosen = _ordered(chosen)
            self._reader = ObservationReader(self._chosen)
        self.shapes = self._reader.shapes
        widths = [int(np.prod(parts[key].shape)) for key in self.state_keys] if vectors else list(self.shapes.get("state", ()))
        self.state_dims = tuple(widths)

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(name.removeprefix("image.") for name in self.shapes if is_image(name))

    def __call__(self, observation: Any) -> dict[str, NDArray[Any]]:
        """One observation. InputError where it lacks what its space promises, or is not finite."""
        if isinstance(observation, Mapping):
            missing = sorted(set(self._chosen or observation) - set(observation))
            require(not missing, "The robot's observation lacks what its space promises.", key=", ".join(missing),
                    found=", ".join(observation))  # fmt: skip
        read = {name: values[0] for name, values in self._reader.single(observation).items()}
        for name, values in read.items():
            require(values.shape == tuple(self.shapes[name]), "The robot's observation has another shape than its space.", key=name,
                    found=values.shape, expected=self.shapes[name])  # fmt: skip
            require(is_image(name) or np.isfinite(values).all(), "The robot's observation is not finite.", key=name,
                    found=values.tolist() if not is_image(name) else None)  # fmt: skip
        return read


def _ordered(parts: Mapping[str, Any]) -> gymnasium.spaces.Dict:
    """A Dict space in this very order: gymnasium sorts the keys of a plain mapping."""
    return gymnasium.spaces.Dict(list(parts.items()))


class History:
    """The newest observations as an agent of `shapes` and `observation_steps` reads them.

    Args:
        shapes, observation_steps: the agent's.
        episode_seed: decides a coherent agent's coordinates.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], observation_steps: int, episode_seed: int) -> None:
        self.shapes, self.steps = shapes, observation_steps
        self._own = {}
        if COORDINATES in shapes:
            self._own[COORDINATES] = coordinates_of_episode(episode_seed, shapes[COORDINATES][0])
        self._frames: deque[dict[str, NDArray[Any]]] = deque(maxlen=observation_steps)

    def add(self, observation: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One more observation; what the agent reads now: name -> (1, …), with a time axis (1, To, …) where To > 1."""
        seen = {name: self._own.get(name, observation.get(name)) for name in self.shapes}
        frame = {name: np.asarray(values) for name, values in seen.items()}
        self._frames.append(frame)
        while len(self._frames) < self.steps:
            self._frames.append(frame)  # before an episode's first step it is repeated
        if self.steps == 1:
            return {name: values[None] for name, values in frame.items()}
        return {name: np.stack([f[name] for f in self._frames])[None] for name in self.shapes}
