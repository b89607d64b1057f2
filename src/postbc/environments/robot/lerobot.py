"""Any arm that LeRobot drives, by its `Robot` interface: `get_observation` and `send_action`, dictionaries of numbers and pictures.

The numbers that a robot observes (`shoulder_pan.pos`, …), in the order of its `observation_features`, are "observation.state", as in a
LeRobotDataset recorded with it; its cameras are "image.<name>". An action is one number for each of `action_features`, in that order.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import threading
from typing import Annotated, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from postbc.environments.robot.clock import RealClock, Ticks
from postbc.environments.robot.images import resized
from postbc.errors import InputError, require
from postbc.schemas import Positive, schema

STATE = "observation.state"


@schema
class LeRobotConfig:
    """Which robot (`--robot-config FILE.yaml`)."""

    robot: dict[str, Any]
    """LeRobot's own configuration: what `lerobot-record` takes after `--robot.` (type, port, id, cameras, max_relative_target, …)."""
    rate: Positive = 30.0
    """Control steps a second."""
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Pixels of a side that frames are resized to (area average); default as they come."""
    low: tuple[float, ...] = ()
    """Least action, one number a motor in LeRobot's units (degrees, or −100 to 100; a gripper 0 to 100), or one for all."""
    high: tuple[float, ...] = ()
    """Largest action, likewise."""


class LeRobotRobot(gymnasium.Env[dict[str, NDArray[Any]], NDArray[np.float32]]):
    """A LeRobot `Robot` as a robot (see :mod:`postbc.environments.robot`).

    Args:
        config: which one.
        robot: an object of that interface, connected or not, instead of the configured one.
        clock: for tests.

    Raises:
        InputError: LeRobot is not installed, the robot cannot be reached, or a feature is neither a number nor a picture.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, config: LeRobotConfig, robot: Any = None, clock: Any = None) -> None:
        self.config, self.robot = config, make_robot(config) if robot is None else robot
        self._fresh, self._ticks = True, Ticks(1 / config.rate, clock or RealClock())
        self._bus = threading.Lock()  # of the motors, which one thread may use at a time
        self.observation_names, self.cameras = _features(self.robot.observation_features, "observation_features")
        self.action_names, pictures = _features(self.robot.action_features, "action_features")
        require(
            self.action_names and not pictures, "The robot's actions are no numbers.", key="action_features", found=pictures
        )
        parts: list[tuple[str, Any]] = []
        if self.observation_names:
            parts.append((STATE, gymnasium.spaces.Box(-np.inf, np.inf, (len(self.observation_names),), np.float32)))
        for name, (height, width) in self.cameras.items():
            shape = (height, width, 3) if config.image_size is None else (config.image_size, config.image_size, 3)
            parts.append((f"image.{name}", gymnasium.spaces.Box(0, 255, shape, np.uint8)))
        self.observation_space: gymnasium.spaces.Space[Any] = gymnasium.spaces.Dict(parts)
        count = len(self.action_names)
        low, high = _bound("low", config.low, count), _bound("high", config.high, count)
        self.action_space: gymnasium.spaces.Space[Any] = gymnasium.spaces.Box(low, high, dtype=np.float32)
        if not self.robot.is_connected:
            try:
                self.robot.connect()
            except Exception as error:
                raise InputError(
                    "The robot cannot be connected.", key="robot", found=f"{type(error).__name__}: {error}"[:500],
                    expected="one that `lerobot-teleoperate` moves", remedy="check power, port and cables",
                ) from error  # fmt: skip
        self._command: NDArray[np.float64] | None = None

    def _observe(self) -> dict[str, NDArray[Any]]:
        with self._bus:
            observed = self.robot.get_observation()
        seen: dict[str, NDArray[Any]] = {}
        if self.observation_names:
            seen[STATE] = np.array([float(observed[name]) for name in self.observation_names], np.float32)
        for name in self.cameras:
            seen[f"image.{name}"] = resized(observed[name], self.config.image_size)
        known = dict(zip(self.observation_names, seen.get(STATE, ())))
        if all(name in known for name in self.action_names):
            self._command = np.array([known[name] for name in self.action_names], np.float64)
        return seen

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arm stays where it is: a person, or a leader arm, brings it to its start while the scene is reset."""
        super().reset(seed=seed)
        observation = self._observe()
        self._fresh = True
        return observation, {} if self._command is None else {"command": self._command}

    def step(self, action: NDArray[np.floating[Any]]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        if self._fresh:
            self._ticks.start()
        self._fresh = False
        self._ticks.sent()
        with self._bus:
            self.robot.send_action(dict(zip(self.action_names, np.asarray(action, np.float64).tolist())))
        self._ticks.wait()
        return self._observe(), 0.0, False, False, {}

    def hold(self) -> None:
        """Make the newest observed position the goal; where the motors do not answer they keep the last goal, a step away at most."""
        if self._command is not None and self._bus.acquire(timeout=0.05):
            try:
                self.robot.send_action(dict(zip(self.action_names, self._command.tolist())))
            finally:
                self._bus.release()

    def close(self) -> None:
        if self.robot.is_connected:
            self.robot.disconnect()


def _features(features: dict[str, Any], key: str) -> tuple[tuple[str, ...], dict[str, tuple[int, int]]]:
    """Names of the numbers; cameras with their height and width."""
    numbers, cameras = [], {}
    for name, kind in features.items():
        if isinstance(kind, tuple | list):
            require(len(kind) == 3 and kind[2] == 3, "This feature is no picture.", key=f"{key}: {name}", found=kind,
                    expected="(height, width, 3)")  # fmt: skip
            cameras[name] = (int(kind[0]), int(kind[1]))
        else:
            numbers.append(name)
    return tuple(numbers), cameras


def _bound(name: str, values: tuple[float, ...], count: int) -> NDArray[np.float32]:
    require(len(values) in (0, 1, count), "This is one number, or one a motor.", key=name, found=f"{len(values)} numbers",
            expected=f"1 or {count}")  # fmt: skip
    return np.broadcast_to(np.array(values or [-np.inf if name == "low" else np.inf], np.float32), (count,)).copy()


def make_robot(config: LeRobotConfig) -> Any:
    """LeRobot's robot of that configuration, not connected. InputError where LeRobot is not installed or does not know it."""
    check()
    import draccus
    from lerobot.robots import RobotConfig
    from lerobot.robots.utils import make_robot_from_config
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    kind = config.robot.get("type")
    require(
        isinstance(kind, str), "LeRobot wants to know which robot.", key="robot.type", found=kind, expected="so101_follower, …"
    )
    with contextlib.suppress(ImportError):  # LeRobot keeps several in one module, or a plugin has it
        importlib.import_module(f"lerobot.robots.{kind}")  # it registers itself
    try:
        return make_robot_from_config(draccus.decode(RobotConfig, dict(config.robot)))
    except Exception as error:
        raise InputError("LeRobot cannot make this robot.", key="robot", found=f"{type(error).__name__}: {error}"[:500],
                         expected="what `lerobot-record` takes after --robot.") from error  # fmt: skip


def check() -> None:
    """InputError where LeRobot is not installed."""
    missing = importlib.util.find_spec("lerobot") is None
    require(not missing, "LeRobot is not installed.", key="robot", found="no module lerobot",
            remedy="pip install 'postbc[lerobot]' (Python 3.12), and your arm's extra: pip install 'lerobot[feetech]'")  # fmt: skip
