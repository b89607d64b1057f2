"""Which OpenGL MuJoCo renders with. MuJoCo and robosuite choose when they are imported, so importing this module chooses first."""

from __future__ import annotations

import ctypes.util
import os
import sys

from postbc.errors import InputError

REMEDY = (
    "install EGL (Debian, Ubuntu: apt install libegl1 libgl1) and set MUJOCO_GL=egl, "
    "or software rendering (apt install libosmesa6) and set MUJOCO_GL=osmesa, before Python starts"
)


def choose() -> None:
    """Set MUJOCO_GL, unless the user has: EGL where it is installed, else OSMesa, else one that can be imported but not render.

    Raises:
        InputError: the user asked for EGL and it is not there (mujoco and robosuite could not even be imported).
    """
    if not sys.platform.startswith("linux"):
        return
    wanted, egl = os.environ.get("MUJOCO_GL"), ctypes.util.find_library("EGL")
    if wanted == "egl" and not egl:
        raise InputError("MUJOCO_GL asks for EGL, which is not installed", remedy=REMEDY)
    if wanted is None:
        os.environ["MUJOCO_GL"] = "egl" if egl else "osmesa" if ctypes.util.find_library("OSMesa") else "glx"


choose()
