"""Environments of action chunks: the contract that everything which plays relies on (adapter.py makes it of any `VectorEnv`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from postbc.errors import require

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
        return np.asarray(self.successes.any(1))

    @property
    def chunk_success(self) -> NDArray[np.bool_]:
        """(N,) all T were (DSRL's definition)."""
        return np.asarray(self.successes.all(1))


class ChunkEnv(Protocol):
    """N environments that play chunks. An ended one waits, and stepping it does nothing, until :meth:`reset` begins its next episode.

    Attributes:
        num_envs: N.
        chunk: T.
        action_dim: A.
        shapes: name -> shape of one observation.
        horizon: actions of an episode until it is truncated.
        chooses_episodes: whether `seeds` decide the episodes; otherwise they are the environment's own.

    One of several tasks also has `task_names`, a list (N,) of those that its environments are in, and `vocabulary`, a tuple of the
    names of all that "language" tells apart. One that draws cameras has `set_drawing(on)`, a bool: whether what follows draws; while it
    does not, frames are the former ones.
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


def tasks_of(env: ChunkEnv) -> list[str | None]:
    """(N,) the tasks that the environments are in; None where there is only one and nobody names it."""
    return list(getattr(env, "task_names", [None] * env.num_envs))


SEED_LIMIT = 2**32  # of NumPy's RandomState, from which robosuite draws initial states


def check_options(num_envs: int, chunk: int, horizon: int, terminate_on: str) -> None:
    """InputError for what no environment of chunks can be made with."""
    for name, value in {"num_envs": num_envs, "chunk": chunk, "horizon": horizon}.items():
        require(isinstance(value, int) and value >= 1, f"{name} must be at least 1.", key=name, found=value)
    known = ("success", "chunk_success", "never")
    require(
        terminate_on in known,
        "There is no such termination.",
        key="terminate_on",
        found=terminate_on,
        expected=", ".join(known),
    )


def check_reset(
    num_envs: int, seeds: Sequence[int] | np.ndarray, mask: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Seeds (N,) int64 and mask (N,) bool of a reset. InputError: other lengths, or a chosen seed outside [0, 2³²)."""
    chosen = np.ones(num_envs, bool) if mask is None else np.asarray(mask, bool)
    require(
        chosen.shape == (num_envs,),
        "The mask needs one entry an environment.",
        key="mask",
        found=chosen.shape,
        expected=num_envs,
    )
    require(len(seeds) == num_envs, "Seeds need one entry an environment.", key="seeds", found=len(seeds), expected=num_envs)
    numbers = np.asarray([int(s) if on else 0 for s, on in zip(seeds, chosen)], np.int64)
    good = ((numbers >= 0) & (numbers < SEED_LIMIT)).all()
    require(good, "A seed is out of range.", key="seeds", found=numbers.tolist(), expected="0 ≤ seed < 2³²")
    return numbers, chosen


def check_chunks(chunks: Any, shape: tuple[int, ...], started: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Chunks (N, T, A) as float64. InputError: another shape, not finite, or no environment has begun an episode."""
    commands: NDArray[np.float64] = np.ascontiguousarray(chunks, np.float64)
    require(commands.shape == shape, "Actions have the wrong shape.", found=commands.shape, expected=shape)
    broken = np.flatnonzero(~np.isfinite(commands).all((1, 2))).tolist()
    require(not broken, "Actions are not finite.", found=f"environments {broken}")
    require(started.any(), "An environment must be reset before its first step.", found="step before reset")
    return commands
