"""LIBERO's tasks, stepped by robosuite's compiled loop; importing this package imports no simulator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from postbc.data.libero_tasks import HORIZON, KITCHEN, SUITES, Task, find_tasks

if TYPE_CHECKING:
    from postbc.environments.libero.vector import LiberoChunkEnv

__all__ = ["HORIZON", "KITCHEN", "SUITES", "Task", "check", "find_tasks", "make"]


def make(name: str, num_envs: int = 1, **options: Any) -> LiberoChunkEnv:
    """N environments of the tasks that `name` means (:func:`find_tasks`); `options` are `LiberoChunkEnv`'s.

    Raises:
        InputError: the simulator cannot be used here, or an argument cannot.
    """
    check(images=bool(options.get("images")))
    return importlib.import_module("postbc.environments.libero.vector").LiberoChunkEnv(name, num_envs, **options)


def check(images: bool = False) -> None:
    """InputError, saying what to install, where LIBERO cannot run, or (for `images`) nothing can be drawn without a display."""
    loading = importlib.import_module("postbc.environments.libero.loading")
    loading.import_libero()
    if images:
        importlib.import_module("postbc.environments.robosuite.rendering").check_opengl()
