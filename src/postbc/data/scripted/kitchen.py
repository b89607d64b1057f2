"""Scripted operators of LIBERO's sixteen kitchen tasks: picking by the rim, pulling and dragging drawers, turning a knob.

A script is a generator: it looks at the scene and says, step by step, where the hand shall go and how it shall be turned. Unlike the
hands at robosuite these see the simulator itself (handles and regions are not part of an observation). Who demonstrates differs as
there: in speed, inertia, aim, noise, pauses, and in the way they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from postbc.data.scripted.hands import METRES, RADIANS, Habits, shake_and_pauses, side_of, yes_or_no
from postbc.data.scripted.operators import Operator
from postbc.errors import require

Vector = NDArray[np.float64]
Place = Callable[[], Vector]  # looked up at every step, for what moves

OPEN, CLOSE = -1.0, 1.0
#: The gripper points down, and its fingers open along y.
DOWN = Rotation.from_matrix([[0, 1, 0], [1, 0, 0], [0, 0, -1]])
UP = np.array([0.0, 0.0, 1.0])
TURN = 0.6  # largest rotation command
GRASPS, LIFTED = 3, 0.03  # times that a hand tries to lift an object, and metres that it has come up with it then


class View(Protocol):
    """What a script sees of the simulator, in metres and world coordinates."""

    @property
    def task(self) -> str: ...

    def hand(self) -> tuple[Vector, Rotation]: ...

    def body(self, name: str) -> Vector: ...

    def geom(self, name: str) -> Vector: ...

    def site(self, name: str) -> Vector: ...

    def joint(self, name: str) -> float: ...


class Move(NamedTuple):
    """What a hand shall do in one step."""

    target: Vector  # (3,)
    rotation: Rotation
    grip: float
    speed: float = 1.0  # share of the operator's own


class Script:
    """The steps of one episode.

    Args:
        view: of the scene, at its first state.
        patience: factor of the steps that a movement may take: 1 for a hand of full speed.
        error: (3,) metres, of the first grasp.
        hover: metres above a grasp where the hand arrives.
        side: metres to the side of the way there; 0: straight.

    Attributes:
        regrasps: times that it has grasped again.
    """

    def __init__(self, view: View, patience: float, error: Vector, hover: float, side: float) -> None:
        self.view, self.patience, self.error, self.hover, self.side = view, patience, error, hover, side
        self.regrasps = 0

    def run(self) -> Iterator[Move]:
        """The script of the view's task, then rest."""
        yield from SCRIPTS[self.view.task](self)
        while True:
            position, rotation = self.view.hand()
            yield Move(position, rotation, OPEN)

    # --- movements

    def go(self, where: Place, rotation: Rotation, grip: float, near: float = 0.01, turned: float = 0.1, steps: int = 60,
           speed: float = 1.0) -> Iterator[Move]:  # fmt: skip
        """Until the hand is `near` (m) and `turned` (rad), or the steps are over."""
        for _ in range(round(steps * self.patience)):
            position, now = self.view.hand()
            if np.linalg.norm(position - where()) < near and (rotation * now.inv()).magnitude() < turned:
                return
            yield Move(where(), rotation, grip, speed)

    def hold(self, rotation: Rotation, grip: float, steps: int) -> Iterator[Move]:
        position = self.view.hand()[0]
        for _ in range(steps):
            yield Move(position, rotation, grip)

    def rise(self, rotation: Rotation, grip: float, height: float) -> Iterator[Move]:
        target = np.array([*self.view.hand()[0][:2], height])
        for _ in range(round(50 * self.patience)):
            if self.view.hand()[0][2] > height - 0.02:
                return
            yield Move(target, rotation, grip)

    def pull(self, rotation: Rotation, direction: Vector, distance: float, grip: float) -> Iterator[Move]:
        """Straight on from here."""
        start = self.view.hand()[0]
        for _ in range(round(60 * self.patience)):
            along = float((self.view.hand()[0] - start) @ direction)
            if along > distance:
                return
            yield Move(start + direction * min(along + 0.06, distance + 0.03), rotation, grip)

    def approach(self, grasp: Place, rotation: Rotation, hover: float, grip: float = OPEN) -> Iterator[Move]:
        """To above a grasp, along the gripper's axis, by the operator's way; then to it, with the operator's aim."""
        axis = rotation.apply(UP)
        if self.side:
            aside = np.array([0.3 * self.side, self.side, 0.5 * abs(self.side)])
            yield from self.go(lambda: grasp() - axis * (hover + self.hover) + aside, rotation, grip, 0.03, 0.5, 40)
        yield from self.go(lambda: grasp() - axis * (hover + self.hover), rotation, grip, 0.015, steps=90)
        yield from self.go(lambda: grasp() + self.error, rotation, grip, 0.006, steps=50, speed=0.6)

    def until_lifted(self, name: str, grasp: Callable[[], Iterator[Move]]) -> Iterator[Move]:
        """`grasp` an object and rise; where it has not come up too, let go and try again, from straight above and with a better aim."""
        for again in range(GRASPS):
            if again:
                yield from self.hold(self.view.hand()[1], OPEN, 6)
                self.side, self.error, self.regrasps = 0.0, 0.3 * self.error, again
            before = self.view.body(name)[2]
            yield from grasp()
            if self.view.body(name)[2] > before + LIFTED:
                return

    def pick(self, grasp: Place, rotation: Rotation, travel: float) -> Iterator[Move]:
        yield from self.approach(grasp, rotation, 0.07)
        yield from self.hold(rotation, CLOSE, 10)
        yield from self.rise(rotation, CLOSE, travel)

    def place(self, name: str, goal: Place, rotation: Rotation, travel: float) -> Iterator[Move]:
        """Bring an object (not the hand) over its goal, lower it, let go."""
        for _ in range(round(120 * self.patience)):
            off = goal() - self.view.body(name)
            if np.linalg.norm(off[:2]) < 0.01:
                break
            yield Move(np.array([*(self.view.hand()[0] + off)[:2], travel]), rotation, CLOSE)
        for _ in range(round(60 * self.patience)):
            off = goal() - self.view.body(name)
            if off[2] > -0.004:
                break
            yield Move(self.view.hand()[0] + off, rotation, CLOSE, 0.5)
        yield from self.hold(rotation, OPEN, 8)
        yield from self.rise(rotation, OPEN, travel)

    def move(self, name: str, grasp: Place, goal: Place, travel: float, rotation: Rotation = DOWN) -> Iterator[Move]:
        """Pick an object and place it; `travel`: the hand's height on the way."""
        yield from self.until_lifted(name, lambda: self.pick(grasp, rotation, travel))
        yield from self.place(name, goal, rotation, travel)

    # --- tasks

    def bowl(self, number: int, angle: float, goal: Place, travel: float) -> Iterator[Move]:
        """By the point of its rim at `angle` (degrees, world): 90 its left, 180 its near side, where the arm hardly reaches further."""
        name, rim = f"akita_black_bowl_{number}", Rotation.from_euler("z", angle, degrees=True).apply((0.047, 0, 0.036))
        turn = angle % 180 - 90  # the fingers open along the radius; to the nearer of the two ways
        return self.move(name, lambda: self.view.body(name) + rim, goal, travel, _turned(turn))

    def on(self, name: str, height: float) -> Place:
        return lambda: self.view.body(name) + UP * height

    def over(self, site: str, *offset: float) -> Place:
        return lambda: self.view.site(site) + np.array(offset)

    def top_of_cabinet(self) -> Place:
        return self.over("wooden_cabinet_1_top_side", 0, 0.02, 0.004)

    def open_top_drawer(self) -> Iterator[Move]:
        """By the handle, the gripper level."""
        rotation = _tilted(np.pi / 2)
        yield from self.approach(lambda: self.view.geom("wooden_cabinet_1_g18"), rotation, 0.08)
        yield from self.hold(rotation, CLOSE, 10)
        yield from self.pull(rotation, np.array([0, 1.0, 0]), 0.17, CLOSE)
        yield from self.hold(rotation, OPEN, 6)
        yield from self.pull(rotation, -rotation.apply(UP), 0.10, OPEN)

    def open_bottom_drawer(self) -> Iterator[Move]:
        """Too low for a grasp: the closed fingers, tilted, drop behind the handle's bar and drag it out."""
        rotation = Rotation.from_euler("x", -0.7) * Rotation.from_euler("z", 90, degrees=True) * DOWN

        def bar() -> Vector:
            return self.view.geom("wooden_cabinet_1_g40")

        yield from self.go(lambda: bar() + (0, 0.22, 0.10), rotation, CLOSE, 0.03, 0.2, 90)
        yield from self.go(lambda: bar() + (0, -0.010, 0.004) - rotation.apply(UP) * 0.10, rotation, CLOSE, 0.012)
        yield from self.go(lambda: bar() + (0, -0.010, 0.004), rotation, CLOSE, 0.005, steps=40, speed=0.5)
        for _ in range(round(150 * self.patience)):
            yield Move(np.array([bar()[0], self.view.hand()[0][1] + 0.035, bar()[2] - 0.016]), rotation, CLOSE)

    def bowl_into_top_drawer(self) -> Iterator[Move]:
        yield from self.open_top_drawer()
        name, rotation = "akita_black_bowl_1", _tilted(0.5)
        self.side = 0.0  # the drawer is in the way

        def grasp() -> Iterator[Move]:
            yield from self.go(lambda: self.view.body(name) + (0, 0.20, 0.30), rotation, OPEN, 0.03, 0.3)
            yield from self.approach(lambda: self.view.body(name) + (0, 0.047, 0.036), rotation, 0.08)
            yield from self.hold(rotation, CLOSE, 10)
            back = self.view.hand()[0] + (0, 0.12, 0.06)
            yield from self.go(lambda: back, rotation, CLOSE, 0.02, 9.0, 50, 0.8)
            yield from self.rise(DOWN, CLOSE, 1.25)

        yield from self.until_lifted(name, grasp)
        yield from self.place(name, self.over("wooden_cabinet_1_top_region", 0, -0.005, -0.02), DOWN, 1.25)

    def turn_knob(self) -> Iterator[Move]:
        yield from self.approach(lambda: self.view.geom("flat_stove_1_g19") + (0.012, 0, 0.008), DOWN, 0.07)
        yield from self.hold(DOWN, CLOSE, 8)
        position = self.view.hand()[0]
        for _ in range(round(80 * self.patience)):
            angle = self.view.joint("flat_stove_1_button")
            if angle > 0.9:
                break
            yield Move(position, Rotation.from_euler("z", min(angle + 0.6, 1.2)) * DOWN, CLOSE)
        yield from self.hold(self.view.hand()[1], OPEN, 5)
        yield from self.rise(DOWN, OPEN, 1.12)

    def pan_onto_stove(self) -> Iterator[Move]:
        name = "chefmate_8_frypan_1"
        goal = self.over("flat_stove_1_cook_region", 0.01, 0, 0.03)
        return self.move(name, lambda: self.view.body(name) + (-0.086, 0.004, 0.018), goal, 1.06, _turned(-90))

    def knob_and_pan(self) -> Iterator[Move]:
        yield from self.turn_knob()
        yield from self.pan_onto_stove()

    def pot_onto_stove(self) -> Iterator[Move]:
        goal = self.over("flat_stove_1_cook_region", 0, 0, 0.093)
        return self.move("moka_pot_1", lambda: self.view.geom("moka_pot_1_g16") + (0, 0, 0.004), goal, 1.20)


def _turned(degrees: float) -> Rotation:
    """Straight down, turned about the vertical: 0: the fingers open along y, −90: along x."""
    return Rotation.from_euler("z", degrees, degrees=True) * DOWN


def _tilted(angle: float) -> Rotation:
    """Down and towards −y: 0 straight down, π/2 level; the fingers open in the y-z plane."""
    return Rotation.from_euler("x", -angle) * DOWN


PLATE, BOWL_2, BOWL_3 = ("plate_1", 0.012), ("akita_black_bowl_2", 0.02), ("akita_black_bowl_3", 0.02)
#: Task -> its script.
SCRIPTS: dict[str, Callable[[Script], Iterator[Move]]] = {
    "KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet": Script.open_bottom_drawer,
    "KITCHEN_SCENE1_open_the_top_drawer_of_the_cabinet": Script.open_top_drawer,
    "KITCHEN_SCENE1_open_the_top_drawer_of_the_cabinet_and_put_the_bowl_in_it": Script.bowl_into_top_drawer,
    "KITCHEN_SCENE1_put_the_black_bowl_on_the_plate": lambda s: s.bowl(1, 90, s.on(*PLATE), 1.04),
    "KITCHEN_SCENE1_put_the_black_bowl_on_top_of_the_cabinet": lambda s: s.bowl(1, 90, s.top_of_cabinet(), 1.27),
    "KITCHEN_SCENE2_open_the_top_drawer_of_the_cabinet": Script.open_top_drawer,
    "KITCHEN_SCENE2_put_the_black_bowl_at_the_back_on_the_plate": lambda s: s.bowl(3, -90, s.on(*PLATE), 1.04),
    "KITCHEN_SCENE2_put_the_black_bowl_at_the_front_on_the_plate": lambda s: s.bowl(1, 180, s.on(*PLATE), 1.04),
    "KITCHEN_SCENE2_put_the_middle_black_bowl_on_the_plate": lambda s: s.bowl(2, 90, s.on(*PLATE), 1.04),
    "KITCHEN_SCENE2_put_the_middle_black_bowl_on_top_of_the_cabinet": lambda s: s.bowl(2, 90, s.top_of_cabinet(), 1.27),
    "KITCHEN_SCENE2_stack_the_black_bowl_at_the_front_on_the_black_bowl_in_the_middle": (
        lambda s: s.bowl(1, -135, s.on(*BOWL_2), 1.05)  # beside the bowl in the middle, whose rim is close
    ),
    "KITCHEN_SCENE2_stack_the_middle_black_bowl_on_the_back_black_bowl": lambda s: s.bowl(2, 90, s.on(*BOWL_3), 1.05),
    "KITCHEN_SCENE3_put_the_frying_pan_on_the_stove": Script.pan_onto_stove,
    "KITCHEN_SCENE3_put_the_moka_pot_on_the_stove": Script.pot_onto_stove,
    "KITCHEN_SCENE3_turn_on_the_stove": Script.turn_knob,
    "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_frying_pan_on_it": Script.knob_and_pan,
}


class KitchenOperators:
    """N hands at N environments: :meth:`begin` gives an environment to an operator, :meth:`act` moves them all.

    Args:
        views: N, of the environments; looked at from the first :meth:`act` after :meth:`begin` on.
        horizon: longest episode (steps); noise is drawn for that many.
    """

    def __init__(self, views: Sequence[View], horizon: int) -> None:
        self.views, self.horizon = views, horizon
        self._hands: list[_Hand | None] = [None] * len(views)

    def begin(self, index: int, operator: Operator, seed: Sequence[int] | int) -> None:
        """Start an episode of `operator` in environment `index`; `seed` decides all that is random in it."""
        self._hands[index] = _Hand(self.views[index], operator, np.random.default_rng(seed), self.horizon)

    def habits(self, index: int) -> Habits:
        """How the running episode of environment `index` has been done so far, by some of
        :meth:`ScriptedOperators.habits <postbc.data.scripted.hands.ScriptedOperators.habits>`'s names."""
        hand = self._hands[index]
        assert hand is not None
        paused = int(hand.pause[: hand.clock].sum())
        again = yes_or_no(hand.script.regrasps)
        return {**hand.habits, "regrasp": again, "pause": yes_or_no(paused), "pause_steps": paused}

    def act(self, observation: np.ndarray) -> np.ndarray:
        """(N, 7) commands in [−1, 1]: x y z, axis-angle, gripper (1 closes); 0 where nobody has begun."""
        commands = np.zeros((len(self._hands), 7), np.float32)
        for i, hand in enumerate(self._hands):
            if hand is not None:
                commands[i] = hand.act()
        return commands


class _Hand:
    """One episode of one operator."""

    def __init__(self, view: View, operator: Operator, rng: np.random.Generator, horizon: int) -> None:
        o, self.view, self.operator = operator, view, operator
        self.speed = o.speed * rng.uniform(0.85, 1.1)
        error = rng.normal(0, o.precision, 3) * (1, 1, 0.7)
        hover, side = max(rng.normal(*o.hover), 0.01), rng.choice([-1.0, 1.0]) * o.side * rng.uniform(0.7, 1.3)
        self.habits: Habits = {"side": side_of(side), "speed": float(self.speed), "hover": float(hover)}
        self.noise, self.pause = shake_and_pauses(o, rng, horizon)
        self.script = Script(view, max(1.0, 1.2 / self.speed), error, hover, side)
        self.moves: Iterator[Move] | None = None
        self.move: Move | None = None
        self.last, self.clock = np.zeros(6), 0

    def act(self) -> Vector:
        if self.moves is None:
            require(self.view.task in SCRIPTS, "No operator knows this task.", key="task", found=self.view.task,
                    expected=", ".join(SCRIPTS))  # fmt: skip
            self.moves = self.script.run()
        t = min(self.clock, len(self.pause) - 1)
        pausing = bool(self.pause[t]) and self.move is not None
        if not pausing:
            self.move = next(self.moves)
        assert self.move is not None
        position, rotation = self.view.hand()
        command = np.zeros(6)
        if not pausing:
            command[:3] = self.operator.gain * (self.move.target - position) / METRES
            command[:3] *= min(1.0, self.speed * self.move.speed / max(float(np.linalg.norm(command[:3])), 1e-9))
            turn = (self.move.rotation * rotation.inv()).as_rotvec() / RADIANS
            command[3:] = np.clip(turn, -TURN, TURN)
        self.last = self.operator.smoothing * self.last + (1 - self.operator.smoothing) * command
        self.clock += 1
        return np.array([*np.clip(self.last + self.noise[t], -1, 1), self.move.grip])
