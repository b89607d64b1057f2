"""What a job is, and what an engine does with it: begin it, say how far it is and how it ended, end it."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from postbc.disk import os_errors
from postbc.errors import InputError
from postbc.progress import Status


class Job(NamedTuple):
    """A call of a module-level function, which may need other jobs' work."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()
    """Names of the jobs without whose work it cannot begin."""
    makes: Path | None = None
    """Its last file but for pictures: where that is there, all that is left is to check the record."""


class JobError(RuntimeError):
    """A job ended by a bug, or was killed; what was said of it, one line a job. The others have ended as they should."""


class Began(NamedTuple):
    """A job works."""

    where: str = ""
    """Machine and process, where that is not this machine."""


class Ended(NamedTuple):
    """A job has ended."""

    error: Exception | None = None
    lost: bool = False
    """Whether its process was lost (killed, or its machine is gone), so that it may be taken up from its last checkpoint."""


Event = tuple[str, Began | Status | Ended]  # the job's name, and what happened


class Engine(Protocol):
    """Runs jobs whose needs are met."""

    def room(self) -> bool:
        """Whether another job may be given."""

    def start(self, name: str, job: Job, attempt: int) -> None:
        """Take a job, and begin it when there is room: :class:`Began` says so. `attempt` counts from 0, those before it were lost."""

    def events(self) -> list[Event]:
        """What happened since the last call; waits about a second for it."""

    def close(self) -> None:
        """End what still runs."""


def log_of(logs: Path, name: str) -> Path:
    """The file that takes what a job prints."""
    return logs / f"{re.sub('[^0-9A-Za-z._=-]+', '-', name)}.log"


def make_logs(logs: Path) -> None:
    """The directory of the logs. InputError where it cannot be."""
    with os_errors(logs):
        logs.mkdir(parents=True, exist_ok=True)


def taken(log: Path, begin: int) -> str:
    """What a job that has done its work printed from byte `begin` on; its log is removed."""
    if not log.exists():
        return ""
    said = log.read_bytes()[begin:].decode("utf-8", "replace")
    remove(log)
    return said.rstrip()


def remove(path: Path) -> None:
    """Remove a file, if that can be done."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """KeyError: 'x', in one line."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def load_plugins() -> None:
    """Import the modules that POSTBC_PLUGINS names (with commas between): they register policies and environments of your own.

    InputError for one that cannot be imported.
    """
    for name in filter(None, (word.strip() for word in os.environ.get("POSTBC_PLUGINS", "").split(","))):
        try:
            importlib.import_module(name)
        except Exception as error:
            raise InputError(
                "A module of your own cannot be imported.", key="POSTBC_PLUGINS", found=f"{name}: {type(error).__name__}: {error}",
                remedy="give its name as `python -c 'import NAME'` takes it, and mend it",
            ) from error  # fmt: skip
