"""A run's metrics: rows of `metrics.csv`, the same for TensorBoard and W&B; a resumed run forgets what it will log again."""

from __future__ import annotations

import csv
import io
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postbc.disk import blame, os_errors, require_file, write_bytes, write_text
from postbc.errors import InputError, NotFiniteError, require

#: One file with one name, however often the run is resumed (torch's SummaryWriter makes a new one each time).
EVENTS = "events.out.tfevents.run"


class Metrics:
    """The metrics of the run in `directory`: `metrics.csv`, `tensorboard/` where it is installed, W&B where WANDB_PROJECT is set.

    Args:
        config: what W&B shows as the configuration.

    Raises:
        InputError: the `metrics.csv` that is there is broken.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.file, self.events = directory / "metrics.csv", directory / "tensorboard" / EVENTS
        self._directory, self._config = directory, config
        self._wandb: Any = None
        self._columns, self.rows = _read(self.file) if self.file.exists() else (["step"], [])

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a row.

        Raises:
            NotFiniteError: a metric is NaN or infinite; nothing is written.
        """
        row: dict[str, float] = {"step": int(step), **{k: float(v) for k, v in metrics.items()}}
        for name, value in row.items():
            if not math.isfinite(value):
                raise NotFiniteError(
                    "A number is not finite: the run ends here.", file=self._directory, key=name, found=f"{value} at step {step}",
                    remedy="look for a setting that is too large (learning rate, weights) or for extreme numbers in the data; "
                    "the last checkpoint is from before",
                )  # fmt: skip
        self.rows.append(row)
        if {*row} <= {*self._columns} and self.file.exists():
            _append(self.file, _table(self._columns, [row], header=False).encode())
        else:
            self._columns = list(dict.fromkeys([*self._columns, *row]))
            write_text(self.file, _table(self._columns, self.rows))
        if content := _events([row], begin=not self.events.exists()):
            with os_errors(self.events):
                self.events.parent.mkdir(exist_ok=True)
            _append(self.events, content)
        if project := os.environ.get("WANDB_PROJECT"):
            self._wandb = self._wandb or self._start_wandb(project)
            self._wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def rewind(self, step: int | None) -> None:
        """Forget the rows after `step` (None: all)."""
        self.rows = [row for row in self.rows if step is not None and row["step"] <= step]
        self._columns = [name for name in self._columns if name == "step" or any(name in row for row in self.rows)]
        if self.rows:
            write_text(self.file, _table(self._columns, self.rows))
            if content := _events(self.rows, begin=True):
                write_bytes(self.events, content)
        else:
            for file in (self.file, self.events):
                with os_errors(file, "removed"):
                    file.unlink(missing_ok=True)

    def sync(self) -> None:
        """What was logged survives a power cut."""
        if self.file.exists():
            with os_errors(self.file), open(self.file, "rb+") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """End W&B's run."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _start_wandb(self, project: str) -> Any:
        """A run of W&B with an id of its own that a resumed run finds again; several may be open in one process."""
        import wandb

        file = self._directory / "wandb_id.txt"
        if not file.exists():
            write_text(file, uuid.uuid4().hex[:12])
        with blame(file, "W&B did not start."):
            return wandb.init(
                project=project, id=require_file(file).read_text(encoding="utf-8"), name=self._directory.name, dir=str(self._directory),
                config=dict(self._config), resume="allow", reinit="create_new",
            )  # fmt: skip


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, each with its "step"; empty cells are left out.

    Raises:
        InputError: missing, or not such a table.
    """
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[list[str], list[dict[str, float]]]:
    require_file(path, "a run's metrics.csv")
    with os_errors(path, "read"):
        content = path.read_bytes()
    what, remedy = (
        "This is not the table of a run's metrics.",
        "remove it to do without what was logged, or choose another --output",
    )
    try:
        text = content[: content.rfind(b"\n") + 1].decode("utf-8")  # a last line without its end: the machine stopped there
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        columns = lines[0] if lines else []
        rows = [{k: float(v) for k, v in zip(columns, line) if v} for line in lines[1:]]
    except (ValueError, csv.Error) as error:
        raise InputError(what, file=path, found=str(error)[:200], remedy=remedy) from None
    require(
        columns[:1] == ["step"] and len({*columns}) == len(columns), what, file=path, key="line 1", found=", ".join(columns)[:200],
        expected="step, and names, each once", remedy=remedy,
    )  # fmt: skip
    for number, (line, row) in enumerate(zip(lines[1:], rows), 2):
        sound = len(line) == len(columns) and row.get("step", -1.0) >= 0 and all(map(math.isfinite, row.values()))
        require(
            sound and row["step"] == int(row["step"]), what, file=path, key=f"line {number}", found=", ".join(line)[:200],
            expected=f"a step and {len(columns) - 1} finite numbers or nothing", remedy=remedy,
        )  # fmt: skip
        row["step"] = int(row["step"])
    return columns, rows


def _table(columns: list[str], rows: list[dict[str, float]], header: bool = True) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _append(path: Path, content: bytes) -> None:
    with os_errors(path), open(path, "ab") as file:
        file.write(content)


def _events(rows: list[dict[str, float]], begin: bool) -> bytes:
    """Rows as TensorBoard's records (begin: with the record that a file begins with); nothing if tensorboard is not installed."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:  # the [tensorboard] extra
        return b""
    content, now = io.BytesIO(), time.time()
    writer = RecordWriter(content)
    if begin:
        writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for row in rows:
        values = [Summary.Value(tag=k, simple_value=v) for k, v in row.items() if k != "step"]
        writer.write(Event(wall_time=now, step=int(row["step"]), summary=Summary(value=values)).SerializeToString())
    return content.getvalue()


def check_wandb() -> None:
    """InputError if the environment asks for W&B and it is not installed."""
    if project := os.environ.get("WANDB_PROJECT"):
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise InputError(
                "W&B is not installed.", key="WANDB_PROJECT", found=project, expected="unset, or W&B installed",
                remedy="unset the variable, or pip install 'postbc[wandb]'",
            ) from error  # fmt: skip
