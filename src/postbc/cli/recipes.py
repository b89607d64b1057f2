"""`postbc recipes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from postbc.cli import options
from postbc.errors import InputError
from postbc.experiments.recipe import load_recipe, names
from postbc.experiments.running import table
from postbc.progress import console, progress, say


@dataclass(frozen=True)
class Recipes:
    """List the experiments that `postbc run` knows: what they are, where their numbers come from, how long they take.

    With --cost, or of named ones, what a seed costs on this machine: every kind of work is timed for a moment at the recipe's own sizes
    (seconds for small networks, a minute or two for the paper's), and counted.
    """

    recipes: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names, or .yaml files: what each costs, stage by stage."""
    cost: bool = False
    """Of all recipes."""


def parse(args: list[str]) -> Recipes:
    chosen: Recipes = options(Recipes, "recipes", args)
    return chosen


def run(config: Recipes) -> None:
    if not config.recipes and not config.cost:
        console().print(table())
        return
    from postbc.experiments.costs import Cost, Stopwatch, cost_of, duration, table_of_costs

    watch, asked = Stopwatch(), config.recipes or tuple(names())
    found: dict[str, list[Cost] | InputError] = {}
    with progress("timing", len(asked)) as bar:
        for name in asked:
            found[name] = cost_of(name, watch)
            bar.advance(1)
    if not config.recipes:
        known = {
            name: f"unknown: {costs.what}" if isinstance(costs, InputError) else duration(sum(c.seconds for c in costs))
            for name, costs in found.items()
        }
        console().print(table(known))
        return
    for name, costs in found.items():
        if isinstance(costs, InputError):
            say(f"{name}: unknown. {costs}")
        else:
            console().print(table_of_costs(name, costs, load_recipe(name)))
