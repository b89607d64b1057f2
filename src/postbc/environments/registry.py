"""Environments by name: "postbc/Lift", "libero/kitchen", "gymnasium:SomeId-v1", "lerobot:pusht/PushT-v0", or a factory of your own."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gymnasium.vector import VectorEnv

from postbc.data.belonging import Facts
from postbc.data.libero_tasks import KITCHEN
from postbc.environments.adapter import ChunkAdapter, Success, foreign_code
from postbc.environments.chunk import ChunkEnv, Termination
from postbc.environments.robosuite.tasks import CONTROL_FREQ, STATE_KEYS, TASKS
from postbc.errors import InputError, require


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
        facts: what a policy must share with it to work there (task, version, robots, controller, control_freq), as robomimic's
            `env_args`; empty: unknown.
        check: raises InputError where the environment cannot run here (package missing, wrong version); called before anything is
            written.
        scene: one environment with chunk 1 that never ends by itself and has `render_frame(i, height, width)`, for videos; None: it
            cannot be drawn.
        state_keys: the parts of "state" in order, as data files name them; None: unknown.
        robot: its name for `postbc robot rollout`, where it is a real one: it cannot be made, and nobody plays in it unattended.
    """

    name: str
    make: Make
    horizon: int
    chunk: int = 4
    fps: int = 20
    facts: Callable[[], Mapping[str, Any]] = dict
    check: Callable[[], None] = field(default=lambda: None)
    scene: Callable[[], ChunkEnv] | None = None
    state_keys: tuple[str, ...] | None = None
    robot: str | None = None

    def belonging(self, shapes: Mapping[str, Any] | None = None) -> Facts:
        """What is known of it, to compare a policy's or data's own facts with; `shapes`: what is observed, default everything."""
        keys = self.state_keys if shapes is None or "state" in shapes else None
        return replace(Facts.of_env_args(self.facts()), state_keys=keys)


#: A film is as long as its episode.
ENDLESS = 10**9


def robosuite_environment(
    task: str,
    env_kwargs: Mapping[str, Any] | None = None,
    num_threads: int | None = None,
    *,
    images: bool = False,
    image_size: int | None = None,
) -> Environment:
    """A robosuite task: Lift, Can or Square, with `env_kwargs` over ours and `num_threads` simulator threads.

    With `images` two cameras are observed instead of the object (robomimic's, 84 pixels a side unless `image_size` says otherwise),
    and the name ends in "-pixels".
    """
    from postbc.environments import robosuite

    found = robosuite.find_task(task)
    given: dict[str, Any] = {"env_kwargs": env_kwargs, "num_threads": num_threads}
    sized: dict[str, Any] = {} if image_size is None else {"image_size": image_size}

    def make(num_envs: int, **options: Any) -> ChunkEnv:
        return robosuite.make(found, num_envs, images=images, **given, **sized, **options)

    def facts() -> Mapping[str, Any]:
        robosuite.check()
        from postbc.environments.robosuite.vector import environment_facts

        return environment_facts(found, env_kwargs or {})

    def scene() -> ChunkEnv:  # the same episodes, without cameras of its own
        return robosuite.make(found, 1, chunk=1, horizon=ENDLESS, terminate_on="never", **given)

    def check() -> None:
        robosuite.check(images)

    cameras = f"-pixels{image_size or ''}" if images else ""
    return Environment(
        f"postbc/{found.name}{cameras}", make, found.horizon, 4, CONTROL_FREQ, facts, check, scene,
        robosuite.STATE_KEYS[:3] if images else robosuite.STATE_KEYS,
    )  # fmt: skip


def libero_environment(
    name: str,
    *,
    images: bool = False,
    image_size: int | None = None,
    num_threads: int | None = None,
) -> Environment:
    """LIBERO: "kitchen" (the sixteen tasks of KITCHEN_SCENE1 to 3), some of them, one task, or a suite.

    Args:
        name: see :func:`postbc.environments.libero.find_tasks`.
        images: whether two cameras are observed instead of the objects; the name then ends in "-pixels".
        image_size: pixels of a side; default LIBERO's 128. Others are in the name: "-pixels64".
        num_threads: simulator threads.

    Raises:
        InputError: nobody knows the name; close ones are listed.
    """
    from postbc.environments import libero

    libero.find_tasks(name)
    sized = {} if image_size is None else {"image_size": image_size}

    def make(num_envs: int, **options: Any) -> ChunkEnv:
        return libero.make(name, num_envs, images=images, num_threads=num_threads, **sized, **options)

    def facts() -> Mapping[str, Any]:
        libero.check()
        from postbc.environments.libero.vector import environment_facts

        return environment_facts(f"libero/{name}")

    def scene() -> ChunkEnv:  # the same episodes, without cameras of its own
        return libero.make(name, 1, chunk=1, horizon=ENDLESS, terminate_on="never")

    def check() -> None:
        libero.check(images)

    cameras = f"-pixels{image_size or ''}" if images else ""
    return Environment(
        f"libero/{name}{cameras}", make, libero.HORIZON, 8, CONTROL_FREQ, facts, check, scene,
        STATE_KEYS[:3] if images else STATE_KEYS,
    )  # fmt: skip


def from_vector_env(
    factory: Callable[[int], VectorEnv],
    *,
    name: str,
    horizon: int,
    success: Success = "auto",
    chunk: int = 4,
    fps: int = 20,
    facts: Mapping[str, Any] | None = None,
    scene: Callable[[], VectorEnv] | None = None,
    **adapter: Any,
) -> Environment:
    """An environment of your own: `factory(N)` gives any gymnasium `VectorEnv` of single steps.

    Args:
        factory: N -> N environments, for example `lambda n: gymnasium.make_vec("My/Task-v0", n, vectorization_mode="sync")`.
        name: what reports call it.
        horizon: actions of an episode until it is truncated.
        success: where it says that the task is solved: see :class:`postbc.environments.adapter.ChunkAdapter`.
        facts: as robomimic's `env_args`, compared with what a policy was trained on; None: unknown.
        scene: one environment with render_mode "rgb_array", for videos.
        adapter: further arguments of the adapter.
    """

    def make(num_envs: int, *, chunk: int, horizon: int, terminate_on: Termination) -> ChunkEnv:
        with foreign_code(name, "construction"):
            env = factory(num_envs)
        return ChunkAdapter(env, chunk, horizon=horizon, terminate_on=terminate_on, success=success, name=name, **adapter)

    def film() -> ChunkEnv:
        assert scene is not None
        with foreign_code(name, "construction"):
            env = scene()
        return ChunkAdapter(env, 1, horizon=ENDLESS, terminate_on="never", success=success, name=name, **adapter)

    return Environment(name, make, horizon, chunk, fps, lambda: dict(facts or {}), scene=film if scene is not None else None)


def gymnasium_environment(
    identity: str, *, success: Success = "auto", horizon: int | None = None, asynchronous: bool = False, **options: Any
) -> Environment:
    """Any id that gymnasium knows, after the import of its package: "CartPole-v1", or "its_package:Its/Task-v0".

    Args:
        identity: as `gymnasium.make` takes it.
        success, horizon: as in :func:`from_vector_env`; the horizon is the id's own limit by default.
        asynchronous: one process an environment.
        options: for `gymnasium.make`.

    Raises:
        InputError: gymnasium does not know it, or it has no limit of steps and no horizon is given.
    """
    import gymnasium

    name = f"gymnasium:{identity}"
    spec, metadata = gymnasium_spec(identity)
    limit = horizon if horizon is not None else spec.max_episode_steps
    require(limit is not None, "This environment has no limit of steps.", key="horizon", found=name, remedy="give a horizon")
    mode = gymnasium.vector.AutoresetMode.DISABLED

    def factory(num_envs: int, **more: Any) -> VectorEnv:
        return gymnasium.make_vec(
            spec, num_envs, vectorization_mode="async" if asynchronous else "sync",
            vector_kwargs={"autoreset_mode": mode}, **{**options, **more},
        )  # fmt: skip

    def scene() -> VectorEnv:
        return gymnasium.make_vec(
            spec, 1, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **options, render_mode="rgb_array"
        )

    facts = {"env_name": name, "env_version": None, "type": 2, "env_kwargs": options}
    rate = metadata.get("render_fps")
    fps = int(rate) if isinstance(rate, int | float) and 1 <= rate <= 1000 else 20
    return from_vector_env(
        factory, name=name, horizon=int(limit or 0), success=success, chunk=1, fps=fps, facts=facts, scene=scene
    )


def gymnasium_spec(identity: str) -> tuple[Any, dict[str, Any]]:
    """What gymnasium knows of an id, after the import of its package: its spec, and the `metadata` that its class declares.

    Raises:
        InputError: nothing.
    """
    import gymnasium

    name = f"gymnasium:{identity}"
    if ":" in identity and importlib.util.find_spec(identity.split(":")[0].split(".")[0]) is not None:
        with foreign_code(name, "import"):
            importlib.import_module(identity.split(":")[0])
    try:
        if ":" in identity:
            importlib.import_module(identity.split(":")[0])
        spec = gymnasium.spec(identity.split(":")[-1])
        creator: Any = spec.entry_point
        if isinstance(creator, str):
            creator = gymnasium.envs.registration.load_env_creator(creator)
    except (gymnasium.error.Error, ImportError, AttributeError, ValueError) as error:
        raise InputError(
            "gymnasium does not know this environment.", key="environment",
            found=f"{name}: {' '.join(str(error).split()) or type(error).__name__}"[:300],
            expected="an id that gymnasium has registered",
            remedy="install its package, and name the module that registers it: gymnasium:its_package:Its/Task-v0",
        ) from error  # fmt: skip
    return spec, dict(getattr(creator, "metadata", None) or {})


def robot_environment(name: str, rate: float, horizon: int) -> Environment:
    """A real robot, for recipes: policies are pretrained for it, and finetuned from what `postbc robot rollout` recorded on it."""

    def make(num_envs: int, **options: Any) -> ChunkEnv:
        raise InputError(
            "A robot is not played in unattended.", key="environment", found=f"robot/{name}", expected="a simulated environment",
            remedy=f"postbc robot rollout --robot {name}, then `postbc finetune best-of-n --rollouts … --best-of-n.eval-episodes 0`",
        )  # fmt: skip

    facts = {"type": 2, "env_kwargs": {"control_freq": rate}}
    return Environment(f"robot/{name}", make, horizon, 1, round(rate), lambda: facts, robot=name)


def _pusht(**options: Any) -> Environment:
    from postbc.environments.pusht import pusht_environment

    return pusht_environment(**options)


#: Name -> what makes it. A package of your own adds its environments here when it is imported.
ENVIRONMENTS: dict[str, Callable[[], Environment]] = {
    **{f"postbc/{name}": (lambda name=name: robosuite_environment(name)) for name in TASKS},  # type: ignore[misc]
    **{f"postbc/{name}-pixels": (lambda name=name: robosuite_environment(name, images=True)) for name in TASKS},  # type: ignore[misc]
    "postbc/PushT": lambda: _pusht(),
    "postbc/PushT-human": lambda: _pusht(covered=0.75),
    "postbc/PushT-state": lambda: _pusht(observation="state"),
    "postbc/PushT-pixels": lambda: _pusht(observation="pixels"),
    "robot/widowx": lambda: robot_environment("widowx", 10.0, 100),
    "robot/lerobot": lambda: robot_environment("lerobot", 30.0, 600),
    **{f"libero/{name}": (lambda name=name: libero_environment(name)) for name in ("kitchen", *KITCHEN)},  # type: ignore[misc]
    **{f"libero/{name}-pixels": (lambda name=name: libero_environment(name, images=True)) for name in ("kitchen", *KITCHEN)},  # type: ignore[misc]
}


def find_environment(name: str) -> Environment:
    """An environment by name; imports no simulator (`check` does).

    Args:
        name: a key of `ENVIRONMENTS`, with or without "postbc/"; robosuite's name of a task ("PickPlaceCan"), as data files have it;
            "libero/" and any of LIBERO's tasks or suites, or "libero/kitchen/3+14" for some of the sixteen; with "-pixels" (or
            "-pixels64") after it for cameras; "metaworld/" and a task (push-v3); "gymnasium:" and an id; or "lerobot:"
            and a type and a task of LeRobot's or its plugins'.

    Raises:
        InputError: nobody knows it.
    """
    if name.startswith("gymnasium:"):
        return gymnasium_environment(name.removeprefix("gymnasium:"))
    if name.startswith("lerobot:"):
        from postbc.environments.lerobot import lerobot_environment

        return lerobot_environment(name.removeprefix("lerobot:"))
    for key in (name, f"postbc/{name}", *(f"postbc/{task.name}" for task in TASKS.values() if task.robosuite_name == name)):
        if key in ENVIRONMENTS:
            return ENVIRONMENTS[key]()
    sized = re.fullmatch(r"(?:postbc/)?(\w+)-pixels(\d{1,4})", name)
    if sized and sized[1] in TASKS:
        return robosuite_environment(sized[1], images=True, image_size=int(sized[2]))
    if name.startswith("metaworld/"):
        from postbc.environments.metaworld import metaworld_environment

        return metaworld_environment(name.removeprefix("metaworld/"))
    if name.startswith("libero/"):
        task, cameras, size = re.fullmatch(r"libero/(.*?)(?:(-pixels)(\d{1,4})?)?", name, re.DOTALL).groups()  # type: ignore[union-attr]
        return libero_environment(task, images=cameras is not None, image_size=None if size is None else int(size))
    known = [key for key in ENVIRONMENTS if not key.startswith("libero/")]
    known += ["libero/kitchen", "libero/TASK", "libero/SUITE", "metaworld/TASK", "gymnasium:ID"]
    close = difflib.get_close_matches(name, list(ENVIRONMENTS), 1, 0.4)
    raise InputError(
        "There is no such environment.", key="environment", found=name, expected=f"{', '.join(known)}, or lerobot:TYPE/TASK",
        remedy=f"did you mean {close[0]}?" if close else "see docs/bring-your-own-environment.md",
    )  # fmt: skip
