"""Run directories: configuration, versions, metrics, checkpoints and resuming; one seed of one stage, one process at a time.

    seed_0/
      config.yaml        the configuration as given, and digests of the input files
      versions.json      postbc, python, torch, numpy, robosuite, mujoco, git commit, command
      metrics.csv        one row a logged step
      tensorboard/       the same, where tensorboard is installed
      checkpoints/       step_000012000.safetensors: everything that the stage needs to go on; until the run has finished
      latest             link to the newest checkpoint; until then too
      .lock              held by the process that works here

A kill at any moment leaves something that the same command with --resume completes, to the same files as an undisturbed run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from postbc.errors import InputError, InUseError, NotFiniteError, require
from postbc.files import (
    Tree,
    blame,
    check_fields,
    digest,
    first_not_finite,
    load_tree,
    os_errors,
    read_yaml,
    remove_leftovers,
    save_tree,
    write_json,
    write_text,
)  # fmt: skip
from postbc.metrics import Metrics, check_wandb, read_metrics
from postbc.schemas import plain

try:
    import fcntl
except ImportError:  # a system without it has no lock
    fcntl = None  # type: ignore[assignment]

__all__ = ["Checkpoints", "Run", "digest", "git_commit", "read_metrics", "versions"]

_CHECKPOINT = re.compile(r"step_(\d{9,})\.safetensors")


def versions() -> dict[str, Any]:
    """Versions of what decides a result, the git commit of the package's checkout, and the command line, quoted for a shell."""
    return {**_versions(), "command": shlex.join(["postbc", *sys.argv[1:]])}


@functools.cache
def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    for package in ("postbc", "torch", "numpy", "gymnasium", "robosuite", "mujoco", "numba", "h5py"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "commit": git_commit()}


def git_commit() -> str | None:
    """The commit of the checkout that holds this package (with `+changes` if the tree differs), or None outside a checkout."""
    options: dict[str, Any] = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True, "timeout": 10}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "--", "."], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if dirty else "")


class Lock:
    """Exclusive use of a directory, until :meth:`release` or this process's death (kills included); nothing where there is no flock.

    Raises:
        InputError: another process, or another Run of this one, works there.
    """

    def __init__(self, directory: Path) -> None:
        self.path, self._handle, self._new = directory / ".lock", -1, not (directory / ".lock").exists()
        while fcntl is not None:
            with os_errors(self.path):
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # a link would empty its target
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
                    os.close(handle)
                    raise InUseError(
                        "This directory is in use by another process.", file=directory, found=f"process {holder or 'unknown'}",
                        remedy="wait until it ends, or choose another --output",
                    ) from None  # fmt: skip
                except OSError:  # a file system without locks
                    os.close(handle)
                    if self._new:
                        self.path.unlink(missing_ok=True)
                    break
                if not (self.path.exists() and os.path.samestat(os.fstat(handle), os.stat(self.path))):
                    os.close(handle)  # its holder removed it in this moment
                    continue
                self._handle = handle
                _LOCKS.add(self)
                with contextlib.suppress(OSError):  # for people; a full disk says so later
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, str(os.getpid()).encode(), 0)
            break

    def release(self, only_new: bool = False) -> None:
        """Let others in, and remove the file (only_new: unless it was there before)."""
        if self._handle >= 0:
            if self._new or not only_new:
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.release()


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_locks() -> None:
    """A forked child (an environment's worker) must not keep the lock of a parent that was killed."""
    for lock in _LOCKS:
        if lock._handle >= 0:
            os.close(lock._handle)
            lock._handle = -1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class Run:
    """A run directory: `with Run(output, config, resume=resume) as run:`.

    Args:
        directory: created if it does not exist.
        config: a schema, or a mapping of plain values; written to `config.yaml`, and compared with it on resume.
        resume: go on with a run that is there (a directory without one starts afresh).
        inputs: digests (:func:`digest`) or fingerprints of what the run reads, by name; recorded and compared as `inputs`.
        volatile: names of fields that do not belong to this run (where to write, how many others beside it); not recorded.
        revisable: names of those that may differ on resume, nested ones with dots ("data.demonstrations": where an input lies, whose
            digest is among `inputs`); recorded as last given.
        keep: how many checkpoints are kept.

    Raises:
        InputError: the directory holds another run or other files, `resume` is off, its configuration or an input differs, one of
            its files is broken, another process works in it, or W&B is asked for and missing. Nothing was written then.
    """

    def __init__(
        self,
        directory: str | Path,
        config: Any,
        *,
        resume: bool = False,
        inputs: Mapping[str, str] | None = None,
        volatile: tuple[str, ...] = ("output", "resume", "jobs"),
        revisable: tuple[str, ...] = ("compute",),
        keep: int = 2,
    ) -> None:
        self.directory, self.keep = Path(directory), max(1, keep)
        values = {k: v for k, v in plain(config).items() if k not in volatile} | ({"inputs": dict(inputs)} if inputs else {})
        self.config: dict[str, Any] = _portable(values)
        self.checkpoint: Path | None = None
        """The checkpoint that :meth:`load` found."""
        self._begin, self._before = time.monotonic(), 0.0
        check_wandb()
        with os_errors(self.directory):
            require(
                self.directory.is_dir() or not os.path.lexists(self.directory), "The output must be a directory.",
                file=self.directory, remedy="choose another --output",
            )  # fmt: skip
            there = sorted(p.name for p in self.directory.iterdir()) if self.directory.is_dir() else []
            require(
                "config.yaml" in there or all(name.startswith(".") for name in there),
                "This directory is not empty and holds no run.", file=self.directory, found=", ".join(there[:5]),
                remedy="choose another --output",
            )  # fmt: skip
            self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.directory)
        old = None
        try:
            if (self.directory / "config.yaml").exists():
                old = self._read(resume, {*revisable})
            self._metrics = Metrics(self.directory, self.config)
            remove_leftovers(self.directory)
            if old != self.config:  # config.yaml first: a kill after it leaves a run that resumes
                text = yaml.dump(self.config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
                write_text(self.directory / "config.yaml", text)
            if not _is_object(self.directory / "versions.json"):
                write_json(self.directory / "versions.json", versions())
        except BaseException:
            self._lock.release(only_new=True)
            raise

    def _read(self, resume: bool, revisable: set[str]) -> dict[str, Any]:
        """The configuration of the run that is there. InputError if it is not this run, or broken."""
        require(
            resume, "This directory already holds a run.", file=self.directory, found="config.yaml",
            expected="an empty or new directory", remedy="choose another --output, or add --resume to go on with it",
        )  # fmt: skip
        file = self.directory / "config.yaml"
        old = read_yaml(file)
        differing = [
            d for d in _differences(old, self.config) if not any(f"{d[0]}.".startswith(f"{name}.") for name in revisable)
        ]
        if differing:
            name, before, now = differing[0]
            of_input = all(d[0].split(".")[0] == "inputs" for d in differing)
            raise InputError(
                "An input of this run is not the one that it began with." if of_input
                else "The run in this directory has another configuration.",
                file=file, key=", ".join(d[0] for d in differing), found=f"{name}: {before!r}", expected=f"{name}: {now!r}",
                remedy="give the same files as before, or choose another --output" if of_input
                else "give the same options as before, or choose another --output",
            )  # fmt: skip
        return old

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken, earlier attempts included as far as they were saved."""
        return self._before + time.monotonic() - self._begin

    @property
    def versions(self) -> dict[str, Any]:
        """Those with which the run began, so that a resumed one records the same."""
        found: dict[str, Any] = json.loads((self.directory / "versions.json").read_text(encoding="utf-8"))
        return found

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a row to the metrics. NotFiniteError if one is NaN or infinite; nothing is written then."""
        self._metrics.log(step, metrics)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The rows logged so far, each with its "step"."""
        return self._metrics.rows

    # -- checkpoints -----------------------------------------------------------------------------------------------------------
    def save(self, step: int, state: Tree) -> Path:
        """Write a checkpoint, point `latest` at it and drop all but the newest `keep`.

        Raises:
            NotFiniteError: a tensor or array of `state` holds NaN or an infinite number; nothing is written.
        """
        if bad := first_not_finite(state):
            raise NotFiniteError(
                "A number is not finite: the run ends here.", file=self.directory, key=bad.lstrip("/"), found=f"at step {step}",
                remedy="look for a setting that is too large (learning rate, weights) or for extreme numbers in the data",
            )  # fmt: skip
        self._metrics.sync()  # what was logged before must be there when this is
        path = self.directory / "checkpoints" / f"step_{step:09d}.safetensors"
        save_tree(path, {"kind": "checkpoint", "step": int(step), "elapsed": self.elapsed, "state": state})
        with contextlib.suppress(OSError, NotImplementedError):  # a file system without links does without: it is for people
            link = self.directory / ".latest.00000000.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(path.relative_to(self.directory))
            os.replace(link, self.directory / "latest")
        found = self._checkpoints()
        for at, old in found.items():  # those of a later step are damaged, or from before a fall back
            if at > step or at in [n for n in sorted(found) if n <= step][: -self.keep]:
                with os_errors(old, "removed"):
                    old.unlink(missing_ok=True)
        return path

    def load(self) -> tuple[int, Tree] | None:
        """The newest checkpoint that can be read, as (step, state), or None where there is none.

        A damaged one gives a warning, and the one before it is used. Metrics logged after it are forgotten, as they will be
        logged again.

        Raises:
            InputError: there are checkpoints, but none can be read.
        """
        found, problems = None, []
        for step, path in sorted(self._checkpoints().items(), reverse=True):
            try:
                tree = load_tree(path, kind="checkpoint")
                check_fields(tree, {"step": int, "elapsed": (int, float), "state": object}, path)
                require(
                    tree["step"] == step and 0 <= tree["elapsed"] < math.inf, "The checkpoint is not what its name says.",
                    file=path, key="step", found=tree["step"], expected=step,
                )  # fmt: skip
            except InputError as error:
                problems.append(error)
                continue
            found, self.checkpoint, self._before = (step, tree["state"]), path, float(tree["elapsed"])
            self._begin = time.monotonic()
            break
        if problems and found is None:
            raise InputError(
                "No checkpoint of this run can be read.", file=self.directory / "checkpoints", found=problems[0].what,
                remedy="remove this directory to begin again, or choose another --output",
            ) from problems[0]  # fmt: skip
        for problem in problems:
            warnings.warn(f"{problem}\n  instead: the checkpoint before it, step {found and found[0]}", stacklevel=2)
        self._metrics.rewind(found and found[0])
        return found

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Putting a loaded state into place: what goes wrong inside is an :class:`InputError` that names the checkpoint."""
        with blame(self.checkpoint, "This checkpoint does not fit the run."):
            yield

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Reading what a finished stage has left; nothing else holds it any more, so that a broken file needs another run."""
        try:
            yield
        except InputError as error:
            raise InputError(
                "This run has finished, but what it left cannot be read.", file=self.directory, found=error,
                remedy="put back a copy of the file, or remove the directory and run the same command again: a finished run keeps no "
                "checkpoints",
            ) from error  # fmt: skip

    def _checkpoints(self) -> dict[int, Path]:
        """Step -> file."""
        found = {}
        with os_errors(folder := self.directory / "checkpoints", "read"):
            for path in folder.iterdir() if folder.is_dir() else ():
                if match := _CHECKPOINT.fullmatch(path.name):
                    found[int(match[1])] = path
        return found

    # -- the end ---------------------------------------------------------------------------------------------------------------
    def finish(self) -> None:
        """The stage has saved its results: remove what only a resumed run needs. May be called again, by a finished run resumed."""
        with os_errors(self.directory):
            (self.directory / "latest").unlink(missing_ok=True)
            for _, path in sorted(self._checkpoints().items()):
                path.unlink(missing_ok=True)
            remove_leftovers(self.directory)
            with contextlib.suppress(OSError):  # somebody keeps something there
                (self.directory / "checkpoints").rmdir()
        self.close()

    def close(self) -> None:
        """Let other processes in. A run that was not finished can be resumed."""
        self._lock.release()
        self._metrics.close()


class Checkpoints:
    """Decides when to checkpoint: at least `seconds` apart, and never more than about 5 % of the time spent on it.

    A run's state is complete, so when it is saved has no influence on what comes out. Without a run, nothing is ever due.
    """

    def __init__(self, run: Run | None, seconds: float) -> None:
        self.run, self.seconds = run, seconds
        self._last, self._cost = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        return self.run is not None and time.monotonic() - self._last >= max(self.seconds, 20 * self._cost)

    def save(self, step: int, state: Tree) -> None:
        begin = time.monotonic()
        if self.run is not None:
            self.run.save(step, state)
        self._last = time.monotonic()
        self._cost = self._last - begin


def _portable(value: Any) -> Any:
    """Text as UTF-8 has it, whatever encoding this process reads its arguments in: a run is resumed under another locale, too."""
    if isinstance(value, dict):
        return {k: _portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_portable(v) for v in value]
    if isinstance(value, str) and not value.isascii():
        with contextlib.suppress(UnicodeError):
            return os.fsencode(value).decode("utf-8", "surrogateescape")
    return value


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every value that differs; one that is missing counts as None."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*new, *old])
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{name}.{k}" if name else str(k))]
    return [] if old == new and type(old) is type(new) else [(name, old, new)]


def _is_object(path: Path) -> bool:
    """Whether versions.json is there; what is broken is written anew, as nothing depends on it."""
    try:
        if path.is_file() and isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            return True
    except (OSError, ValueError, RecursionError):
        pass
    if not os.path.lexists(path):
        return False
    warnings.warn(f"{path} could not be read, and is written anew", stacklevel=3)
    return False
