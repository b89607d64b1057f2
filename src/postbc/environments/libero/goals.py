"""A BDDL goal as data: a conjunction of what joints and positions must satisfy, and of bodies that must touch.

Joints and positions are checked compiled; contacts only where those hold. What LIBERO's own objects say about a joint (`is_open`,
`turn_on`, …) is read off them as an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

from postbc.environments.robosuite.native_control import Physics
from postbc.environments.robosuite.operational_space import Floats, Indices, compiled
from postbc.errors import InputError

JOINT, ON_OBJECT, ON_SITE, IN_SITE = range(4)
NEAR = 0.03  # m, horizontally: `ObjectState.check_ontop`
ABOVE, BELOW = 0.10, 0.005  # m above a site's top, and below it: `SiteObject.under`
SUNK = 0.01  # m below a site's box: `SiteObject.in_box`
#: predicate -> LIBERO's method of the object that owns the joint, and the ranges of joint positions that the method compares with
JOINT_PREDICATES = {
    "open": ("is_open", "default_open_ranges"),
    "close": ("is_close", "default_close_ranges"),
    "turnon": ("turn_on", "default_turnon_ranges"),
    "turnoff": ("turn_off", "default_turnoff_ranges"),
}


class Conditions(NamedTuple):
    """G conditions, all of which must hold."""

    kind: Indices  # (G,)
    target: Indices  # (G,) of a joint its address in qpos; else what is below, a body or a site
    body: Indices  # (G,) what is put somewhere
    bounds: Floats  # (G, 2) of a joint, both included
    size: Floats  # (G, 3) of a site, half


@compiled
def conditions_hold(physics: Physics, goals: Conditions) -> bool:
    """Whether all of them hold."""
    for g in range(len(goals.kind)):
        kind, i, size = goals.kind[g], goals.target[g], goals.size[g]
        if kind == JOINT:
            if not goals.bounds[g, 0] <= physics.qpos[i] <= goals.bounds[g, 1]:
                return False
            continue
        position = physics.xpos[goals.body[g]]
        if kind == ON_OBJECT:
            below = physics.xpos[i]
            x, y = below[0] - position[0], below[1] - position[1]
            if not below[2] <= position[2] or not np.sqrt(x * x + y * y) < NEAR:
                return False
            continue
        centre, rotation = physics.site_xpos[i], physics.site_xmat[i]
        for r in range(3):
            value = 0.0
            for c in range(3):  # LIBERO multiplies by the rotation, not by its transpose
                value += rotation[3 * r + c] * (position[c] - centre[c] if kind == ON_SITE else size[c])
            if kind == ON_SITE:
                low, high = (size[2] - BELOW, size[2] + ABOVE) if r == 2 else (-size[r], size[r])
                if not low < value < high:
                    return False
            else:
                half = abs(value)
                low = centre[r] - half - (SUNK if r == 2 else 0.0)
                if not low < position[r] < centre[r] + half:
                    return False
    return True


class Goal:
    """When a task is solved; equal to LIBERO's `_check_success` in every state.

    Args:
        env: LIBERO's environment object of the scene.
        goal_state: the goal as LIBERO parses it: [predicate, argument, …] each.

    Raises:
        InputError: a predicate that is not read.
    """

    def __init__(self, env: Any, goal_state: Sequence[Sequence[str]]) -> None:
        self._env, self._model = env, env.sim.model._model
        self._touching: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]] = []
        rows: list[tuple[int, int, int, tuple[float, float], Any]] = []
        for predicate, *names in goal_state:
            read = self._joint if predicate.lower() in JOINT_PREDICATES else self._place
            rows += read(predicate.lower(), *names)
        kind, target, body, bounds, size = zip(*rows)
        self.conditions = Conditions(
            np.array(kind, np.int64), np.array(target, np.int64), np.array(body, np.int64), np.array(bounds, float),
            np.array(size, float).reshape(-1, 3),
        )  # fmt: skip

    def __call__(self, physics: Physics, data: mujoco.MjData) -> bool:
        """Whether it holds in a simulation as it stands after a step."""
        if not conditions_hold(physics, self.conditions):
            return False
        if not self._touching:
            return True
        first, second = data.contact.geom.T
        return all(bool(np.any((a[first] & b[second]) | (b[first] & a[second]))) for a, b in self._touching)

    def _joint(self, predicate: str, name: str) -> list[tuple[int, int, int, tuple[float, float], Any]]:
        site = self._env.object_sites_dict.get(name)
        joints = (site or self._env.get_object(name)).joints
        if len(joints) != 1:
            raise InputError("A goal about an object of several joints is not read.", key=predicate, found=f"{name}: {joints}")
        owner = self._env.get_object(site.parent_name) if site else self._env.get_object(name)
        address, bounds = joint_interval(self._model, owner, joints[0], predicate)
        return [(JOINT, address, 0, bounds, np.zeros(3))]

    def _place(self, predicate: str, *names: str) -> list[tuple[int, int, int, tuple[float, float], Any]]:
        known = predicate in ("on", "in") and len(names) == 2
        where = names[-1]
        site = self._env.object_sites_dict.get(where)
        if not known or (site is None and predicate == "in"):
            raise InputError("This goal is not read.", key=predicate, found=" ".join(names),
                             expected=f"(On object object or site), (In object site), or {', '.join(JOINT_PREDICATES)}")  # fmt: skip
        body, free = int(self._env.obj_body_id[names[0]]), (-np.inf, np.inf)
        if site is None:
            self._touch(where, names[0])
            return [(ON_OBJECT, int(self._env.obj_body_id[where]), body, free, np.zeros(3))]
        if predicate == "on" and self._env.get_object(site.parent_name) is not None:
            self._touch(site.parent_name, names[0])
        kind = ON_SITE if predicate == "on" else IN_SITE
        return [(kind, int(self._model.site(where).id), body, free, np.array(site.size, float))]

    def _touch(self, *names: str) -> None:
        masks = []
        for name in names:
            mask = np.zeros(self._model.ngeom, bool)
            mask[[self._model.geom(geom).id for geom in self._env.get_object(name).contact_geoms]] = True
            masks.append(mask)
        self._touching.append((masks[0], masks[1]))


def joint_interval(model: mujoco.MjModel, owner: Any, joint: str, predicate: str) -> tuple[int, tuple[float, float]]:
    """A joint's address in qpos, and the positions (low, high, both included) at which `owner` says that the predicate holds.

    Raises:
        InputError: LIBERO compares with something else than the ends of the object's ranges.
    """
    method, ranges = JOINT_PREDICATES[predicate]
    says: Callable[[float], bool] = getattr(owner, method)
    kept = {name: tuple(value) for name, value in owner.object_properties["vis_site_names"].items()}
    try:  # asking switches what is shown
        for end in owner.object_properties["articulation"][ranges]:
            before, after = float(np.nextafter(end, -np.inf)), float(np.nextafter(end, np.inf))
            below, at, above = bool(says(before)), bool(says(end)), bool(says(after))
            if below != above:
                inside = end if at else (before if below else after)
                bounds = (-np.inf, inside) if below else (inside, np.inf)
                return int(model.joint(joint).qposadr[0]), bounds
    finally:
        owner.object_properties["vis_site_names"].update(kept)
    raise InputError("A goal about this object is not read.", key=predicate, found=joint)
