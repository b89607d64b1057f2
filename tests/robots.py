"""Robots for tests: a point that moves where it is told, at any speed, and can stop answering; a fake of each foreign interface."""

from __future__ import annotations

import threading
import time
from typing import Any

import gymnasium
import numpy as np


class FakeClock:
    """Time that a test moves."""

    real = False

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, until: float) -> None:
        self.time = max(self.time, until)


class Point(gymnasium.Env):  # type: ignore[type-arg]
    """Moves by its action; solved beyond 1. Takes `seconds` a step, and from `silent_from` on never answers (until `answer` is set)."""

    metadata = {"render_modes": [], "render_fps": 20, "simulated": True}  # noqa: RUF012

    def __init__(
        self, seconds: float = 0.0, silent_from: int | None = None, fails_at: int | None = None, success: bool = True
    ) -> None:
        self.observation_space = gymnasium.spaces.Dict(
            {
                "at": gymnasium.spaces.Box(-9, 9, (2,), np.float32), "steps": gymnasium.spaces.Box(0, 99, (1,), np.float32),
                "image.top": gymnasium.spaces.Box(0, 255, (4, 6, 3), np.uint8),
            }
        )  # fmt: skip
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.seconds, self.silent_from, self.fails_at, self.says = seconds, silent_from, fails_at, success
        self.answer = threading.Event()
        self.sent: list[tuple[float, np.ndarray]] = []
        self.held: list[float] = []
        self.seeds: list[int | None] = []

    def observation(self) -> dict[str, np.ndarray]:
        image = np.full((4, 6, 3), self.count, np.uint8)
        return {"at": self.at.astype(np.float32), "steps": np.array([self.count], np.float32), "image.top": image}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at, self.count = self.np_random.uniform(-0.5, 0.5, 2), 0
        self.seeds.append(seed)
        return self.observation(), {"command": np.zeros(2)}

    def step(self, action: np.ndarray) -> Any:
        self.sent.append((time.monotonic(), np.array(action)))
        if self.fails_at == self.count:
            raise OSError("the cable is loose")
        if self.silent_from is not None and self.count >= self.silent_from:
            self.answer.wait(10)
        time.sleep(self.seconds)
        self.at, self.count = self.at + 0.1 * action, self.count + 1
        info = {"success": bool((self.at > 1).any())} if self.says else {}
        return self.observation(), 0.0, False, False, info

    def hold(self) -> None:
        self.held.append(time.monotonic())


class Arm(Point):
    """One that does not say that it is simulated."""

    metadata = {"render_modes": [], "render_fps": 20}  # noqa: RUF012


class FakeManipulator:
    """manipulator_gym's `ManipulatorInterface`, moving as it is told."""

    def __init__(self) -> None:
        self.pose, self.gripper_state, self.actions = np.array([0.25, 0, 0.2, 0, 1.5, 0]), 1.0, []
        self.primary_img = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
        self.wrist_img: Any = None

    @property
    def eef_pose(self) -> np.ndarray:
        return self.pose.copy()

    def reset(self, **options: Any) -> bool:
        self.pose, self.gripper_state = np.array([0.25, 0, 0.2, 0, 1.5, 0]), 1.0
        return True

    def step_action(self, action: np.ndarray) -> bool:
        self.actions.append(np.array(action))
        self.pose, self.gripper_state = self.pose + action[:6], float(action[6])
        return True


class FakeLeRobot:
    """LeRobot's `Robot` interface: two motors and a camera."""

    observation_features = {"shoulder.pos": float, "gripper.pos": float, "front": (12, 16, 3)}  # noqa: RUF012
    action_features = {"shoulder.pos": float, "gripper.pos": float}  # noqa: RUF012

    def __init__(self) -> None:
        self.is_connected, self.at, self.sent = False, {"shoulder.pos": 10.0, "gripper.pos": 50.0}, []

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True

    def get_observation(self) -> dict[str, Any]:
        assert self.is_connected
        return {**self.at, "front": np.full((12, 16, 3), 7, np.uint8)}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        assert set(action) == set(self.action_features)
        self.sent.append(dict(action))
        self.at = dict(action)
        return action

    def disconnect(self) -> None:
        self.is_connected = False


if "RobotPoint-v0" not in gymnasium.registry:
    gymnasium.register("RobotPoint-v0", "robots:Point", max_episode_steps=25)
    gymnasium.register("RobotArm-v0", "robots:Arm", max_episode_steps=25)
