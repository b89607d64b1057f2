"""Options of `postbc run NAME` and `postbc sweep NAME...`, and the list of `postbc recipes`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from pydantic import Field
from rich.table import Table
from rich.text import Text

from postbc.devices import cores
from postbc.errors import InputError, require
from postbc.experiments.recipe import Finetuner, Recipe, load_recipes, names
from postbc.pretraining import Method
from postbc.progress import say
from postbc.schemas import Seed, schema

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


@schema
class RunSweep:
    """Several recipes as one graph of runs, over processes of this machine or a Ray cluster, to one report that compares them.

    Runs that recipes have in common (a pretraining, a posterior, scripted demonstrations) are made once. Run it again and it goes on
    where it was stopped; other recipes, methods, finetuners and seeds may be asked of the same directory later. progress.html in the
    output directory shows the states of all runs.
    """

    recipes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Names (`postbc recipes`) or .yaml files."""
    output: Path = Path("runs/sweep")
    """Directory of the runs and of the report."""
    seeds: tuple[Seed, ...] | None = None
    """Default: each recipe's own."""
    methods: tuple[Method, ...] | None = None
    """Ways to pretrain; default: each recipe's own."""
    finetuners: tuple[Finetuner, ...] | None = None
    """Ways to finetune; default: each recipe's own."""
    demonstrations: Path | None = None
    """A file for all recipes instead of their own (a recipe's field `demonstrations` says it for one)."""
    jobs: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Runs at a time (with --address: the cluster decides); default: as many as this machine has cores for."""
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: a Ray cluster (extra [ray])."""
    address: str | None = None
    """Of a running Ray cluster (auto: this machine's); default: Ray is started on this machine for the sweep."""
    cpus_per_job: Annotated[float, Field(gt=0, le=1024)] = 1.0
    """CPUs that a run takes (Ray)."""
    gpus_per_job: Annotated[float, Field(ge=0, le=64)] = 0.0
    """GPUs that a run takes (Ray); a fraction shares one: at 0.25, four runs."""

    def __post_init__(self) -> None:
        titles = [Path(name).stem for name in self.recipes]
        require(titles, "There is nothing to sweep over.", key="recipes", found="none", expected=f"names: {', '.join(names())}")
        require(len({*titles}) == len(titles), "Each recipe may be given once.", key="recipes", found=", ".join(titles))
        given = {
            "address": self.address is not None, "cpus-per-job": self.cpus_per_job != 1.0, "gpus-per-job": self.gpus_per_job != 0.0
        }  # fmt: skip
        for name in (name for name, said in given.items() if said and self.engine != "ray"):
            raise InputError("This is for Ray.", key=name, found="--engine local", remedy="give --engine ray")
        require(self.address is None or self.jobs is None, "A cluster decides how many run at a time.", key="jobs", found=self.jobs,
                remedy="leave --jobs out, or --address")  # fmt: skip
        require(self.gpus_per_job <= 1 or self.gpus_per_job % 1 == 0, "Several GPUs are whole ones.", key="gpus_per_job",
                found=self.gpus_per_job, expected="a fraction below 1, or a whole number")  # fmt: skip

    def chosen(self) -> dict[str, Recipe[Any]]:
        """The recipes with the sweep's own values."""
        own = {
            "seeds": self.seeds,
            "methods": self.methods,
            "finetuners": self.finetuners,
            "demonstrations": self.demonstrations,
        }
        said: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        return {title: replace(recipe, **said) for name in self.recipes for title, recipe in load_recipes(name).items()}

    def run(self) -> None:
        """Run what has not been run yet, then report."""
        from postbc.experiments.sweep import run_sweep
        from postbc.jobs import local

        logs, jobs = self.output / "logs", self.jobs or cores()
        if self.engine == "ray":
            from postbc.engines.ray import RayEngine

            make = partial(RayEngine, logs, self.address, self.cpus_per_job, self.gpus_per_job, self.jobs)
            report = run_sweep(self.chosen(), self.output, lambda _: make())
        else:
            report = run_sweep(self.chosen(), self.output, local(jobs, logs))
        say(f"report: {report / 'report.html'}")


def table(costs: Mapping[str, str] | None = None) -> Table:
    """The recipes: name, what it is, where its numbers come from, how long it takes; and what a seed of each costs here."""
    grid = Table(
        title="postbc run NAME --output DIR", caption="postbc run NAME --help lists every option with the recipe's value"
    )
    grid.add_column("recipe", no_wrap=True)
    grid.add_column("what, where its numbers come from, how long it takes")
    if costs is not None:
        grid.add_column("a seed here, one process, at most")
    for name in names():
        recipe, *others = load_recipes(name).values()
        several = f" ({1 + len(others)} variants: postbc sweep {name})" if others else ""
        cost = [Text(costs[name])] if costs else []
        grid.add_row(Text(name), Text(f"{recipe.about}{several}\n{recipe.source}; {recipe.size}"), *cost)
    return grid
