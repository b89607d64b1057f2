"""Scripted operators: they see what a policy sees (the low-dimensional observation) and answer with commands at 20 Hz (OSC_POSE).

Every episode draws its habits (the way it comes, its errors, its noise, its pauses) from a generator of its own before it starts,
so its actions depend on its seed and its observations alone, not on which other episodes run beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from postbc.data.scripted.operators import Operator
from postbc.errors import require

#: Phases of an episode; Lift ends in LIFT.
APPROACH, DESCEND, CLOSE, LIFT, CARRY, LOWER, RELEASE, LEAVE = range(8)

#: Metres and radians for a command of 1 (robosuite's OSC_POSE output_max).
METRES, RADIANS = 0.05, 0.5

#: Farthest that an operator turns the gripper from where it starts, if there is another way (rad).
WRIST = 1.8
#: More than any turn (rad): what is out of reach is taken only where nothing else is left.
FAR = 10.0

#: What an episode was done by: words (each a filter of the file, `side=left`) and numbers (attributes of the episode).
Habits = dict[str, "str | float"]

#: Grasps that an episode may try; each has its own error.
_ATTEMPTS = 8


@dataclass(frozen=True)
class Geometry:
    """What an operator knows about a task."""

    patience: int
    """Steps after which an episode that is not solved is given up."""
    grasp_height: float
    """Of the gripper above the object's centre when it closes (m)."""
    symmetry: float | None
    """The object looks the same after a turn by this angle about the vertical (rad); None: it is round (and tall), and any will do."""
    goal: tuple[float, float, float] | None = None
    """Where the object's centre is let go (m, world), None when lifting it is all."""
    travel_height: float = 0.0
    """Height of the gripper while carrying (m, world)."""
    fit: float = 0.03
    """Horizontal error (m) at which it is lowered; a hasty operator takes up to twice that."""
    handle: float = 0.0
    """It is held this far from its centre, along its own x axis, across which the gripper must close (m)."""
    closing: int = 3
    """Least steps for which the gripper closes before lifting."""
    place_yaws: tuple[float, ...] = ()
    """How it may be turned where it is let go (rad, world), within the arm's reach; none: in any way."""


#: Task -> geometry. All share the observation's layout: eef_pos 0:3, eef_quat 3:7 (x y z w), gripper_qpos 7:9, object position 9:12,
#: object quaternion 12:16.
GEOMETRIES: dict[str, Geometry] = {
    "Lift": Geometry(patience=250, grasp_height=0.0, symmetry=np.pi / 2),
    # goal: in the can's quarter of the second bin (x 0.10 to 0.30, y 0.28 to 0.53), on the side that the arm reaches well
    "Can": Geometry(patience=450, grasp_height=0.015, symmetry=None, goal=(0.19, 0.37, 0.90), travel_height=1.02),
    # goal: around the square peg (its top at 0.95, 6.7 mm of play), down to the table
    "Square": Geometry(
        patience=450,
        grasp_height=-0.005,
        symmetry=np.pi,
        goal=(0.23, 0.10, 0.85),
        travel_height=1.02,
        fit=0.004,
        handle=0.054,
        closing=6,
        place_yaws=(np.pi / 2, np.pi, 3 * np.pi / 2),
    ),
}


def geometry_of(task: str) -> Geometry:
    """The task's geometry; InputError for a task that no operator knows."""
    require(task in GEOMETRIES, "No operator knows this task.", key="task", found=repr(task), expected=" or ".join(GEOMETRIES))
    return GEOMETRIES[task]


def shake_and_pauses(operator: Operator, rng: np.random.Generator, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """A hand's noise (horizon, 6) in its commands, correlated in time, and the steps (horizon,) in which it rests."""
    o = operator
    rho = np.exp(-1 / o.noise_time)
    white = rng.standard_normal((horizon, 6)) * (np.sqrt(1 - rho**2) * o.noise * np.repeat([1, 1 / 3], 3))
    value = rng.standard_normal(6) * o.noise * np.repeat([1, 1 / 3], 3)
    noise, pause = np.zeros((horizon, 6)), np.zeros(horizon, bool)
    for t in range(horizon):
        value = rho * value + white[t]
        noise[t] = value
    for start in np.flatnonzero(rng.random(horizon) < o.pause_rate):
        pause[start : start + rng.geometric(1 / o.pause_time)] = True
    return noise, pause


def side_of(aside: float) -> str:
    """The side that a hand comes from, by the offset of its way along y (m)."""
    return "straight" if aside == 0 else "left" if aside > 0 else "right"


def yes_or_no(value: object) -> str:
    return "yes" if value else "no"


class ScriptedOperators:
    """N hands at N environments: :meth:`begin` gives an environment to an operator, :meth:`act` moves them all.

    Args:
        task: a key of :data:`GEOMETRIES`.
        num_envs: N.
        horizon: longest episode (steps); noise is drawn for that many.
    """

    def __init__(self, task: str, num_envs: int, horizon: int) -> None:
        n, self.geometry, self.horizon = num_envs, geometry_of(task), horizon
        self.phase = np.full(n, APPROACH)
        self.clock = np.zeros(n, dtype=int)  # steps since begin
        self.since = np.zeros(n, dtype=int)  # steps since the phase began
        self.attempt = np.zeros(n, dtype=int)
        self.speed, self.gain, self.smoothing, self.hover, self.tolerance, self.lift = (np.zeros(n) for _ in range(6))
        self.settle = np.zeros(n, dtype=int)
        self.face = np.full(n, np.nan)  # 0 nearest, 1 second nearest pair of faces; NaN: not aligned
        self.via = np.zeros((n, 3))  # where it comes through, relative to the object; used until reached
        self.via_left = np.zeros(n, dtype=bool)
        self.error = np.zeros((n, _ATTEMPTS, 3))
        self.fumbles = np.zeros(n, dtype=bool)  # the first grasp is aimed beside the object
        self.noise = np.zeros((n, horizon, 6))
        self.pause = np.zeros((n, horizon), dtype=bool)
        self.last: NDArray[np.float64] = np.zeros((n, 6))
        self.turn = np.zeros(n)  # of the gripper to a round object, from where it starts (rad)
        self.yaw = np.zeros(n)  # to which the gripper is turned (rad, world)
        self.place_yaw = np.zeros(n)  # to which the object is turned before it is let go
        self.grasp = np.zeros((n, 3))

    def begin(self, index: int, operator: Operator, seed: Sequence[int] | int) -> None:
        """Start an episode of ``operator`` in environment ``index``; ``seed`` decides all that is random in it."""
        rng, o, i = np.random.default_rng(seed), operator, index
        self.phase[i], self.clock[i], self.since[i], self.attempt[i] = APPROACH, 0, 0, 0
        self.speed[i] = o.speed * rng.uniform(0.85, 1.1)
        self.gain[i], self.smoothing[i], self.tolerance[i] = o.gain, o.smoothing, o.tolerance
        self.hover[i] = max(rng.normal(*o.hover), 0.01)
        self.lift[i] = o.lift * rng.uniform(0.9, 1.2)
        self.settle[i] = self.geometry.closing + rng.poisson(o.settle - 3)
        self.face[i] = (1.0 if rng.random() < o.other_face else 0.0) if rng.random() < o.align else np.nan
        if self.geometry.handle:  # there is no other way
            self.face[i] = np.nan_to_num(self.face[i])
        side = rng.choice([-1.0, 1.0]) * o.side * rng.uniform(0.7, 1.3)
        self.via[i] = (rng.normal(0, 0.3 * o.side), side, self.hover[i] + 0.5 * abs(side))
        self.via_left[i] = o.side > 0
        self.error[i] = rng.normal(0, o.precision, (_ATTEMPTS, 3)) * (1, 1, 0.7)
        self.fumbles[i] = rng.random() < o.fumble
        if self.fumbles[i]:  # beside the object, in a direction of its own
            angle = rng.uniform(0, 2 * np.pi)
            self.error[i, 0, :2] = rng.uniform(0.035, 0.055) * np.array([np.cos(angle), np.sin(angle)])
            self.error[i, 0, 2] = 0.012  # not so deep as to push the object away
        self.noise[i], self.pause[i] = shake_and_pauses(o, rng, self.horizon)
        if self.geometry.symmetry is None:
            self.turn[i] = rng.normal(*o.turn)
            self.error[i, :, 2] += rng.normal(*o.depth)
        self.last[i] = 0

    def habits(self, index: int) -> Habits:
        """How the running episode of environment `index` has been done so far.

        Words: side (left, right or straight), the way the hand came; face (nearest, other or none), the pair of faces that the gripper
        was turned to (not of a round object); fumble, whether the first grasp was aimed beside the object; regrasp, whether a grasp was
        repeated; pause, whether the hand rested. Numbers: grasps (tried), pause_steps, speed (largest command), hover (m above the
        object before it came down), grasp_height (m of the last grasp above the object's centre), turn (rad by which the gripper turned
        from where it started, of a round object).
        """
        i, paused = index, int(self.pause[index, : self.clock[index]].sum())
        of_shape: Habits = {"turn": float(self.turn[i])}
        if self.geometry.symmetry is not None:
            of_shape = {"face": {0.0: "nearest", 1.0: "other"}.get(float(self.face[i]), "none")}
        return {
            "side": side_of(self.via[i, 1]), **of_shape, "fumble": yes_or_no(self.fumbles[i]),
            "regrasp": yes_or_no(self.attempt[i]), "pause": yes_or_no(paused), "grasps": int(self.attempt[i]) + 1,
            "pause_steps": paused, "speed": float(self.speed[i]), "hover": float(self.hover[i]),
            "grasp_height": float(self.error[i, self.attempt[i], 2] + self.geometry.grasp_height),
        }  # fmt: skip

    def _turn(self, observation: np.ndarray, current: np.ndarray) -> None:
        """Decide once, at the first step, to which yaw (rad, world) the gripper is turned."""
        first = self.clock == 0
        if not first.any():
            return
        self.yaw[first] = (current + self.turn)[first]  # who does not align keeps the yaw of the start
        quarter = self.geometry.symmetry
        align = first & ~np.isnan(self.face)
        if quarter is None or not align.any():
            return
        stands = _yaw(Rotation.from_quat(observation[align, 12:16]))
        nearest = _wrapped(stands - current[align], quarter)
        turns = np.stack([nearest, nearest - np.where(nearest >= 0, quarter, -quarter)])
        choice, row = (self.face[align] == 1).astype(int), np.arange(len(stands))
        if self.geometry.place_yaws:
            # the nearest place within the wrist's reach, and the nearest grasp from which there is one: few jumps to be learnt
            further = _wrapped(np.asarray(self.geometry.place_yaws)[:, None, None] - stands, 2 * np.pi)  # (places, 1, N)
            most = np.maximum(np.abs(turns), np.abs(turns + further))  # (places, 2 grasps, N)
            cost = np.where(most < WRIST, np.abs(further), FAR + most)
            place, least = cost.argmin(0), cost.min(0)
            grasp = np.where(least < FAR, np.abs(turns), least).argmin(0)
            choice = np.where((choice == 1) & (least[1 - grasp, row] < FAR), 1 - grasp, grasp)
            self.place_yaw[align] = stands + further[place[choice, row], 0, row]
        self.yaw[align] += turns[choice, row]
        self.face[align] = choice

    def _enter(self, mask: np.ndarray, phase: int) -> None:
        self.phase[mask], self.since[mask] = phase, 0

    def act(self, observation: np.ndarray) -> np.ndarray:
        """(N, S) raw observations -> (N, 7) commands in [-1, 1]: x y z, axis-angle, gripper (1 closes)."""
        hand, thing = observation[:, :3].astype(np.float64), observation[:, 9:12].astype(np.float64)
        held = thing
        if self.geometry.handle:
            stands = _yaw(Rotation.from_quat(observation[:, 12:16]))
            held = thing + self.geometry.handle * np.stack([np.cos(stands), np.sin(stands), 0 * stands], 1)
        # The gripper points down at rotation pi about x; what is left of that is yaw and a little tilt.
        orientation = Rotation.from_quat(observation[:, 3:7]) * Rotation.from_rotvec([-np.pi, 0, 0])
        self._turn(observation, yaw := _yaw(orientation))
        geometry, rows = self.geometry, np.arange(len(hand))
        aim = held + self.error[rows, self.attempt]
        aim[:, 2] += geometry.grasp_height
        off = np.linalg.norm(hand[:, :2] - aim[:, :2], axis=1)

        # Transitions, on what is seen now.
        pausing = self.pause[rows, np.minimum(self.clock, self.horizon - 1)]
        via = held + self.via
        self.via_left &= (np.linalg.norm(hand - via, axis=1) > 0.03) & (self.since < 60)
        above = (
            (self.phase == APPROACH) & ~self.via_left & (off < self.tolerance) & (hand[:, 2] - aim[:, 2] < self.hover + 0.03)
        )
        if geometry.handle:  # a finger that comes down on it would tilt it
            above &= np.abs(_wrapped(self.yaw - yaw, 2 * np.pi)) < 0.15
        self._enter(above, DESCEND)
        low = (self.phase == DESCEND) & (np.abs(hand[:, 2] - aim[:, 2]) < 0.008) & (off < np.maximum(0.006, self.tolerance / 3))
        low |= (self.phase == DESCEND) & (self.since > 45)  # as near as it gets
        self._enter(low & ~pausing, CLOSE)
        closed = (self.phase == CLOSE) & (self.since >= self.settle)
        self.grasp[closed] = hand[closed]
        self._enter(closed, LIFT)
        # Not there after all: the object stayed behind. Open, rise, try again with another error.
        carrying = (self.phase >= LIFT) & (self.phase <= LOWER)
        lost = carrying & (self.since > 4) & (hand[:, 2] - thing[:, 2] - geometry.grasp_height > 0.045)
        self.attempt[lost] = np.minimum(self.attempt[lost] + 1, _ATTEMPTS - 1)
        self._enter(lost, APPROACH)

        # Where to go.
        target, grip = hand.copy(), np.full(len(hand), -1.0)
        at = self.phase == APPROACH
        target[at] = aim[at] + [0, 0, 1] * self.hover[at, None]
        target[at & self.via_left] = via[at & self.via_left]
        at = self.phase == DESCEND
        target[at] = aim[at]
        at = self.phase == CLOSE
        grip[at] = 1
        at = self.phase == LIFT
        target[at], grip[at] = self.grasp[at] + [0, 0, 1] * self.lift[at, None], 1
        if geometry.goal is not None:
            self._place(hand, thing, target, grip)
        if geometry.place_yaws:
            turning = (self.phase == CARRY) | (self.phase == LOWER)
            self.yaw[turning] = (yaw + _wrapped(self.place_yaw - stands, 2 * np.pi))[turning]

        command = np.zeros((len(hand), 6))
        command[:, :3] = self.gain[:, None] * (target - hand) / METRES
        length = np.linalg.norm(command[:, :3], axis=1, keepdims=True)
        command[:, :3] *= np.minimum(1, self.speed[:, None] / np.maximum(length, 1e-9))
        upright = Rotation.from_rotvec(np.outer(self.yaw, [0, 0, 1]))
        turn = (upright * orientation.inv()).as_rotvec() / RADIANS
        command[:, 3:] = np.clip(turn, -0.6 * self.speed[:, None], 0.6 * self.speed[:, None])
        command[pausing] = 0
        self.last = self.smoothing[:, None] * self.last + (1 - self.smoothing[:, None]) * command
        shake = self.noise[rows, np.minimum(self.clock, self.horizon - 1)]
        shake = shake * np.where(pausing | (self.phase == CLOSE), 0.3, 1.0)[:, None]  # a waiting hand rests
        self.clock += 1
        self.since += ~pausing
        return np.concatenate([np.clip(self.last + shake, -1, 1), grip[:, None]], axis=1).astype(np.float32)

    def _place(self, hand: np.ndarray, thing: np.ndarray, target: np.ndarray, grip: np.ndarray) -> None:
        """The phases after lifting: carry above the goal, lower, let go, leave."""
        goal, rise = np.asarray(self.geometry.goal), self.geometry.travel_height
        near = np.linalg.norm(thing[:, :2] - goal[:2], axis=1)
        at = self.phase == LIFT
        target[at, 2] = rise  # over the wall between the bins, however high this operator likes to lift
        self._enter(at & ((hand[:, 2] > rise - 0.02) | (self.since > 60)), CARRY)
        fits = near < np.maximum(self.geometry.fit, np.minimum(0.6 * self.tolerance, 2 * self.geometry.fit))
        self._enter((self.phase == CARRY) & fits, LOWER)
        if self.geometry.handle:  # beside its place, or caught on its edge: up again
            high = (self.phase == LOWER) & (thing[:, 2] > goal[2] + 0.06)
            self._enter(high & ((near > 2.5 * self.geometry.fit) | (self.since > 30)), CARRY)
        self._enter((self.phase == LOWER) & ((thing[:, 2] < goal[2] + 0.02) | (self.since > 40)), RELEASE)
        self._enter((self.phase == RELEASE) & (self.since >= 4), LEAVE)
        at = self.phase == CARRY
        target[at, :2] = hand[at, :2] + (goal[:2] - thing[at, :2])
        target[at, 2], grip[at] = rise, 1
        at = self.phase == LOWER
        target[at], grip[at] = hand[at] + (goal - thing[at]), 1
        at = self.phase == LEAVE
        target[at, 2] = np.minimum(hand[at, 2] + 0.06, rise)


def _wrapped(angle: np.ndarray, period: float) -> np.ndarray:
    """(N,) what differs from `angle` by a multiple of `period`, in [−period/2, period/2)."""
    return (angle + period / 2) % period - period / 2


def _yaw(rotation: Rotation) -> np.ndarray:
    """(N,) angle about the vertical (rad)."""
    matrix = rotation.as_matrix()
    return np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])
