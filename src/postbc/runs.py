"""Run directories: configuration, versions, metrics, atomic checkpoints without pickle, and resuming.

    run/
      config.yaml        the configuration, as given
      versions.json      postbc, python, torch, numpy, robosuite, mujoco, git commit, command
      metrics.csv        one row a logged step
      tensorboard/       the same, where tensorboard is installed
      checkpoints/       step_000012000.safetensors: everything that the stage needs to go on
      latest             link to the newest checkpoint

A checkpoint is one safetensors file: tensors and arrays as such, everything else (numbers, text, lists, nesting) as JSON in its
header. It appears by rename after fsync, so a kill leaves the old one or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from postbc.errors import InputError

Tree = Any  # nested dicts and lists of tensors, arrays, numbers, strings, booleans and None


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, on failure removed.

    Raises:
        InputError: the disk is full, or the directory cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o644)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        text = str(error)
        if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in text:
            raise InputError(
                "The disk is full; nothing was written.",
                file=path,
                remedy="free some space, then run the same command with --resume",
            ) from error
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
            raise InputError("This path cannot be written.", file=path, found=text, remedy="choose another --output") from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tree(path: str | Path, tree: Tree) -> None:
    """Save a nested structure of tensors, arrays and plain values as one safetensors file, atomically."""
    tensors: dict[str, torch.Tensor] = {}

    def encode(value: Any, key: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"@tensor": key}
        if isinstance(value, np.ndarray):
            tensors[key] = torch.from_numpy(np.array(value, order="C"))  # a copy: safetensors refuses shared memory
            return {"@array": key}
        if isinstance(value, dict):
            if not all(isinstance(k, (str, int)) for k in value):
                raise TypeError(f"{key}: keys must be text or integers, found {list(value)}")
            return {"@dict": [[k, encode(v, f"{key}/{k}")] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            return [encode(v, f"{key}/{i}") for i, v in enumerate(value)]
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{key}: a {type(value).__name__} cannot be saved")

    text = json.dumps(encode(tree, ""))
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"tree": text})


def load_tree(path: str | Path, device: str = "cpu") -> Tree:
    """Load what :func:`save_tree` wrote.

    Raises:
        InputError: missing, not a safetensors file (a pickle, say), truncated, or not written by :func:`save_tree`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            "There is no such checkpoint." if not path.exists() else "A checkpoint file is expected, not a directory.",
            file=path,
            remedy="give the path of a .safetensors file that postbc wrote",
        )
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as raw:
            head = raw.read(2)
        if head == b"PK" or head[:1] == b"\x80":
            raise InputError(
                "This is a pickle (torch.save); loading one can run any code, so postbc never does.",
                file=path,
                expected="a safetensors file written by postbc",
                remedy="save the weights with safetensors, or pretrain again with `postbc pretrain`",
            ) from error
        raise InputError(
            "This is not a readable checkpoint.", file=path, found=str(error), expected="a complete safetensors file",
            remedy="use another checkpoint of the same run (checkpoints/)",
        ) from error  # fmt: skip
    if "tree" not in metadata:
        raise InputError(
            "This safetensors file was not written by postbc.", file=path, key="header metadata 'tree'",
            found=sorted(metadata), remedy="give a policy or checkpoint file that postbc wrote",
        )  # fmt: skip

    def decode(value: Any) -> Any:
        if isinstance(value, dict):
            if "@tensor" in value:
                return tensors[value["@tensor"]]
            if "@array" in value:
                return tensors[value["@array"]].numpy()
            return {k: decode(v) for k, v in value["@dict"]}
        if isinstance(value, list):
            return [decode(v) for v in value]
        return value

    return decode(json.loads(metadata["tree"]))


def versions() -> dict[str, Any]:
    """Versions of what decides a result, the git commit of the working directory's repository, and the command line."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    for package in ("postbc", "torch", "numpy", "gymnasium", "robosuite", "mujoco", "numba", "h5py"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = git_commit()
    found["command"] = " ".join(["postbc", *sys.argv[1:]])
    return found


def git_commit() -> str | None:
    """The commit of the checkout that holds this package (with `+changes` if the tree differs), or None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "."],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if dirty else "")


def as_plain(config: Any) -> Any:
    """A configuration dataclass as plain dictionaries, lists and values (paths as text)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: as_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(k): as_plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [as_plain(v) for v in config]
    return str(config) if isinstance(config, Path) else config


class Run:
    """A run directory.

    Args:
        directory: created if it does not exist.
        config: a frozen dataclass; written to `config.yaml`, and compared with it on resume.
        resume: go on with a run that is there (a directory without one starts afresh).
        volatile: names of configuration fields that may differ on resume (where to write, how many threads); not recorded.
        revisable: names of those that may differ on resume because later stages check them themselves; recorded as last given.

    Raises:
        InputError: the directory holds another run and `resume` is off, or its configuration differs.
    """

    def __init__(
        self,
        directory: str | Path,
        config: Any,
        *,
        resume: bool = False,
        volatile: tuple[str, ...] = ("output", "resume"),
        revisable: tuple[str, ...] = (),
        keep: int = 2,
    ) -> None:
        self.directory, self.keep = Path(directory), keep
        self._config = {k: v for k, v in as_plain(config).items() if k not in volatile}
        recorded = self.directory / "config.yaml"
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError("The output must be a directory.", file=self.directory, remedy="choose another --output")
        if recorded.exists():
            old = yaml.safe_load(recorded.read_text())
            if not resume:
                raise InputError(
                    "This directory already holds a run.", file=self.directory, found="config.yaml",
                    expected="an empty or new directory", remedy="choose another --output, or add --resume to go on with it",
                )  # fmt: skip
            differing = sorted(k for k in {*old, *self._config} - {*revisable} if old.get(k) != self._config.get(k))
            if differing:
                k = differing[0]
                raise InputError(
                    "The run in this directory has another configuration.", file=recorded, key=", ".join(differing),
                    found=f"{k}: {old.get(k)!r}", expected=f"{k}: {self._config.get(k)!r}",
                    remedy="give the same options as before, or choose another --output",
                )  # fmt: skip
            if old != self._config:
                self._record()
        elif self.directory.is_dir() and any(p for p in self.directory.iterdir() if not p.name.startswith(".")):
            raise InputError(
                "This directory is not empty and holds no run.", file=self.directory,
                found=", ".join(sorted(p.name for p in self.directory.iterdir())[:5]), remedy="choose another --output",
            )  # fmt: skip
        else:  # config.yaml first: a kill after it leaves a run that resumes
            self._record()
        if not (self.directory / "versions.json").exists():
            write_json(self.directory / "versions.json", versions())
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        self._wandb: Any = None

    def _record(self) -> None:
        write_text(self.directory / "config.yaml", yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True))

    # -- metrics ---------------------------------------------------------------------------------------------------------------
    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a row to `metrics.csv`, to TensorBoard where it is installed, and to W&B where WANDB_PROJECT is in the environment.

        Raises:
            InputError: W&B is asked for, but not installed.
        """
        row = {"step": step, **{k: float(v) for k, v in metrics.items()}}
        path = self.directory / "metrics.csv"
        known = list(self._rows[0]) if self._rows else []
        self._rows.append(row)
        if set(row) <= set(known) and path.exists():
            with open(path, "a", newline="") as file:
                csv.DictWriter(file, known, restval="").writerow(row)
        else:
            self._rewrite(path)
        self._mirror(step, row)

    def _rewrite(self, path: Path) -> None:
        columns = list(dict.fromkeys(k for row in self._rows for k in row))
        self._rows = [{k: row[k] for k in columns if k in row} for row in self._rows]
        if self._rows:
            self._rows[0] = {k: self._rows[0].get(k, "") for k in columns}
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(path, text.getvalue())

    def _mirror(self, step: int, row: dict[str, Any]) -> None:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.directory / "tensorboard"), purge_step=step)
            except ImportError:  # the [tensorboard] extra is not installed
                self._writer = False
        if self._writer:
            for k, v in row.items():
                if k != "step":
                    self._writer.add_scalar(k, v, step)
        if project := os.environ.get("WANDB_PROJECT"):
            if self._wandb is None:
                self._wandb = self._start_wandb(project)
            self._wandb.log({k: v for k, v in row.items() if k != "step"}, step=step)

    def _start_wandb(self, project: str) -> Any:
        """A run of W&B with an id of its own that a resumed run finds again; several may be open in one process."""
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                "W&B is not installed.", key="WANDB_PROJECT", found=project, expected="unset, or W&B installed",
                remedy="unset the variable, or pip install 'postbc[wandb]'",
            ) from error  # fmt: skip
        file = self.directory / "wandb_id.txt"
        if not file.exists():
            write_text(file, uuid.uuid4().hex[:12])
        return wandb.init(
            project=project, id=file.read_text(), name=self.directory.name, dir=str(self.directory), config=self._config,
            resume="allow", reinit="create_new",
        )  # fmt: skip

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        return self._rows

    # -- checkpoints -----------------------------------------------------------------------------------------------------------
    def save(self, step: int, state: Tree) -> Path:
        """Write a checkpoint, point `latest` at it and drop all but the newest `keep`."""
        folder = self.directory / "checkpoints"
        path = folder / f"step_{step:09d}.safetensors"
        save_tree(path, {"step": step, "time": time.time(), "state": state})
        link = self.directory / f".latest.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(path.relative_to(self.directory))
        os.replace(link, self.directory / "latest")
        for old in sorted(folder.glob("step_*.safetensors"))[: -self.keep]:
            old.unlink()
        return path

    def load(self) -> tuple[int, Tree] | None:
        """The newest checkpoint as (step, state), or None; metrics logged after it are forgotten, as they will be logged again."""
        for leftover in self.directory.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        latest = self.directory / "latest"
        found = None
        if latest.exists():
            checkpoint = load_tree(latest)
            found = (int(checkpoint["step"]), checkpoint["state"])
        path = self.directory / "metrics.csv"
        if path.exists():
            with open(path, newline="") as file:
                rows = [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]
            self._rows = [
                {**row, "step": int(row["step"])} for row in rows if "step" in row and found and row["step"] <= found[0]
            ]
            self._rewrite(path) if self._rows else path.unlink()
        return found

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints of a stage that has finished and saved its result."""
        (self.directory / "latest").unlink(missing_ok=True)
        for path in (self.directory / "checkpoints").glob("step_*.safetensors"):
            path.unlink()

    def close(self) -> None:
        """Flush what is buffered."""
        if self._writer:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
