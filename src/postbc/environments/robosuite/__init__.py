"""robosuite 1.4.0's Lift, Can and Square, stepped by a compiled loop; importing this package imports no simulator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from postbc.environments.robosuite.loading import import_robosuite
from postbc.environments.robosuite.tasks import HAND, IMAGE, STATE_KEYS, TASKS, Task, find_task

if TYPE_CHECKING:
    from postbc.environments.robosuite.vector import RobosuiteChunkEnv

__all__ = ["HAND", "IMAGE", "STATE_KEYS", "TASKS", "Task", "check", "find_task", "make"]


def make(task: str | Task, num_envs: int = 1, *, images: bool = False, **options: Any) -> RobosuiteChunkEnv:
    """N environments of a task that play chunks; `options` are `RobosuiteChunkEnv`'s, with `images` `RobosuitePixelEnv`'s.

    Raises:
        InputError: the simulator cannot be used here, or an argument cannot.
    """
    check(images)
    if images:
        return importlib.import_module("postbc.environments.robosuite.pixels").RobosuitePixelEnv(task, num_envs, **options)
    return importlib.import_module("postbc.environments.robosuite.vector").RobosuiteChunkEnv(task, num_envs, **options)


def check(images: bool = False) -> None:
    """InputError, saying what to install, where the simulator cannot run, or (for `images`) draw without a display."""
    import_robosuite()
    if images:
        importlib.import_module("postbc.environments.robosuite.rendering").check_opengl()
