"""`postbc sweep NAME...`."""

from __future__ import annotations

from postbc.cli import options
from postbc.experiments.running import RunSweep


def parse(args: list[str]) -> RunSweep:
    chosen: RunSweep = options(RunSweep, "sweep", args)
    return chosen


def run(config: RunSweep) -> None:
    config.run()
