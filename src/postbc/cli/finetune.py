"""`postbc finetune …`: every finetuner's command is its stage's options and the function that runs one seed of it."""

from __future__ import annotations

import importlib
from typing import Any

from postbc.cli import options
from postbc.jobs import run_seeds
from postbc.progress import console
from postbc.stages.finetuning import FINETUNERS, Finetune, table
from postbc.stages.seeds import seeds_of


class Command:
    """One finetuner's `parse` and `run`."""

    def __init__(self, name: str) -> None:
        self.name = name
        module, kind = FINETUNERS[name]
        self.stage: Any = importlib.import_module(module)
        self.kind: type[Finetune] = getattr(self.stage, kind)

    def parse(self, args: list[str]) -> Finetune:
        chosen: Finetune = options(self.kind, f"finetune {self.name}", args)
        return chosen

    def run(self, config: Finetune) -> None:
        seeds = seeds_of(config)
        run_seeds(self.stage.run_seed, config, seeds, config.jobs, config.output)
        console().print(table(config.output, seeds))
