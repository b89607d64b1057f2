"""Simulated tasks as gymnasium vector environments: `make("Lift", num_envs=8, chunk=4)`.

Importing this module registers them: `gymnasium.make_vec("postbc/Lift-v0", num_envs=8)`, and Can-v0 and Square-v0.
"""

from __future__ import annotations

import os

import gymnasium

os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is first imported; robosuite insists on it too

from postbc.environments.robosuite import TASKS, Task
from postbc.environments.vector import RobosuiteVectorEnv, make

__all__ = ["TASKS", "RobosuiteVectorEnv", "Task", "make"]

for _name in TASKS:
    if f"postbc/{_name}-v0" not in gymnasium.registry:
        gymnasium.register(
            f"postbc/{_name}-v0",
            vector_entry_point="postbc.environments.vector:make",
            kwargs={"task": _name},
        )
