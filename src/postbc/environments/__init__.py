"""Environments: by name (`find_environment`), or any gymnasium `VectorEnv` (`from_vector_env`); all play chunks of actions.

Importing this package registers `gymnasium.make_vec("postbc/Lift-v0", num_envs=8)`, and Can-v0 and Square-v0; it imports no simulator.
"""

from __future__ import annotations

from postbc.environments.adapter import ChunkAdapter
from postbc.environments.chunk import ChunkEnv, ChunkStep, Observations, Termination
from postbc.environments.gymnasium_interface import register
from postbc.environments.registry import (
    ENVIRONMENTS,
    Environment,
    find_environment,
    from_vector_env,
    gymnasium_environment,
    libero_environment,
    robosuite_environment,
)

__all__ = [
    "ENVIRONMENTS", "ChunkAdapter", "ChunkEnv", "ChunkStep", "Environment", "Observations", "Termination", "find_environment",
    "from_vector_env", "gymnasium_environment", "libero_environment", "robosuite_environment",
]  # fmt: skip

register()
