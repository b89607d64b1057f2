"""`postbc theory`."""

from __future__ import annotations

from postbc.cli import options
from postbc.theory.command import Theory


def parse(args: list[str]) -> Theory:
    chosen: Theory = options(Theory, "theory", args)
    return chosen


def run(config: Theory) -> None:
    config.run()
