"""`postbc recipes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from postbc.cli import options
from postbc.errors import InputError
from postbc.experiments.recipe import load_recipes, names
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

    watch = Stopwatch()
    asked = {name: load_recipes(name) for name in config.recipes or names()}
    found: dict[str, dict[str, list[Cost] | InputError]] = {name: {} for name in asked}
    with progress("timing", sum(map(len, asked.values()))) as bar:
        for name, recipes in asked.items():
            for title, recipe in recipes.items():
                found[name][title] = cost_of(recipe, watch)
                bar.advance(1)
    if not config.recipes:
        known = dict[str, str]()
        for name, costs in found.items():
            failed = [error for error in costs.values() if isinstance(error, InputError)]
            total = sum(cost.seconds for one in costs.values() if not isinstance(one, InputError) for cost in one)
            known[name] = f"unknown: {failed[0].what}" if failed else duration(total)
        console().print(table(known))
        return
    for name, costs in found.items():
        for title, one in costs.items():
            if isinstance(one, InputError):
                say(f"{title}: unknown. {one}")
            else:
                console().print(table_of_costs(title, one, asked[name][title]))
