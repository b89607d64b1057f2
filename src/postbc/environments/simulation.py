"""One environment of the vector: `NativeSimulation` runs a chunk in one compiled call, `RobosuiteSimulation` calls `env.step`.

Both have the interface `Simulation`; the second is what the first is measured against, and what stands in for it where an
environment uses something that is not compiled.
"""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any, Protocol

import mujoco
import numpy as np
from numpy.typing import NDArray

from postbc.environments import episodes
from postbc.environments.native_control import Controller, NativeControl, Physics, control_substep, diverged, watch
from postbc.environments.operational_space import Floats, compiled
from postbc.environments.robosuite import Task, numpy_seeded, task_sensors
from postbc.environments.sensing import Sensors, observe, sample, solved

Bools = NDArray[np.bool_]
WHOLE_STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # with the accelerations that warm-start the solver


class Simulation(Protocol):
    """One simulated episode after another; observations are (S,) float64 in `observation`."""

    env: Any
    observation: Floats

    @property
    def model(self) -> mujoco.MjModel: ...

    @property
    def data(self) -> mujoco.MjData: ...

    def reset(self, seed: int) -> None:
        """Begin the episode `seed`."""

    def run(self, actions: Floats, until_solved: bool, successes: Bools) -> tuple[int, bool]:
        """Execute `actions` (T, A), writing the success of each into `successes` (T,), up to the first if `until_solved`.

        Returns: how many were executed; whether the simulation diverged.
        """

    def set_sim_state(self, state: Floats) -> None:
        """Continue from robosuite's flattened state (Ds,) [time, qpos, qvel], the arm's controller at rest there."""

    def get_state(self) -> dict[str, Any]:
        """Everything that the future depends on, as arrays."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Undo whatever has happened since `get_state`."""

    def model_xml(self) -> str:
        """The MJCF of the model."""


@compiled
def run_chunk(
    physics: Physics, controller: Controller, sensors: Sensors, actions: Floats, until_solved: bool, successes: Bools, out: Floats
) -> tuple[int, bool]:
    """`Simulation.run`: all control steps of a chunk, their observations and success checks, without Python."""
    for t in range(len(actions)):
        for k in range(controller.arm.substeps):
            if not control_substep(physics, controller, actions[t], k == 0):
                return t + 1, True
            sample(physics, sensors, out)
        successes[t] = solved(physics, sensors)
        if until_solved and successes[t]:
            return t + 1, False
    return len(actions), False


class NativeSimulation:
    """A simulation driven by the compiled loop; many share one robosuite environment object, each with a model and data of its own."""

    def __init__(self, task: Task, env: Any) -> None:
        self.task, self.env = task, env
        self._model = copy.copy(env.sim.model._model)
        self._data = mujoco.MjData(self._model)
        self.observation = np.zeros(task.observation_dim)
        self.control = NativeControl(env, self.model, self.data)
        sensors = task_sensors(task, env)
        self.sensors = sensors._replace(clock=sensors.clock.copy())
        self.cube_size = np.array(env.cube.size, float) if hasattr(env, "cube") else np.zeros(0)

    @property
    def model(self) -> mujoco.MjModel:
        return self._model

    @property
    def data(self) -> mujoco.MjData:
        return self._data

    def reset(self, seed: int) -> None:
        state = episodes.draw(self.env, seed)
        if state.size is not None:
            self._resize(state.size)
        episodes.put(self.env, self.model, self.data, state)
        self._begin()

    def _begin(self) -> None:
        watch(self.data)
        self.control.restart()
        observe(self.control.physics, self.sensors, self.observation)
        self.sensors.clock[:] = self.sensors.timestep, 1.0  # the reset's own sample counts as one substep's

    def _resize(self, size: Floats) -> None:
        self.cube_size = size
        episodes.resize_cube(self.env, self.model, self.data, size)

    def run(self, actions: Floats, until_solved: bool, successes: Bools) -> tuple[int, bool]:
        control = self.control
        return run_chunk(
            control.physics, control.controller, self.sensors, actions, until_solved, successes, self.observation
        )  # type: ignore[no-any-return]

    def set_sim_state(self, state: Floats) -> None:
        mujoco.mj_resetData(self.model, self.data)
        self.data.time, nq = state[0], self.model.nq
        self.data.qpos[:], self.data.qvel[:] = state[1 : 1 + nq], state[1 + nq :]
        mujoco.mj_forward(self.model, self.data)
        self._begin()

    def get_state(self) -> dict[str, Any]:
        physics = np.empty(mujoco.mj_stateSize(self.model, WHOLE_STATE))
        mujoco.mj_getState(self.model, self.data, physics, WHOLE_STATE)
        goal = self.control.controller.goal
        return {
            "physics": physics,
            "cube_size": self.cube_size.copy(),
            "goal_position": goal.position.copy(),
            "goal_orientation": goal.orientation.copy(),
            "rest": goal.rest.copy(),
            "fingers": self.control.controller.fingers.copy(),
            "clock": self.sensors.clock.copy(),
            "observation": self.observation.copy(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        if len(state["cube_size"]):
            self._resize(np.array(state["cube_size"], float))
        mujoco.mj_resetData(self.model, self.data)
        physics = np.array(state["physics"], float)
        mujoco.mj_setState(self.model, self.data, physics, WHOLE_STATE)
        mujoco.mj_forward(self.model, self.data)  # for the poses that render_frame and sim_states see; the next step repeats it
        mujoco.mj_setState(self.model, self.data, physics, WHOLE_STATE)  # forward replaced the warm start
        watch(self.data)
        goal = self.control.controller.goal
        goal.position[:], goal.orientation[:], goal.rest[:] = state["goal_position"], state["goal_orientation"], state["rest"]
        self.control.controller.fingers[:] = state["fingers"]
        self.sensors.clock[:] = state["clock"]
        self.observation[:] = state["observation"]

    def model_xml(self) -> str:
        root = ET.fromstring(self.env.sim.model.get_xml())
        if len(self.cube_size):
            for geom in root.iter("geom"):
                if geom.get("name", "").startswith("cube_g0"):
                    geom.set("size", " ".join(repr(float(x)) for x in self.cube_size))
        return ET.tostring(root, encoding="unicode")


class RobosuiteSimulation:
    """A simulation stepped by robosuite itself: the reference, and the fallback."""

    def __init__(self, task: Task, env: Any) -> None:
        self.task, self.env = task, env
        env.hard_reset = True
        self.observation = np.zeros(task.observation_dim)

    @property
    def model(self) -> mujoco.MjModel:
        return self.env.sim.model._model

    @property
    def data(self) -> mujoco.MjData:
        return self.env.sim.data._data

    def reset(self, seed: int) -> None:
        with numpy_seeded(seed):
            self._observe(self.env.reset())
        watch(self.data)

    def _observe(self, observation: Mapping[str, Any]) -> None:
        keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state")
        self.observation[:] = np.concatenate([observation[key] for key in keys])

    def run(self, actions: Floats, until_solved: bool, successes: Bools) -> tuple[int, bool]:
        for t, action in enumerate(actions):
            observation, *_ = self.env.step(action)
            if diverged(Physics.of(self.model, self.data)):
                return t + 1, True
            self._observe(observation)
            successes[t] = bool(self.env._check_success())
            if until_solved and successes[t]:
                return t + 1, False
        return len(actions), False

    def set_sim_state(self, state: Floats) -> None:
        self.env.sim.reset()
        self.env.sim.set_state_from_flattened(np.asarray(state, float))
        self.env.sim.forward()
        robot = self.env.robots[0]
        robot.controller.update_initial_joints(self.data.qpos[robot._ref_joint_pos_indexes])
        robot.gripper.current_action = np.zeros(robot.gripper.dof)
        for observable in self.env._observables.values():
            observable.reset()
        self._observe(self.env._get_observations(force_update=True))
        watch(self.data)

    def get_state(self) -> dict[str, Any]:
        physics = np.empty(mujoco.mj_stateSize(self.model, WHOLE_STATE))
        mujoco.mj_getState(self.model, self.data, physics, WHOLE_STATE)
        controller, gripper = self.env.robots[0].controller, self.env.robots[0].gripper
        observables = self.env._observables
        return {
            "physics": physics,
            "cube_size": np.array(self.env.cube.size, float) if hasattr(self.env, "cube") else np.zeros(0),
            "goal_position": np.array(controller.goal_pos),
            "goal_orientation": np.array(controller.goal_ori),
            "rest": np.array(controller.initial_joint),
            "fingers": np.array(gripper.current_action) * np.ones(2),
            "clock": np.array([[o._time_since_last_sample, float(o._sampled)] for o in observables.values()]),
            "observation": self.observation.copy(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        physics = np.array(state["physics"], float)
        if len(state["cube_size"]):
            episodes.resize_cube(self.env, self.model, self.data, np.array(state["cube_size"], float))
        mujoco.mj_setState(self.model, self.data, physics, WHOLE_STATE)
        controller, gripper = self.env.robots[0].controller, self.env.robots[0].gripper
        controller.update(force=True)
        controller.new_update = True
        controller.goal_pos, controller.goal_ori = np.array(state["goal_position"]), np.array(state["goal_orientation"])
        controller.initial_joint, gripper.current_action = np.array(state["rest"]), np.array(state["fingers"])
        for observable, (elapsed, sampled) in zip(self.env._observables.values(), state["clock"]):
            observable._time_since_last_sample, observable._sampled = float(elapsed), bool(sampled)
        mujoco.mj_setState(self.model, self.data, physics, WHOLE_STATE)
        watch(self.data)
        self.observation[:] = state["observation"]

    def model_xml(self) -> str:
        return str(self.env.sim.model.get_xml())
