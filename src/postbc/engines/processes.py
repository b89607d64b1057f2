"""Jobs on this machine: one after the other in this process, or each in a process of its own, none of which outlives this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from postbc.engines.base import Began, Ended, Event, Job, JobError, first_line, load_plugins, log_of, make_logs, remove, taken
from postbc.engines.signals import Interrupted, interruptible
from postbc.errors import InputError
from postbc.progress import Status, listening, say

STAGES = tuple(
    f"postbc.stages.{name}"
    for name in (
        "demos", "posterior", "calibrate", "pretrain", "evaluate", "no_regression", "held_out", "best_of_n", "dsrl", "dppo", "residual",
    )
)  # fmt: skip
"""What jobs are made of. Importing them takes 3 s, so it is done once; the processes of the jobs are forked from one that has."""


class Here:
    """One job at a time, in this process.

    Args:
        hear: takes what happens to a job until it ends, whose progress is otherwise shown on the terminal.
        alone: whether there is one job only, whose error is left as it is.
    """

    def __init__(self, logs: Path, hear: Callable[[str, Began | Status], None] | None = None, alone: bool = False) -> None:
        self.logs, self.hear, self.alone = logs, hear, alone
        self._events: list[Event] = []

    def room(self) -> bool:
        return not self._events

    def start(self, name: str, job: Job, attempt: int) -> None:
        """Do the whole job."""
        hear = self.hear
        if hear is not None:
            hear(name, Began())
        try:
            with listening(None if hear is None else lambda status: hear(name, status)):
                job.function(*job.arguments)
        except Exception as error:
            if not (self.alone or isinstance(error, InputError)):
                traceback.print_exc()
                error = JobError(f"failed: {first_line(error)}")
            self._events.append((name, Ended(error)))
            return
        remove(log_of(self.logs, name))  # of an earlier attempt
        self._events.append((name, Ended()))

    def events(self) -> list[Event]:
        found, self._events = self._events, []
        return found

    def close(self) -> None:
        pass


class Processes:
    """`at_once` jobs at a time, each in a process of its own, which ends when this one does, however that ends.

    What a job prints comes here when it has ended, or stays in `logs`/<name>.log if it failed.

    Args:
        again: what goes on with a job that was killed, in words.
    """

    def __init__(self, at_once: int, logs: Path, again: str = "the same command") -> None:
        self.at_once, self.logs, self.again = at_once, logs, again
        self._context, self._running, self._begun = _context(), dict[str, _Child](), list[Event]()
        make_logs(logs)

    def room(self) -> bool:
        return len(self._running) < self.at_once

    def start(self, name: str, job: Job, attempt: int) -> None:
        self._running[name] = _Child(self._context, job, log_of(self.logs, name), self.again)
        self._begun.append((name, Began()))

    def events(self) -> list[Event]:
        found, self._begun = self._begun, []
        waiting = [event for child in self._running.values() for event in child.events]
        connection.wait(waiting, timeout=0.0 if found else 1.0)
        for name, child in list(self._running.items()):
            if (status := child.news()) is not None:
                found.append((name, status))
            if not child.process.is_alive():
                del self._running[name]
                found.append((name, child.outcome()))
        return found

    def close(self) -> None:
        for child in self._running.values():
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + 5.0
        for child in self._running.values():
            child.process.join(max(0.0, deadline - time.monotonic()))
            child.signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            child.process.join()
            if child.log.exists() and not child.log.stat().st_size:
                remove(child.log)


def _context() -> Any:
    """How processes begin: never as a copy of this one, which may have torch's, the simulator's and the caller's threads."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")  # macOS's libraries do not bear a fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*STAGES, "torch._dynamo"])  # the latter is what torch.optim imports at its first use
    return context


class _Child:
    """A job's process. It leads a group of its own: the terminal's Ctrl-C reaches the parent alone, who then stops whole groups."""

    def __init__(self, context: Any, job: Job, log: Path, again: str) -> None:
        self.log, self._begin, self._open = log, log.stat().st_size if log.exists() else 0, True
        self._again = again
        self._error: InputError | None = None
        self._bug = ""
        self._messages, theirs = context.Pipe(duplex=False)
        # the job is pickled here, so that the child watches its parent before it imports what the job needs
        call = pickle.dumps((job.function, job.arguments))
        self.process = context.Process(target=_work, args=(call, str(log), dict(os.environ), theirs))
        self.process.start()
        theirs.close()

    @property
    def events(self) -> list[Any]:
        """What to wait for."""
        return [self.process.sentinel, *([self._messages] if self._open else [])]

    def news(self) -> Status | None:
        """The newest status since the last call."""
        found = None
        try:
            while self._open and self._messages.poll():
                message = self._messages.recv()
                if isinstance(message, InputError):
                    self._error = message
                elif isinstance(message, str):
                    self._bug = message
                else:
                    found = Status(*message)
        except (EOFError, OSError):
            self._open = False
        return found

    def outcome(self) -> Ended:
        """After its end. What it printed is printed here, or stays in the log of a failure."""
        self.news()
        self._messages.close()
        code = self.process.exitcode
        if code == 0 or self._error is not None:
            if said := taken(self.log, self._begin):
                say(said)
            return Ended(self._error)
        number = -code if code < 0 else code - 128
        if number in {*signal.Signals}:
            name = signal.Signals(number).name
            error = JobError(f"ended by {name}; {self._again} goes on (log: {self.log})")
            return Ended(error, lost=name not in ("SIGTERM", "SIGINT", "SIGHUP"))  # with those somebody asked it to end
        why = f": {self._bug}" if self._bug else ""
        return Ended(JobError(f"failed with exit status {code}{why} (log: {self.log})"))

    def signal(self, number: int) -> None:
        """Send a signal to the process and those that it started, unless it has ended."""
        with contextlib.suppress(OSError):
            if self.process.is_alive():
                try:
                    os.killpg(self.process.pid, number)
                except (AttributeError, ProcessLookupError):  # Windows; or it does not lead its group yet
                    os.kill(self.process.pid, number)


def _work(job: bytes, log: str, environment: dict[str, str], messages: Any) -> None:
    """The body of a job's process."""
    os.environ.clear()  # the fork server's is that of its first job
    os.environ.update(environment)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print_to(log)

    def send(status: Status) -> None:
        with contextlib.suppress(OSError):
            messages.send(tuple(status))

    try:
        with interruptible(), listening(send):
            load_plugins()
            function, arguments = pickle.loads(job)
            function(*arguments)
    except InputError as error:
        messages.send(error)
        sys.exit(2)
    except Interrupted as error:
        sys.exit(error.status)
    except Exception as error:
        traceback.print_exc()
        messages.send(first_line(error))
        sys.exit(1)


def print_to(log: str | Path) -> None:
    """From now on what this process prints goes to the end of a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]


def _end_with_parent() -> None:
    """When the parent has died, however it did: end at once, and the group with it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
