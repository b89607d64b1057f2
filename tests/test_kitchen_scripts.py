"""The kitchens' scripts in a world of one bowl, without physics: a hand that is where it is sent, and lifts what it closes on."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from postbc.data.scripted.kitchen import DOWN, GRASPS, Script

TABLE, TRAVEL = 0.9, 1.1
RIM = np.array([0.0, 0.047, 0.036])


class World:
    """A bowl is held by a gripper that was closed within 5 mm of its rim; `slips`: how often it slides out in the air."""

    task = "none"

    def __init__(self, slips: int = 0) -> None:
        self.position, self.bowl = np.array([0.0, 0.0, 1.2]), np.array([0.1, 0.2, TABLE])
        self.slips, self.closed, self.held, self.closings = slips, False, False, 0

    def hand(self) -> tuple[np.ndarray, Rotation]:
        return self.position.copy(), DOWN

    def body(self, name: str) -> np.ndarray:
        return self.bowl.copy()

    def geom(self, name: str) -> np.ndarray:
        raise AssertionError(name)

    site = geom

    def joint(self, name: str) -> float:
        raise AssertionError(name)

    def play(self, script: Script, steps: int = 2000) -> None:
        goal = np.array([0.3, -0.2, TABLE])
        for _, move in zip(range(steps), script.move("bowl", lambda: self.bowl + RIM, lambda: goal, TRAVEL)):
            step = np.clip(move.target - self.position, -0.03, 0.03)
            self.position = self.position + step
            if move.grip > 0 and not self.closed:
                self.closings += 1
                self.held = bool(np.linalg.norm(self.position - self.bowl - RIM) < 0.005)
            self.closed = move.grip > 0
            if self.held and self.slips and self.position[2] > TABLE + 0.045:
                self.slips, self.held = self.slips - 1, False
            self.held &= self.closed
            self.bowl = self.bowl + step if self.held else np.array([*self.bowl[:2], max(TABLE, self.bowl[2] - 0.02)])


def script(world: World, error: float) -> Script:
    return Script(world, 1.0, np.array([error, 0.0, 0.0]), 0.02, 0.05)


@pytest.mark.parametrize(("error", "slips", "closings"), [(0.0, 0, 1), (0.004, 0, 1), (0.014, 0, 2), (0.0, 1, 2), (0.0, 2, 3)])
def test_a_hand_grasps_again_what_it_did_not_lift(error: float, slips: int, closings: int) -> None:
    world = World(slips)
    played = script(world, error)
    world.play(played)
    assert world.closings == closings == played.regrasps + 1
    np.testing.assert_allclose(world.bowl, [0.3, -0.2, TABLE], atol=0.015)


def test_a_hand_gives_up_in_the_end() -> None:
    world = World()
    world.play(script(world, 0.5))
    assert world.closings == GRASPS
    np.testing.assert_allclose(world.bowl, [0.1, 0.2, TABLE])


@pytest.mark.parametrize("angle", [90, -90, 180, -135, 45])
def test_a_bowl_is_gripped_across_its_rim(angle: float) -> None:
    """Where the script says, the fingers opening along the radius, the wrist turned by a right angle at most."""
    world = World()
    played = Script(world, 1.0, np.zeros(3), 0.02, 0.0)
    radius = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle)), 0.0])
    for move in played.bowl(1, angle, lambda: np.zeros(3), TRAVEL):
        world.position = move.target
        if move.grip > 0:
            break
    np.testing.assert_allclose(world.position, world.bowl + 0.047 * radius + [0, 0, 0.036], atol=0.001)
    opening = move.rotation.apply(DOWN.inv().apply([0.0, 1.0, 0.0]))
    assert abs(opening @ radius) == pytest.approx(1)
    assert (move.rotation * DOWN.inv()).magnitude() <= np.pi / 2 + 1e-6
