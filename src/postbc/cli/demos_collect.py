"""`postbc demos collect`."""

from __future__ import annotations

from postbc.cli import options
from postbc.stages.demos import Collect


def parse(args: list[str]) -> Collect:
    chosen: Collect = options(Collect, "demos collect", args)
    return chosen


def run(config: Collect) -> None:
    config.run()
