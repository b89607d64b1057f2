"""The states of many jobs while they run: a live table on the terminal, and one HTML file that refreshes itself."""

from __future__ import annotations

import contextlib
import importlib.resources
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from postbc.disk import write_text
from postbc.engines.base import Began
from postbc.errors import InputError
from postbc.progress import Status, clock, console, listener, say

State = Literal["waiting", "running", "done", "failed", "left out"]
STATES: tuple[State, ...] = ("running", "failed", "left out", "waiting", "done")
"""In the order in which people want to see them."""
COLOURS = {"running": "cyan", "failed": "red", "left out": "yellow", "waiting": "dim", "done": "green"}
REFRESH = 3.0
"""Seconds between two writings of the page."""


@dataclass
class Row:
    """What is known of a job."""

    name: str
    state: State = "waiting"
    note: str = ""
    """Where it runs, why it failed, what it needs."""
    status: Status | None = None
    begun: float | None = None
    seconds: float | None = None
    """From its beginning to its end."""

    @property
    def share(self) -> float:
        """How much of what it does now is done."""
        s = self.status
        return 1.0 if self.state == "done" else min(1.0, s.done / s.total) if s is not None and s.total else 0.0

    @property
    def doing(self) -> str:
        """Rate and time left of a running job, the reason of one that failed."""
        if self.state == "running" and self.status is not None:
            s = self.status
            return "  ".join(filter(None, (f"{s.description} {s.done:,.0f}/{s.total:,.0f}", s.doing, self.note)))
        return self.note

    @property
    def took(self) -> str:
        """Its time until now, or until it ended."""
        seconds = self.seconds if self.seconds is not None or self.begun is None else time.monotonic() - self.begun
        return "" if seconds is None else clock(seconds)


class Board:
    """Shows jobs; a context manager. On a terminal a live table, elsewhere a line for what ended (where it is to be `told`).

    Args:
        page: the HTML file, written atomically every few seconds, whatever the jobs say meanwhile, and at the end.
        link: a file that the page leads to when all has ended.
    """

    def __init__(
        self, names: Sequence[str], title: str = "", page: Path | None = None, told: bool = False, link: str = ""
    ) -> None:
        self.rows = {name: Row(name) for name in names}
        self.title, self.page, self.told, self.link = title, page, told, link
        self._outer = listener()  # inside of a job whoever shows that one shows these
        terminal = console(stderr=True)
        self.live = self._outer is None and terminal.is_terminal and sys.stderr.isatty()
        self._live = Live(
            console=terminal, get_renderable=self.table, refresh_per_second=2, redirect_stdout=sys.stdout.isatty(), redirect_stderr=True
        ) if self.live else None  # fmt: skip
        self._begun = self._said = time.monotonic()
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_on, daemon=True)

    def __enter__(self) -> Board:
        self._write()
        if self.page is not None:
            self._writer.start()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is not None:
            for row in self.rows.values():
                if row.state == "running":
                    row.state, row.note, row.status = "waiting", "interrupted; the same command goes on", None
        if self._live is not None:
            self._live.stop()
        self._ended.set()
        if self.page is not None:
            self._writer.join()
        self._write(final="interrupted" if kind is not None else "ended")

    def set(self, name: str, state: State, note: str = "") -> None:
        """A job has another state."""
        row, now = self.rows[name], time.monotonic()
        row.state, row.note, row.status = state, " ".join(note.split()), None
        if state == "running" and row.begun is None:
            row.begun = now
        if state in ("done", "failed") and row.begun is not None:
            row.seconds = now - row.begun
        if self.told and not self.live and state == "done" and row.begun is not None:
            ended = sum(r.state not in ("waiting", "running") for r in self.rows.values())
            say(f"{name} done in {row.took} ({ended} of {len(self.rows)})", stderr=True)

    def hear(self, name: str, status: Began | Status) -> None:
        """A job begins, or is so far."""
        if isinstance(status, Began):
            self.set(name, "running", status.where)
            return
        self.rows[name].status = status
        if self._outer is not None:
            self._outer(status)
        elif not self.live and self.told and time.monotonic() - self._said > 30:
            self._said = time.monotonic()
            say(f"{name}: {status.description} {status.done:.0f}/{status.total:.0f}  {status.doing}", stderr=True)

    @property
    def counts(self) -> dict[State, int]:
        """State -> jobs."""
        found = {state: sum(row.state == state for row in self.rows.values()) for state in STATES}
        return {state: number for state, number in found.items() if number}

    @property
    def _ordered(self) -> list[Row]:
        return [row for state in STATES for row in self.rows.values() if row.state == state]

    def table(self) -> Group:
        """The table for the terminal: what fits, the most interesting first, and how many there are of each state."""
        room = max(4, console(stderr=True).size.height - 5)
        ordered = self._ordered
        grid = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for row in ordered[:room]:
            bar = f"{row.share:4.0%}" if row.state == "running" and row.status else ""
            cells = [Text(cell, overflow="ellipsis", no_wrap=True) for cell in (row.name, row.state, bar, row.took, row.doing)]
            cells[1].stylize(COLOURS[row.state])
            grid.add_row(*cells)
        more = f", {len(ordered) - room} not shown" if len(ordered) > room else ""
        counts = ", ".join(f"{number} {state}" for state, number in self.counts.items())
        return Group(grid, Text(f"{counts}{more}, {clock(time.monotonic() - self._begun)}"))

    def _write(self, final: str = "") -> None:
        if self.page is None:
            return
        now = datetime.now(timezone.utc)
        text = _template().render(
            title=self.title, rows=self._ordered, counts=self.counts, final=final, now=f"{now:%Y-%m-%d %H:%M:%S} UTC", refresh=5,
            stamp=int(now.timestamp()), took=clock(time.monotonic() - self._begun), link=self.link,
        )  # fmt: skip
        write_text(self.page, text)

    def _write_on(self) -> None:
        while not self._ended.wait(REFRESH):
            with contextlib.suppress(InputError):  # a full disk: the last page says so
                self._write()


@lru_cache(maxsize=1)
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(importlib.resources.files("postbc").joinpath("board.html.j2").read_text(encoding="utf-8"))
