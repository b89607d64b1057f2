"""One environment of the vector: an episode after another of one task or of several, in whatever scenes they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

from postbc.environments.libero.goals import Goal
from postbc.environments.libero.scenes import Layout, Scene, SceneSensors, observe_scene
from postbc.environments.robosuite.native_control import NativeControl, control_substep, watch
from postbc.environments.robosuite.operational_space import Floats
from postbc.environments.robosuite.simulation import Bools, physics_state, set_physics_state
from postbc.environments.robosuite.tasks import ACTION_DIM

NO_OPS = 5
"""Actions of zeros in which LIBERO's evaluation lets the objects fall onto the table (lifelong/metric.py)."""


class Playable(NamedTuple):
    """A task with all that its episodes need."""

    scene: Scene
    goal: Goal
    states: NDArray[np.float64]  # (50, Ds) flattened initial states
    tail: Floats  # what stands at the end of the observed state: the task's place among several, or nothing


class LiberoSimulation:
    """Episodes of `tasks`, one after another (a :class:`postbc.environments.robosuite.simulation.Simulation`).

    The seed s of an episode decides its task s mod n, its initial state (s div n) mod 50, and where the scene's fixtures stand: as
    after `np.random.seed(s); env.reset()` in LIBERO. What follows is LIBERO's evaluation: the initial state, and five actions of zeros.

    Attributes:
        task: index of the episode's.
    """

    def __init__(self, tasks: list[Playable], layout: Layout) -> None:
        self._tasks, self._layout = tasks, layout
        self._parts: dict[int, tuple[NativeControl, SceneSensors]] = {}  # by the scene's identity
        self.observation: Floats = np.zeros(layout.dim + len(tasks[0].tail))
        self.task = 0

    @property
    def playable(self) -> Playable:
        return self._tasks[self.task]

    @property
    def scene(self) -> Scene:
        return self.playable.scene

    @property
    def env(self) -> Any:
        """LIBERO's environment object, to read from."""
        return self.scene.env

    @property
    def control(self) -> NativeControl:
        return self._part()[0]

    @property
    def model(self) -> mujoco.MjModel:
        return self.scene.model

    @property
    def data(self) -> mujoco.MjData:
        return self.control.data

    def _part(self) -> tuple[NativeControl, SceneSensors]:
        """Of the current task's scene, made when it is first met."""
        scene = self.scene
        if id(scene) not in self._parts:
            control = NativeControl(scene.env, scene.model, mujoco.MjData(scene.model))
            self._parts[id(scene)] = control, self._layout.sensors(scene)
        return self._parts[id(scene)]

    def reset(self, seed: int) -> None:
        self.task = seed % len(self._tasks)
        states = self.playable.states
        mujoco.mj_resetData(self.model, self.data)
        self.scene.place_fixtures(self.data, seed)
        self.put(states[seed // len(self._tasks) % len(states)])
        self.control.read_controller()  # which aims at the pose of the reset
        self.control.controller.fingers[:] = 0.0
        self._first_no_op()
        for _ in range(NO_OPS - 1):
            self.control.step(np.zeros(ACTION_DIM))
        self._observe()

    def put(self, state: Floats) -> None:
        """Flattened state (Ds,) into `data`, forwarded."""
        nq = self.model.nq
        self.data.time, self.data.qpos[:], self.data.qvel[:] = state[0], state[1 : 1 + nq], state[1 + nq :]
        mujoco.mj_forward(self.model, self.data)
        watch(self.data)

    def _first_no_op(self) -> None:
        """robosuite's first step after an initial state was set: its controller still believes in the reset's pose.

        So it aims there, and its first torque is that of an arm at rest at its goal: gravity compensation.
        """
        physics, controller = self.control.physics, self.control.controller
        arm, data = controller.arm, self.data
        mujoco.mj_step1(self.model, data)
        data.ctrl[arm.actuators] = np.clip(data.qfrc_bias[arm.dofs], arm.torque_low, arm.torque_high)
        data.ctrl[arm.fingers] = arm.finger_centre + arm.finger_range * controller.fingers
        mujoco.mj_step2(self.model, data)
        for _ in range(arm.substeps - 1):
            control_substep(physics, controller, np.zeros(ACTION_DIM), False)

    def _observe(self) -> None:
        control, sensors = self._part()
        observe_scene(control.physics, sensors, self.observation[: self._layout.dim])
        self.observation[self._layout.dim :] = self.playable.tail

    def run(self, actions: Floats, until_solved: bool, successes: Bools) -> tuple[int, bool]:
        control, goal = self.control, self.playable.goal
        for t, action in enumerate(actions):
            if not control.step(action):
                return t + 1, True
            self._observe()
            successes[t] = goal(control.physics, control.data)
            if until_solved and successes[t]:
                return t + 1, False
        return len(actions), False

    def set_sim_state(self, state: Floats) -> None:
        """Continue the current task from a flattened state (Ds,), the fixtures where they are and the arm's controller at rest."""
        fixtures = self.data.mocap_pos.copy(), self.data.mocap_quat.copy()
        mujoco.mj_resetData(self.model, self.data)
        self.data.mocap_pos[:], self.data.mocap_quat[:] = fixtures
        self.put(state)
        self.control.restart()
        self._observe()

    def pose(self, state: Floats) -> None:
        """Only the poses of a recorded state (Ds,), to draw it as a step showed it: bodies are a substep older than joints."""
        model, data, nq = self.model, self.data, self.model.nq
        data.qpos[:], data.qvel[:] = state[1 : 1 + nq], state[1 + nq :]
        mujoco.mj_integratePos(model, data.qpos, data.qvel, -model.opt.timestep)  # what the substep began with
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        data.qpos[:] = state[1 : 1 + nq]

    def get_state(self) -> dict[str, Any]:
        physics = physics_state(self.model, self.data)
        return {"task": self.task, "physics": physics, "observation": self.observation.copy()} | self.control.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.task = int(state["task"])
        set_physics_state(self.model, self.data, state["physics"])
        self.observation[:] = state["observation"]
        self.control.set_state(state)

    def model_xml(self) -> str:
        """The MJCF of the model: LIBERO's, with the scene's fixtures as mocap bodies."""
        return self.scene.xml
