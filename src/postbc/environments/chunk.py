"""Environments of action chunks: the contract that everything which plays relies on, and the one adapter that makes it of any `VectorEnv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

#: Name -> (N, ...): "state" (N, S) float32, "image.<camera>" (N, C, H, W) uint8, "language" (N, E) float32; raw units.
Observations = dict[str, np.ndarray]
Termination = Literal["success", "chunk_success", "never"]


@dataclass
class ChunkStep:
    """What happened while N environments played a chunk of T actions each, which stops where an episode ends."""

    observation: Observations
    """After the chunk; of an ended episode its own last one, never the first of the next."""
    rewards: NDArray[np.float64]
    """(N, T) the environment's own, 0 where nothing was executed."""
    successes: NDArray[np.bool_]
    """(N, T) whether the task was solved after that action, False where nothing was executed."""
    num_steps: NDArray[np.int64]
    """(N,) executed actions: 0 for an environment that waits for its reset."""
    terminated: NDArray[np.bool_]
    """(N,) the episode is over for good (success, as asked for, or the environment's own end)."""
    truncated: NDArray[np.bool_]
    """(N,) it ran out of time (or diverged): its value goes on."""
    diverged: NDArray[np.bool_]
    """(N,) the simulation became unstable."""
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> NDArray[np.bool_]:
        """(N,)."""
        return self.terminated | self.truncated

    @property
    def success(self) -> NDArray[np.bool_]:
        """(N,) any action's step was successful."""
        return self.successes.any(1)

    @property
    def chunk_success(self) -> NDArray[np.bool_]:
        """(N,) all T were (DSRL's definition)."""
        return self.successes.all(1)


class ChunkEnv(Protocol):
    """N environments that play chunks. An ended one waits, and stepping it does nothing, until :meth:`reset` begins its next episode.

    Attributes:
        num_envs: N.
        chunk: T.
        action_dim: A.
        shapes: name -> shape of one observation.
        horizon: actions of an episode until it is truncated.
        chooses_episodes: whether `seeds` decide the episodes; otherwise they are the environment's own.
    """

    num_envs: int
    chunk: int
    action_dim: int
    shapes: Mapping[str, tuple[int, ...]]
    horizon: int
    chooses_episodes: bool

    def reset(self, seeds: Sequence[int] | np.ndarray, mask: NDArray[np.bool_] | None = None) -> Observations:
        """Begin episodes with exactly these `seeds` (N,) in the environments of `mask` (N,) (default all); the observations of all."""
        ...

    def step(self, chunks: NDArray[np.floating[Any]]) -> ChunkStep:
        """Play raw chunks (N, T, A)."""
        ...

    def get_state(self) -> dict[str, Any] | None:
        """Everything that the future depends on, plain data and arrays; None where the environment cannot say."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`get_state`."""
        ...

    def close(self) -> None: ...
