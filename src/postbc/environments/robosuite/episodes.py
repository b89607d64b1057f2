"""The initial state of an episode, drawn from the episode's own seed.

robosuite draws it from NumPy's global generator, which threads would share. Here the same draws are made in the same order from a
`RandomState(seed)` of the episode's own, so that the state is, bit for bit, that of `np.random.seed(seed); env.reset()` in robosuite
with its default `hard_reset=True` — without recompiling the model: the one thing that compilation randomises, the size of Lift's
cube, is written into the compiled model.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import mujoco
import numpy as np

from postbc.environments.robosuite.operational_space import Floats

CUBE_LOW, CUBE_HIGH = 0.020, 0.022  # m, half edges: `Lift._load_model`
CUBE_DENSITY = 1000.0  # kg/m³, MuJoCo's default


class Shape(NamedTuple):
    """What the placement sampler must know of an object."""

    horizontal_radius: float
    bottom: float
    top: float


class Placement(NamedTuple):
    position: tuple[float, float, float]
    quaternion: Floats  # (4,) w, x, y, z
    object: Any


class InitialState(NamedTuple):
    """`size` (3,) of the cube or None; `arm` (n,) joint positions; `placements` by object name."""

    size: Floats | None
    arm: Floats
    placements: dict[str, Placement]


def unsupported_reset(env: Any) -> str | None:
    """Why this module cannot draw a robosuite environment's initial state, or None if it can."""
    from robosuite.utils.placement_samplers import SequentialCompositeSampler, UniformRandomSampler

    sampler = env.placement_initializer
    parts = list(sampler.samplers.values()) if type(sampler) is SequentialCompositeSampler else [sampler]
    for part in parts:
        if type(part) is not UniformRandomSampler:
            return f"its placement initializer is a {type(part).__name__}"
    return None


def resizes(env: Any) -> bool:
    """Whether episodes differ in their model: Lift's, in the size of the cube."""
    return hasattr(env, "cube")


def draw(env: Any, seed: int) -> InitialState:
    """The initial state of the episode `seed` (0 ≤ seed < 2³²)."""
    random = np.random.RandomState(seed)  # robosuite's own generator, so that its draws are reproduced
    size, shapes = None, {}
    if resizes(env):
        size = np.array([random.uniform(CUBE_LOW, CUBE_HIGH) for _ in range(3)])
        shapes["cube"] = Shape(float(np.linalg.norm(size[:2], 2)), -size[2], size[2])
    robot = env.robots[0]
    noise, arm = robot.initialization_noise, np.array(robot.init_qpos, float)
    uniform = noise["type"] == "uniform"
    arm += (random.uniform(-1.0, 1.0, len(arm)) if uniform else random.randn(len(arm))) * noise["magnitude"]
    return InitialState(size, arm, _place(env.placement_initializer, random, shapes, {}))


def _place(
    sampler: Any,
    random: np.random.RandomState,
    shapes: Mapping[str, Shape],
    placed: dict[str, Placement],
    reference: Any = None,
    on_top: bool = True,
) -> dict[str, Placement]:
    """`ObjectPositionSampler.sample` with a generator of our own."""
    from robosuite.utils import RandomizationError
    from robosuite.utils.transform_utils import quat_multiply

    if hasattr(sampler, "samplers"):
        for name, part in sampler.samplers.items():
            arguments = {"reference": reference, "on_top": on_top} | (sampler.sample_args[name] or {})
            placed = _place(part, random, shapes, placed, **arguments)
        return placed
    base = np.array(sampler.reference_pos if reference is None else reference, float)
    if isinstance(reference, str):
        below = placed[reference]
        base = np.array(below.position) + np.array([0.0, 0.0, _shape(below.object, shapes).top if on_top else 0.0])
    placed = dict(placed)
    for item in sampler.mujoco_objects:
        shape = _shape(item, shapes)
        margin = shape.horizontal_radius if sampler.ensure_object_boundary_in_range else 0.0
        for _ in range(5000):
            x = random.uniform(low=sampler.x_range[0] + margin, high=sampler.x_range[1] - margin) + base[0]
            y = random.uniform(low=sampler.y_range[0] + margin, high=sampler.y_range[1] - margin) + base[1]
            z = sampler.z_offset + base[2] - (shape.bottom if on_top else 0.0)
            if sampler.ensure_valid_placement and any(
                np.linalg.norm((x - other.position[0], y - other.position[1]))
                <= _shape(other.object, shapes).horizontal_radius + shape.horizontal_radius
                and z - other.position[2] <= _shape(other.object, shapes).top - shape.bottom
                for other in placed.values()
            ):
                continue
            quaternion = _rotation(sampler, random)
            if hasattr(item, "init_quat"):
                quaternion = quat_multiply(quaternion, item.init_quat)
            placed[item.name] = Placement((x, y, z), quaternion, item)
            break
        else:
            raise RandomizationError(f"cannot place {item.name}")
    return placed


def _shape(item: Any, shapes: Mapping[str, Shape]) -> Shape:
    return shapes.get(item.name) or Shape(item.horizontal_radius, item.bottom_offset[-1], item.top_offset[-1])


def _rotation(sampler: Any, random: np.random.RandomState) -> Floats:
    """`UniformRandomSampler._sample_quat`: (4,) w, x, y, z."""
    angle = sampler.rotation
    if angle is None:
        angle = random.uniform(high=2 * np.pi, low=0)
    elif np.iterable(angle):
        angle = random.uniform(high=max(angle), low=min(angle))
    quaternion = np.zeros(4)
    quaternion[0], quaternion[1 + "xyz".index(sampler.rotation_axis)] = np.cos(angle / 2), np.sin(angle / 2)
    return quaternion


def resize_cube(env: Any, model: mujoco.MjModel, data: mujoco.MjData, size: Floats) -> None:
    """Give Lift's cube the half edges `size` (3,) in a compiled model, with all that follows from them. Overwrites `data`."""
    body = env.cube_body_id
    mass = CUBE_DENSITY * 8.0 * float(np.prod(size))
    for geom in range(model.body_geomadr[body], model.body_geomadr[body] + model.body_geomnum[body]):
        model.geom_size[geom] = size
        model.geom_rbound[geom] = np.linalg.norm(size)
        model.geom_aabb[geom, 3:] = size
    model.body_mass[body] = mass
    model.body_inertia[body] = mass / 3.0 * (float(size @ size) - size**2)
    model.body_iquat[body] = (1.0, 0.0, 0.0, 0.0)
    mujoco.mj_setConst(model, data)


#: What `resize_cube` changes in a model, and in its statistics.
SIZED = ("body_inertia", "body_invweight0", "body_mass", "body_subtreemass", "cam_poscom0", "dof_M0", "dof_invweight0", "geom_aabb",
         "geom_rbound", "geom_size", "light_poscom0")  # fmt: skip
SIZED_STATISTICS = ("meaninertia", "meanmass", "meansize")

Cube = list[Floats]  # the values of SIZED and SIZED_STATISTICS for one size


class Models:
    """The compiled model that each thread steps with.

    Episodes of Lift differ in the cube, and so in a thousand of the numbers of a model of 73 MB. Each thread has one copy, which
    becomes the model of whatever simulation it works on; tasks whose episodes do not differ share one model.

    Attributes:
        shared: robosuite's own, never changed.
        cube: its cube; empty for another task.
    """

    def __init__(self, env: Any) -> None:
        self.env, self.shared = env, env.sim.model._model
        self.cube = self._cube(self.shared) if resizes(env) else []
        self._threads = threading.local()

    def of(self, cube: Cube) -> mujoco.MjModel:
        """This thread's model with `cube`, until it is asked for another."""
        if not resizes(self.env):
            return self.shared
        mine = self._threads
        if not hasattr(mine, "model"):
            mine.model, mine.cube = copy.copy(self.shared), self.cube
            mine.views = [getattr(mine.model, name) for name in SIZED]
        if mine.cube is not cube:
            for view, values in zip(mine.views, cube):
                view[...] = values
            for name, value in zip(SIZED_STATISTICS, cube[-1]):
                setattr(mine.model.stat, name, value)
            mine.cube = cube
        return mine.model

    def resized(self, data: mujoco.MjData, size: Floats) -> Cube:
        """A cube with the half edges `size` (3,); :func:`resize_cube`. Overwrites `data`."""
        model = self.of(getattr(self._threads, "cube", self.cube))
        resize_cube(self.env, model, data, size)
        self._threads.cube = self._cube(model)
        return self._threads.cube

    @staticmethod
    def _cube(model: mujoco.MjModel) -> Cube:
        statistics = np.array([getattr(model.stat, name) for name in SIZED_STATISTICS])
        return [*(getattr(model, name).copy() for name in SIZED), statistics]


def cube_size(env: Any, model: mujoco.MjModel) -> Floats:
    """Half edges (3,) of Lift's cube in a compiled model; (0,) for another task."""
    return np.array(model.geom_size[model.body_geomadr[env.cube_body_id]]) if resizes(env) else np.zeros(0)


def put(env: Any, model: mujoco.MjModel, data: mujoco.MjData, state: InitialState) -> None:
    """Reset a simulation to an initial state, forwarded, as `env.reset` does."""
    mujoco.mj_resetData(model, data)
    robot = env.robots[0]
    data.qpos[robot._ref_joint_pos_indexes] = state.arm
    data.qpos[robot._ref_gripper_joint_pos_indexes] = robot.gripper.init_qpos
    unused = getattr(env, "obj_to_use", None)
    for name, placement in state.placements.items():
        if "visual" in name.lower():  # fixed to the world, at a place that is not random: set when the model was built
            continue
        address = model.joint(placement.object.joints[0]).qposadr[0]
        data.qpos[address : address + 7] = [*placement.position, *placement.quaternion]
        if unused is not None and name != unused:  # `clear_objects`
            data.qpos[address : address + 7] = (10, 10, 10, 1, 0, 0, 0)
    mujoco.mj_forward(model, data)
