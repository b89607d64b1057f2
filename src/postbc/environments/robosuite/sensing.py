"""The low-dimensional observation and the success check of a task, compiled.

The observation is robomimic's: robot0_eef_pos 3, robot0_eef_quat 4 (x, y, z, w), robot0_gripper_qpos 2, object 10 or 14. The object's
part is its position 3 and quaternion 4, then either the end effector's position minus the object's (3; Lift) or the object's pose in
the end effector's frame (3 + 4; Can, Square). robosuite computes that pose in float32; so does this.

When robosuite samples: an observable is sampled once every 1/20 s of its own clock, which runs 2 ms ahead of the control step
since the reset's own sample counts too. So the sample falls on the last of the 25 substeps (rounding never moves it: tested), after
`mj_step` has moved qpos, but before anything recomputes the poses. Hence, in what `env.step` returns, gripper_qpos is new and every
pose is one substep (2 ms) old, and so it is for the success check. Reading the simulation after the last mj_step2 gives just that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from postbc.environments.robosuite.native_control import Physics
from postbc.environments.robosuite.operational_space import Floats, Indices, compiled


class Sensors(NamedTuple):
    """What is observed, and when the task is solved."""

    hand: int  # body of robot0_eef_quat
    site: int  # site of robot0_eef_pos
    fingers: Indices  # (2,) in qpos
    object: int  # body
    relative_pose: bool  # the object's pose in the hand's frame (else the difference of positions)
    low: Floats  # (3,) solved: the object's position is strictly inside this box …
    high: Floats  # (3,)
    released: bool  # … and, if True, the hand is away: 1 − tanh(10 · distance) < 0.6


@compiled
def observe_hand(physics: Physics, site: int, hand: int, fingers: Indices, out: Floats) -> None:
    """robot0_eef_pos 3, robot0_eef_quat 4, robot0_gripper_qpos 2 into out[:9]."""
    eef, quaternion = physics.site_xpos[site], physics.xquat[hand]
    for i in range(3):
        out[i], out[3 + i] = eef[i], quaternion[i + 1]
    out[6] = quaternion[0]
    out[7], out[8] = physics.qpos[fingers[0]], physics.qpos[fingers[1]]


@compiled
def observe_object(physics: Physics, site: int, hand: int, body: int, relative_pose: bool, out: Floats) -> None:
    """A body's position 3 and quaternion 4 into out[:7]; its pose in the hand's frame into out[7:14], or else out[7:10]."""
    eef, hand_quaternion = physics.site_xpos[site], physics.xquat[hand]
    position, quaternion = physics.xpos[body], physics.xquat[body]
    for i in range(3):
        out[i], out[3 + i] = position[i], quaternion[i + 1]
    out[6] = quaternion[0]
    if not relative_pose:
        for i in range(3):
            out[7 + i] = eef[i] - position[i]
        return
    # Rᵀ (p − eef), and the quaternion hand⁻¹ ⊗ object with its sign fixed as in `mat2quat`: w not negative
    w, x, y, z = hand_quaternion[0], -hand_quaternion[1], -hand_quaternion[2], -hand_quaternion[3]
    a, b, c, d = quaternion[0], quaternion[1], quaternion[2], quaternion[3]
    rw, rx = w * a - x * b - y * c - z * d, w * b + x * a + y * d - z * c
    ry, rz = w * c - x * d + y * a + z * b, w * d + x * c - y * b + z * a
    sign = -1.0 if rw < 0.0 else 1.0
    out[10], out[11], out[12], out[13] = sign * rx, sign * ry, sign * rz, sign * rw
    px, py, pz = position[0] - eef[0], position[1] - eef[1], position[2] - eef[2]
    tx, ty, tz = 2.0 * (y * pz - z * py), 2.0 * (z * px - x * pz), 2.0 * (x * py - y * px)
    out[7] = px + w * tx + y * tz - z * ty
    out[8] = py + w * ty + z * tx - x * tz
    out[9] = pz + w * tz + x * ty - y * tx


@compiled
def observe(physics: Physics, sensors: Sensors, out: Floats) -> None:
    """The observation (S,) of the simulation as it stands."""
    observe_hand(physics, sensors.site, sensors.hand, sensors.fingers, out)
    observe_object(physics, sensors.site, sensors.hand, sensors.object, sensors.relative_pose, out[9:])


@compiled
def solved(physics: Physics, sensors: Sensors) -> bool:
    """Whether the task's success check holds."""
    position, eef = physics.xpos[sensors.object], physics.site_xpos[sensors.site]
    distance = 0.0
    for i in range(3):
        if not sensors.low[i] < position[i] < sensors.high[i]:
            return False
        distance += (eef[i] - position[i]) ** 2
    return not sensors.released or 1.0 - np.tanh(10.0 * np.sqrt(distance)) < 0.6


def sensors_of(env: Any, object_body: int, low: Floats, high: Floats, released: bool, relative_pose: bool) -> Sensors:
    """The sensors of a robosuite environment with one object of interest."""
    robot = env.robots[0]
    return Sensors(
        hand=int(env.sim.model.body_name2id(robot.robot_model.eef_name)),
        site=int(robot.eef_site_id),
        fingers=np.array(robot._ref_gripper_joint_pos_indexes, np.int64),
        object=int(object_body),
        relative_pose=relative_pose,
        low=np.array(low, float),
        high=np.array(high, float),
        released=released,
    )
