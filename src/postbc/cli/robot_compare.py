"""`postbc robot compare`."""

from __future__ import annotations

from postbc.cli import options
from postbc.progress import console
from postbc.stages.robot_compare import RobotCompare, compare, said


def parse(args: list[str]) -> RobotCompare:
    chosen: RobotCompare = options(RobotCompare, "robot compare", args)
    return chosen


def run(config: RobotCompare) -> None:
    compare(config)
    console().print(said(config.output), markup=False, soft_wrap=True)
