"""The WidowX of the paper by rail-berkeley/manipulator_gym: its `ManipulatorInterface` (or its server, from another machine) as an Env.

An action is 7 numbers: the end effector's displacement dx, dy, dz (m) and drx, dry, drz (rad) of one control step, and the gripper,
absolute (1 open, 0 closed). manipulator_gym's own `ManipulatorEnv` clips the displacement to 0.02 m a step; so does this, and keeps the
end effector within a workspace, where one is given. Observed are its 8 numbers of state (position 3, roll, pitch, yaw, a 0, gripper)
under the name "state", and its cameras as "image.primary" and "image.wrist".
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from postbc.environments.robot.clock import RealClock, Ticks
from postbc.environments.robot.images import resized
from postbc.errors import InputError, require
from postbc.schemas import Positive, schema

Point = tuple[float, float, float]


@schema
class ManipulatorConfig:
    """Which robot, and how it moves (`--robot-config FILE.yaml`)."""

    interface: Literal["server", "widowx", "widowx_sim"] = "server"
    """server: manipulator_server.py of manipulator_gym, on this machine or another; widowx: the arm itself, by ROS, in this process;
    widowx_sim: its PyBullet simulation."""
    host: str = "localhost"
    """Where the server is."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5556
    rate: Positive = 10.0
    """Control steps a second (manipulator_gym: 0.1 s a step)."""
    wrist_camera: bool = False
    """Whether "image.wrist" is observed too."""
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Pixels of a side that frames are resized to (area average); default as they come."""
    displacement: Positive = 0.02
    """Largest dx, dy, dz of a control step (m)."""
    rotation: Positive = 0.02
    """Largest drx, dry, drz of a control step (rad); 0.02 is what manipulator_gym's action space declares."""
    workspace: tuple[Point, Point] | None = None
    """Corners of the box that the end effector stays in (m): [[x, y, z], [x, y, z]]."""


class ManipulatorRobot(gymnasium.Env[dict[str, NDArray[Any]], NDArray[np.float32]]):
    """A `ManipulatorInterface` as a robot (see :mod:`postbc.environments.robot`).

    Args:
        config: which one.
        interface: an object with `step_action`, `reset`, `eef_pose`, `gripper_state`, `primary_img` and `wrist_img`, instead of the
            configured one.
        clock: for tests.

    Raises:
        InputError: manipulator_gym is not installed, or the robot cannot be reached.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, config: ManipulatorConfig | None = None, interface: Any = None, clock: Any = None) -> None:
        self.config = config or ManipulatorConfig()
        self.interface = connect(self.config) if interface is None else interface
        self._fresh, self._ticks = True, Ticks(1 / self.config.rate, clock or RealClock())
        first = self._observe()
        parts: list[tuple[str, Any]] = [("state", gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32))]
        parts += [(k, gymnasium.spaces.Box(0, 255, v.shape, np.uint8)) for k, v in first.items() if k != "state"]
        self.observation_space: gymnasium.spaces.Space[Any] = gymnasium.spaces.Dict(parts)
        high = np.array([self.config.displacement] * 3 + [self.config.rotation] * 3 + [1.0], np.float32)
        low = np.append(-high[:6], np.float32(0))
        self.action_space: gymnasium.spaces.Space[Any] = gymnasium.spaces.Box(low, high, dtype=np.float32)

    def _observe(self) -> dict[str, NDArray[Any]]:
        robot = self.interface
        state = np.concatenate([np.asarray(robot.eef_pose, np.float32)[:6], [0.0, robot.gripper_state]]).astype(np.float32)
        seen: dict[str, NDArray[Any]] = {"state": state, "image.primary": resized(robot.primary_img, self.config.image_size)}
        if self.config.wrist_camera:
            wrist = robot.wrist_img
            require(wrist is not None, "The robot has no wrist camera.", key="wrist_camera", found=True, expected="false")
            seen["image.wrist"] = resized(wrist, self.config.image_size)
        return seen

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        good = self.interface.reset()
        require(
            good is not False,
            "The robot has refused to go to its start.",
            key="reset",
            remedy="look at manipulator_gym's server",
        )
        observation = self._observe()
        self._fresh = True
        return observation, {"command": np.append(np.zeros(6), observation["state"][7])}

    def step(self, action: NDArray[np.floating[Any]]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        command = np.clip(np.asarray(action, np.float64), self.action_space.low, self.action_space.high)  # type: ignore[attr-defined]
        if self.config.workspace is not None:
            low, high = np.sort(np.array(self.config.workspace), axis=0)
            at = np.asarray(self.interface.eef_pose, float)[:3]
            # from outside it may come back, by no more than a step
            command[:3] = np.clip(
                np.clip(at + command[:3], low, high) - at, -self.config.displacement, self.config.displacement
            )
        if self._fresh:
            self._ticks.start()
        self._fresh = False
        self._ticks.sent()
        done = self.interface.step_action(command)
        require(done is not False, "The robot has refused an action.", key="step_action", found=command.tolist(),
                remedy="look at manipulator_gym's server")  # fmt: skip
        self._ticks.wait()
        return self._observe(), 0.0, False, False, {}

    def hold(self) -> None:
        """A displacement is done within its control step, and the arm holds where it then is: nothing has to be sent."""


def connect(config: ManipulatorConfig) -> Any:
    """The interface that `config` names. InputError where manipulator_gym is not installed, or the robot cannot be reached."""
    module, name, options = {
        "server": ("interface_service", "ActionClientInterface", {"host": config.host, "port": config.port}),
        "widowx": ("widowx", "WidowXInterface", {}),
        "widowx_sim": ("widowx_sim", "WidowXSimInterface", {}),
    }[config.interface]
    check()
    try:
        made: Any = getattr(importlib.import_module(f"manipulator_gym.interfaces.{module}"), name)
        return made(**options)
    except Exception as error:
        raise InputError(
            "The robot cannot be reached.", key="interface", found=f"{config.interface}: {type(error).__name__}: {error}"[:500],
            remedy=f"start manipulator_server.py on the robot's machine, port {config.port}; its packages are manipulator_gym's",
        ) from error  # fmt: skip


def check() -> None:
    """InputError where manipulator_gym is not installed."""
    missing = importlib.util.find_spec("manipulator_gym") is None
    require(not missing, "manipulator_gym is not installed.", key="robot", found="no module manipulator_gym",
            remedy="pip install git+https://github.com/rail-berkeley/manipulator_gym (and agentlace, for its server)")  # fmt: skip
