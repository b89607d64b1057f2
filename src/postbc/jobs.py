"""Several long jobs at once, each in a process of its own: one display, no orphans, and one that fails stops no other."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

from postbc.disk import os_errors
from postbc.errors import InputError, require
from postbc.progress import Status, console, display, listen, say

STAGES = tuple(
    f"postbc.stages.{name}"
    for name in (
        "demos", "posterior", "calibrate", "pretrain", "evaluate", "no_regression", "best_of_n", "dsrl", "dppo", "residual",
    )
)  # fmt: skip
"""What jobs are made of. Importing them takes 3 s, so it is done once; the processes of the jobs are forked from one that has."""

C = TypeVar("C")
Job = tuple[Callable[..., Any], tuple[Any, ...]]  # a module-level function and its arguments


class JobError(RuntimeError):
    """A job ended by a bug, or was killed; what was said of it, one line a job. The others have ended as they should."""


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP arrived; `number` says which. Its text is one clear line."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted ({signal.Signals(number).name})")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that a shell expects."""
        return 128 + self.number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted` inside, once; a second signal ends the process at once.

    A signal that is ignored from outside (nohup) stays ignored. Outside of the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    owner = os.getpid()

    def interrupt(number: int, _: object) -> None:
        if os.getpid() != owner:  # a forked worker (an environment's), to whom it does what it did before
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
            return
        for known in before:
            signal.signal(known, signal.SIG_DFL)
        raise Interrupted(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.getsignal(number)
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_seeds(function: Callable[[C, int], Any], config: C, seeds: Sequence[int], at_once: int, output: str | Path) -> None:
    """`function(config, seed)` of every seed, as jobs named seed_<s>; logs of those that fail stay in `output`/logs.

    Raises:
        InputError: no seeds, a repeated one, or as :func:`run_jobs`.
        JobError: as :func:`run_jobs`.
    """
    require(
        seeds and len({*seeds}) == len(seeds), "Seeds must be given, each once.", key="seeds", found=", ".join(map(str, seeds))
    )
    run_jobs({f"seed_{seed}": (function, (config, seed)) for seed in seeds}, at_once, Path(output) / "logs")


def run_jobs(jobs: Mapping[str, Job], at_once: int, logs: str | Path) -> None:
    """Run every job, `at_once` of them at a time; one that fails stops no other.

    One at a time runs in this process. Otherwise each has a process, which ends when this one does, however that ends; its
    progress is a bar here, and what it prints comes here when it has ended, or stays in `logs`/<name>.log if it failed. The files
    that the jobs make are the same either way.

    Raises:
        InputError: jobs raised it, after all have ended (one: as it was raised).
        JobError: jobs were killed, or failed by a bug whose traceback is in its log.
    """
    require(at_once >= 1, "At least one job must run at a time.", key="jobs", found=at_once, expected=">= 1")
    logs = Path(logs)
    here = at_once == 1 or len(jobs) == 1
    try:
        failed = _run_here(jobs, logs) if here else _run_apart(jobs, at_once, logs)
    finally:
        with contextlib.suppress(OSError):
            logs.rmdir()  # empty where nothing failed
    errors = list(failed.values())
    refused = [error for error in errors if isinstance(error, InputError)]
    if len(errors) == 1 and (refused or len(jobs) == 1):
        raise errors[0]
    if errors:
        kind = InputError if refused else JobError
        raise kind("\n".join(f"{name}: {error}" for name, error in failed.items()))


def _run_here(jobs: Mapping[str, Job], logs: Path) -> dict[str, Exception]:
    failed: dict[str, Exception] = {}
    for number, (name, (function, arguments)) in enumerate(jobs.items(), 1):
        try:
            function(*arguments)
        except Exception as error:
            failed[name] = error
            if len(jobs) > 1:
                if not isinstance(error, InputError):
                    traceback.print_exc()
                    failed[name] = JobError(f"failed: {type(error).__name__}: {str(error).strip().split(chr(10))[0]}")
                _say_failed(name, number < len(jobs))
            continue
        _remove(logs / f"{name}.log")  # of an earlier attempt
    return failed


def _say_failed(name: str, others: bool) -> None:
    say(f"{name} failed{'; the others go on' if others else ''}", stderr=True)


def _run_apart(jobs: Mapping[str, Job], at_once: int, logs: Path) -> dict[str, Exception]:
    with os_errors(logs):
        logs.mkdir(parents=True, exist_ok=True)
    context = _context()
    waiting, running, failed = list(jobs), dict[str, _Child](), dict[str, Exception]()
    terminal = console(stderr=True)
    if not terminal.is_terminal:
        say(f"{', '.join(jobs)}: {at_once} at a time, logs in {logs}", stderr=True)
    with display(terminal, disable=not terminal.is_terminal) as bars:
        shown = {name: bars.add_task(name, total=None, doing="waiting") for name in jobs}
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    name = waiting.pop(0)
                    running[name] = _Child(context, jobs[name], logs / f"{name}.log")
                connection.wait([event for child in running.values() for event in child.events], timeout=1.0)
                for name, child in list(running.items()):
                    if (status := child.news()) is not None:
                        doing = f"{status.description}: {status.doing}"
                        bars.update(shown[name], total=int(status.total), completed=int(status.done), doing=doing)
                    if child.process.is_alive():
                        continue
                    del running[name]
                    error = child.outcome()
                    bars.update(shown[name], doing="failed" if error else "done")
                    if error is not None:
                        failed[name] = error
                        _say_failed(name, bool(waiting or running))
        finally:
            for child in running.values():
                child.signal(signal.SIGTERM)
            deadline = time.monotonic() + 5.0
            for child in running.values():
                child.process.join(max(0.0, deadline - time.monotonic()))
                child.signal(getattr(signal, "SIGKILL", signal.SIGTERM))
                child.process.join()
                if child.log.exists() and not child.log.stat().st_size:
                    _remove(child.log)
    return failed


def _context() -> Any:
    """How processes begin: never as a copy of this one, which may have torch's, the simulator's and the caller's threads."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")  # macOS's libraries do not bear a fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*STAGES, "torch._dynamo"])  # the latter is what torch.optim imports at its first use
    return context


class _Child:
    """A job's process. It leads a group of its own: the terminal's Ctrl-C reaches the parent alone, who then stops whole groups."""

    def __init__(self, context: Any, job: Job, log: Path) -> None:
        self.log, self._begin, self._open = log, log.stat().st_size if log.exists() else 0, True
        self._error: InputError | None = None
        self._messages, theirs = context.Pipe(duplex=False)
        # the job is pickled here, so that the child watches its parent before it imports what the job needs
        self.process = context.Process(target=_work, args=(pickle.dumps(job), str(log), dict(os.environ), theirs))
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
                else:
                    found = Status(*message)
        except (EOFError, OSError):
            self._open = False
        return found

    def outcome(self) -> Exception | None:
        """After its end: its error, None if it did its work. What it printed is printed here, or stays in the log of a failure."""
        self.news()
        self._messages.close()
        code = self.process.exitcode
        if code == 0 or self._error is not None:
            if self.log.exists():
                said = self.log.read_bytes()[self._begin :].decode("utf-8", "replace")
                if said.strip():
                    say(said.rstrip())
                _remove(self.log)
            return self._error
        number = -code if code < 0 else code - 128
        if number in {*signal.Signals}:
            name = signal.Signals(number).name
            return JobError(f"ended by {name}; the same command with --resume goes on (log: {self.log})")
        return JobError(f"failed with exit status {code}; its log says why: {self.log}")

    def signal(self, number: int) -> None:
        """Send a signal to the process and those that it started, unless it has ended."""
        with contextlib.suppress(OSError):
            if self.process.is_alive():
                try:
                    os.killpg(self.process.pid, number)
                except (AttributeError, ProcessLookupError):  # Windows; or it does not lead its group yet
                    os.kill(self.process.pid, number)


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


def _work(job: bytes, log: str, environment: dict[str, str], messages: Any) -> None:
    """The body of a job's process."""
    os.environ.clear()  # the fork server's is that of its first job
    os.environ.update(environment)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]

    def send(status: Status) -> None:
        with contextlib.suppress(OSError):
            messages.send(tuple(status))

    listen(send)
    try:
        with interruptible():
            load_plugins()
            function, arguments = pickle.loads(job)
            function(*arguments)
    except InputError as error:
        messages.send(error)
        sys.exit(2)
    except Interrupted as error:
        sys.exit(error.status)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _end_with_parent() -> None:
    """When the parent has died, however it did: end at once, and the group with it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
