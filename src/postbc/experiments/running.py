"""Options of `postbc run NAME`, and the list of `postbc recipes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from rich.table import Table
from rich.text import Text

from postbc.errors import require
from postbc.experiments.recipe import Recipe, load_recipe, names, with_policy
from postbc.policies.base import policy_class
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


def parse(name: str, args: Sequence[str]) -> RunRecipe[Any]:
    """The recipe `name` (or a .yaml file) with the options `args` over its values, as the command line gives them.

    Prints help or a usage error and raises SystemExit as argparse does.

    Raises:
        InputError: there is no such recipe or kind of policy, or a value cannot be used.
    """
    recipe = load_recipe(name)
    recipe = with_policy(recipe, _given(args, "--policy.kind", recipe.policy.kind))
    generic: Any = RunRecipe
    default = RunRecipe(recipe, Path("runs") / Path(name).stem)
    chosen: RunRecipe[Any] = tyro.cli(
        generic[policy_class(recipe.policy.kind).Config], prog=f"postbc run {name}", args=list(args), default=default
    )
    return chosen


def _given(args: Sequence[str], option: str, default: str) -> str:
    """The value of an option that decides what the others are, before they are parsed."""
    for word, following in zip(args, [*args[1:], ""]):
        if word == option:
            require(following, "A value is missing.", key=option)
            return following
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return default


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
