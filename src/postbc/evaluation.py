"""Rollouts of a policy: every member on the same fixed episodes, success by both definitions, one record an episode.

**Seeds.** The seed of an episode decides its initial state completely. Evaluation episodes are `EVALUATION_SEED` + 0, + 1, ... (10⁹
and up); demonstrations, rollouts and training episodes use seeds below 10⁹. So no evaluation state was ever trained on, and every
method, member and run meets the same states: differences between methods are paired.

**Success.** An episode ends when a whole chunk is successful, or at the horizon. That records both definitions in one run: `success`
(any environment step; robomimic, diffusion_policy) and `chunk_success` (every step of some chunk; DPPO, DSRL: the stricter).

**Members.** A member's n environments run its episodes j, j + n, j + 2n, ... and its own generator draws (n, ...) numbers a step, so
its result depends on n but not on which members run beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from postbc.errors import InputError
from postbc.nn import Generators, make_generators
from postbc.policies.base import NormalizationTensors, Policy
from postbc.progress import progress as progress_bar
from postbc.runs import write_text
from postbc.statistics import wilson_interval

EVALUATION_SEED = 1_000_000_000
STREAM = 7_000  # of the members' generators: never that of training
MakeEnv = Callable[[int], VectorEnv]


def evaluation_seeds(episodes: int, seed: int = EVALUATION_SEED) -> np.ndarray:
    """(E,) int64 episode seeds `seed`, `seed` + 1, ...; ValueError if they could be those of training (or exceed NumPy's 2³² − 1)."""
    if episodes < 1:
        raise InputError("An evaluation needs at least one episode.", key="episodes", found=episodes, expected=">= 1")
    if not EVALUATION_SEED <= seed <= 2**32 - episodes:
        raise ValueError(f"evaluation seeds lie in [{EVALUATION_SEED}, 2**32), found {seed} + {episodes}")
    return seed + np.arange(episodes, dtype=np.int64)


class Actor(Protocol):
    """What acts in an environment: raw observations in, raw action chunks out."""

    members: int
    observation_dim: int
    chunk: int
    action_dim: int

    def act(self, observation: Tensor, generators: Generators) -> Tensor:
        """Raw (M, n, S) float32 -> raw chunks (M, n, T, A); randomness from `generators`, one a member."""
        ...


class PolicyActor:
    """A policy of normalised units in an environment of raw ones: the one place where the two meet.

    Args:
        policy: M members.
        normalization: raw <-> normalised; default `policy.normalization`.
    """

    def __init__(self, policy: Policy, normalization: NormalizationTensors | None = None) -> None:
        self.policy = policy
        self.normalization: NormalizationTensors = normalization or policy.normalization  # type: ignore[attr-defined]
        self.members, self.observation_dim = policy.members, policy.observation_dim
        self.chunk, self.action_dim = policy.chunk, policy.action_dim
        self.seeds: Sequence[int] = getattr(policy, "seeds", range(policy.members))

    def act(self, observation: Tensor, generators: Generators) -> Tensor:
        """Raw (M, n, S) -> raw chunks (M, n, T, A): normalise, sample, undo."""
        observation = observation.to(self.normalization.observation_low.device)
        chunk = self.policy.sample(self.normalization.normalize_observation(observation), generators=generators)
        return self.normalization.unnormalize_chunk(chunk)


@dataclass(frozen=True)
class Episode:
    """What is kept of an episode."""

    member: int
    """Index of the member within the policy."""
    seed: int
    """The member's seed."""
    episode_seed: int
    """Decides the initial state."""
    success: bool
    """Any environment step was successful."""
    chunk_success: bool
    """Every step of some chunk was successful."""
    steps: int
    """Environment steps until the end."""
    first_success_step: int | None
    """Environment steps until the first success, or None."""
    total_reward: float
    """Sum of the environment's rewards."""
    diverged: bool
    """The simulation became unstable; counted as it stands."""
    initial_observation: list[float]
    """(S,) raw units."""


@dataclass(frozen=True)
class Evaluation:
    """Episodes of all members, member by member, in the order of their episode seeds."""

    episodes: tuple[Episode, ...]
    actions: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """(member, episode seed) -> (steps, A) raw actions, if they were recorded: enough to play an episode again."""

    @property
    def members(self) -> int:
        """M."""
        return 1 + max(e.member for e in self.episodes)

    def outcomes(self, definition: str = "success") -> np.ndarray:
        """(M, E) bool, by "success" or "chunk_success"; columns are the same episode seeds for every member."""
        rows = [[getattr(e, definition) for e in self.episodes if e.member == m] for m in range(self.members)]
        return np.array(rows, bool)

    @property
    def success_rate(self) -> np.ndarray:
        """(M,) share of episodes with any successful step."""
        return self.outcomes().mean(1)

    @property
    def chunk_success_rate(self) -> np.ndarray:
        """(M,) share of episodes with a wholly successful chunk."""
        return self.outcomes("chunk_success").mean(1)

    def interval(self, member: int, definition: str = "success", confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of a member's rate: what its E episodes say about this one policy."""
        row = self.outcomes(definition)[member]
        return wilson_interval(int(row.sum()), len(row), confidence)

    def summary(self) -> list[dict[str, Any]]:
        """One dict a member: seed, episodes, both rates with their Wilson intervals, mean steps, diverged episodes."""
        table = []
        for m in range(self.members):
            mine = [e for e in self.episodes if e.member == m]
            table.append(
                {
                    "member": m, "seed": mine[0].seed, "episodes": len(mine),
                    "success": float(self.success_rate[m]), "success_interval": list(self.interval(m)),
                    "chunk_success": float(self.chunk_success_rate[m]),
                    "chunk_success_interval": list(self.interval(m, "chunk_success")),
                    "mean_steps": float(np.mean([e.steps for e in mine])), "diverged": sum(e.diverged for e in mine),
                }
            )  # fmt: skip
        return table

    def save(self, path: str | Path) -> None:
        """One JSON object a line and an episode (actions are not written), atomically."""
        write_text(path, "".join(json.dumps(asdict(e), allow_nan=False) + "\n" for e in self.episodes))

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read :meth:`save`'s file. InputError if a line is not an episode."""
        path, names = Path(path), {f.name for f in fields(Episode)}
        if not path.is_file():
            raise InputError("There is no such file of episodes.", file=path, expected="episodes.jsonl of `postbc evaluate`")
        episodes = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                values = json.loads(line)
                episodes.append(Episode(**{k: values[k] for k in names}))
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    "A line is not an episode.", file=path, key=f"line {number}", found=repr(error), remedy="evaluate again"
                ) from error
        if not episodes:
            raise InputError("The file holds no episodes.", file=path, remedy="evaluate again")
        return cls(tuple(sorted(episodes, key=lambda e: (e.member, e.episode_seed))))


def _check_sizes(actor: Actor, env: VectorEnv) -> None:
    observed, acted = env.single_observation_space.shape or (), env.single_action_space.shape or ()
    for what, here, there in (("observation", actor.observation_dim, observed), ("action", actor.action_dim, acted)):
        if there and there[-1] != here:
            raise InputError(
                f"The policy's {what} size is not the environment's.", key=f"{what}_dim", found=f"policy {here}",
                expected=f"environment {there[-1]}", remedy="evaluate a policy that was trained on this task",
            )  # fmt: skip
    mode = env.metadata.get("autoreset_mode")
    if mode is not None and mode != AutoresetMode.DISABLED:
        raise ValueError(f"evaluate resets environments itself: autoreset 'disabled' is expected, found {mode}")


@torch.inference_mode()
def evaluate(
    actor: Actor,
    make_env: MakeEnv,
    *,
    episodes: int = 200,
    seed: int = EVALUATION_SEED,
    envs_per_member: int = 10,
    policy_seeds: Sequence[int] | None = None,
    record_actions: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Run every member on the episodes `evaluation_seeds(episodes, seed)`.

    Args:
        actor: M members.
        make_env: N -> a chunked `VectorEnv` of N environments that ends an episode at `chunk_success`, with autoreset disabled, whose
            `reset` takes options `reset_mask` (N,) and `seeds` (N,), and whose info has success, chunk_success, num_steps,
            step_rewards and diverged. An ended one waits: stepping it does nothing. It is closed at the end.
        envs_per_member: n; N = M·n, member m has the environments m·n, ..., m·n + n − 1.
        policy_seeds: one a member, of its generator; default the actor's `seeds`, or 0, 1, ....
        record_actions: keep the raw actions (for videos).

    Raises:
        InputError: the policy's observation or action size is not the environment's.
    """
    seeds = list(policy_seeds if policy_seeds is not None else getattr(actor, "seeds", range(actor.members)))
    if len(seeds) != actor.members:
        raise ValueError(f"{len(seeds)} policy seeds for {actor.members} members")
    episode_seeds = evaluation_seeds(episodes, seed)
    n = min(envs_per_member, episodes)
    generators = make_generators(seeds, STREAM + seed - EVALUATION_SEED)
    env = make_env(actor.members * n)
    try:
        _check_sizes(actor, env)
        recorder = _Recorder(seeds, n, episode_seeds, record_actions)
        observation, _ = env.reset(options={"reset_mask": np.ones(len(recorder.current), bool), "seeds": recorder.seeds()})
        recorder.begin(np.ones(len(recorder.current), bool), observation)
        with progress_bar("evaluate", actor.members * episodes) if progress else nullcontext() as bar:
            while not recorder.done:
                raw = torch.as_tensor(observation, dtype=torch.float32).view(actor.members, n, -1)
                chunk = actor.act(raw, generators).flatten(0, 1).cpu().numpy()
                observation, reward, terminated, truncated, info = env.step(chunk)
                ended = recorder.step(chunk, reward, terminated | truncated | info["diverged"], info)
                if bar is not None and ended.any():
                    bar.advance(int(ended.sum()), success=recorder.running_success)
                again = recorder.next(ended)
                if again.any():
                    observation, _ = env.reset(options={"reset_mask": again, "seeds": recorder.seeds()})
                    recorder.begin(again, observation)
    finally:
        env.close()
    return recorder.evaluation()


class _Recorder:
    """The book-keeping of :func:`evaluate`: which episode each of the N environments runs, and what has happened in it."""

    def __init__(self, policy_seeds: Sequence[int], n: int, episode_seeds: np.ndarray, record_actions: bool) -> None:
        members, self.n, self.policy_seeds, self.episode_seeds = len(policy_seeds), n, policy_seeds, episode_seeds
        self.current = np.tile(np.arange(n), members)  # index of the episode; one beyond the last: idle
        self.finished: dict[tuple[int, int], Episode] = {}
        self.actions: dict[tuple[int, int], np.ndarray] = {}
        self.steps, self.first = np.zeros(members * n, int), np.zeros(members * n, int)
        self.success, self.chunk_success = np.zeros(members * n, bool), np.zeros(members * n, bool)
        self.reward = np.zeros(members * n)
        self.initial: list[list[float]] = [[] for _ in self.current]
        self.played: list[list[np.ndarray]] | None = [[] for _ in self.current] if record_actions else None

    @property
    def done(self) -> bool:
        return len(self.finished) == len(self.policy_seeds) * len(self.episode_seeds)

    @property
    def running_success(self) -> float:
        return float(np.mean([e.success for e in self.finished.values()]))

    def seeds(self) -> np.ndarray:
        """(N,) episode seeds; those of environments without an episode left mean nothing."""
        return self.episode_seeds[np.minimum(self.current, len(self.episode_seeds) - 1)]

    def next(self, ended: np.ndarray) -> np.ndarray:
        """Give the ended environments their next episodes; returns (N,) which of them have one."""
        self.current[ended] += self.n
        return ended & (self.current < len(self.episode_seeds))

    def begin(self, mask: np.ndarray, observation: np.ndarray) -> None:
        self.steps[mask], self.first[mask], self.reward[mask] = 0, 0, 0.0
        self.success[mask], self.chunk_success[mask] = False, False
        for i in np.flatnonzero(mask):
            self.initial[i] = np.asarray(observation[i], float).tolist()
            if self.played is not None:
                self.played[i] = []

    def step(self, chunk: np.ndarray, reward: np.ndarray, ended: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        """Book one vector step; returns (N,) in which environments an episode ended."""
        taken, success = np.asarray(info["num_steps"], int), np.asarray(info["success"], bool)
        new = success & ~self.success
        # a success pays the chunk's highest reward (0 of −1/0, 1 of 0/1), so its first occurrence is the first success
        self.first[new] = self.steps[new] + 1 + np.argmax(info["step_rewards"][new], 1)
        self.steps += taken
        self.success |= success
        self.chunk_success |= np.asarray(info["chunk_success"], bool)
        self.reward += reward
        active = self.current < len(self.episode_seeds)
        if self.played is not None:
            for i in np.flatnonzero(active):
                self.played[i].append(chunk[i, : taken[i]])
        ended = ended & active
        for i in np.flatnonzero(ended):
            m, episode_seed = int(i) // self.n, int(self.episode_seeds[self.current[i]])
            self.finished[m, episode_seed] = Episode(
                m, int(self.policy_seeds[m]), episode_seed, bool(self.success[i]), bool(self.chunk_success[i]), int(self.steps[i]),
                int(self.first[i]) if self.success[i] else None, float(self.reward[i]), bool(info["diverged"][i]), self.initial[i],
            )  # fmt: skip
            if self.played is not None:
                self.actions[m, episode_seed] = np.concatenate(self.played[i])
        return ended

    def evaluation(self) -> Evaluation:
        return Evaluation(tuple(self.finished[k] for k in sorted(self.finished)), self.actions)
