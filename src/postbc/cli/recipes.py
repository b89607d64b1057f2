"""`postbc recipes`."""

from __future__ import annotations

from dataclasses import dataclass

from postbc.cli import options
from postbc.experiments.running import table
from postbc.progress import console


@dataclass(frozen=True)
class Recipes:
    """List the experiments that `postbc run` knows: what they are, where their numbers come from, how long they take."""


def parse(args: list[str]) -> Recipes:
    chosen: Recipes = options(Recipes, "recipes", args)
    return chosen


def run(config: Recipes) -> None:
    console().print(table())
