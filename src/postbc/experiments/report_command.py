"""`postbc report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from postbc.experiments.report import build
from postbc.experiments.report_sections import Content, signed
from postbc.experiments.summary import Setting


@dataclass(frozen=True)
class Report:
    """Collect finished runs into one self-contained HTML file, with plots (PNG), summary.json and results.csv beside it."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, or directories above them; everything below is collected. A former report's directory works as well."""
    output: Path
    """Directory of the report."""
    title: str = "Posterior behavioral cloning"
    """Heading of the page."""

    def run(self) -> None:
        """Build it, print a short table and the path."""
        content = build(self.runs, self.output, self.title)
        console = Console()
        for setting in content.settings:
            console.print(table(content, setting))
        for note in content.notes:
            console.print(f"note: {note}", markup=False, style="yellow")
        console.print(f"report: {self.output / 'report.html'}", markup=False, soft_wrap=True)


def table(content: Content, setting: Setting) -> Table:
    """One row a group of a setting: seeds, success before and after, and PostBC's difference to it in words."""
    grid = Table(
        title=f"{setting.title}: success rate, mean over seeds",
        caption="95 % intervals over seeds; verdict after Holm's correction",
    )
    grid.add_column("pretraining", no_wrap=True)
    for name in ("seeds", "before", "after"):
        grid.add_column(name, justify="right")
    grid.add_column("PostBC − this, after")
    for g in content.of(setting):
        pairs = [p for p in content.pairs["success_after"] if p.baseline is g]
        said = "\n".join(f"{signed(p)}\n{p.verdict}" for p in pairs)
        rates = [f"{g.values(k).mean():.3f}" for k in ("success_before", "success_after")]
        grid.add_row(g.label, str(len(g.runs)), *rates, said)
    return grid
