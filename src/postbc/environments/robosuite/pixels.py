"""Robosuite's tasks as two cameras see them: robomimic's image observations, drawn by the native simulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postbc.environments.chunk import Observations
from postbc.environments.robosuite.tasks import CAMERAS, HAND, IMAGE, Task
from postbc.environments.robosuite.vector import RobosuiteChunkEnv
from postbc.errors import require


class RobosuitePixelEnv(RobosuiteChunkEnv):
    """N environments that are seen, not told where the object is.

    Observations: "state" (N, 9) float32, the hand's (robot0_eef_pos 3, robot0_eef_quat 4, robot0_gripper_qpos 2);
    "image.agentview" and "image.robot0_eye_in_hand" (N, 3, size, size) uint8, upright, drawn where a chunk ends (so with chunk 1 at
    every step) of the poses that robosuite's own cameras see.

    Args:
        image_size: pixels of a side.
        task, num_envs, options: as in :class:`RobosuiteChunkEnv`.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(self, task: str | Task, num_envs: int = 1, *, image_size: int = IMAGE, **options: Any) -> None:
        good = isinstance(image_size, int) and 8 <= image_size <= 4096
        require(good, "An image has a size.", key="image_size", found=image_size, expected="8 to 4096 pixels")
        super().__init__(task, num_envs, **options)
        self._size, frame = image_size, (3, image_size, image_size)
        self.shapes = {"state": (HAND,), **dict.fromkeys(CAMERAS, frame)}
        self._frames = {name: np.zeros((num_envs, *frame), np.uint8) for name in CAMERAS}

    def _observations(self, moved: NDArray[np.bool_]) -> Observations:
        for i in np.flatnonzero(moved) if self._draws else ():
            for name, camera in CAMERAS.items():
                frame = self.render_frame(int(i), self._size, self._size, camera, lagging=True)
                self._frames[name][i] = np.moveaxis(frame, -1, 0)
        return {"state": self.full_state()[:, :HAND], **{name: frames.copy() for name, frames in self._frames.items()}}

    def get_state(self) -> dict[str, Any]:
        """As above, with the frames of the cameras."""
        return super().get_state() | {"frames": {name: frames.copy() for name, frames in self._frames.items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`, bit for bit.

        Raises:
            InputError: the state is of another task, other cameras or another number of environments.
        """
        sizes = {name: np.shape(frames) for name, frames in state.get("frames", {}).items()}
        here = {name: frames.shape for name, frames in self._frames.items()}
        require(sizes == here, "The state is of other cameras.", key="images", found=sizes, expected=here)
        super().set_state(state)
        for name, frames in self._frames.items():
            frames[:] = state["frames"][name]
