"""What lies in run directories, read with distrust: only real files below the given directories, of known kinds and bounded sizes.

Whatever is not what it should be is left out, and a note says so; only results (see `summary.py`) end a report.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from postbc.errors import InputError, require
from postbc.files import read_yaml
from postbc.schemas import CountOrZero, Seed, Share, parse, read_json, schema
from postbc.training.results import EPISODES_FILE

T = TypeVar("T")

LARGEST = 2**24
"""Bytes of a configuration or JSON file that is read."""
MOST_FILES = 100_000
MARKS = {
    "results.json": "finetuning", "policy.safetensors": "pretraining", "posterior.safetensors": "posterior",
    "evaluation.json": "evaluation", "episodes.jsonl": "evaluation",
}  # fmt: skip
#: Of a finetuning run, what came of each evaluation episode.
EPISODES = tuple(EPISODES_FILE.format(when) for when in ("before", "after"))
#: First bytes: (offset, bytes). A picture or video is embedded only if it begins as one.
SIGNATURES = {".png": (0, b"\x89PNG\r\n\x1a\n"), ".mp4": (4, b"ftyp")}


@dataclass(frozen=True)
class Found:
    """A file below one of the given directories."""

    name: str
    """Relative to the given directory, that one's own name first."""
    path: Path
    size: int


@dataclass(frozen=True)
class Stage:
    """One run directory."""

    name: str
    kind: str
    """posterior, pretraining, finetuning, evaluation or run."""
    path: Path
    values: dict[str, Any]
    """config.yaml."""
    versions: dict[str, str]

    @property
    def config(self) -> dict[str, Any]:
        """Flattened: "data.chunk" -> 4."""
        return flatten(self.values)


@schema
class Evaluated:
    """What of an evaluation.json is shown."""

    success: Share
    success_interval: tuple[Share, Share]
    chunk_success: Share
    chunk_success_interval: tuple[Share, Share]
    episodes: CountOrZero
    agent_seed: Seed | None = None
    method: str | None = None
    finetuner: str | None = None


@dataclass
class Material:
    """The files below some directories, each once, and notes on what was left out."""

    files: list[Found]
    notes: list[str] = field(default_factory=list)

    def named(self, *names: str) -> list[Found]:
        """Files of these names or, for a name that begins with a dot, of that ending."""
        return [f for f in self.files if f.path.name in names or f.path.suffix.lower() in names]

    def beside(self, found: Found, name: str) -> Found | None:
        """The file of this name in the same directory."""
        return self._of_path.get(found.path.with_name(name))

    @cached_property
    def _of_path(self) -> dict[Path, Found]:
        return {f.path: f for f in self.files}

    def note(self, found: Found, error: object) -> None:
        self.notes.append(f"{found.name} is left out: {' '.join(str(error).split())[:300]}")

    def json(self, found: Found, kind: type[T]) -> T | None:
        """The file as a schema, fields that the schema does not have left aside; None (and a note) if it is not one."""
        try:
            values = read_json(found.path, dict[str, Any], LARGEST)
            names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
            return parse(kind, {k: v for k, v in values.items() if k in names})
        except InputError as error:
            self.note(found, error)
            return None

    def versions(self, found: Found) -> dict[str, str]:
        """versions.json: name -> text."""
        try:
            values = read_json(found.path, dict[str, str | int | float | bool | None], LARGEST)
        except InputError as error:
            self.note(found, error)
            return {}
        return {k: str(v) for k, v in values.items() if v is not None}

    def config(self, found: Found) -> dict[str, Any]:
        """config.yaml."""
        try:
            return read_yaml(found.path)
        except (InputError, IndexError) as error:
            self.note(found, error)
            return {}

    def stages(self) -> list[Stage]:
        """Every directory with a config.yaml, told apart by what lies in it."""
        beside: dict[Path, dict[str, Found]] = {}
        for f in self.files:
            beside.setdefault(f.path.parent, {})[f.path.name] = f
        result = []
        for folder, names in beside.items():
            if "config.yaml" in names:
                kind = next((kind for mark, kind in MARKS.items() if mark in names), "run")
                name = str(Path(names["config.yaml"].name).parent)
                versions = self.versions(names["versions.json"]) if "versions.json" in names else {}
                result.append(Stage(name, kind, folder, self.config(names["config.yaml"]), versions))
        return result

    def embeddable(self, suffix: str) -> list[Found]:
        """Pictures or videos, no former report's, that begin as such a file does."""
        reports = {f.path.parent for f in self.named("report.html")}
        candidates = [f for f in self.named(suffix) if not reports & {f.path.parent, f.path.parent.parent}]
        return [f for f in candidates if _begins(f.path, *SIGNATURES[suffix])]

    def posterior_pictures(self) -> list[Found]:
        """PNG files with "posterior" in the name of the file or of a directory above it."""
        return [f for f in self.embeddable(".png") if "posterior" in f.name.lower()]

    def saliency_pictures(self) -> list[Found]:
        """What evaluations drew of where their agents look."""
        return [f for f in self.embeddable(".png") if f.path.name == "saliency.png"]

    def videos(self) -> list[Found]:
        """MP4 files, successes and failures of every directory in turn, so that a limit leaves some of each."""
        lanes: dict[tuple[Path, str], list[Found]] = {}
        for f in self.embeddable(".mp4"):
            lanes.setdefault((f.path.parent, f.path.name.split("_")[0]), []).append(f)
        longest = max(map(len, lanes.values()), default=0)
        return [lane[k] for k in range(longest) for lane in lanes.values() if k < len(lane)]


def look(directories: Iterable[str | Path]) -> Material:
    """Walk the directories. Links that lead out of them, hidden directories and what is not a plain file are left out.

    Raises:
        InputError: a directory does not exist or cannot be read, or holds more than `MOST_FILES` files.
    """
    files: dict[Path, Found] = {}
    notes: list[str] = []
    wanted = {*MARKS, *EPISODES, "config.yaml", "versions.json", "summary.json", "sweep.json", "report.html"}
    for given in map(Path, directories):
        try:
            require(given.is_dir(), "There is no such run directory.", file=given, remedy="give directories that postbc wrote")
            root, seen = given.resolve(), 0
            for folder, inside, names in os.walk(root, onerror=lambda e: notes.append(_unreadable(e))):
                inside[:] = sorted(name for name in inside if not name.startswith("."))
                seen += len(names)
                require(
                    seen <= MOST_FILES, "There are too many files here.", file=given, expected=f"at most {MOST_FILES:,}",
                    remedy="give the run directories themselves",
                )  # fmt: skip
                for name in sorted(names):
                    if not name.startswith(".") and (name in wanted or Path(name).suffix.lower() in SIGNATURES):
                        path = Path(os.path.realpath(os.path.join(folder, name)))
                        status = path.lstat() if path.is_relative_to(root) and os.path.lexists(path) else None
                        if status is not None and stat.S_ISREG(status.st_mode):
                            shown = Path(root.name) / (Path(folder) / name).relative_to(root)
                            files.setdefault(path, Found(printable(str(shown)), path, status.st_size))
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                "This directory cannot be read.", file=printable(str(given)), found=getattr(error, "strerror", None) or error
            ) from None
    return Material(list(files.values()), notes)


def _unreadable(error: OSError) -> str:
    return printable(f"{error.filename} cannot be read ({error.strerror}) and is left out")


def _begins(path: Path, offset: int, expected: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(offset + len(expected))[offset:] == expected
    except OSError:
        return False


def printable(text: str) -> str:
    """Text that every encoding of Unicode can write: undecodable bytes of file names become question marks."""
    return text.encode("utf-8", "replace").decode()


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> {"a.b": value}."""
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {k: v for key, value in values.items() for k, v in flatten(value, f"{prefix}{key}.").items()}


def shared_and_differing(configs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Fields equal in all configurations with their values, and the names of those that differ."""
    keys = list(dict.fromkeys(k for config in configs for k in config))
    texts = [{k: repr(v) for k, v in config.items()} for config in configs]
    same = [k for k in keys if all(text.get(k) == texts[0].get(k) for text in texts)]
    return {k: configs[0][k] for k in same}, [k for k in keys if k not in same]


def within(found: Sequence[Found], megabytes: float, number: int) -> tuple[list[Found], int]:
    """The first `number` files as long as they fit into the size together, and how many were left out."""
    chosen: list[Found] = []
    room = megabytes * 1e6
    for f in found:
        if len(chosen) < number and f.size <= room:
            chosen.append(f)
            room -= f.size
    return chosen, len(found) - len(chosen)
