"""Options of `postbc run NAME`, and the list of `postbc recipes`."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import tyro
from rich.table import Table
from rich.text import Text

from postbc.experiments.recipe import Recipe, load_recipe, names
from postbc.progress import say
from postbc.schemas import schema

P = TypeVar("P")


@schema
class RunRecipe(Generic[P]):
    """A whole experiment: demonstrations → posterior → pretraining by each method → finetuning by each finetuner → report.

    Run it again and it goes on where it was stopped; other methods, finetuners and seeds may be asked of the same directory later.
    """

    recipe: Annotated[Recipe[P], tyro.conf.arg(name="")]
    output: Path = field(default_factory=Path)
    """Directory of the experiment."""
    resume: bool = True
    """Go on with the experiment that is there; --no-resume refuses one."""

    def run(self) -> None:
        """Run what has not been run yet, then report."""
        from postbc.experiments.sweep import run_recipe

        report = run_recipe(self.recipe, self.output, self.resume)
        say(f"report: {report / 'report.html'}")


def table() -> Table:
    """The recipes: name, what it is, where its numbers come from, how long it takes."""
    grid = Table(
        title="postbc run NAME --output DIR", caption="postbc run NAME --help lists every option with the recipe's value"
    )
    grid.add_column("recipe", no_wrap=True)
    grid.add_column("what, where its numbers come from, how long it takes")
    for name in names():
        recipe = load_recipe(name)
        grid.add_row(Text(name), Text(f"{recipe.about}\n{recipe.source}; {recipe.size}"))
    return grid
