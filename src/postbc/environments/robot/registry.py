"""Robots by name: "sim/Lift-pixels64", "widowx", "lerobot", "gymnasium:SomeId-v1", or a factory of your own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium

from postbc.data.belonging import Facts
from postbc.environments.robosuite import TASKS
from postbc.environments.robosuite import check as check_robosuite
from postbc.environments.robosuite.tasks import CONTROL_FREQ
from postbc.errors import InputError, require
from postbc.files import read_yaml
from postbc.schemas import parse

#: What of a simulated robot's name says that cameras are observed, and how large.
PIXELS = "-pixels"


@dataclass(frozen=True)
class Robot:
    """What can be played on.

    Attributes:
        name: as it is asked for.
        make: the `Env` (:mod:`postbc.environments.robot` says what it must have), connected.
        rate: control steps a second.
        horizon: control steps of an episode by default.
        simulated: its time may pass as fast as it is stepped, seeds decide its scene, and it resets itself.
        facts: what a policy must share with it to work there, as robomimic's `env_args`; empty: unknown.
        check: raises InputError where it cannot be used here; called before anything is written.
    """

    name: str
    make: Callable[[], gymnasium.Env[Any, Any]]
    rate: float
    horizon: int
    simulated: bool = False
    facts: Callable[[], Mapping[str, Any]] = dict
    check: Callable[[], None] = field(default=lambda: None)

    def belonging(self) -> Facts:
        """What is known of it, to compare a policy's own facts with."""
        return Facts.of_env_args(self.facts())


def _options(kind: type[Any], config: Path | None) -> Any:
    return parse(kind, _read(config), config)


def _read(config: Path | None) -> dict[str, Any]:
    return {} if config is None else read_yaml(config, remedy="mend it: docs/robot.md has examples")


def _simulated(name: str, config: Path | None) -> Robot:
    from postbc.environments.robot.simulated import SimulatedConfig, SimulatedRobot

    task, dash, size = name.partition(PIXELS)
    known = task in TASKS and (not size or (bool(dash) and size.isascii() and size.isdigit()))
    names = ", ".join(f"sim/{task}, sim/{task}{PIXELS}64" for task in TASKS)
    require(known, "There is no such simulated robot.", key="robot", found=f"sim/{name}", expected=names)
    options: SimulatedConfig = _options(SimulatedConfig, config)
    if size:
        require(options.image_size in (None, int(size)), "The cameras' size is given twice.", key="image_size",
                found=options.image_size, expected=int(size))  # fmt: skip
        options = parse(SimulatedConfig, {**vars(options), "image_size": int(size)})

    def facts() -> Mapping[str, Any]:
        check_robosuite()
        from postbc.environments.robosuite.vector import environment_facts

        return environment_facts(TASKS[task], {})

    return Robot(
        f"sim/{name}", lambda: SimulatedRobot(task, bool(dash), options), CONTROL_FREQ, TASKS[task].horizon, True, facts,
        lambda: check_robosuite(bool(dash)),
    )  # fmt: skip


def at_rate(rate: float) -> dict[str, Any]:
    """`env_args` of a robot of which no more is known than how often it is commanded."""
    return {"type": 2, "env_kwargs": {"control_freq": rate}}


def _widowx(config: Path | None) -> Robot:
    from postbc.environments.robot import manipulator_gym

    options = _options(manipulator_gym.ManipulatorConfig, config)
    return Robot(
        "widowx", lambda: manipulator_gym.ManipulatorRobot(options), options.rate, 100, False, lambda: at_rate(options.rate),
        manipulator_gym.check,
    )  # fmt: skip


def _lerobot(config: Path | None) -> Robot:
    from postbc.environments.robot import lerobot

    require(config is not None, "LeRobot wants to know which robot.", key="robot_config", found="none",
            expected="a YAML file: robot: {type: so101_follower, port: …, cameras: …}, low: …, high: …")  # fmt: skip
    options = _options(lerobot.LeRobotConfig, config)
    return Robot(
        "lerobot", lambda: lerobot.LeRobotRobot(options), options.rate, 600, False, lambda: at_rate(options.rate), lerobot.check
    )


def _gymnasium(identity: str, config: Path | None) -> Robot:
    from postbc.environments.registry import gymnasium_environment, gymnasium_spec

    known = gymnasium_environment(identity)  # which imports its module, or says that nobody knows it
    simulated = gymnasium_spec(identity)[1].get("simulated") is True  # whoever does not say so may be an arm
    options = _read(config)
    make = lambda: gymnasium.make(identity.split(":")[-1], disable_env_checker=True, **options)  # noqa: E731
    return Robot(known.name, make, float(known.fps), known.horizon, simulated, known.facts, known.check)


#: Name -> what makes it of a YAML file of its options (or None). A package of your own adds its robots here when it is imported.
ROBOTS: dict[str, Callable[[Path | None], Robot]] = {
    **{f"sim/{task}": (lambda config, task=task: _simulated(task, config)) for task in TASKS},  # type: ignore[misc]
    **{f"sim/{task}{PIXELS}": (lambda config, task=task: _simulated(task + PIXELS, config)) for task in TASKS},  # type: ignore[misc]
    "widowx": _widowx,
    "lerobot": _lerobot,
}


def find_robot(name: str, config: Path | None = None) -> Robot:
    """A robot by name; nothing is imported that moves one, and nothing moves.

    Args:
        name: a key of `ROBOTS`, "sim/Lift-pixels64" for cameras of another size, or "gymnasium:" and the id of any `Env`.
        config: YAML file of its options.

    Raises:
        InputError: nobody knows it, or the file holds something else.
    """
    if name.startswith("gymnasium:"):
        return _gymnasium(name.removeprefix("gymnasium:"), config)
    if name in ROBOTS:
        return ROBOTS[name](config)
    if name.startswith("sim/"):
        return _simulated(name.removeprefix("sim/"), config)
    close = difflib.get_close_matches(name, list(ROBOTS), 1, 0.4)
    raise InputError(
        "There is no such robot.", key="robot", found=name, expected=f"{', '.join(ROBOTS)}, or gymnasium:ID",
        remedy=f"did you mean {close[0]}?" if close else "see docs/robot.md",
    )  # fmt: skip
