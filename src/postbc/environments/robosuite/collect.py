"""Record scripted operators in the simulator: only successes are kept, and the same seed gives the same demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from postbc.data.episodes import LOW_DIM_KEYS, Dataset, Episode, is_image
from postbc.data.scripted.hands import Habits, ScriptedOperators, geometry_of
from postbc.data.scripted.operators import OPERATORS, Operator, find_operators
from postbc.environments.chunk import Observations, tasks_of
from postbc.environments.robosuite import make
from postbc.errors import require
from postbc.seeding import episode_seed

#: Called after every episode with the operator's name, whether it succeeded, and its length in steps.
Progress = Callable[[str, bool, int], None]


@dataclass(frozen=True, eq=False)
class Collection:
    """What :func:`collect` returns."""

    dataset: Dataset
    """The successes, people taking turns; filters for each operator, each quality and each habit (`side=left`)."""
    attempts: dict[str, tuple[int, int]]
    """Operator (or, with several tasks, task) -> (successes, episodes)."""
    model_xml: dict[str, str]
    """Episode name -> MJCF."""
    habits: dict[str, dict[str, float]] = field(default_factory=dict)
    """Episode name -> what of its habits is a number, as :meth:`ScriptedOperators.habits` names it."""


def is_over(successes: Sequence[bool], horizon: int, tail: int) -> bool:
    """Solved for more than `tail` steps on end (what stands for a moment only, while it is put down, is not done), or out of time."""
    held = next((n for n, solved in enumerate(reversed(successes)) if not solved), len(successes))
    return held > tail or (held == 0 and len(successes) >= horizon)


@dataclass(eq=False)
class _Episode:
    """One running attempt: what has been recorded so far."""

    person: Person
    attempt: int
    observations: dict[str, list[np.ndarray]] = field(default_factory=dict)
    actions: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)
    model_xml: str = ""
    habits: Habits = field(default_factory=dict)
    task: str | None = None

    @property
    def succeeded(self) -> bool:
        """Solved, and still so at the last recorded step: an object that was thrown up and fell is no demonstration."""
        return self.successes[-1]

    def recorded(self, name: str) -> Episode:
        n = len(self.actions)
        return Episode(
            {name: np.stack(rows) for name, rows in self.observations.items()},
            np.stack(self.actions),
            rewards=np.array(self.successes, dtype=np.float32),
            dones=np.arange(n) == n - 1,
            states=np.stack(self.states),
            name=name,
            operator=self.person.operator.name,
            episode_seed=self.person.seed_of(self.attempt),
            task=self.task,
        )


class Person:
    """One operator's attempts 0, 1, 2, …: as many as it takes for ``quota`` successes, and no more whatever runs in parallel.

    Args:
        identity: the collection's seed, and numbers that tell people apart.
        labels: filters that this one's demonstrations belong to; the first is what is counted.
        seed_of: the seed of the environment in an attempt.
    """

    def __init__(
        self, operator: Operator, quota: int, identity: Sequence[int], labels: Sequence[str], seed_of: Callable[[int], int]
    ) -> None:
        self.operator, self.quota, self.launched, self.running = operator, quota, 0, 0
        self.identity, self.labels, self.seed_of = tuple(identity), tuple(labels), seed_of
        self.kept: dict[int, _Episode] = {}

    @property
    def missing(self) -> int:
        """Attempts that have to be launched now, should all running ones succeed."""
        return self.quota - len(self.kept) - self.running

    def launch(self) -> _Episode:
        require(self.launched < 20 * self.quota + 20, "An operator hardly ever succeeds at this task.", key=self.operator.name,
                found=f"{len(self.kept)} successes in {self.launched} episodes",
                remedy="leave this operator out, or allow longer episodes (horizon)")  # fmt: skip
        episode = _Episode(self, self.launched)
        self.launched += 1
        self.running += 1
        return episode

    def finish(self, episode: _Episode) -> None:
        self.running -= 1
        if episode.succeeded:
            self.kept[episode.attempt] = episode


def collect(
    task: str = "Lift",
    num: int = 50,
    operators: Sequence[str] = ("all",),
    seed: int = 0,
    *,
    num_envs: int = 8,
    horizon: int | None = None,
    tail: int = 5,
    native: bool = True,
    images: bool = False,
    image_size: int | None = None,
    progress: Progress | None = None,
) -> Collection:
    """Let operators demonstrate until ``num`` episodes have succeeded, equally many of each (the first ones one more).

    Args:
        task: "Lift", "Can" or "Square".
        num: successes wanted in all.
        operators: names, qualities ("proficient", "better", "okay", "worse") or "all".
        seed: decides everything; ``num_envs`` does not change the result.
        num_envs: environments run side by side.
        horizon: control steps after which an unsolved episode counts as failed; default the task's (Lift 250, Can and Square 450).
        tail: steps that it has to stay solved for; they are kept.
        native: the compiled control loop (fast) instead of robosuite's own.
        images: record two cameras of `image_size` pixels a side (default robomimic's 84), and not the object.
        progress: called after each episode.

    Raises InputError for an unknown task or operator, fewer than one demonstration, or an operator that hardly ever succeeds.
    """
    require(num >= 1, "Nothing to collect.", key="num", found=num, expected=">= 1")
    require(num_envs >= 1, "At least one environment is needed.", key="num_envs", found=num_envs, expected=">= 1")
    require(seed >= 0, "The seed is not negative.", key="seed", found=seed, expected=">= 0")
    require(tail >= 0, "The tail is not negative.", key="tail", found=tail, expected=">= 0")
    chosen = find_operators(operators)
    horizon = geometry_of(task).patience if horizon is None else horizon
    people = []
    for operator, quota in zip(chosen, shares(num, len(chosen))):
        identity = seed, list(OPERATORS).index(operator.name)
        labels = operator.name, operator.quality
        people.append(Person(operator, quota, identity, labels, partial(episode_seed, *identity)))
    num_envs = min(num_envs, num)  # all are busy from the first step, so none is stepped that was never reset
    hands = ScriptedOperators(task, num_envs, horizon + tail)
    # Nobody ends an episode but the loop below: an operator goes on lifting for `tail` steps.
    seen: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    env = make(task, num_envs, chunk=1, horizon=horizon + tail + 1, terminate_on="never", native=native, images=images, **seen)
    try:
        return record(env, hands, people, horizon, tail, progress)
    finally:
        env.close()


def shares(num: int, of: int) -> list[int]:
    """`num` things in equal parts, the first ones one more."""
    return [num // of + (i < num % of) for i in range(of)]


def record(env: Any, hands: Any, people: Sequence[Person], horizon: int, tail: int, progress: Progress | None) -> Collection:
    """Let people demonstrate in the environments `env`, all of them busy, until nobody misses a success."""
    _run(env, hands, people, horizon, tail, progress)
    return _assemble(people, env.env_args(), getattr(env, "vocabulary", ()))


def _run(env: Any, hands: Any, people: Sequence[Person], horizon: int, tail: int, progress: Progress | None) -> None:
    n = env.num_envs
    slots: list[_Episode | None] = [None] * n
    observation: Observations = {}
    while True:
        mask, seeds = np.zeros(n, dtype=bool), np.zeros(n, dtype=np.int64)
        for i in range(n):
            person = max(people, key=lambda person: person.missing)
            if slots[i] is None and person.missing > 0:
                slots[i] = episode = person.launch()
                mask[i], seeds[i] = True, person.seed_of(episode.attempt)
                hands.begin(i, person.operator, [*person.identity, episode.attempt, 1])
        if all(slot is None for slot in slots):
            return
        idle = np.array([slot is None for slot in slots])
        if mask.any():
            observation = env.reset(seeds, mask)
        for slot in np.flatnonzero(mask).tolist():
            slots[slot].model_xml = env.model_xml(slot)  # type: ignore[union-attr]
            slots[slot].task = tasks_of(env)[slot]  # type: ignore[union-attr]
        states = env.sim_states()
        actions = hands.act(env.full_state())
        actions[idle] = 0
        played = env.step(actions[:, None])
        for i, episode in enumerate(slots):  # type: ignore[assignment]
            if episode is None:
                continue
            for name, values in observation.items():
                if name == "state" or is_image(name):  # a file says the task by its name
                    episode.observations.setdefault(name, []).append(values[i].copy())
            episode.actions.append(actions[i].copy())
            episode.states.append(np.array(states[i], dtype=np.float64))
            episode.successes.append(bool(played.success[i]))
            if is_over(episode.successes, horizon, tail):
                episode.habits = hands.habits(i)
                episode.person.finish(episode)
                slots[i] = None
                if progress is not None:
                    progress(episode.person.operator.name, episode.succeeded, len(episode.actions))
        observation = played.observation


def _assemble(people: Sequence[Person], environment: dict[str, Any], tasks: Sequence[str]) -> Collection:
    kept = [[person.kept[attempt] for attempt in sorted(person.kept)] for person in people]
    turns = [episodes[turn] for turn in range(max(map(len, kept))) for episodes in kept if turn < len(episodes)]
    episodes = tuple(episode.recorded(f"demo_{i}") for i, episode in enumerate(turns))
    filters: dict[str, tuple[str, ...]] = {}
    for attempt, episode in zip(turns, episodes):
        words = (f"{name}={value}" for name, value in attempt.habits.items() if isinstance(value, str))
        for key in (*attempt.person.labels, *words):
            filters[key] = (*filters.get(key, ()), episode.name)
    others = episodes[0].state.shape[1] - 9
    keys, widths = (LOW_DIM_KEYS, (3, 4, 2, others)) if others else (LOW_DIM_KEYS[:3], (3, 4, 2))
    dataset = Dataset(episodes, keys, widths, environment, dict(sorted(filters.items())), "scripted operators", tuple(tasks))
    attempts: dict[str, tuple[int, int]] = {}
    for person in people:
        succeeded, tried = attempts.get(person.labels[0], (0, 0))
        attempts[person.labels[0]] = succeeded + len(person.kept), tried + person.launched
    numbers = [{name: value for name, value in attempt.habits.items() if not isinstance(value, str)} for attempt in turns]
    names = [episode.name for episode in episodes]
    return Collection(dataset, attempts, dict(zip(names, (a.model_xml for a in turns))), dict(zip(names, numbers)))
