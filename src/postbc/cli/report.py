"""`postbc report`."""

from __future__ import annotations

from postbc.cli import options
from postbc.experiments.reporting import Report


def parse(args: list[str]) -> Report:
    chosen: Report = options(Report, "report", args)
    return chosen


def run(config: Report) -> None:
    config.run()
