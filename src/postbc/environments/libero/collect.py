"""Record scripted operators in LIBERO's kitchens: equally many of each task, successes only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from scipy.spatial.transform import Rotation

from postbc.data.libero_tasks import find_tasks
from postbc.data.scripted.kitchen import SCRIPTS, KitchenOperators, Vector
from postbc.data.scripted.operators import OPERATORS, find_operators
from postbc.environments.libero import HORIZON, make
from postbc.environments.libero.simulation import LiberoSimulation
from postbc.environments.robosuite.collect import Collection, Person, Progress, record, shares
from postbc.errors import require
from postbc.seeding import EVALUATION_SEED, episode_seed


class SimulationView:
    """A simulation as a script sees it (:class:`postbc.data.scripted.kitchen.View`)."""

    def __init__(self, simulation: LiberoSimulation, names: Sequence[str]) -> None:
        self._simulation, self._names = simulation, names

    @property
    def task(self) -> str:
        return self._names[self._simulation.task]

    def hand(self) -> tuple[Vector, Rotation]:
        site, data = self._simulation.control.controller.arm.site, self._simulation.data
        return data.site_xpos[site].copy(), Rotation.from_matrix(data.site_xmat[site].reshape(3, 3))

    def body(self, name: str) -> Vector:
        return np.array(self._simulation.data.xpos[self._simulation.scene.objects[name]])

    def geom(self, name: str) -> Vector:
        return np.array(self._simulation.data.geom(name).xpos)

    def site(self, name: str) -> Vector:
        return np.array(self._simulation.data.site(name).xpos)

    def joint(self, name: str) -> float:
        return float(self._simulation.data.qpos[self._simulation.scene.joints[name]])


def task_seed(identity: Sequence[int], task: int, of: int, attempt: int) -> int:
    """Seed of an episode of the task `task` of `of`, below evaluation's."""
    seed = episode_seed(*identity, attempt) % (EVALUATION_SEED // of * of)
    return seed - seed % of + task


def collect(
    name: str = "kitchen",
    num: int = 80,
    operators: Sequence[str] = ("proficient", "better"),
    seed: int = 0,
    *,
    num_envs: int = 8,
    horizon: int = HORIZON,
    tail: int = 5,
    images: bool = False,
    progress: Progress | None = None,
) -> Collection:
    """Let operators demonstrate until ``num`` episodes have succeeded, equally many of each task, and in a task of each operator.

    Args:
        name: "kitchen", or one of its tasks.
        num, operators, seed, num_envs, tail, progress: as in :func:`postbc.environments.robosuite.collect.collect`.
        horizon: control steps after which an unsolved episode counts as failed.
        images: record two cameras, and not the objects.

    Raises:
        InputError: an unknown task or operator, fewer than one demonstration, or an operator that hardly ever succeeds.
    """
    require(num >= 1, "Nothing to collect.", key="num", found=num, expected=">= 1")
    require(1 <= horizon <= HORIZON, "An episode has at most as many steps as LIBERO's.", key="horizon", found=horizon,
            expected=f"1 to {HORIZON}")  # fmt: skip
    names = [task.name for task in find_tasks(name)]
    unknown = [task for task in names if task not in SCRIPTS]
    require(
        not unknown, "No operator knows this task.", key="task", found=", ".join(unknown)[:200], expected=", ".join(SCRIPTS)
    )
    chosen, people = find_operators(operators), []
    for k, (task, of_task) in enumerate(zip(names, shares(num, len(names)))):
        for operator, quota in zip(chosen, shares(of_task, len(chosen))):
            identity = seed, list(OPERATORS).index(operator.name), list(SCRIPTS).index(task)
            labels = (operator.name, operator.quality) if len(names) == 1 else (task, operator.name, operator.quality)
            people.append(Person(operator, quota, identity, labels, partial(task_seed, identity, k, len(names))))
    env = make(name, min(num_envs, num), chunk=1, horizon=horizon + tail + 1, terminate_on="never", images=images)
    try:
        hands = KitchenOperators([SimulationView(simulation, names) for simulation in env.playing], horizon + tail)
        return replace(record(env, hands, people, horizon, tail, progress), model_xml={})  # the package has the scenes
    finally:
        env.close()
