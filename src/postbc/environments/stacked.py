"""Environments as an agent observes them: the newest few observations, where it looks at several; the posterior's coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from postbc.data.episodes import COORDINATES
from postbc.environments.chunk import ChunkEnv, ChunkStep, Observations, Termination, check_chunks, tasks_of
from postbc.environments.coordinates import CoordinatesEnv

if TYPE_CHECKING:
    from postbc.environments.registry import Make


def make_stacked(
    make: Make,
    num_envs: int,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    observation_steps: int,
    chunk: int,
    horizon: int,
    terminate_on: Termination,
) -> ChunkEnv:
    """N environments as `make` makes them, for who reads `shapes`.

    With `observation_steps` > 1 their observations have a time axis after N; the posterior's coordinates are among them where they are
    read.
    """

    def made(chunk: int, terminate_on: Termination) -> ChunkEnv:
        env = make(num_envs, chunk=chunk, horizon=horizon, terminate_on=terminate_on)
        return CoordinatesEnv(env, shapes[COORDINATES][0]) if COORDINATES in shapes else env

    if observation_steps == 1:
        return made(chunk, terminate_on)
    return StackedEnv(made(1, "success" if terminate_on == "success" else "never"), observation_steps, chunk, terminate_on)


class StackedEnv:
    """Observations (N, To, ...) of the last To environment steps, the newest last; before an episode's first step it is repeated.

    Args:
        env: with chunk 1, which ends episodes at the first success if `terminate_on` says so, else at the horizon only.
        observation_steps: To.
        chunk: T.
    """

    def __init__(self, env: ChunkEnv, observation_steps: int, chunk: int, terminate_on: Termination) -> None:
        self.env, self.steps, self.chunk, self.terminate_on = env, observation_steps, chunk, terminate_on
        self.num_envs, self.action_dim, self.shapes = env.num_envs, env.action_dim, env.shapes
        self.horizon, self.chooses_episodes = env.horizon, env.chooses_episodes
        self.vocabulary: tuple[str, ...] = getattr(env, "vocabulary", ())
        self._waiting = np.ones(self.num_envs, bool)
        self._frames: Observations = {}

    @property
    def task_names(self) -> list[str | None]:
        """(N,) as in :class:`postbc.environments.chunk.ChunkEnv`."""
        return tasks_of(self.env)

    def reset(self, seeds: Sequence[int] | np.ndarray, mask: NDArray[np.bool_] | None = None) -> Observations:
        mask = np.ones(self.num_envs, bool) if mask is None else np.asarray(mask, bool)
        for name, value in self.env.reset(seeds, mask).items():
            if name not in self._frames:
                self._frames[name] = np.repeat(value[:, None], self.steps, 1)
            self._frames[name][mask] = value[mask, None]
        self._waiting[mask] = False
        return self._observation()

    def _observation(self) -> Observations:
        return {name: frames.copy() for name, frames in self._frames.items()}

    def step(self, chunks: NDArray[np.floating[Any]]) -> ChunkStep:
        n, t = self.num_envs, self.chunk
        commands = check_chunks(chunks, (n, t, self.action_dim), np.array([bool(self._frames)]))
        rewards, successes, executed = np.zeros((n, t)), np.zeros((n, t), bool), np.zeros(n, np.int64)
        running = ~self._waiting
        terminated, truncated, diverged = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, bool)
        for k in range(t):
            on = running & ~terminated & ~truncated
            if not on.any():
                break
            step = self.env.step(commands[:, k : k + 1])
            taken = on & (step.num_steps > 0)
            rewards[on, k], successes[on, k] = step.rewards[on, 0], step.successes[on, 0]
            executed += np.where(on, step.num_steps, 0)
            terminated, truncated, diverged = (
                so_far | (on & now)
                for so_far, now in ((terminated, step.terminated), (truncated, step.truncated), (diverged, step.diverged))
            )
            for name, frames in self._frames.items():
                frames[taken] = np.concatenate([frames[taken, 1:], step.observation[name][taken, None]], 1)
        if self.terminate_on == "chunk_success":
            whole = running & successes.all(1) & ~diverged
            terminated, truncated = terminated | whole, truncated & ~whole
        self._waiting |= terminated | truncated
        return ChunkStep(self._observation(), rewards, successes, executed, terminated, truncated, diverged)

    def get_state(self) -> dict[str, Any] | None:
        inner = self.env.get_state()
        return None if inner is None else {"inner": inner, "waiting": self._waiting.copy(), "frames": self._observation()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.env.set_state(state["inner"])
        self._waiting[:] = state["waiting"]
        self._frames = {name: np.array(frames) for name, frames in state["frames"].items()}

    def close(self) -> None:
        self.env.close()
