"""Rollouts of an agent on fixed episodes, success by both definitions, one record an episode.

**Seeds.** The seed of an episode decides its initial state completely. Evaluation episodes are `EVALUATION_SEED` + 0, + 1, ... (10⁹
and up); whatever collects or trains draws below 10⁹, by construction. So no evaluation state was ever trained on, and every
method, seed and run meets the same states: differences between methods are paired.

**Success.** An episode ends when a whole chunk is successful, or at the horizon. That records both definitions in one run: `success`
(any environment step; robomimic, diffusion_policy) and `chunk_success` (every step of some chunk; DPPO, DSRL: the stricter).

**Random numbers.** The n environments run the episodes j, j + n, j + 2n, ..., and the agent draws for all n at every step: its result
depends on n, and on nothing that runs beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from postbc.agents.base import Agent
from postbc.data.belonging import check_source
from postbc.environments.chunk import ChunkEnv, ChunkStep, Observations, tasks_of
from postbc.environments.registry import Environment, find_environment
from postbc.environments.stacked import make_stacked
from postbc.errors import InputError, require
from postbc.files import write_text
from postbc.policies.base import About, Observation, Shapes
from postbc.progress import progress as progress_bar
from postbc.schemas import Count, CountOrZero, NonNegative, Seed, Share, later, parse, plain, schema
from postbc.seeding import EVALUATION_SEED, evaluation_seeds, make_generator
from postbc.statistics import wilson_interval


@schema
class Episode:
    """What is kept of an episode."""

    seed: Seed
    """The agent's seed."""
    episode_seed: Seed
    """Decides the initial state."""
    success: bool
    """Any environment step was successful."""
    chunk_success: bool
    """Every step of some chunk was successful."""
    steps: CountOrZero
    """Environment steps until the end."""
    first_success_step: CountOrZero | None
    """Environment steps until the first success, or None."""
    total_reward: float
    """Sum of the environment's rewards."""
    diverged: bool
    """The simulation became unstable; counted as it stands."""
    initial_observation: list[float] | None
    """(S,) the first state in raw units; None where there is none among the observations."""
    task: str | None = later(None)
    """Which of the environment's tasks it is of, where there are several."""


@schema
class TaskRate:
    """Success in one of several tasks."""

    task: str
    episodes: Count
    success: Share
    """Share of them with any successful environment step."""
    success_interval: tuple[Share, Share]
    """95 %, Wilson."""

    @staticmethod
    def of(task: str, successes: int, episodes: int) -> TaskRate:
        """So many of so many."""
        return TaskRate(task, episodes, successes / episodes, wilson_interval(successes, episodes))

    @staticmethod
    def pooled(rates: Sequence[TaskRate]) -> TaskRate:
        """All episodes of one task together."""
        episodes = sum(rate.episodes for rate in rates)
        successes = round(sum(rate.success * rate.episodes for rate in rates))
        return TaskRate.of(rates[0].task, successes, episodes)


@schema
class Summary:
    """evaluation.json of `postbc evaluate`."""

    environment: str
    policy: str
    """Where it was read from."""
    method: str | None
    """Of its pretraining; None: unknown."""
    finetuner: str | None
    """dsrl, residual, best-of-n; None: the pretrained policy itself."""
    agent_seed: Seed
    episode_seed: Seed
    """The first."""
    episodes: Count
    horizon: Count
    """Environment steps after which an episode has failed."""
    chunk: Count
    chooses_episodes: bool
    """Whether seeds decide the episodes in this environment."""
    success: Share
    """Share of episodes with any successful environment step."""
    success_interval: tuple[Share, Share]
    """95 %, Wilson."""
    chunk_success: Share
    """Share of episodes with a wholly successful chunk."""
    chunk_success_interval: tuple[Share, Share]
    mean_steps: NonNegative
    diverged: CountOrZero
    """Episodes whose simulation became unstable."""
    covered: tuple[str, ...] = ()
    """Cameras that the agent saw black."""
    tasks: tuple[TaskRate, ...] = later(())
    """By task, where there are several."""


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one agent, in the order of their episode seeds."""

    episodes: tuple[Episode, ...]
    actions: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """Episode seed -> (steps, A) raw actions, if they were recorded: enough to play an episode again."""
    chooses_episodes: bool = field(default=True, compare=False)
    """Whether the environment lets seeds decide its episodes; otherwise they are labels, and other policies meet other states."""

    def outcomes(self, definition: str = "success") -> np.ndarray:
        """(E,) bool, by "success" or "chunk_success"."""
        return np.array([getattr(e, definition) for e in self.episodes], bool)

    @property
    def success_rate(self) -> float:
        """Share of episodes with any successful step."""
        return float(self.outcomes().mean())

    @property
    def chunk_success_rate(self) -> float:
        """Share of episodes with a wholly successful chunk."""
        return float(self.outcomes("chunk_success").mean())

    def interval(self, definition: str = "success", confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the rate: what the E episodes say about this one policy."""
        row = self.outcomes(definition)
        return wilson_interval(int(row.sum()), len(row), confidence)

    @property
    def tasks(self) -> tuple[TaskRate, ...]:
        """Success by task; empty where the environment has one alone."""
        of: dict[str, list[bool]] = {}
        for episode in self.episodes:
            if episode.task is not None:
                of.setdefault(episode.task, []).append(episode.success)
        return tuple(TaskRate.of(task, sum(row), len(row)) for task, row in sorted(of.items())) if len(of) > 1 else ()

    def summary(self) -> dict[str, Any]:
        """The figures of :class:`Summary`."""
        return {
            "agent_seed": self.episodes[0].seed, "episode_seed": self.episodes[0].episode_seed, "episodes": len(self.episodes),
            "success": self.success_rate, "success_interval": list(self.interval()),
            "chunk_success": self.chunk_success_rate, "chunk_success_interval": list(self.interval("chunk_success")),
            "mean_steps": float(np.mean([e.steps for e in self.episodes])), "diverged": sum(e.diverged for e in self.episodes),
            "tasks": self.tasks,
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """One JSON object a line and an episode (actions are not written), atomically."""
        write_text(path, "".join(json.dumps(plain(e), allow_nan=False) + "\n" for e in self.episodes))

    @classmethod
    def load(cls, path: str | Path, episode_seeds: Sequence[int] | None = None, agent_seed: int | None = None) -> Evaluation:
        """Read :meth:`save`'s file.

        Raises:
            InputError: a line is not an episode, an episode is there twice, or (where they are given) the episodes are not those of
                `episode_seeds`, in this order, played with `agent_seed`.
        """
        path = Path(path)
        require(path.is_file(), "There is no such file of episodes.", file=path, expected="episodes.jsonl of `postbc evaluate`")
        episodes = []
        for number, line in enumerate(_lines(path), 1):
            try:
                episodes.append(parse(Episode, json.loads(line)))
            except (ValueError, RecursionError) as error:  # an InputError is a ValueError
                raise InputError(
                    "A line is not an episode.",
                    file=path,
                    key=f"line {number}",
                    found=str(error)[:300],
                    remedy="evaluate again",
                ) from error
        require(episodes, "The file holds no episodes.", file=path, remedy="evaluate again")
        once = len({e.episode_seed for e in episodes}) == len(episodes) and len({e.seed for e in episodes}) == 1
        require(once, "The file is not one evaluation of one agent.", file=path, remedy="evaluate again")
        found = cls(tuple(sorted(episodes, key=lambda e: e.episode_seed)))
        same = episode_seeds is None or [e.episode_seed for e in found.episodes] == list(episode_seeds)
        require(same and agent_seed in (None, episodes[0].seed), "These are the episodes of another evaluation.", file=path,
                remedy="remove the file, and run the same command with --resume")  # fmt: skip
        return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "The file of episodes cannot be read.", file=path, found=str(error), remedy="evaluate again"
        ) from error


def check_sizes(agent: Agent, env: ChunkEnv, file: str | Path | None = None) -> None:
    """InputError where an agent cannot play in an environment: other observations, or actions of another size."""
    check_shapes(agent.shapes, agent.action_dim, env, file)


def check_shapes(shapes: Shapes, action_dim: int, env: ChunkEnv, file: str | Path | None = None) -> None:
    """InputError where what observes `shapes` and acts in `action_dim` dimensions cannot play in an environment."""
    remedy = "take a policy that was trained on this task, with these observations"
    for name, shape in shapes.items():
        there = env.shapes.get(name)
        require(there is not None, "The policy reads an observation that the environment does not have.", file=file, key=name,
                found=f"the environment has {', '.join(env.shapes)}", remedy=remedy)  # fmt: skip
        require(tuple(there or ()) == tuple(shape), "The policy's observation size is not the environment's.", file=file, key=name,
                found=f"policy {tuple(shape)}", expected=f"environment {tuple(there or ())}", remedy=remedy)  # fmt: skip
    require(action_dim == env.action_dim, "The policy's action size is not the environment's.", file=file, key="action_dim",
            found=f"policy {action_dim}", expected=f"environment {env.action_dim}", remedy=remedy)  # fmt: skip


def check_plays(
    agent: Agent,
    about: About,
    environment: Environment,
    horizon: int,
    file: str | Path | None = None,
    allow_version_mismatch: bool = False,
) -> list[str]:
    """Before anything is written: does the environment run here, does the agent's data belong to it, do the sizes fit?

    Returns:
        What is not known on one of the sides.

    Raises:
        InputError: one of them does not.
    """
    environment.check()
    found = check_source(
        about.facts, environment.belonging(agent.shapes), environment.name, file=str(file or "the policy"),
        allow_version_mismatch=allow_version_mismatch,
    )  # fmt: skip
    env = make_stacked(
        environment.make, 1, shapes=agent.shapes, observation_steps=agent.observation_steps, chunk=agent.chunk, horizon=horizon,
        terminate_on="never",
    )  # fmt: skip
    try:
        check_sizes(agent, env, file)
    finally:
        env.close()
    return found


def to_tensors(observation: Observations, agent: Agent) -> Observation:
    """What the agent reads, on its device."""
    return {name: torch.as_tensor(observation[name]).to(agent.device) for name in agent.shapes}


@torch.inference_mode()
def evaluate(
    agent: Agent,
    environment: Environment | str,
    *,
    episodes: int = 200,
    seed: int = EVALUATION_SEED,
    num_envs: int = 10,
    agent_seed: int = 0,
    horizon: int | None = None,
    record_actions: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Run the agent on the episodes `evaluation_seeds(episodes, seed)`.

    Args:
        environment: or its name; it is made, and closed at the end.
        num_envs: n environments side by side (at most one an episode); part of the random stream.
        agent_seed: of the agent's random numbers, and what its episodes are labelled with.
        horizon: environment steps after which an episode has failed; default: the environment's.
        record_actions: keep the raw actions (for videos).

    Raises:
        InputError: seeds that could be those of training, or an agent of other observations or actions than the environment's.
    """
    environment = find_environment(environment) if isinstance(environment, str) else environment
    seeds = evaluation_seeds(episodes, seed)
    require(num_envs >= 1, "An evaluation needs at least one environment.", key="num_envs", found=num_envs)
    n = min(num_envs, episodes)
    generator = make_generator(agent_seed, "evaluation/acting", agent.device, seed - EVALUATION_SEED)
    limit = environment.horizon if horizon is None else horizon
    with progress_bar("evaluate", episodes) if progress else nullcontext() as bar:  # it says "starting" while code compiles
        env = make_stacked(
            environment.make, n, shapes=agent.shapes, observation_steps=agent.observation_steps, chunk=agent.chunk, horizon=limit,
            terminate_on="chunk_success",
        )  # fmt: skip
        try:
            check_sizes(agent, env)
            book = _Book(agent_seed, n, seeds, record_actions)
            observation = env.reset(book.seeds())
            book.begin(np.ones(n, bool), observation, tasks_of(env))
            while len(book.finished) < episodes:
                chunk = agent.act(to_tensors(observation, agent), generator).cpu().numpy()
                step = env.step(chunk)
                observation, ended = step.observation, book.step(chunk, step)
                if bar is not None and ended.any():
                    bar.advance(int(ended.sum()), success=book.running_success)
                again = book.next(ended)
                if again.any():
                    observation = env.reset(book.seeds(), again)
                    book.begin(again, observation, tasks_of(env))
        finally:
            env.close()
    return Evaluation(tuple(book.finished[k] for k in sorted(book.finished)), book.actions, env.chooses_episodes)


class _Book:
    """The book-keeping of :func:`evaluate`: which episode each of the n environments runs, and what has happened in it."""

    def __init__(self, agent_seed: int, n: int, episode_seeds: np.ndarray, record_actions: bool) -> None:
        self.agent_seed, self.n, self.episode_seeds = agent_seed, n, episode_seeds
        self.current = np.arange(n)  # index of the episode; one beyond the last: idle
        self.finished: dict[int, Episode] = {}
        self.actions: dict[int, np.ndarray] = {}
        self.steps, self.first, self.reward = np.zeros(n, int), np.zeros(n, int), np.zeros(n)
        self.success, self.chunk_success = np.zeros(n, bool), np.zeros(n, bool)
        self.initial: list[list[float] | None] = [None] * n
        self.tasks: list[str | None] = [None] * n
        self.played: list[list[np.ndarray]] | None = [[] for _ in range(n)] if record_actions else None

    @property
    def running_success(self) -> float:
        return float(np.mean([e.success for e in self.finished.values()]))

    def seeds(self) -> np.ndarray:
        """(n,) episode seeds; those of environments without an episode left mean nothing."""
        return self.episode_seeds[np.minimum(self.current, len(self.episode_seeds) - 1)]

    def next(self, ended: np.ndarray) -> np.ndarray:
        """Give the ended environments their next episodes; returns (n,) which of them have one."""
        self.current[ended] += self.n
        return ended & (self.current < len(self.episode_seeds))

    def begin(self, mask: np.ndarray, observation: Observations, tasks: Sequence[str | None]) -> None:
        self.steps[mask], self.first[mask], self.reward[mask] = 0, 0, 0.0
        self.success[mask], self.chunk_success[mask] = False, False
        for i in np.flatnonzero(mask):
            state = observation["state"][i] if "state" in observation else None
            self.tasks[i] = tasks[int(i)]
            self.initial[i] = None if state is None else np.asarray(state, float).reshape(-1, state.shape[-1])[-1].tolist()
            if self.played is not None:
                self.played[i] = []

    def step(self, chunk: np.ndarray, step: ChunkStep) -> np.ndarray:
        """Book one vector step; returns (n,) in which environments an episode ended."""
        new = step.success & ~self.success
        self.first[new] = self.steps[new] + 1 + np.argmax(step.successes[new], 1)
        self.steps += step.num_steps
        self.success |= step.success
        self.chunk_success |= step.chunk_success
        self.reward += step.rewards.sum(1)
        active = self.current < len(self.episode_seeds)
        if self.played is not None:
            for i in np.flatnonzero(active):
                self.played[i].append(chunk[i, : step.num_steps[i]])
        ended = step.ended & active
        for i in np.flatnonzero(ended):
            episode_seed = int(self.episode_seeds[self.current[i]])
            self.finished[episode_seed] = Episode(
                self.agent_seed, episode_seed, bool(self.success[i]), bool(self.chunk_success[i]), int(self.steps[i]),
                int(self.first[i]) if self.success[i] else None, float(self.reward[i]), bool(step.diverged[i]), self.initial[i],
                self.tasks[i],
            )  # fmt: skip
            if self.played is not None:
                self.actions[episode_seed] = np.concatenate(self.played[i])
        return ended
