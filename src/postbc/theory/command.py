"""`postbc theory [STATEMENT]`: execute statements, print their checks and numbers, keep picture and numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from postbc.errors import InputError
from postbc.theory import STATEMENTS, StatementResult

#: Inches; statements that are not listed get the first.
SIZES = {"": (9.0, 3.6), "main-theorem-return": (13.0, 3.6), "gaussian-lemma": (13.0, 3.8), "rl-finetuning": (12.0, 6.0),
         "near-optimality": (7.0, 4.2)}  # fmt: skip


@dataclass(frozen=True)
class Theory:
    """Execute section 2 of the paper: every statement with its numbers, checks and picture (docs/theory.md explains them).

    Statements: bc-fails-to-cover, uniform-noise-fails, main-theorem-return, main-theorem-coverage, return-lemma,
    near-optimality, gaussian-lemma, rl-finetuning.
    """

    statement: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[STATEMENT]")] = None
    """The statement to execute; all of them, when none is given."""
    output: Path = Path("theory")
    """Directory for one STATEMENT.png and STATEMENT.json each."""
    seed: int = 0
    """Seed of every sampled dataset; each statement starts from it anew."""
    repetitions: int | None = None
    """Number of sampled datasets (Monte-Carlo repetitions); the default is each statement's own."""

    def run(self) -> None:
        if self.statement is not None and self.statement not in STATEMENTS:
            raise InputError("there is no such statement", found=self.statement, expected=", ".join(STATEMENTS))
        if self.repetitions is not None and self.repetitions < 2:
            raise InputError(
                "too few repetitions for a spread", key="--repetitions", found=self.repetitions, expected="2 or more"
            )
        if self.seed < 0:
            raise InputError("a seed cannot be negative", key="--seed", found=self.seed, expected="0 or more")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                "the output directory cannot be made", file=self.output, found=error, remedy="name another"
            ) from error
        console = Console()
        names = list(STATEMENTS) if self.statement is None else [self.statement]
        if self.statement is None:
            for name in names:
                console.print(f"  [bold]{name:<22}[/bold] {_headline(name)}", highlight=False)
        results = {name: self._execute(name, console) for name in names}
        if len(results) > 1:
            console.print(_summary(results))

    def _execute(self, name: str, console: Console) -> StatementResult:
        def progress(items: Sequence[Any], description: str) -> Iterable[Any]:
            label = f"{name}: {description}"
            return track(items, label, console=Console(stderr=True), transient=True, total=len(items))

        options = {} if self.repetitions is None else {"repetitions": self.repetitions}
        result = STATEMENTS[name](seed=self.seed, track=progress, **options)
        console.rule(f"[bold]{name}")
        console.print(_statement(name), highlight=False, markup=False, soft_wrap=True)
        console.print(_checks(result))
        console.print(_numbers(result))
        figure = Figure(figsize=SIZES.get(name, SIZES[""]), layout="constrained")
        result.plot(figure)
        picture, numbers = self.output / f"{name}.png", self.output / f"{name}.json"
        figure.savefig(picture, dpi=110)
        content = {
            "statement": name,
            "seed": self.seed,
            "repetitions": self.repetitions,
            "checks": [{"claim": c.claim, "found": c.found, "holds": bool(c.holds), "how": c.how} for c in result.checks()],
            "rows": [{key: _plain(value) for key, value in row.items()} for row in result.rows()],
        }
        numbers.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"{picture}\n{numbers}", highlight=False, soft_wrap=True)
        return result


def _plain(value: float | int | str) -> float | int | str | None:
    """JSON has no NaN (a quantity of an event that no dataset fell into)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _statement(name: str) -> str:
    lines = (STATEMENTS[name].__doc__ or "").split("\n\n    Args:")[0].strip().splitlines()
    return "\n".join(line.strip() for line in lines)


def _headline(name: str) -> str:
    return _statement(name).splitlines()[0]


def _checks(result: StatementResult) -> Table:
    table = Table(title="Claims", title_justify="left")
    for column in ("claim", "found", "holds", "how"):
        table.add_column(column)
    for check in result.checks():
        table.add_row(check.claim, check.found, "[green]yes" if check.holds else "[red]no", check.how)
    return table


def _numbers(result: StatementResult) -> Table:
    rows = result.rows()
    table = Table(title="Numbers", title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def _summary(results: dict[str, StatementResult]) -> Table:
    table = Table(title="Summary", title_justify="left")
    for column in ("statement", "claims that hold", "claims that do not"):
        table.add_column(column)
    for name, result in results.items():
        checks = result.checks()
        failed = "\n".join(f"{check.claim}: {check.found}" for check in checks if not check.holds)
        table.add_row(name, f"{sum(check.holds for check in checks)} of {len(checks)}", failed)
    return table
