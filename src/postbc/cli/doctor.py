"""`postbc doctor`."""

from __future__ import annotations

from postbc.cli import options
from postbc.doctor import Doctor


def parse(args: list[str]) -> Doctor:
    chosen: Doctor = options(Doctor, "doctor", args)
    return chosen


def run(config: Doctor) -> None:
    config.run()
