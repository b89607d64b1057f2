"""Recorded episodes in the simulator again: open-loop, to see whether the data belongs to it; or state by state, to observe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from postbc.data.belonging import Facts, check_belongs
from postbc.data.episodes import LOW_DIM_KEYS, Dataset, Episode
from postbc.environments.robosuite import TASKS, make
from postbc.errors import InputError, require

#: robosuite's environment name -> our task
TASK_OF = {task.robosuite_name: name for name, task in TASKS.items()}
REMEDY = "the same numbers would be other movements here; use data of a Panda under OSC_POSE delta control at 20 Hz"


@dataclass(frozen=True, eq=False)
class Playback:
    """What happened; one entry an episode."""

    names: tuple[str, ...]
    """Episodes played."""
    successes: np.ndarray
    """(n,) bool: the task was solved at some step."""
    first_success: np.ndarray
    """(n,) int64 step of the first success, -1 where there was none."""
    drift: np.ndarray
    """(n,) float64 largest distance (m) between recorded and replayed end-effector positions."""
    warnings: tuple[str, ...] = ()
    """What the data does not say about its simulator."""


def task_of(facts: Facts, source: str) -> str:
    """The task that the data was recorded in. InputError when it is none of ours."""
    name = str(facts.environment)
    require(name in TASK_OF, "The demonstrations are of a task that cannot be simulated here.", file=source,
            key="env_args: env_name", found=name, expected=" or ".join(TASK_OF))  # fmt: skip
    return TASK_OF[name]


def belongs(facts: Facts, env: Any, source: str, allow_version_mismatch: bool) -> list[str]:
    """Whether data is of this simulator, of its observations apart: warnings, or an InputError."""
    facts = Facts(facts.environment, facts.version, facts.robots, facts.controller, facts.control_freq)
    ours = Facts.of_env_args(env.env_args())
    return check_belongs(facts, ours, file=source, allow_version_mismatch=allow_version_mismatch, remedy=REMEDY)


def _solved(simulation: Any) -> bool:
    """Whether the task is solved in the state that a simulation is in."""
    from postbc.environments.robosuite.sensing import solved

    if hasattr(simulation, "sensors"):
        return bool(solved(simulation.control.physics, simulation.sensors))
    return bool(simulation.env._check_success())


def _check_states(name: str, states: np.ndarray | None, env: Any, source: str) -> None:
    width = env.sim_states().shape[1]
    found = None if states is None else states.shape
    require(states is not None, "The demonstrations hold no simulator states, so there is no state to begin from.", file=source,
            key=f"data/{name}/states", expected=f"(N, {width}) flattened states [time, qpos, qvel]")  # fmt: skip
    require(found is not None and len(found) == 2 and found[1] == width, "The simulator states are not this simulator's.", file=source,
            key=f"data/{name}/states", found=f"shape {found}", expected=f"(N, {width}) flattened states [time, qpos, qvel]",
            remedy="use data of this task as robosuite 1.4 has it, with one robot")  # fmt: skip


def replay(
    dataset: Dataset,
    *,
    native: bool = True,
    num_envs: int = 8,
    allow_version_mismatch: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Playback:
    """Put the simulator into each episode's first state and execute its actions.

    Args:
        dataset: with simulator states, of a known task.
        native: the compiled control loop instead of robosuite's own.
        num_envs: environments run side by side.
        allow_version_mismatch: go on although the data is of another simulator version.
        progress: called with the number of episodes that have ended.

    Raises:
        InputError: data without states, with states of another width, of another simulator version, task or controller.
    """
    facts, count = Facts.of_dataset(dataset), len(dataset)
    task = task_of(facts, dataset.source)
    require(num_envs >= 1, "At least one environment is needed.", key="num_envs", found=num_envs, expected=">= 1")
    env = make(task, min(num_envs, count), chunk=1, horizon=int(dataset.lengths.max()) + 1, terminate_on="never", native=native)

    def begin(played: Sequence[Episode]) -> None:
        # The episode's own seed, where it was recorded, restores what the state leaves out (Lift: the size of the cube).
        env.reset([e.episode_seed or 0 for e in played] + [0] * (env.num_envs - len(played)))
        env.set_sim_states(np.stack([np.asarray(e.states)[0] for e in played]), list(range(len(played))))

    try:
        warnings = belongs(facts, env, dataset.source, allow_version_mismatch)
        for episode in dataset:
            _check_states(episode.name, episode.states, env, dataset.source)
        return play(env, dataset, begin, warnings, progress)
    finally:
        env.close()


def play(
    env: Any,
    dataset: Dataset,
    begin: Callable[[Sequence[Episode]], None],
    warnings: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Playback:
    """Execute each episode's actions, from where `begin` puts the first environments for some episodes at a time."""
    count, hands = len(dataset), dataset.state_keys[:1] == LOW_DIM_KEYS[:1]
    successes, first, drift = np.zeros(count, dtype=bool), np.full(count, -1, dtype=np.int64), np.zeros(count)
    require(dataset.action_dim == env.action_dim, "The actions have the wrong width.", file=dataset.source, key="actions",
            found=dataset.action_dim, expected=env.action_dim)  # fmt: skip
    # Long ones first, so that the environments of a batch end at about the same time.
    order, ended = np.argsort(-dataset.lengths, kind="stable"), 0
    for batch in np.split(order, np.arange(env.num_envs, count, env.num_envs)):
        played = [dataset[int(k)] for k in batch]
        begin(played)
        for step in range(max(len(e) for e in played)):
            actions = np.zeros((env.num_envs, 1, dataset.action_dim), dtype=np.float32)
            running = [i for i, e in enumerate(played) if step < len(e)]
            for i in running:
                actions[i, 0] = played[i].actions[step]
            happened = env.step(actions)
            for i in running:
                k = int(batch[i])
                if happened.success[i] and not successes[k]:
                    successes[k], first[k] = True, step
                if hands and step + 1 < len(played[i]):
                    off = happened.observation["state"][i, :3] - played[i].state[step + 1, :3]
                    drift[k] = max(drift[k], float(np.linalg.norm(off)))
        ended += len(batch)
        if progress is not None:
            progress(ended)
    return Playback(dataset.names, successes, first, drift, tuple(warnings))


class Observer:
    """Plays recorded simulator states: episodes of states and actions become episodes with observations and rewards.

    Observations are of the recorded states themselves, nothing is integrated in between; a step is a success if the state after it
    is, the last one if executing its action from the last state leads to one.

    Args:
        environment: of the recording, as robomimic's `env_args`.
        source: file named in errors.

    Raises:
        InputError: the recording is of another task, simulator version or controller.
    """

    def __init__(
        self, environment: dict[str, Any], source: str, *, num_envs: int = 8, allow_version_mismatch: bool = False
    ) -> None:
        facts = Facts.of_env_args(environment, source)
        self.task, self.source = task_of(facts, source), source
        self.env = make(self.task, num_envs, chunk=1, horizon=2, terminate_on="never")
        try:
            self.warnings = belongs(facts, self.env, source, allow_version_mismatch)
        except InputError:
            self.close()
            raise
        self.env.reset([0] * num_envs)

    def env_args(self) -> dict[str, Any]:
        """The simulator's, as robomimic's `env_args`."""
        return self.env.env_args()

    def close(self) -> None:
        self.env.close()

    def observe(self, name: str, states: np.ndarray, actions: np.ndarray, operator: str | None = None) -> Episode:
        """States (N, Ds) and actions (N, A) -> the whole episode.

        Raises:
            InputError: arrays of other shapes, or not finite.
        """
        env, n = self.env, len(states)
        _check_states(name, states, env, self.source)
        require(actions.shape == (n, env.action_dim), "The actions have the wrong shape.", file=self.source, key=f"data/{name}/actions",
                found=actions.shape, expected=(n, env.action_dim))  # fmt: skip
        require(n and np.isfinite(states).all() and np.isfinite(actions).all(), "The recording is empty or not finite.",
                file=self.source, key=f"data/{name}")  # fmt: skip
        observations, solved = [], []
        for start in range(0, n, env.num_envs):
            part = states[start : start + env.num_envs]
            observations.append(env.set_sim_states(part, list(range(len(part))))["state"])
            solved += [_solved(simulation) for simulation in env.simulations[: len(part)]]
        env.set_sim_states(states[-1:], [0])
        last = env.step(np.repeat(actions[-1][None, None].astype(np.float32), env.num_envs, 0)).success[0]
        successes = np.append(solved[1:], last)
        return Episode(
            {"state": np.concatenate(observations)},
            actions,
            successes.astype(np.float32),
            np.arange(n) == n - 1,
            states,
            name,
            operator,
        )
