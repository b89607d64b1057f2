"""Long jobs as a graph: each begins as soon as what it needs is done, one that fails stops no other, one that is lost is taken up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from postbc.board import Board
from postbc.engines.base import Began, Ended, Engine, Job, JobError, load_plugins
from postbc.engines.processes import STAGES, Here, Processes
from postbc.engines.signals import Interrupted, interruptible
from postbc.errors import InputError, require
from postbc.progress import Status, say

__all__ = [
    "STAGES", "Board", "Interrupted", "Job", "JobError", "interruptible", "load_plugins", "local", "run_graph", "run_jobs", "run_seeds",
]  # fmt: skip
C = TypeVar("C")
RETRIES = 3
"""How often a job of a graph may be lost before it has failed."""


def run_seeds(function: Callable[[C, int], Any], config: C, seeds: Sequence[int], at_once: int, output: str | Path) -> None:
    """`function(config, seed)` of every seed, as jobs named seed_<s>; logs of those that fail stay in `output`/logs.

    Raises:
        InputError: no seeds, a repeated one, or as :func:`run_jobs`.
        JobError: as :func:`run_jobs`.
    """
    require(
        seeds and len({*seeds}) == len(seeds), "Seeds must be given, each once.", key="seeds", found=", ".join(map(str, seeds))
    )
    jobs = {f"seed_{seed}": Job(function, (config, seed)) for seed in seeds}
    run_jobs(jobs, at_once, Path(output) / "logs", "the same command with --resume")


def run_jobs(jobs: Mapping[str, Job], at_once: int, logs: str | Path, again: str = "the same command") -> None:
    """Run every job, `at_once` of them at a time; one that fails stops no other.

    One at a time runs in this process. Otherwise each has a process, which ends when this one does, however that ends; its
    progress is a line of a table here, and what it prints comes here when it has ended, or stays in `logs`/<name>.log if it failed.
    The files that the jobs make are the same either way. `again` is what goes on with a job that was killed, in words.

    Raises:
        InputError: jobs raised it, after all have ended (one: as it was raised).
        JobError: jobs were killed, or failed by a bug whose traceback is in its log.
    """
    require(at_once >= 1, "At least one job must run at a time.", key="jobs", found=at_once, expected=">= 1")
    logs = Path(logs)
    if at_once == 1 or len(jobs) == 1:
        failed = _run(jobs, Here(logs, alone=len(jobs) == 1), None, 0)
    else:
        board = Board([*jobs])
        engine = Processes(at_once, logs, again)
        if not board.live:
            say(f"{', '.join(jobs)}: {at_once} at a time, logs in {logs}", stderr=True)
        with board:
            failed = _run(jobs, engine, board, 0)
    _tidy(logs)
    raise_failures(failed, alone=len(jobs) == 1)


def run_graph(jobs: Mapping[str, Job], engine: Callable[[Board], Engine], logs: Path, board: Board) -> dict[str, Exception]:
    """Run jobs that need one another; what failed, by name, when nothing more can be done.

    A job that is done already (:attr:`Job.makes`) checks its record in this process, where a process of its own would take longer to
    start. One whose process is lost begins again, from its last checkpoint, up to `RETRIES` times. One that needs what failed is left
    out.

    Args:
        engine: makes the engine, when it is first needed.
    """
    require_graph(jobs)
    try:
        with board:
            return _run(jobs, _Lazy(engine, board), board, RETRIES)
    finally:
        _tidy(logs)


def raise_failures(failed: Mapping[str, Exception], alone: bool = False) -> None:
    """Nothing where nothing failed; one InputError as it was raised, several errors as one.

    Raises:
        InputError: where one is among them.
        JobError: otherwise.
    """
    errors = list(failed.values())
    refused = [error for error in errors if isinstance(error, InputError)]
    if len(errors) == 1 and (refused or alone):
        raise errors[0]
    if errors:
        kind = InputError if refused else JobError
        raise kind("\n".join(f"{name}: {error}" for name, error in failed.items()))


def require_graph(jobs: Mapping[str, Job]) -> None:
    """ValueError for a need that is no job, or a circle: a bug of whoever made the graph."""
    order: dict[str, None] = {}

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            raise ValueError(f"jobs need one another in a circle: {' → '.join((*way, name))}")
        if name not in jobs:
            raise ValueError(f"{way[-1]} needs {name}, which is no job")
        if name not in order:
            for need in jobs[name].needs:
                visit(need, (*way, name))
            order[name] = None

    for name in jobs:
        visit(name, ())


class _Lazy:
    """An engine that is made when its first job comes."""

    def __init__(self, make: Callable[[Board], Engine], board: Board) -> None:
        self._make, self._board = make, board
        self._engine: Engine | None = None

    def __getattr__(self, name: str) -> Any:
        if self._engine is None:
            self._engine = self._make(self._board)
        return getattr(self._engine, name)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def local(at_once: int, logs: Path) -> Callable[[Board], Engine]:
    """Makes the engine of this machine: this process for one job at a time, else processes."""

    def make(board: Board) -> Engine:
        return Here(logs, board.hear) if at_once == 1 else Processes(at_once, logs)

    return make


def _run(jobs: Mapping[str, Job], engine: Any, board: Board | None, retries: int) -> dict[str, Exception]:
    """The scheduler."""
    waiting, running, done = [*jobs], dict[str, int](), set[str]()
    failed, out, lost = dict[str, Exception](), set[str](), dict[str, int]()

    def heard(name: str, what: Began | Status) -> None:
        if board is not None and isinstance(what, Status):  # nothing begins: what is done is looked at
            board.hear(name, what)

    checks = Here(Path(), heard)

    def show(name: str, state: Any, note: str = "") -> None:
        if board is not None:
            board.set(name, state, note)

    def ended(name: str, outcome: Ended) -> None:
        if outcome.error is None:
            done.add(name)
            show(name, "done")
        elif outcome.lost and lost.get(name, 0) < retries:
            lost[name] = lost.get(name, 0) + 1
            waiting.insert(0, name)
            show(name, "waiting", f"lost {lost[name]}×: taken up from its last checkpoint")
            say(f"{name} was lost ({_line(outcome.error)}): it is taken up", stderr=True)
        else:
            failed[name] = outcome.error
            show(name, "failed", _line(outcome.error))
            if len(jobs) > 1:
                say(f"{name} failed{'; the others go on' if waiting or running else ''}", stderr=True)

    try:
        while waiting or running:
            for name in [*waiting]:
                missing = [need for need in jobs[name].needs if need in failed or need in out]
                if missing:
                    waiting.remove(name)
                    out.add(name)
                    show(name, "left out", f"needs {missing[0]}")
                    say(f"{name} is left out: needs {missing[0]}", stderr=True)
            ready = [name for name in waiting if done.issuperset(jobs[name].needs)]
            made = [name for name in ready if name not in lost and (path := jobs[name].makes) is not None and path.exists()]
            for name in made:
                waiting.remove(name)
                checks.start(name, jobs[name], 0)
                for _, event in checks.events():
                    ended(name, event)  # type: ignore[arg-type]
            if made:
                continue
            for name in ready:
                if not engine.room():
                    break
                waiting.remove(name)
                running[name] = lost.get(name, 0)
                engine.start(name, jobs[name], running[name])
            if not running:
                continue
            for name, event in engine.events():
                if isinstance(event, Ended):
                    del running[name]
                    ended(name, event)
                elif board is not None:
                    board.hear(name, event)
    finally:
        engine.close()
    return {name: failed[name] for name in jobs if name in failed}


def _line(error: Exception) -> str:
    """An error's parts in one line."""
    return "; ".join(part.strip() for part in str(error).splitlines() if part.strip())[:500]


def _tidy(logs: Path) -> None:
    with contextlib.suppress(OSError):
        logs.rmdir()  # empty where nothing failed
