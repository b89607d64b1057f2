"""`postbc no-regression`."""

from __future__ import annotations

from postbc.cli import options
from postbc.jobs import run_seeds
from postbc.progress import console
from postbc.stages.no_regression import NoRegression, play_pairs, summary


def parse(args: list[str]) -> NoRegression:
    chosen: NoRegression = options(NoRegression, "no-regression", args)
    return chosen


def run(config: NoRegression) -> None:
    run_seeds(play_pairs, config, config.seeds, config.jobs, config.output)
    for seed in config.seeds:
        console().print(summary(config.output, seed), markup=False, soft_wrap=True)
