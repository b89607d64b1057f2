"""The tasks: robosuite 1.4.0's Lift, PickPlaceCan and NutAssemblySquare with one Panda arm, as robomimic has them."""

from __future__ import annotations

from dataclasses import dataclass

from postbc.errors import InputError

CONTROL_FREQ = 20
ACTION_DIM = 7
"""OSC_POSE's six and the gripper."""
VERSION = "1.4.0"
STATE_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
"""Parts of an observation, as robomimic names them."""
HAND = 9
"""Numbers of the first three, which say nothing of the object."""
CAMERAS = {"image.agentview": "agentview", "image.robot0_eye_in_hand": "robot0_eye_in_hand"}
"""Name of an observation -> robosuite's camera: the two of robomimic's image files."""
IMAGE = 84
"""Pixels of a side there."""


@dataclass(frozen=True)
class Task:
    """One robosuite task.

    Attributes:
        name: our name.
        robosuite_name: robosuite's.
        observation_dim: length of the observation, 9 + `object_dim`.
        object_dim: length of its object part.
        horizon: control steps of an episode, unless told otherwise (DPPO's and DSRL's).
    """

    name: str
    robosuite_name: str
    observation_dim: int
    object_dim: int
    horizon: int


TASKS: dict[str, Task] = {
    "Lift": Task("Lift", "Lift", 19, 10, 300),
    "Can": Task("Can", "PickPlaceCan", 23, 14, 300),
    "Square": Task("Square", "NutAssemblySquare", 23, 14, 400),
}


def find_task(name: str | Task) -> Task:
    """A task by our name or robosuite's ("PickPlaceCan" is Can). InputError for another."""
    if isinstance(name, Task):
        return name
    for key, task in TASKS.items():
        if name in (key, task.robosuite_name):
            return task
    raise InputError("There is no such robosuite task here.", key="task", found=name, expected=", ".join(TASKS))
