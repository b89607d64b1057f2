"""`postbc evaluate`."""

from __future__ import annotations

from postbc.cli import options
from postbc.jobs import run_seeds
from postbc.progress import console
from postbc.stages.evaluate import Evaluate, evaluate_stage, table, task_table
from postbc.stages.seeds import seeds_of


def parse(args: list[str]) -> Evaluate:
    chosen: Evaluate = options(Evaluate, "evaluate", args)
    return chosen


def run(config: Evaluate) -> None:
    seeds = seeds_of(config)
    run_seeds(evaluate_stage, config, seeds, config.jobs, config.output)
    console().print(table(config.output, seeds))
    by_task = task_table(config.output, seeds)
    if by_task is not None:
        console().print(by_task)
