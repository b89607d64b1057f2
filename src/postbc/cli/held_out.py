"""`postbc held-out`."""

from __future__ import annotations

from postbc.cli import options
from postbc.jobs import run_seeds
from postbc.progress import console
from postbc.stages.held_out import HeldOut, compare_held_out, summary


def parse(args: list[str]) -> HeldOut:
    chosen: HeldOut = options(HeldOut, "held-out", args)
    return chosen


def run(config: HeldOut) -> None:
    run_seeds(compare_held_out, config, config.seeds, config.jobs, config.output)
    for seed in config.seeds:
        console().print(summary(config.output, seed), markup=False, soft_wrap=True)
