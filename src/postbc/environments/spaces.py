"""gymnasium's spaces as named observations and raw actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from postbc.environments.chunk import Observations
from postbc.errors import InputError, require


class ObservationReader:
    """Observations of a gymnasium space as {"state": (N, S) float32, "image.<key>": (N, C, H, W) uint8}.

    A Box of one axis is "state", a uint8 Box of three an image ("image.pixels" where it has no key), channels last or first. Of a Dict
    the vectors, in the order of the space's keys, are concatenated to "state", and each image keeps its key.

    Args:
        space: of one environment.

    Attributes:
        shapes: name -> shape of one observation.

    Raises:
        InputError: a space that is none of these.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self._nested = isinstance(space, spaces.Dict)
        parts: Mapping[str, Any] = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self._vectors: list[str] = []
        self._images: dict[str, tuple[str, bool]] = {}  # name -> (key, channels last)
        self.shapes: dict[str, tuple[int, ...]] = {}
        width = 0
        for key, part in parts.items():
            known = isinstance(part, spaces.Box) and (len(part.shape) <= 1 or (len(part.shape) == 3 and part.dtype == np.uint8))
            require(known, "This kind of observation is not read.", key=key or "observation_space", found=part,
                    expected="a vector (Box of one axis), an image (uint8 Box of three), or a Dict of them",
                    remedy="wrap the environment, for example in gymnasium.wrappers.FlattenObservation")  # fmt: skip
            if len(part.shape) <= 1:
                self._vectors.append(key)
                width += int(np.prod(part.shape))
                continue
            last = part.shape[-1] in (1, 3, 4) or part.shape[0] not in (1, 3, 4)
            name = key if key.startswith("image.") else f"image.{key or 'pixels'}"
            self._images[name] = (key, last)
            self.shapes[name] = (part.shape[2], *part.shape[:2]) if last else tuple(part.shape)
        if self._vectors:
            self.shapes = {"state": (width,), **self.shapes}

    def __call__(self, batch: Any) -> Observations:
        """Of N environments, as a `VectorEnv` returns them; copies."""
        parts = batch if self._nested else {"": batch}
        result: Observations = {}
        if self._vectors:
            count = len(parts[self._vectors[0]])
            vectors = [np.asarray(parts[key], np.float32).reshape(count, -1) for key in self._vectors]
            result["state"] = np.concatenate(vectors, 1)
        for name, (key, last) in self._images.items():
            result[name] = np.array(np.moveaxis(parts[key], -1, 1) if last else parts[key], np.uint8, order="C")
        return result

    def single(self, observation: Any) -> Observations:
        """Of one environment, N = 1."""
        batch = {k: np.asarray(v)[None] for k, v in observation.items()} if self._nested else np.asarray(observation)[None]
        return self(batch)


class ActionBox:
    """Raw actions within a Box of one axis.

    Raises:
        InputError: another space.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        remedy = "a policy's actions are real numbers: wrap the environment so that it takes a vector of them"
        good = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
        require(
            good, "Actions must be continuous.", key="action_space", found=space, expected="a Box of one axis", remedy=remedy
        )
        assert isinstance(space, spaces.Box)
        require(len(space.shape) == 1, "Actions must be vectors.", key="action_space", found=space, expected="a Box of one axis",
                remedy="give an environment of single steps: chunks are made of it here")  # fmt: skip
        self.low, self.high, self.dtype, self.dim = space.low, space.high, space.dtype, int(space.shape[0])

    @property
    def idle(self) -> NDArray[np.float64]:
        """(A,) what an environment is given whose step nobody looks at."""
        return np.clip(np.zeros(self.dim), self.low, self.high)

    def clip(self, actions: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        return np.clip(actions, self.low, self.high)


def plain_state(value: Any, where: str = "get_state()") -> Any:
    """A simulator's state as nested dicts, lists, arrays and plain values, as checkpoints hold them.

    Raises:
        InputError: something else is in it.
    """
    convert: Callable[[Any, str], Any] = plain_state
    if isinstance(value, Mapping):
        return {str(k): convert(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [convert(v, f"{where}[{k}]") for k, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.copy()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError("An environment's state must be plain data, to be kept in a checkpoint.", key=where, found=type(value).__name__,
                     expected="arrays, numbers and text, in dicts and lists")  # fmt: skip
