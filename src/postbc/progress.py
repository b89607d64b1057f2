"""Progress on the terminal: rate, time left and a few figures, for anything that takes longer than a few seconds."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

STATUS_FILE = "POSTBC_PROGRESS"  # environment variable: where a process without a terminal says how far it is


def read_status(path: Path) -> dict[str, Any] | None:
    """What a process with `STATUS_FILE` set to `path` is doing: description, done, total, figures; None if it has not said."""
    try:
        status: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return status


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f}/s" if task.speed else "–/s", style="progress.data.speed")


class Bar:
    """What :func:`progress` yields."""

    def __init__(self, display: Progress, task: Any, live: bool, total: float, done: float, description: str) -> None:
        self._display, self._task, self._live, self._total, self._done = display, task, live, total, done
        self._description, self._begin, self._shown, self._from = description, time.monotonic(), time.monotonic(), done

    def advance(self, by: float = 1, **figures: Any) -> None:
        """Go on by `by`; figures (numbers or tensors, which are averaged) are shown about four times a second."""
        self._done += by
        now = time.monotonic()
        status = os.environ.get(STATUS_FILE)
        if now - self._shown < (0.25 if self._live else 1.0 if status else 30.0) and self._done < self._total:
            return
        self._shown = now
        values = {k: float(v.mean()) if isinstance(v, torch.Tensor) else float(v) for k, v in figures.items()}
        text = "  ".join(f"{k} {v:.3g}" for k, v in values.items())
        if self._live:
            self._display.update(self._task, completed=self._done, figures=text)
        elif status:
            content = {"description": self._description, "done": self._done, "total": self._total, "figures": text}
            temporary = Path(f"{status}.tmp")
            temporary.write_text(json.dumps(content))
            temporary.replace(status)
        else:  # a log file gets a line now and then instead of a redrawn bar
            rate = (self._done - self._from) / max(now - self._begin, 1e-9)
            left = (self._total - self._done) / rate if rate else float("nan")
            print(
                f"{self._description}: {self._done:.0f}/{self._total:.0f}  {rate:,.1f}/s  {left:.0f} s left  {text}", flush=True
            )


@contextmanager
def progress(description: str, total: float, done: float = 0) -> Iterator[Bar]:
    """A progress bar on a terminal, an occasional line elsewhere."""
    console = Console(stderr=True)
    live = console.is_terminal and sys.stderr.isatty()
    display = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"), console=console, disable=not live, refresh_per_second=4,
    )  # fmt: skip
    with display:
        task = display.add_task(description, total=total, completed=int(done), figures="")
        yield Bar(display, task, live, total, done, description)
