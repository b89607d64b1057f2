"""`postbc demos replay`."""

from __future__ import annotations

from postbc.cli import options
from postbc.stages.demos import Replay


def parse(args: list[str]) -> Replay:
    chosen: Replay = options(Replay, "demos replay", args)
    return chosen


def run(config: Replay) -> None:
    config.run()
