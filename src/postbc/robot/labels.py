"""What people say of a session's episodes: `labels.jsonl`, a line a decision, only ever appended to.

    {"episode": 12, "label": "failure", "by": "Ada", "time": "2026-11-29T10:15:02.120+00:00", "note": ""}

The label of an episode is that of its last line; null takes it back. Several people, pages and processes may write at once: a lock
on the file keeps lines whole and in order, and a decision that :meth:`Labels.set` has returned from is on the disk.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from postbc.disk import os_errors, sync_directory
from postbc.errors import InputError, require
from postbc.schemas import CountOrZero, parse, schema

try:
    import fcntl
except ImportError:  # a system without it has no lock between processes; appended lines are whole all the same
    fcntl = None  # type: ignore[assignment]

Label = Literal["success", "failure", "discard"]
LABELS: tuple[Label, ...] = get_args(Label)


def user_name() -> str:
    """Who is at this machine, as far as it knows; "" for a user without a name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


@schema
class Decision:
    """One line of `labels.jsonl`."""

    episode: CountOrZero
    """Its number in the session."""
    label: Label | None
    """None takes the episode's label back."""
    by: Annotated[str, Field(max_length=100)] = ""
    """Who decided; "" if nobody said."""
    time: Annotated[str, Field(max_length=40)] = ""
    """ISO 8601, UTC."""
    note: Annotated[str, Field(max_length=2000)] = ""


class Labels:
    """The labels of one session folder; safe for several threads and processes.

    Args:
        folder: the session's, which exists; the file is made with the first decision.

    Every method raises InputError if the file cannot be read or written, or naming the line that is no decision. A last line that a
    kill has torn is dropped with a warning.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / "labels.jsonl"
        with os_errors(folder, "read"):
            require(
                Path(folder).is_dir(), "There is no such folder.", file=folder, expected="a session's", remedy="check the path"
            )
        self._mutex = threading.Lock()
        self._seen: tuple[int, ...] = ()
        self._decisions: list[Decision] = []

    def set(self, episode: int, label: Label | None, by: str = "", note: str = "") -> None:
        """Decide on an episode, or take its label back (None)."""
        decision = _decide(episode, label, by, note)
        with self._opened() as handle:
            self._append(handle, decision)

    def undo(self, by: str = "") -> int | None:
        """Take back the last decision that stands (of `by`, if given): its episode, which has no label now; None if there is none."""
        if not self.file.exists():
            return None
        with self._opened() as handle:
            standing = {d.episode: (number, d) for number, d in enumerate(self._read(handle))}
            mine = [(number, d.episode) for number, d in standing.values() if d.label is not None and by in ("", d.by)]
            if not mine:
                return None
            _, episode = max(mine)
            self._append(handle, _decide(episode, None, by, "undo"))
            return episode

    def current(self) -> dict[int, Label]:
        """Episode -> label; episodes without one are left out."""
        last = {d.episode: d.label for d in self.history()}
        return {episode: label for episode, label in sorted(last.items()) if label is not None}

    def opinions(self) -> dict[int, dict[str, Label]]:
        """Episode -> who -> their last label of it, of those given since it was last taken back. If they differ, people disagree."""
        found: dict[int, dict[str, Label]] = {}
        for decision in self.history():
            if decision.label is None:
                found.pop(decision.episode, None)
            else:
                found.setdefault(decision.episode, {})[decision.by] = decision.label
        return found

    def history(self) -> list[Decision]:
        """All decisions, the oldest first; taken-back ones too."""
        if not self.file.exists():
            return []
        with self._opened(os.O_RDONLY) as handle:
            return list(self._read(handle))

    # -- the file ----------------------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _opened(self, how: int = os.O_RDWR | os.O_APPEND | os.O_CREAT) -> Iterator[int]:
        """The file, locked: for this process alone if it is to be written."""
        with self._mutex, os_errors(self.file, "read" if how == os.O_RDONLY else "written"):
            handle = os.open(self.file, how, 0o666)
            try:
                if fcntl is not None:
                    with contextlib.suppress(OSError):  # a file system without locks
                        fcntl.flock(handle, fcntl.LOCK_SH if how == os.O_RDONLY else fcntl.LOCK_EX)
                yield handle
            finally:
                os.close(handle)  # and with it the lock

    def _read(self, handle: int) -> list[Decision]:
        found = os.fstat(handle)
        seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if seen != self._seen:
            lines, torn = _split(_content(handle))
            if torn:
                warnings.warn(
                    f"The last line of {self.file} was cut by a kill: it does not count.", RuntimeWarning, stacklevel=4
                )
            self._decisions = [_decision(line, f"{self.file}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
            self._seen = seen
        return self._decisions

    def _append(self, handle: int, decision: Decision) -> None:
        content = _content(handle)
        _, torn = _split(content)
        size = len(content) - torn
        line = json.dumps(asdict(decision)).encode() + b"\n"  # ASCII: a cut is never within a letter
        if size and not content[:size].endswith(b"\n"):
            line = b"\n" + line  # an editor left the last line open
        try:
            if torn:
                os.ftruncate(handle, size)
            while line:
                line = line[os.write(handle, line) :]
            os.fsync(handle)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, size)  # nothing of it rather than a part
            raise
        if not content:
            sync_directory(self.file.parent)


def _decide(episode: int, label: Label | None, by: str, note: str) -> Decision:
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return parse(Decision, {"episode": episode, "label": label, "by": by, "time": time, "note": note})


def _content(handle: int) -> bytes:
    os.lseek(handle, 0, os.SEEK_SET)
    return b"".join(iter(lambda: os.read(handle, 1 << 20), b""))


def _split(content: bytes) -> tuple[list[bytes], int]:
    """Whole lines, and how many bytes of a torn one are at the end. A last line that is open but whole JSON is whole."""
    *lines, rest = content.split(b"\n")
    if rest.strip():
        try:
            json.loads(rest)
        except (ValueError, RecursionError):
            return lines, len(rest)
        lines.append(rest)
    return lines, 0


def _decision(line: bytes, where: str) -> Decision:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError("A line is no decision.", file=where, found=line[:100].decode("utf-8", "replace"), expected="JSON",
                         remedy="mend the line, or remove it") from None  # fmt: skip
    return parse(Decision, values, where)
