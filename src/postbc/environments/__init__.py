"""Simulated tasks as gymnasium vector environments: `make("Lift", num_envs=8, chunk=4)`.

Importing this module registers them: `gymnasium.make_vec("postbc/Lift-v0", num_envs=8)`, and Can-v0 and Square-v0.
"""

from __future__ import annotations

import gymnasium

from postbc.environments import opengl  # noqa: F401  before anything imports mujoco
from postbc.environments.native_control import NativeControl
from postbc.environments.robosuite import TASKS, Task
from postbc.environments.single import RobosuiteEnv
from postbc.environments.vector import RobosuiteVectorEnv, make

__all__ = ["TASKS", "NativeControl", "RobosuiteEnv", "RobosuiteVectorEnv", "Task", "make"]

for _name in TASKS:
    if f"postbc/{_name}-v0" not in gymnasium.registry:
        gymnasium.register(
            f"postbc/{_name}-v0",
            entry_point="postbc.environments.single:RobosuiteEnv",
            vector_entry_point="postbc.environments.vector:make",
            kwargs={"task": _name},
        )
