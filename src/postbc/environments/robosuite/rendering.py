"""Frames without a display."""

from __future__ import annotations

import atexit
import os
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from postbc.environments.robosuite.loading import REMEDY
from postbc.errors import InputError


class Renderer:
    """Draws any simulation of one task: one OpenGL context, made with the first frame of a size; not for several threads."""

    def __init__(self) -> None:
        self._size: tuple[int, int] | None = None
        self._renderer: Any = None
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # robosuite's collision geoms

    def frame(self, model: mujoco.MjModel, data: mujoco.MjData, height: int, width: int, camera: str) -> NDArray[np.uint8]:
        """(H, W, 3) uint8, of the joint positions as they are now."""
        mujoco.mj_kinematics(model, data)  # poses lag a substep behind qpos; the next step computes them again
        mujoco.mj_camlight(model, data)
        return self.frame_of_poses(model, data, height, width, camera)

    def frame_of_poses(
        self, model: mujoco.MjModel, data: mujoco.MjData, height: int, width: int, camera: str
    ) -> NDArray[np.uint8]:
        """(H, W, 3) uint8, of the poses in `data`, as robosuite draws what `env.step` returns."""
        if self._size != (height, width):
            self.close()
            self._renderer, self._size = _renderer(model, height, width), (height, width)
            atexit.register(self.close)  # a context that outlives EGL complains
        camera_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if camera_id < 0:
            names = ", ".join(model.camera(i).name for i in range(model.ncam))
            raise InputError("unknown camera", found=camera, expected=names)
        view = mujoco.MjvCamera()
        view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera_id
        # the simulations' models differ in geom sizes, which the scene takes from the model given here
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(model, data, self._options, None, view, everything, self._renderer.scene)
        return np.array(self._renderer.render())

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            atexit.unregister(self.close)
        self._renderer = self._size = None


def check_opengl() -> None:
    """InputError, saying what to install, where nothing can be drawn without a display."""
    renderer = _renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8)
    renderer.close()


def _renderer(model: mujoco.MjModel, height: int, width: int) -> Any:
    model.vis.global_.offheight = max(model.vis.global_.offheight, height)
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
    try:
        if os.environ.get("MUJOCO_GL") == "egl":  # mujoco may have been imported before that was set
            from mujoco import egl, gl_context

            gl_context.GLContext = egl.GLContext
        return mujoco.Renderer(model, height, width)
    except Exception as error:  # each OpenGL platform fails with exceptions of its own
        raise InputError(
            f"cannot render without a display: {error}", found=f"MUJOCO_GL={os.environ.get('MUJOCO_GL')}", remedy=REMEDY
        ) from error
