"""Progress on the terminal: rate, time left and a few figures, for anything that takes longer than a few seconds."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


class Status(NamedTuple):
    """How far something is."""

    description: str
    done: float
    total: float
    rate: float | None
    """Units a second over the last minute; None until two have been counted."""
    figures: str

    @property
    def doing(self) -> str:
        """Rate, time left and figures in a few words."""
        if self.rate is None:
            return "starting …" if self.done < self.total else self.figures
        left = f"{clock((self.total - self.done) / self.rate)} left" if self.done < self.total else ""
        return "  ".join(part for part in (f"{self.rate:,.1f}/s", left, self.figures) if part)


_listener: Callable[[Status], None] | None = None


@contextmanager
def listening(listener: Callable[[Status], None] | None) -> Iterator[None]:
    """Inside, this process's progress goes to `listener`, once a second, and not to the terminal (for jobs). None: as it went."""
    global _listener
    before, _listener = _listener, listener or _listener
    try:
        yield
    finally:
        _listener = before


def listener() -> Callable[[Status], None] | None:
    """Who hears this process's progress, if it is a job's."""
    return _listener


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(int(min(seconds, 359_999_999)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def console(stderr: bool = False) -> Console:
    """A terminal, or a file in its place, that takes any text: what its encoding cannot show is replaced, nothing is highlighted,
    and brackets are brackets (markup only where `print(…, markup=True)` says that the text is our own)."""
    stream = sys.stderr if stderr else sys.stdout
    if getattr(stream, "errors", None) == "strict":
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def say(text: str, stderr: bool = False) -> None:
    """One line, not wrapped, however long."""
    console(stderr).print(text, soft_wrap=True)


def note(sentences: Iterable[str]) -> None:
    """Each on a line: what is worth knowing and stops nothing."""
    for sentence in sentences:
        say(f"note: {sentence}")


class Bar:
    """What :func:`progress` yields."""

    def __init__(self, show: Callable[[Status], None], every: float, description: str, total: float, done: float) -> None:
        self._show, self._every, self._shown = show, every, time.monotonic()
        self._description, self._total, self._done = description, total, done
        self._samples: deque[tuple[float, float]] = (
            deque()
        )  # (time, done), from the first advance on: what comes before is compiling

    def advance(self, by: float = 1, **figures: Any) -> None:
        """Go on by `by`; figures (numbers or tensors, which are averaged) are shown about four times a second."""
        self._done += by
        now = time.monotonic()
        if not self._samples or now - self._samples[-1][0] > 0.5:
            self._samples.append((now, self._done))
            while now - self._samples[0][0] > 60 and len(self._samples) > 2:
                self._samples.popleft()
        if now - self._shown < self._every and self._done < self._total:
            return
        self._shown, (since, begun) = now, self._samples[0]
        rate = (self._done - begun) / (now - since) if now > since and self._done > begun else None
        values = {k: float(v.float().mean()) if hasattr(v, "float") else float(v) for k, v in figures.items()}
        text = "  ".join(f"{k} {v:.3g}" for k, v in values.items())
        self._show(Status(self._description, self._done, self._total, rate, text))

    def reach(self, done: float) -> None:
        """Go on to `done` of the total."""
        self.advance(done - self._done)


class _Doing(ProgressColumn):
    """Whatever the task says, without a meaning for brackets in it."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self._field = field

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get(self._field, "")))


def display(terminal: Console, disable: bool) -> Progress:
    """Bars of description, bar, count and what is being done (field `doing`); descriptions are shown as they are."""
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Doing("doing"), console=terminal,
        disable=disable, refresh_per_second=4, redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip


@contextmanager
def progress(description: str, total: float, done: float = 0) -> Iterator[Bar]:
    """A progress bar on a terminal, a line every 30 seconds elsewhere, the listener's in a job's process."""
    if _listener is not None:
        _listener(Status(description, done, total, None, ""))
        yield Bar(_listener, 1.0, description, total, done)
        return
    terminal = console(stderr=True)
    if not (terminal.is_terminal and sys.stderr.isatty()):

        def line(status: Status) -> None:
            say(f"{status.description}: {status.done:.0f}/{status.total:.0f}  {status.doing}")

        yield Bar(line, 30.0, description, total, done)
        return
    with display(terminal, disable=False) as bars:
        task = bars.add_task(description, total=total, completed=int(done), doing="starting …")

        def redraw(status: Status) -> None:
            bars.update(task, completed=int(status.done), doing=status.doing)

        yield Bar(redraw, 0.25, description, total, done)
