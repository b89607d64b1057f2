"""Play demonstrations open-loop in the simulator: does the data belong to this simulator, and are its actions what was executed?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from postbc.demonstrations.types import Demonstrations
from postbc.demonstrations.versions import check_simulator_version
from postbc.errors import InputError

#: robosuite's environment name -> task of :mod:`postbc.environments`
TASK_OF = {"Lift": "Lift", "PickPlaceCan": "Can", "NutAssemblySquare": "Square"}

#: Arguments of the recorded environment that must be the simulator's, or the actions mean something else.
_MEANINGFUL = ("robots", "control_freq")


@dataclass(frozen=True, eq=False)
class Replay:
    """What happened; one entry a demonstration."""

    names: tuple[str, ...]
    """Trajectories played."""
    successes: np.ndarray
    """(n,) bool: the task was solved at some step."""
    first_success: np.ndarray
    """(n,) int64 step of the first success, -1 where there was none."""
    drift: np.ndarray
    """(n,) float64 largest distance (m) between recorded and replayed end-effector positions."""


def task_of(demonstrations: Demonstrations) -> str:
    """The task that the data was recorded in. InputError when it is none of ours or its actions mean something else there."""
    name = str(demonstrations.environment.get("env_name"))
    if name not in TASK_OF:
        raise InputError(
            "The demonstrations are of a task that cannot be simulated here.",
            file=demonstrations.source,
            key="env_args: env_name",
            found=name,
            expected=" or ".join(TASK_OF),
        )
    return TASK_OF[name]


def _check_controller(recorded: dict[str, Any], ours: dict[str, Any], source: str) -> None:
    then, now = recorded.get("env_kwargs") or {}, ours.get("env_kwargs") or {}
    pairs = [(key, then.get(key), now.get(key)) for key in _MEANINGFUL]
    controllers = [kwargs.get("controller_configs") or {} for kwargs in (then, now)]
    settings = ("type", "control_delta", "output_max", "output_min", "kp")
    pairs += [(f"controller_configs.{key}", controllers[0].get(key), controllers[1].get(key)) for key in settings]
    for key, a, b in pairs:
        a, b = ([x] if isinstance(x, str) and key == "robots" else x for x in (a, b))
        if a is not None and b is not None and json.dumps(a) != json.dumps(b) and not np.array_equal(a, b):
            raise InputError(
                "The demonstrations were recorded with other settings than the simulator's.",
                file=source,
                key=f"env_args: env_kwargs.{key}",
                found=a,
                expected=b,
                remedy="the same numbers would be other movements here; use data of a Panda under OSC_POSE delta control at 20 Hz",
            )


def replay(
    demonstrations: Demonstrations,
    *,
    native: bool = True,
    num_envs: int = 8,
    allow_version_mismatch: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Replay:
    """Put the simulator into each demonstration's first state and execute its actions.

    Args:
        demonstrations: with simulator states, of a known task.
        native: the compiled control loop instead of robosuite's own.
        num_envs: environments run side by side.
        allow_version_mismatch: go on although the data is of another simulator version.
        progress: called with the number of demonstrations that have ended.

    Raises InputError for data without states, of another simulator version, task or controller.
    """
    check_simulator_version(demonstrations.environment, source=demonstrations.source, allow_mismatch=allow_version_mismatch)
    task = task_of(demonstrations)
    without = [trajectory.name for trajectory in demonstrations if trajectory.states is None]
    if without:
        raise InputError(
            "The demonstrations hold no simulator states, so there is no state to begin from.",
            file=demonstrations.source,
            key=f"data/{without[0]}/states",
            expected="(N, Ds) flattened states [time, qpos, qvel]",
        )
    from postbc.environments import make

    count = len(demonstrations)
    successes, first, drift = np.zeros(count, dtype=bool), np.full(count, -1, dtype=np.int64), np.zeros(count)
    longest = int(demonstrations.lengths.max())
    env: Any = make(
        task, num_envs=min(num_envs, count), chunk=1, horizon=longest + 1, reward="sparse", terminate_on="never", native=native,
        autoreset="disabled",
    )  # fmt: skip
    try:
        _check_controller(demonstrations.environment, env.env_args(), demonstrations.source)
        # Long ones first, so that the environments of a batch end at about the same time.
        order, ended = np.argsort(-demonstrations.lengths, kind="stable"), 0
        for batch in np.split(order, np.arange(env.num_envs, count, env.num_envs)):
            played = [demonstrations[int(k)] for k in batch]
            # The episode's own seed, where it was recorded, restores what the state leaves out (Lift: the size of the cube).
            seeds = [trajectory.episode_seed or 0 for trajectory in played] + [0] * (env.num_envs - len(played))
            env.reset(options={"reset_mask": np.ones(env.num_envs, dtype=bool), "seeds": np.array(seeds)})
            env.set_sim_states(np.stack([t.states[0] for t in played if t.states is not None]), list(range(len(batch))))
            for step in range(max(len(t) for t in played)):
                actions = np.zeros((env.num_envs, 1, demonstrations.action_dim), dtype=np.float32)
                running = [i for i, t in enumerate(played) if step < len(t)]
                for i in running:
                    actions[i, 0] = played[i].actions[step]
                observation, _, _, _, info = env.step(actions)
                for i in running:
                    k = int(batch[i])
                    if info["success"][i] and not successes[k]:
                        successes[k], first[k] = True, step
                    if step + 1 < len(played[i]):
                        off = observation[i, :3] - played[i].observations[step + 1, :3]
                        drift[k] = max(drift[k], float(np.linalg.norm(off)))
            ended += len(batch)
            if progress is not None:
                progress(ended)
    finally:
        env.close()
    return Replay(demonstrations.names, successes, first, drift)
