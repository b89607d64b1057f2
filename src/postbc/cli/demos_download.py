"""`postbc demos download`."""

from __future__ import annotations

from postbc.cli import options
from postbc.stages.demos import Download


def parse(args: list[str]) -> Download:
    chosen: Download = options(Download, "demos download", args)
    return chosen


def run(config: Download) -> None:
    config.run()
