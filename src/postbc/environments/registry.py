"""Environments by name: "postbc/Lift", "postbc/PushT", "gymnasium:SomeId-v1", or a factory of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from postbc.environments.chunk import ChunkEnv, Termination


class Make(Protocol):
    def __call__(self, num_envs: int, *, chunk: int, horizon: int, terminate_on: Termination) -> ChunkEnv: ...


@dataclass(frozen=True)
class Environment:
    """What can be evaluated on and finetuned in.

    Attributes:
        name: as it is asked for.
        make: N environments of chunks.
        horizon: actions of an episode by default.
        chunk: T by default.
        fps: control steps a second, for videos.
        facts: what a policy must share with it to work there (task, version, robots, controller, control_freq), as robomimic's `env_args`;
            empty: unknown.
        check: raises InputError where the environment cannot run here (package missing, wrong version); called before anything is written.
    """

    name: str
    make: Make
    horizon: int
    chunk: int = 4
    fps: int = 20
    facts: Callable[[], Mapping[str, Any]] = dict
    check: Callable[[], None] = field(default=lambda: None)
