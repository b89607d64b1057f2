"""Scenes: LIBERO's environment objects, read from and never stepped, and what the compiled loop must know of them.

Tasks that share a scene share one object and one compiled model. A scene's fixtures (a cabinet, a stove) stand somewhere else in every
episode. LIBERO writes their poses into the model; here the model is compiled with them as mocap bodies, whose poses are part of a
simulation's own data and state: the same physics to the bit, and one model for any number of simulations.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from postbc.environments.libero.goals import joint_interval
from postbc.environments.libero.loading import build, parse_problem
from postbc.environments.libero.rendering import SceneRenderer
from postbc.environments.robosuite.building import numpy_seeded
from postbc.environments.robosuite.native_control import Physics, unsupported
from postbc.environments.robosuite.operational_space import Floats, Indices, compiled
from postbc.environments.robosuite.sensing import observe_hand, observe_object
from postbc.errors import InputError, require

HAND, OBJECT = 9, 14  # numbers of robot0_eef_pos, _eef_quat, _gripper_qpos; and of an object


class Burner(NamedTuple):
    """A site that is shown while a joint is within bounds: a stove that is on."""

    site: int
    joint: int  # address in qpos
    bounds: tuple[float, float]
    shown: float  # alpha
    hidden: float


class Scene:
    """One compiled scene.

    Attributes:
        env: LIBERO's environment object, reset, with the arm and its controller as LIBERO's reset leaves them.
        model: MuJoCo's, the same for all simulations.
        objects: name -> body, in LIBERO's order.
        fixtures: name -> (body, mocap index).
        joints: name -> address in qpos, of the fixtures' drawers, doors and knobs.
        renderer: draws it; its context is made with the first frame.

    Raises:
        InputError: the compiled loop cannot step it.
    """

    def __init__(self, bddl: Path) -> None:
        self.env = build(bddl)
        roots = {self.env.get_object(name).root_body for name in self.env.fixtures_dict}
        tree = ET.fromstring(self.env.model.get_xml())
        world = tree.find("worldbody")
        assert world is not None
        for body in world.findall("body"):
            if body.get("name") in roots:
                body.set("mocap", "true")
        self.xml = ET.tostring(tree, encoding="unicode")
        with numpy_seeded(0):
            self.env.reset_from_xml_string(self.xml)
        self.model: mujoco.MjModel = self.env.sim.model._model
        reason = unsupported(self.env)
        require(reason is None, f"The compiled loop cannot step this scene: {reason}.", file=bddl)
        self.objects = {name: int(self.env.obj_body_id[name]) for name in self.env.objects_dict}
        bodies = {name: int(self.env.obj_body_id[name]) for name in self.env.fixtures_dict}
        self.fixtures = {name: (body, int(self.model.body_mocapid[body])) for name, body in bodies.items()}
        within = [name for name, (_, mocap) in self.fixtures.items() if mocap < 0]
        require(not within, "A fixture is part of another body, and cannot be placed.", file=bddl, found=within)
        self.joints = {
            joint: int(self.model.joint(joint).qposadr[0])
            for name in self.env.fixtures_dict
            for joint in self.env.get_object(name).joints
        }
        self.burners = [burner for name in self.env.visualization_sites_list for burner in self._burners(name)]
        self.renderer = SceneRenderer(self.model)

    def _burners(self, name: str) -> list[Burner]:
        owner = self.env.get_object(name)
        address, bounds = joint_interval(self.model, owner, owner.joints[0], "turnon")
        result = []
        for site, _ in owner.object_properties["vis_site_names"].values():
            index = int(self.model.site(site).id)
            alpha = float(self.model.site_rgba[index, 3])
            result.append(Burner(index, address, bounds, alpha if alpha > 0 else 1 - alpha, 1 - alpha if alpha > 0 else alpha))
        return result

    def show_burners(self, data: mujoco.MjData) -> None:
        """Before a simulation is drawn: LIBERO shows a burner while its stove is on."""
        for burner in self.burners:
            on = burner.bounds[0] <= data.qpos[burner.joint] <= burner.bounds[1]
            self.model.site_rgba[burner.site, 3] = burner.shown if on else burner.hidden

    def place_fixtures(self, data: mujoco.MjData, seed: int) -> None:
        """Write into `data` where the fixtures stand after `np.random.seed(seed); env.reset()` in LIBERO."""
        from robosuite.utils import RandomizationError

        robot = self.env.robots[0]
        with numpy_seeded(seed):  # LIBERO's own samplers, after what its robot draws
            while True:
                if robot.initialization_noise["type"] == "gaussian":
                    np.random.randn(len(robot.init_qpos))  # noqa: NPY002
                else:
                    np.random.uniform(size=len(robot.init_qpos))  # noqa: NPY002
                for initializer in 2 * self.env.object_property_initializers:  # a reset loads the model and adds them once more
                    initializer.sample()
                try:
                    placements = self.env.placement_initializer.sample()
                    break
                except RandomizationError:  # its evaluation tries again
                    continue
        for name, (_, mocap) in self.fixtures.items():
            if name in placements:
                data.mocap_pos[mocap], data.mocap_quat[mocap] = placements[name][0], placements[name][1]

    def place_fixtures_as(self, data: mujoco.MjData, xml: str, file: str) -> None:
        """Write into `data` where the fixtures stand in a model, as LIBERO's demonstrations hold one each.

        Raises:
            InputError: it is none of this scene.
        """
        try:
            bodies = {body.get("name"): body for body in ET.fromstring(xml).iter("body")}
            for body, mocap in self.fixtures.values():
                found = bodies[self.model.body(body).name]
                data.mocap_pos[mocap] = np.array((found.get("pos") or "0 0 0").split(), float)
                data.mocap_quat[mocap] = np.array((found.get("quat") or "1 0 0 0").split(), float)
        except (ET.ParseError, KeyError, ValueError) as error:
            raise InputError("The demonstration's model is not of this scene.", file=file, key="model_file", found=str(error)[:200],
                             expected=f"MJCF with {', '.join(self.fixtures)}") from None  # fmt: skip


_SCENES: dict[str, Scene] = {}


def find_scene(bddl: Path) -> Scene:
    """The scene of a task's file, compiled once a process: files of one scene differ in their goals and sentences only."""
    problem = parse_problem(bddl)
    key = json.dumps({k: v for k, v in problem.items() if k not in ("goal_state", "obj_of_interest", "language_instruction")})
    if key not in _SCENES:
        _SCENES[key] = Scene(bddl)
    return _SCENES[key]


# --- what is observed


class SceneSensors(NamedTuple):
    """Where the numbers of a state are in one scene; −1 where the scene has no such thing, which then reads 0."""

    site: int
    hand: int
    fingers: Indices  # (2,) in qpos
    objects: Indices  # (O,) bodies
    joints: Indices  # (J,) in qpos
    fixtures: Indices  # (X,) bodies


@compiled
def observe_scene(physics: Physics, sensors: SceneSensors, out: Floats) -> None:
    """robot0_eef_pos 3, robot0_eef_quat 4, robot0_gripper_qpos 2, then 14 an object, joints, and 3 a fixture, into `out`."""
    out[:] = 0.0
    observe_hand(physics, sensors.site, sensors.hand, sensors.fingers, out)
    at = HAND
    for body in sensors.objects:
        if body >= 0:
            observe_object(physics, sensors.site, sensors.hand, body, True, out[at:])
        at += OBJECT
    for joint in sensors.joints:
        if joint >= 0:
            out[at] = physics.qpos[joint]
        at += 1
    for body in sensors.fixtures:
        if body >= 0:
            for i in range(3):
                out[at + i] = physics.xpos[body, i]
        at += 3


class Layout:
    """The state of several scenes as one vector: as many slots for objects and fixtures as any has, and all of their joints.

    Attributes:
        dim: its length.
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.objects = max(len(scene.objects) for scene in scenes)
        self.fixtures = max(len(scene.fixtures) for scene in scenes)
        self.joints = tuple(dict.fromkeys(joint for scene in scenes for joint in scene.joints))
        self.dim = HAND + OBJECT * self.objects + len(self.joints) + 3 * self.fixtures

    def sensors(self, scene: Scene) -> SceneSensors:
        robot = scene.env.robots[0]
        fixtures = {name: body for name, (body, _) in scene.fixtures.items()}
        return SceneSensors(
            site=int(robot.eef_site_id),
            hand=int(scene.env.sim.model.body_name2id(robot.robot_model.eef_name)),
            fingers=np.array(robot._ref_gripper_joint_pos_indexes, np.int64),
            objects=_slots(scene.objects, self.objects),
            joints=np.array([scene.joints.get(joint, -1) for joint in self.joints], np.int64),
            fixtures=_slots(fixtures, self.fixtures),
        )


def _slots(bodies: Mapping[str, int], count: int) -> Indices:
    return np.array([*bodies.values(), *[-1] * (count - len(bodies))], np.int64)
