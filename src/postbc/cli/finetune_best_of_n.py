"""`postbc finetune best-of-n`."""

from __future__ import annotations

from postbc.cli import options
from postbc.jobs import run_seeds
from postbc.progress import console
from postbc.stages.best_of_n import BestOfN, run_seed
from postbc.stages.finetuning import table
from postbc.stages.seeds import seeds_of


def parse(args: list[str]) -> BestOfN:
    chosen: BestOfN = options(BestOfN, "finetune best-of-n", args)
    return chosen


def run(config: BestOfN) -> None:
    seeds = seeds_of(config)
    run_seeds(run_seed, config, seeds, config.jobs, config.output)
    console().print(table(config.output, seeds))
