"""Importing the simulator: MuJoCo, numba and robosuite 1.4.0, whatever machine this is; a clear error where that cannot be.

MuJoCo and robosuite choose their OpenGL, open a log file and look for a place for compiled code when they are imported, so
:func:`import_robosuite` comes before any of them.
"""

from __future__ import annotations

import atexit
import ctypes.util
import importlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from postbc.environments.robosuite.tasks import VERSION
from postbc.errors import InputError, require

INSTALL = "pip install 'postbc[robosuite]'"
REMEDY = (
    "install EGL (Debian, Ubuntu: apt install libegl1 libgl1) and set MUJOCO_GL=egl, "
    "or software rendering (apt install libosmesa6) and set MUJOCO_GL=osmesa, before Python starts"
)
OFF = ("disable", "disabled", "off", "false", "0")
KNOWN = ("", "enable", "enabled", "on", "true", "1", "glfw", "glx", "egl", "osmesa", *OFF)


def choose_opengl() -> None:
    """Set MUJOCO_GL, unless the user has: EGL where it is installed, else OSMesa, else one that can be imported but not render.

    Raises:
        InputError: the user asked for something that is not there (mujoco and robosuite could not even be imported).
    """
    if not sys.platform.startswith("linux"):
        return
    wanted, egl = os.environ.get("MUJOCO_GL"), ctypes.util.find_library("EGL")
    require(wanted is None or wanted.lower().strip() in KNOWN, "MUJOCO_GL has a value that MuJoCo does not know.", key="MUJOCO_GL",
            found=wanted, expected="egl, osmesa, glfw, or unset", remedy="unset MUJOCO_GL, and what works here is chosen")  # fmt: skip
    require(wanted != "egl" or egl, "MUJOCO_GL asks for EGL, which is not installed.", key="MUJOCO_GL", remedy=REMEDY)
    if wanted is None:
        os.environ["MUJOCO_GL"] = "egl" if egl else "osmesa" if ctypes.util.find_library("OSMesa") else "glx"
    chosen, platform = os.environ["MUJOCO_GL"].lower().strip(), os.environ.get("PYOPENGL_PLATFORM", "").lower()
    require(not platform or chosen not in ("egl", "osmesa") or platform == chosen, "PYOPENGL_PLATFORM and MUJOCO_GL disagree.",
            key="PYOPENGL_PLATFORM", found=platform, expected=chosen, remedy="unset PYOPENGL_PLATFORM")  # fmt: skip


def import_robosuite() -> ModuleType:
    """robosuite, without its advice on macro files and without its log file.

    Raises:
        InputError: not installed, not version 1.4.0 (others step differently without saying so), or it cannot be imported here.
    """
    if "robosuite" in sys.modules and hasattr(sys.modules["robosuite"], "__version__"):
        return sys.modules["robosuite"]
    choose_opengl()
    logger = logging.getLogger("robosuite_logs")
    if not logger.filters:
        logger.addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        importlib.import_module("mujoco")
        _find_place_for_compiled_code()
        with _no_log_file():
            robosuite = importlib.import_module("robosuite")
    except Exception as error:  # OpenGL, OpenCV and numba each fail with exceptions of their own
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if "libGL" in text:  # OpenCV wants it, even where nothing is drawn
            remedy = "apt install libgl1, or pip install opencv-python-headless"
        elif isinstance(error, ModuleNotFoundError):
            remedy = INSTALL
        else:
            remedy = f"unset MUJOCO_GL and PYOPENGL_PLATFORM if you have set them; else {INSTALL} in a fresh environment"
        raise InputError(
            "The simulator cannot be imported.", found=text, expected=f"robosuite {VERSION}", remedy=remedy
        ) from error
    found = robosuite.__version__
    require(found == VERSION, "Another version of robosuite is installed.", found=found, expected=VERSION, remedy=INSTALL)
    return robosuite


@contextmanager
def _no_log_file() -> Iterator[None]:
    """robosuite opens /tmp/robosuite.log, which on a shared machine belongs to whoever came first; nobody reads it."""
    real = logging.FileHandler

    def handler(filename: Any, *args: Any, **kwargs: Any) -> logging.Handler:
        return logging.NullHandler() if Path(filename).name == "robosuite.log" else real(filename, *args, **kwargs)

    with mock.patch.object(logging, "FileHandler", handler):
        yield


def _find_place_for_compiled_code() -> None:
    """numba refuses to define a cached function where no directory for the machine code can be written: give it one."""
    numba = importlib.import_module("numba")
    appdirs = importlib.import_module("numba.misc.appdirs")
    anywhere = [numba.config.CACHE_DIR] if numba.config.CACHE_DIR else []
    anywhere.append(appdirs.AppDirs(appname="numba", appauthor=False).user_cache_dir)
    found = importlib.util.find_spec("robosuite")
    sources = [str(Path(__file__).parent), *((found and found.submodule_search_locations) or [])]
    if any(_writable(Path(place)) for place in anywhere) or all(_writable(Path(source) / "__pycache__") for source in sources):
        return
    place = tempfile.mkdtemp(prefix="postbc-numba-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    numba.config.CACHE_DIR = place
    warnings.warn("No directory for compiled code can be written, so every process compiles anew (about 20 s): "
                  "set NUMBA_CACHE_DIR to one that can.", RuntimeWarning, stacklevel=3)  # fmt: skip


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
