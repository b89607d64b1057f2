"""`postbc robot rollout`."""

from __future__ import annotations

from postbc.cli import options
from postbc.jobs import run_seeds
from postbc.progress import console
from postbc.stages.robot_rollout import RobotRollout, roll_out, table
from postbc.stages.seeds import seeds_of


def parse(args: list[str]) -> RobotRollout:
    chosen: RobotRollout = options(RobotRollout, "robot rollout", args)
    return chosen


def run(config: RobotRollout) -> None:
    seeds = seeds_of(config)
    run_seeds(roll_out, config, seeds, 1, config.output)  # one robot
    console().print(table(config.output, seeds))
