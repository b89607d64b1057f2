"""Options of `postbc report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table
from rich.text import Text

from postbc.errors import require
from postbc.experiments.report import Content, build
from postbc.experiments.summary import Setting
from postbc.experiments.tables import signed
from postbc.progress import console
from postbc.schemas import schema


@schema
class Report:
    """Collect finished runs into one self-contained HTML file, with plots (PNG, PDF), tables (Markdown, LaTeX, CSV), summary.json and
    results.csv beside it."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, or directories above them; everything below is collected. A former report's directory works as well."""
    output: Path
    """Directory of the report."""
    title: str = "Posterior behavioral cloning"
    """Heading of the page."""

    def __post_init__(self) -> None:
        require(self.runs, "There is nothing to report.", key="runs", found="none", expected="directories of finished runs")

    def run(self) -> None:
        """Build it, print a short table and the path."""
        content = build(self.runs, self.output, self.title)
        shown = console()
        for setting in content.settings:
            shown.print(table(content, setting))
        for note in content.notes:
            shown.print(f"note: {note}", markup=False, style="yellow")
        shown.print(f"report: {self.output / 'report.html'}", markup=False, soft_wrap=True)


def table(content: Content, setting: Setting) -> Table:
    """One row a group of a setting: seeds, success before and after, and PostBC's difference to it, or its own to another variant."""
    grid = Table(
        title=Text(f"{setting.title}: success rate, mean over seeds"),
        caption="95 % intervals over seeds; verdict after Holm's correction",
    )
    grid.add_column("pretraining", no_wrap=True)
    for name in ("seeds", "before", "after"):
        grid.add_column(name, justify="right")
    grid.add_column("PostBC − this, after")
    for g in content.of(setting):
        said = [f"{' '.join(signed(p))}\n{p.verdict}" for p in content.pairs["success_after"] if p.baseline is g]
        variants = [p for p in content.variants["success_after"] if p.ours is g]
        said += [f"this − {p.baseline.label}: {' '.join(signed(p))}\n{p.verdict}" for p in variants]
        rates = [f"{g.values(k).mean():.3f}" for k in ("success_before", "success_after")]
        grid.add_row(Text(g.label), str(len(g.runs)), *rates, Text("\n".join(said)))
    return grid
