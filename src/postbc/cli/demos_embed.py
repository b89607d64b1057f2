"""`postbc demos embed`."""

from __future__ import annotations

from postbc.cli import options
from postbc.stages.demos import Embed


def parse(args: list[str]) -> Embed:
    chosen: Embed = options(Embed, "demos embed", args)
    return chosen


def run(config: Embed) -> None:
    config.run()
