"""`postbc demos inspect`."""

from __future__ import annotations

from postbc.cli import options
from postbc.stages.demos import Inspect


def parse(args: list[str]) -> Inspect:
    chosen: Inspect = options(Inspect, "demos inspect", args)
    return chosen


def run(config: Inspect) -> None:
    config.run()
