"""robosuite 1.4.0's control step as one compiled loop: 25 physics substeps, each under the operational-space controller.

robosuite computes the controller in Python at every substep, and runs the forward dynamics three times: once in `env.step`, once
in `controller.update` and once inside `mj_step`. Here a substep is mj_step1 (kinematics, contacts, bias forces), the controller, and
mj_step2 (actuation, constraint solver, integration), all without Python and without the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

from postbc.environments.robosuite.libmujoco import addresses, call
from postbc.environments.robosuite.operational_space import Floats, Gains, Goal, Indices, Workspace, compiled, set_goal, torques
from postbc.errors import InputError

BAD_QPOS = int(mujoco.mjtWarning.mjWARN_BADQPOS)
BAD_QVEL = int(mujoco.mjtWarning.mjWARN_BADQVEL)
BAD_QACC = int(mujoco.mjtWarning.mjWARN_BADQACC)
BAD_CTRL = int(mujoco.mjtWarning.mjWARN_BADCTRL)


class Physics(NamedTuple):
    """Addresses and views of one mjModel and mjData; valid as long as both live."""

    step1: int
    step2: int
    model: int
    data: int
    qpos: Floats
    qvel: Floats
    ctrl: Floats
    bias: Floats
    qM: Floats
    xpos: Floats
    xquat: Floats
    xanchor: Floats
    xaxis: Floats
    site_xpos: Floats
    site_xmat: Floats
    warnings: NDArray[np.int32]

    @classmethod
    def of(cls, model: mujoco.MjModel, data: mujoco.MjData) -> Physics:
        d = data
        step1, step2 = addresses("mj_step1", "mj_step2")
        return cls(step1, step2, model._address, d._address, d.qpos, d.qvel, d.ctrl, d.qfrc_bias, d.qM,
                   d.xpos, d.xquat, d.xanchor, d.xaxis, d.site_xpos, d.site_xmat, d.warning.number)  # fmt: skip


class Arm(NamedTuple):
    """Where the arm and its gripper are in the model, and their limits."""

    qpos: Indices  # (n,)
    dofs: Indices  # (n,)
    joints: Indices  # (n,)
    actuators: Indices  # (n,)
    mass: Indices  # (n, n) positions in qM, −1 where the entry is zero
    site: int
    torque_low: Floats  # (n,)
    torque_high: Floats  # (n,)
    fingers: Indices  # (g,) actuators
    finger_direction: Floats  # (g,)
    finger_speed: float  # per substep
    finger_centre: Floats  # (g,)
    finger_range: Floats  # (g,)
    substeps: int


class Controller(NamedTuple):
    """Everything `control_substep` needs: what is fixed (arm, gains), what changes (goal, fingers), and scratch."""

    arm: Arm
    gains: Gains
    goal: Goal
    fingers: Floats  # (g,) the gripper's current action in [−1, 1]
    work: Workspace


@compiled
def diverged(physics: Physics) -> bool:
    """Whether MuJoCo has found NaN or huge numbers since `watch` (it then resets the simulation by itself)."""
    counts = physics.warnings
    return counts[BAD_QPOS] != 1 or counts[BAD_QVEL] != 1 or counts[BAD_QACC] != 1 or counts[BAD_CTRL] != 1


@compiled
def control_substep(physics: Physics, controller: Controller, action: Floats, first: bool) -> bool:
    """One physics substep under `action` (n_a,); `first`: the action is new. Returns False if the simulation diverged."""
    arm, work = controller.arm, controller.work
    call(physics.step1, physics.model, physics.data)
    if diverged(physics):
        return False
    position, orientation = physics.site_xpos[arm.site], physics.site_xmat[arm.site]
    if first:
        set_goal(action, position, orientation, controller.gains, controller.goal, work)
    n = len(arm.dofs)
    for j in range(n):
        axis, anchor = physics.xaxis[arm.joints[j]], physics.xanchor[arm.joints[j]]
        x, y, z = position[0] - anchor[0], position[1] - anchor[1], position[2] - anchor[2]
        work.jacobian[0, j] = axis[1] * z - axis[2] * y
        work.jacobian[1, j] = axis[2] * x - axis[0] * z
        work.jacobian[2, j] = axis[0] * y - axis[1] * x
        for i in range(3):
            work.jacobian[3 + i, j] = axis[i]
        for i in range(n):
            work.mass[j, i] = physics.qM[arm.mass[j, i]] if arm.mass[j, i] >= 0 else 0.0
    q, v = work.q, work.v
    for j in range(n):
        q[j], v[j] = physics.qpos[arm.qpos[j]], physics.qvel[arm.dofs[j]]
    if not torques(q, v, position, orientation, controller.gains, controller.goal, work):
        return False
    for j in range(n):
        torque = work.torque[j] + physics.bias[arm.dofs[j]]
        physics.ctrl[arm.actuators[j]] = min(max(torque, arm.torque_low[j]), arm.torque_high[j])
    sign = np.sign(action[6])
    for i in range(len(arm.fingers)):
        wanted = controller.fingers[i] + arm.finger_direction[i] * arm.finger_speed * sign
        controller.fingers[i] = min(max(wanted, -1.0), 1.0)
        physics.ctrl[arm.fingers[i]] = arm.finger_centre[i] + arm.finger_range[i] * controller.fingers[i]
    call(physics.step2, physics.model, physics.data)
    return not diverged(physics)


@compiled
def control_step(physics: Physics, controller: Controller, action: Floats) -> bool:
    """One 20 Hz control step under `action` (n_a,). Returns False if the simulation diverged."""
    for k in range(controller.arm.substeps):  # noqa: SIM110  numba compiles no generator
        if not control_substep(physics, controller, action, k == 0):
            return False
    return True


def watch(data: mujoco.MjData) -> None:
    """Arm `diverged`. Counts start at 1 since MuJoCo prints, and writes to a log file, only where it counts from 0."""
    data.warning.number[:] = 1


class NativeControl:
    """The compiled control loop of one robosuite 1.4.0 environment (LIBERO's tasks are such environments too).

    Args:
        env: a robosuite environment object that has been reset.
        model, data: the simulation to drive; the environment's own by default. Another copy of the same model drives a
            second simulation from one environment object.
    Raises:
        InputError: the environment uses something the loop does not implement; `unsupported(env)` says what without raising.

    `step` leaves the environment's own Python objects (controller, observables, timestep) alone. After anything else has moved
    the simulation or replaced it (`env.reset`), call `read_controller` or build a new object.
    """

    def __init__(self, env: Any, model: mujoco.MjModel | None = None, data: mujoco.MjData | None = None) -> None:
        reason = unsupported(env)
        if reason is not None:
            raise InputError(f"the compiled control loop cannot step this environment: {reason}", remedy="use env.step")
        self.env = env
        self.model = env.sim.model._model if model is None else model
        self.data = env.sim.data._data if data is None else data
        arm, gains = arm_of(env), gains_of(env.robots[0].controller)
        joints = len(arm.dofs)
        self.controller = Controller(
            arm,
            gains,
            Goal(np.zeros(3), np.zeros((3, 3)), np.zeros(joints)),
            np.zeros(len(arm.fingers)),
            Workspace.allocate(joints),
        )
        self.physics = Physics.of(self.model, self.data)
        watch(self.data)
        self.read_controller()

    def use(self, model: mujoco.MjModel) -> None:
        """Step with this copy of the model from now on."""
        if model is not self.model:
            self.model, self.physics = model, self.physics._replace(model=model._address)

    def read_controller(self) -> None:
        """Take goal, rest posture and gripper from the environment's own controller."""
        robot = self.env.robots[0]
        goal = self.controller.goal
        goal.position[:], goal.orientation[:], goal.rest[:] = (
            robot.controller.goal_pos,
            robot.controller.goal_ori,
            robot.controller.initial_joint,
        )
        self.controller.fingers[:] = robot.gripper.current_action

    def restart(self) -> None:
        """The controller as robosuite has it after a reset: at rest where the arm is, gripper command at its middle.

        `data` must be forwarded (`mj_forward`). robosuite keeps the last gripper command over a reset without recompilation; here
        an episode never depends on the one before.
        """
        arm, goal = self.controller.arm, self.controller.goal
        goal.position[:] = self.data.site_xpos[arm.site]
        goal.orientation[:] = self.data.site_xmat[arm.site].reshape(3, 3)
        goal.rest[:] = self.data.qpos[arm.qpos]
        self.controller.fingers[:] = 0.0

    def get_state(self) -> dict[str, Floats]:
        """What the controller remembers."""
        goal = self.controller.goal
        return {
            "goal_position": goal.position.copy(), "goal_orientation": goal.orientation.copy(), "rest": goal.rest.copy(),
            "fingers": self.controller.fingers.copy(),
        }  # fmt: skip

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Undo whatever has happened since `get_state`."""
        goal = self.controller.goal
        goal.position[:], goal.orientation[:], goal.rest[:] = state["goal_position"], state["goal_orientation"], state["rest"]
        self.controller.fingers[:] = state["fingers"]

    def step(self, action: NDArray[np.floating[Any]]) -> bool:
        """One 20 Hz control step under `action` (7,). Returns False if the simulation diverged (MuJoCo has then reset it)."""
        return bool(control_step(self.physics, self.controller, np.asarray(action, np.float64)))


def unsupported(env: Any) -> str | None:
    """Why the compiled loop cannot step a robosuite environment, or None if it can."""
    from robosuite.models.grippers.panda_gripper import PandaGripper

    if len(env.robots) != 1:
        return f"it has {len(env.robots)} robots; one arm is implemented"
    robot, model = env.robots[0], env.sim.model._model
    controller = robot.controller
    if not hasattr(controller, "impedance_mode") or controller.name != "OSC_POSE":
        return f"its controller is {controller.name}; OSC_POSE is implemented"
    if controller.impedance_mode != "fixed":
        return f"its impedance_mode is {controller.impedance_mode!r}; 'fixed' is implemented"
    if controller.interpolator_pos is not None or controller.interpolator_ori is not None:
        return "its controller interpolates goals"
    if controller.orientation_limits is not None and np.any(controller.orientation_limits):
        return "its controller has orientation_limits"
    if type(robot.gripper) is not PandaGripper:
        return f"its gripper is a {type(robot.gripper).__name__}; PandaGripper is implemented"
    if model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:
        return "its integrator is RK4, which does not divide into mj_step1 and mj_step2"
    if np.any(model.jnt_type[robot._ref_joint_indexes] != mujoco.mjtJoint.mjJNT_HINGE):
        return "its arm has joints other than hinges"
    body = int(model.site_bodyid[model.site(controller.eef_name).id])
    dof, moving = _last_dof(model, body), []
    while dof >= 0:
        moving.append(dof)
        dof = int(model.dof_parentid[dof])
    if sorted(moving) != sorted(robot._ref_joint_vel_indexes):
        return "joints other than the arm's move its end effector"
    return None


def _last_dof(model: mujoco.MjModel, body: int) -> int:
    while body > 0 and model.body_dofnum[body] == 0:
        body = int(model.body_parentid[body])
    return int(model.body_dofadr[body] + model.body_dofnum[body] - 1) if body > 0 else -1


def arm_of(env: Any) -> Arm:
    """The arm's indices in the model and its limits."""
    robot, model = env.robots[0], env.sim.model._model
    dofs = [int(dof) for dof in robot._ref_joint_vel_indexes]
    mass = np.full((len(dofs), len(dofs)), -1, np.int64)
    for j, dof in enumerate(dofs):  # qM holds each dof's row along its chain of parents
        entry, parent = int(model.dof_Madr[dof]), dof
        while parent >= 0:
            mass[j, dofs.index(parent)] = mass[dofs.index(parent), j] = entry
            entry, parent = entry + 1, int(model.dof_parentid[parent])
    low, high = robot.torque_limits
    fingers = np.array(robot._ref_joint_gripper_actuator_indexes, np.int64)
    finger_low, finger_high = model.actuator_ctrlrange[fingers].T
    return Arm(
        qpos=np.array(robot._ref_joint_pos_indexes, np.int64),
        dofs=np.array(dofs, np.int64),
        joints=np.array(robot._ref_joint_indexes, np.int64),
        actuators=np.array(robot._ref_joint_actuator_indexes, np.int64),
        mass=mass,
        site=int(model.site(robot.controller.eef_name).id),
        torque_low=np.array(low),
        torque_high=np.array(high),
        fingers=fingers,
        finger_direction=np.array([-1.0, 1.0]),  # PandaGripper.format_action
        finger_speed=float(robot.gripper.speed),
        finger_centre=0.5 * (finger_high + finger_low),
        finger_range=0.5 * (finger_high - finger_low),
        substeps=int(env.control_timestep / env.model_timestep),
    )


def gains_of(controller: Any) -> Gains:
    """The controller's configuration, as arrays of six or three."""
    controller.scale_action(np.zeros(6))  # fills in its scaling
    limits = controller.position_limits
    low, high = (np.full(3, -np.inf), np.full(3, np.inf)) if limits is None else np.array(limits, float)
    six = np.ones(6)
    return Gains(
        kp=controller.kp * six,
        kd=controller.kd * six,
        uncoupled=bool(controller.uncoupling),
        delta=bool(controller.use_delta),
        input_low=controller.input_min * six,
        input_high=controller.input_max * six,
        input_centre=controller.action_input_transform * six,
        scale=controller.action_scale * six,
        output_centre=controller.action_output_transform * six,
        position_low=low,
        position_high=high,
    )
