"""`postbc demos convert`."""

from __future__ import annotations

from postbc.cli import options
from postbc.stages.demos import Convert


def parse(args: list[str]) -> Convert:
    chosen: Convert = options(Convert, "demos convert", args)
    return chosen


def run(config: Convert) -> None:
    config.run()
