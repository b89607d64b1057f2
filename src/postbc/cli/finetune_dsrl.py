"""`postbc finetune dsrl`."""

from __future__ import annotations

from postbc.cli import options
from postbc.jobs import run_seeds
from postbc.progress import console
from postbc.stages.dsrl import Dsrl, run_seed
from postbc.stages.finetuning import table
from postbc.stages.seeds import seeds_of


def parse(args: list[str]) -> Dsrl:
    chosen: Dsrl = options(Dsrl, "finetune dsrl", args)
    return chosen


def run(config: Dsrl) -> None:
    seeds = seeds_of(config)
    run_seeds(run_seed, config, seeds, config.jobs, config.output)
    console().print(table(config.output, seeds))
