"""One environment of the vector: `NativeSimulation` runs a chunk in one compiled call, `RobosuiteSimulation` calls `env.step`.

Both have the interface `Simulation`; the second is what the first is measured against, and what stands in for it where an
environment uses something that is not compiled.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import mujoco
import numpy as np
from numpy.typing import NDArray

from postbc.environments.robosuite import episodes
from postbc.environments.robosuite.building import SENSORS, numpy_seeded
from postbc.environments.robosuite.native_control import Controller, NativeControl, Physics, control_step, diverged, watch
from postbc.environments.robosuite.operational_space import Floats, compiled
from postbc.environments.robosuite.sensing import Sensors, observe, solved
from postbc.environments.robosuite.tasks import Task

Bools = NDArray[np.bool_]
#: What robosuite's controller keeps between `update`s; its first step after a reset works with the values of the reset.
CACHED = ("ee_pos", "ee_ori_mat", "ee_pos_vel", "ee_ori_vel", "joint_pos", "joint_vel", "J_pos", "J_ori", "J_full", "mass_matrix",
          "new_update")  # fmt: skip
WHOLE_STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # with the accelerations that warm-start the solver


class Simulation(Protocol):
    """One simulated episode after another; observations are (S,) float64 in `observation`."""

    observation: Floats

    @property
    def env(self) -> Any: ...

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


def physics_state(model: mujoco.MjModel, data: mujoco.MjData) -> Floats:
    """What MuJoCo needs to continue bit for bit."""
    state = np.empty(mujoco.mj_stateSize(model, WHOLE_STATE))
    mujoco.mj_getState(model, data, state, WHOLE_STATE)
    return state


def set_physics_state(model: mujoco.MjModel, data: mujoco.MjData, state: Floats) -> None:
    """Continue from :func:`physics_state`."""
    mujoco.mj_resetData(model, data)
    physics = np.array(state, float)
    mujoco.mj_setState(model, data, physics, WHOLE_STATE)
    mujoco.mj_forward(model, data)  # for whoever looks at the poses; the next step computes them again
    mujoco.mj_setState(model, data, physics, WHOLE_STATE)  # forward has replaced the warm start
    watch(data)


def _simulation_state(simulation: Simulation) -> dict[str, Any]:
    cube_size = episodes.cube_size(simulation.env, simulation.model)
    physics = physics_state(simulation.model, simulation.data)
    return {"physics": physics, "cube_size": cube_size, "observation": simulation.observation.copy()}


def _set_simulation_state(simulation: Simulation, state: Mapping[str, Any], resize_cube: Callable[[Floats], None]) -> None:
    if len(state["cube_size"]):
        resize_cube(np.array(state["cube_size"], float))
    set_physics_state(simulation.model, simulation.data, state["physics"])
    simulation.observation[:] = state["observation"]


@compiled
def run_chunk(
    physics: Physics,
    controller: Controller,
    sensors: Sensors,
    actions: Floats,
    until_solved: bool,
    successes: Bools,
    out: Floats,
) -> tuple[int, bool]:
    """`Simulation.run`: all control steps of a chunk, their observations and success checks, without Python."""
    for t in range(len(actions)):
        if not control_step(physics, controller, actions[t]):
            return t + 1, True
        observe(physics, sensors, out)
        successes[t] = solved(physics, sensors)
        if until_solved and successes[t]:
            return t + 1, False
    return len(actions), False


class NativeSimulation:
    """A simulation driven by the compiled loop; many share one robosuite environment object, and the models (one a thread)."""

    def __init__(self, task: Task, env: Any, models: episodes.Models) -> None:
        self.task, self.env, self._models, self._cube = task, env, models, models.cube
        self._data = mujoco.MjData(models.shared)
        self.observation: Floats = np.zeros(task.observation_dim)
        self.control = NativeControl(env, self.model, self.data)
        self.sensors = SENSORS[task.robosuite_name](env)

    @property
    def model(self) -> mujoco.MjModel:
        """For use at once, and in this thread: it becomes the model of the simulation that is asked next."""
        return self._models.of(self._cube)

    @property
    def data(self) -> mujoco.MjData:
        return self._data

    def reset(self, seed: int) -> None:
        state = episodes.draw(self.env, seed)
        if state.size is not None:
            self._resize_cube(state.size)
        episodes.put(self.env, self.model, self.data, state)
        self._begin()

    def _resize_cube(self, size: Floats) -> None:
        self._cube = self._models.resized(self.data, size)

    def _begin(self) -> None:
        watch(self.data)
        self.control.restart()
        observe(self.control.physics, self.sensors, self.observation)

    def run(self, actions: Floats, until_solved: bool, successes: Bools) -> tuple[int, bool]:
        control = self.control
        control.use(self.model)
        steps, failed = run_chunk(
            control.physics, control.controller, self.sensors, actions, until_solved, successes, self.observation
        )
        return int(steps), bool(failed)

    def set_sim_state(self, state: Floats) -> None:
        mujoco.mj_resetData(self.model, self.data)
        self.data.time, nq = state[0], self.model.nq
        self.data.qpos[:], self.data.qvel[:] = state[1 : 1 + nq], state[1 + nq :]
        mujoco.mj_forward(self.model, self.data)
        self._begin()

    def get_state(self) -> dict[str, Any]:
        return _simulation_state(self) | self.control.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        _set_simulation_state(self, state, self._resize_cube)
        self.control.set_state(state)

    def model_xml(self) -> str:
        root = ET.fromstring(self.env.model.get_xml())  # sim.model's would be the XML of whatever this process compiled last
        size = episodes.cube_size(self.env, self.model)
        for geom in root.iter("geom"):
            if len(size) and geom.get("name", "").startswith("cube_g0"):
                geom.set("size", " ".join(repr(float(edge)) for edge in size))
        return ET.tostring(root, encoding="unicode")


class RobosuiteSimulation:
    """A simulation stepped by robosuite itself: the reference, and the fallback."""

    def __init__(self, task: Task, env: Any) -> None:
        self.task, self.env = task, env
        env.hard_reset = True
        self.observation: Floats = np.zeros(task.observation_dim)

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
        self._observe(self.env._get_observations(force_update=True))
        self._restart_observables()
        watch(self.data)

    def get_state(self) -> dict[str, Any]:
        controller, gripper = self.env.robots[0].controller, self.env.robots[0].gripper
        return _simulation_state(self) | {
            "goal_position": np.array(controller.goal_pos),
            "goal_orientation": np.array(controller.goal_ori),
            "rest": np.array(controller.initial_joint),
            "fingers": np.array(gripper.current_action) * np.ones(2),
            "cached": {name: np.array(getattr(controller, name)) for name in CACHED},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As above; also takes a `NativeSimulation`'s state, so that the two can be compared from anywhere."""
        _set_simulation_state(self, state, lambda size: episodes.resize_cube(self.env, self.model, self.data, size))
        controller, gripper = self.env.robots[0].controller, self.env.robots[0].gripper
        for name, value in state.get("cached", {"new_update": True}).items():
            setattr(controller, name, bool(value) if name == "new_update" else np.array(value))
        controller.goal_pos, controller.goal_ori = np.array(state["goal_position"]), np.array(state["goal_orientation"])
        controller.initial_joint, gripper.current_action = np.array(state["rest"]), np.array(state["fingers"])
        self._restart_observables()

    def _restart_observables(self) -> None:
        for observable in self.env._observables.values():  # as after a reset, and (to rounding) after every control step
            observable._time_since_last_sample, observable._sampled = self.env.model_timestep, True

    def model_xml(self) -> str:
        return str(self.env.model.get_xml())
