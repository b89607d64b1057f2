"""Operational-space control of one arm, compiled: robosuite 1.4.0's OSC_POSE controller without its matrix inverses.

robosuite forms Λ = pinv(J M⁻¹ Jᵀ) and the null-space projector N = 1 − M⁻¹ Jᵀ Λ J, and applies
τ = Jᵀ [Λ_pos f; Λ_ori t] + Nᵀ M u + bias with u = k (q₀ − q) − 2 √k q̇ (`robosuite/controllers/osc.py`, `utils/control_utils.py`).
With M = L Lᵀ and W = L⁻¹ Jᵀ that is A = Λ⁻¹ = Wᵀ W and Nᵀ M u = M u − Jᵀ Λ (J u): two Cholesky factors and no inverse.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

JOINT_STIFFNESS = 10.0  # `nullspace_torques`: joint_kp
SINGULAR = 1e-12  # pivots further apart than this go to np.linalg.pinv, as everything does in robosuite


class Gains(NamedTuple):
    """What the controller was configured with; arrays are never written to."""

    kp: Floats  # (6,)
    kd: Floats  # (6,)
    uncoupled: bool  # position and orientation separately (robosuite's default)
    delta: bool  # actions are offsets to the pose (else absolute poses)
    input_low: Floats  # (6,)
    input_high: Floats  # (6,)
    input_centre: Floats  # (6,)
    scale: Floats  # (6,)
    output_centre: Floats  # (6,)
    position_low: Floats  # (3,), −inf where not limited
    position_high: Floats  # (3,)


class Goal(NamedTuple):
    """The controller's own state: what it is heading for."""

    position: Floats  # (3,)
    orientation: Floats  # (3, 3)
    rest: Floats  # (n,) joint positions that the null space is drawn to


class Workspace(NamedTuple):
    """Arrays written before they are read, allocated once."""

    jacobian: Floats  # (6, n)
    mass: Floats  # (n, n)
    mass_factor: Floats  # (n, n)
    whitened: Floats  # (n, 6), W
    inverse_inertia: Floats  # (6, 6), A
    factor: Floats  # (6, 6)
    joint_acceleration: Floats  # (n,), u
    null_wrench: Floats  # (6,)
    wrench: Floats  # (6,)
    rotation: Floats  # (3, 3)
    torque: Floats  # (n,)
    q: Floats  # (n,)
    v: Floats  # (n,)

    @classmethod
    def allocate(cls, joints: int) -> Workspace:
        n = joints
        shapes = [(6, n), (n, n), (n, n), (n, 6), (6, 6), (6, 6), (n,), (6,), (6,), (3, 3), (n,), (n,), (n,)]
        return cls(*(np.zeros(shape) for shape in shapes))


@compiled
def rotation_of(vector: Floats, matrix: Floats) -> None:
    """Rotation matrix (3, 3) of an axis-angle vector (3,), through a float32 quaternion as robosuite's `quat2mat`."""
    angle = np.sqrt(vector[0] * vector[0] + vector[1] * vector[1] + vector[2] * vector[2])
    matrix[:] = 0.0
    if angle == 0.0:
        matrix[0, 0] = matrix[1, 1] = matrix[2, 2] = 1.0
        return
    s = np.sin(angle / 2.0) / angle
    w, x, y, z = (
        np.float32(np.cos(angle / 2.0)),
        np.float32(vector[0] * s),
        np.float32(vector[1] * s),
        np.float32(vector[2] * s),
    )
    f = np.sqrt(2.0 / np.float64(w * w + x * x + y * y + z * z))
    w, x, y, z = np.float32(w * f), np.float32(x * f), np.float32(y * f), np.float32(z * f)
    matrix[0, 0] = 1.0 - np.float64(y * y) - np.float64(z * z)
    matrix[0, 1] = x * y - z * w
    matrix[0, 2] = x * z + y * w
    matrix[1, 0] = x * y + z * w
    matrix[1, 1] = 1.0 - np.float64(x * x) - np.float64(z * z)
    matrix[1, 2] = y * z - x * w
    matrix[2, 0] = x * z - y * w
    matrix[2, 1] = y * z + x * w
    matrix[2, 2] = 1.0 - np.float64(x * x) - np.float64(y * y)


@compiled
def set_goal(action: Floats, position: Floats, orientation: Floats, gains: Gains, goal: Goal, work: Workspace) -> None:
    """A new action (≥ 6,) at the pose position (3,), orientation (9,): `OperationalSpaceController.set_goal`."""
    command = work.wrench  # free until the torques are computed
    turning = False
    for i in range(6):
        command[i] = action[i]
        if gains.delta:
            clipped = min(max(action[i], gains.input_low[i]), gains.input_high[i])
            command[i] = (clipped - gains.input_centre[i]) * gains.scale[i] + gains.output_centre[i]
        turning = turning or (i >= 3 and command[i] != 0.0)
    for i in range(3):
        target = position[i] + command[i] if gains.delta else command[i]
        goal.position[i] = min(max(target, gains.position_low[i]), gains.position_high[i])
    if not gains.delta:
        rotation_of(command[3:], goal.orientation)
    elif turning:  # without a rotation the former orientation goal stays
        rotation_of(command[3:], work.rotation)
        for i in range(3):
            for j in range(3):
                goal.orientation[i, j] = 0.0
                for k in range(3):
                    goal.orientation[i, j] += work.rotation[i, k] * orientation[3 * k + j]


@compiled
def factorise(matrix: Floats, start: int, size: int, factor: Floats) -> bool:
    """Cholesky factor of matrix[start:start+size, …], into the same place of `factor`; False where (nearly) singular."""
    low, high = np.inf, 0.0
    for i in range(start, start + size):
        for j in range(start, i + 1):
            total = matrix[i, j]
            for k in range(start, j):
                total -= factor[i, k] * factor[j, k]
            if i == j:
                low, high = min(low, total), max(high, total)
                if not total > SINGULAR * high:
                    return False
                factor[i, i] = np.sqrt(total)
            else:
                factor[i, j] = total / factor[j, j]
    return low > SINGULAR * high


@compiled
def solve(matrix: Floats, start: int, size: int, vector: Floats, factor: Floats) -> None:
    """vector[start:start+size] ← pinv(matrix block) vector[…] for a symmetric, positive semidefinite block."""
    if not factorise(matrix, start, size, factor):
        inverse = np.linalg.pinv(matrix[start : start + size, start : start + size].copy())
        vector[start : start + size] = inverse @ vector[start : start + size].copy()
        return
    for i in range(start, start + size):
        for k in range(start, i):
            vector[i] -= factor[i, k] * vector[k]
        vector[i] /= factor[i, i]
    for i in range(start + size - 1, start - 1, -1):
        for k in range(i + 1, start + size):
            vector[i] -= factor[k, i] * vector[k]
        vector[i] /= factor[i, i]


@compiled
def torques(q: Floats, v: Floats, position: Floats, orientation: Floats, gains: Gains, goal: Goal, work: Workspace) -> bool:
    """Joint torques into `work.torque`, without the bias force; `work.jacobian` and `work.mass` are given.

    Args: q, v (n,) joint positions and velocities; position (3,), orientation (9,) of the end-effector site.
    Returns: False if the mass matrix is not positive definite, as it always is unless the simulation has diverged.
    """
    if not factorise(work.mass, 0, len(q), work.mass_factor):
        return False
    n = len(q)
    J, M, L, W, A = work.jacobian, work.mass, work.mass_factor, work.whitened, work.inverse_inertia
    u, null, wrench, R, G = work.joint_acceleration, work.null_wrench, work.wrench, orientation, goal.orientation
    damping = 2.0 * np.sqrt(JOINT_STIFFNESS)
    for j in range(n):
        u[j] = JOINT_STIFFNESS * (goal.rest[j] - q[j]) - damping * v[j]
    for i in range(3):
        wrench[i] = (goal.position[i] - position[i]) * gains.kp[i]
    # ½ Σ columns: current × goal (`orientation_error`)
    wrench[3] = wrench[4] = wrench[5] = 0.0
    for c in range(3):
        wrench[3] += 0.5 * (R[3 + c] * G[2, c] - R[6 + c] * G[1, c])
        wrench[4] += 0.5 * (R[6 + c] * G[0, c] - R[c] * G[2, c])
        wrench[5] += 0.5 * (R[c] * G[1, c] - R[3 + c] * G[0, c])
    for i in range(3, 6):
        wrench[i] *= gains.kp[i]
    for i in range(6):
        velocity = 0.0
        null[i] = 0.0
        for j in range(n):
            velocity += J[i, j] * v[j]
            null[i] += J[i, j] * u[j]
        wrench[i] -= gains.kd[i] * velocity
    for c in range(6):
        for i in range(n):
            total = J[c, i]
            for k in range(i):
                total -= L[i, k] * W[k, c]
            W[i, c] = total / L[i, i]
    for a in range(6):
        for b in range(a + 1):
            total = 0.0
            for i in range(n):
                total += W[i, a] * W[i, b]
            A[a, b] = A[b, a] = total
    solve(A, 0, 6, null, work.factor)
    if gains.uncoupled:
        solve(A, 0, 3, wrench, work.factor)
        solve(A, 3, 3, wrench, work.factor)
    else:
        solve(A, 0, 6, wrench, work.factor)
    for j in range(n):
        total = 0.0
        for i in range(n):
            total += M[j, i] * u[i]
        for i in range(6):
            total += J[i, j] * (wrench[i] - null[i])
        work.torque[j] = total
    return True
