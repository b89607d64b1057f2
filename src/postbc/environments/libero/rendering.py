"""What the cameras of a scene see: only what is within a camera's view is handed to OpenGL, and the pixels are the same."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from postbc.environments.robosuite.rendering import Renderer

#: name of an observation -> robosuite's camera
CAMERAS = {"image.agentview": "agentview", "image.wrist": "robot0_eye_in_hand"}
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
HIDDEN = 5  # a group of geoms that MuJoCo does not draw


class SceneRenderer:
    """Frames of any simulation of one scene: one OpenGL context a size, made with the first frame, kept until the process ends.

    Args:
        model: the scene's; its groups of geoms are changed while a frame is drawn, which no simulation reads.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = model
        self._renderers: dict[tuple[int, int], Renderer] = {}
        self._groups = np.array(model.geom_group)
        self._bounded = np.flatnonzero(model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE)
        boxes = model.geom_aabb[self._bounded]
        self._corners = boxes[:, None, :3] + CORNERS * boxes[:, None, 3:]  # (G, 8, 3) in each geom's frame
        # what is out of view may be seen in a mirror, or throw a shadow
        planes = model.geom_matid[model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE]
        mirrors = bool((model.mat_reflectance[planes[planes >= 0]] > 0).any())
        self.culls = not mirrors and not model.light_castshadow.any()

    def frame(self, data: mujoco.MjData, height: int, width: int, camera: str, *, lagging: bool = False) -> NDArray[np.uint8]:
        """(H, W, 3) uint8, upright.

        Args:
            lagging: of the poses in `data`, which lag a substep behind the joints: as robosuite draws what `env.step` returns.

        Raises:
            InputError: no OpenGL for rendering without a display, or an unknown camera.
        """
        renderer = self._renderers.setdefault((height, width), Renderer())
        if not lagging:
            mujoco.mj_kinematics(self.model, data)
            mujoco.mj_camlight(self.model, data)
        index = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if self.culls and index >= 0:
            self.model.geom_group[self._bounded[~self._visible(data, index, width / height)]] = HIDDEN
        try:
            return renderer.frame_of_poses(self.model, data, height, width, camera)
        finally:
            self.model.geom_group[:] = self._groups

    def _visible(self, data: mujoco.MjData, camera: int, aspect: float) -> NDArray[np.bool_]:
        """(G,) which bounding boxes are not wholly on the wrong side of one of the five planes of a camera's view."""
        rotations: Any = data.geom_xmat[self._bounded].reshape(-1, 3, 3)
        world = np.einsum("gij,gkj->gki", rotations, self._corners) + data.geom_xpos[self._bounded][:, None]
        x, y, z = np.moveaxis((world - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3), -1, 0)  # it looks along −z
        up = np.tan(np.deg2rad(self.model.cam_fovy[camera]) / 2)
        outside = (z > 0).all(1)
        for value, slope in ((x, up * aspect), (y, up)):
            outside |= (value > -slope * z).all(1) | (-value > -slope * z).all(1)
        return np.asarray(~outside)
