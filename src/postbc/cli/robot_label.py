"""`postbc robot label`."""

from __future__ import annotations

from postbc.cli import options
from postbc.stages.robot_label import RobotLabel


def parse(args: list[str]) -> RobotLabel:
    chosen: RobotLabel = options(RobotLabel, "robot label", args)
    return chosen


def run(config: RobotLabel) -> None:
    config.run()
