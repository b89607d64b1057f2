"""Recipes, run to their report: one by itself (`postbc run`), or several as one graph of runs (`postbc sweep`).

Every stage keeps its own record, so that what was stopped goes on, and methods, finetuners, seeds and, in a sweep, recipes can be added
to a directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from postbc.board import Board
from postbc.engines.base import Engine
from postbc.errors import InputError, require
from postbc.experiments.checks import check
from postbc.experiments.graph import Graph
from postbc.experiments.layout import Layout
from postbc.experiments.recipe import FINETUNING, Recipe
from postbc.experiments.summary import SWEEP_FILE, Sweep
from postbc.files import os_errors, write_json
from postbc.jobs import local, raise_failures, run_graph
from postbc.progress import say
from postbc.runs import Lock, Run, digest
from postbc.schemas import read_json

#: Fields that do not belong to the experiment, and those that may change between two runs into one directory: their stages
#: check them against their own records.
VOLATILE = ("output", "jobs", "videos", "about", "source", "size")
REVISABLE = ("methods", "finetuners", "finetune_in", "seeds", *FINETUNING, "per_method", "compute")
PAGE = "progress.html"


def run_recipe(recipe: Recipe[Any], output: Path, resume: bool = True) -> Path:
    """Run `recipe` to its report, going on where a former run was stopped (unless `resume` is off); the report's directory.

    A job that fails is one line; those that do not need what it should have made go on, and the report shows what is there.

    Raises:
        InputError: an input cannot be used, or `output` holds another experiment (nothing was written then); or a job raised it.
        JobError: a job was killed, or failed by a bug.
    """
    layout = Layout(output)
    check(recipe, layout)
    inputs = {} if recipe.demonstrations is None else {"demonstrations": digest(recipe.demonstrations)}
    with Run(output, recipe, resume=resume, inputs=inputs, volatile=VOLATILE, revisable=REVISABLE) as run:
        graph = Graph(layout)
        graph.add(recipe)
        title = f"{recipe.environment.removeprefix('postbc/')}: {', '.join(recipe.methods)}"
        report = _run(graph, local(recipe.jobs, output / "logs"), title, recipe.finetuners)
        run.finish()
    return report


def run_sweep(recipes: Mapping[str, Recipe[Any]], output: Path, engine: Callable[[Board], Engine] | None = None) -> Path:
    """Run recipes, by title, as one graph into one directory: what two have in common is made once. The report's directory.

    Args:
        engine: makes what runs the jobs (:func:`postbc.jobs.local`, :class:`postbc.engines.ray.RayEngine`); one at a time by default.

    Raises:
        InputError: as :func:`run_recipe`, of any recipe; or another sweep works in `output`.
        JobError: as :func:`run_recipe`.
    """
    require(recipes, "There is nothing to sweep over.", key="recipes", found="none", expected="names or .yaml files")
    layout, former = Layout(output, tagged=True), _former(output)
    graph, checked = Graph(layout), set[Any]()
    for title, recipe in recipes.items():
        try:
            check(recipe, layout, checked)
        except InputError as error:
            raise InputError(f"{title}: {error}") from error
        graph.add(recipe, title)
    with os_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    lock = Lock(output)
    try:
        runs = {where.relative_to(output).as_posix(): titles for where, titles in graph.recipes.items()}
        merged = {where: [*dict.fromkeys([*former.get(where, ()), *runs.get(where, ())])] for where in {**former, **runs}}
        write_json(output / SWEEP_FILE, {"runs": merged})
        finetuners = tuple(dict.fromkeys(f for recipe in recipes.values() for f in recipe.finetuners))
        return _run(graph, engine or local(1, output / "logs"), ", ".join(recipes), finetuners, whole=True)
    finally:
        lock.release()


def _former(output: Path) -> dict[str, tuple[str, ...]]:
    """What sweeps before this one wrote. InputError for a directory that is something else's."""
    if (output / SWEEP_FILE).exists():
        return dict(read_json(output / SWEEP_FILE, Sweep).runs)
    with os_errors(output, "read"):
        there = sorted(p.name for p in output.iterdir() if not p.name.startswith(".")) if output.is_dir() else []
    require(not there, "This directory is not empty and holds no sweep.", file=output, found=", ".join(there[:5]),
            remedy="choose another --output")  # fmt: skip
    return {}


def _run(graph: Graph, engine: Callable[[Board], Engine], title: str, finetuners: tuple[str, ...], whole: bool = False) -> Path:
    """Run the graph, report what is there, raise what failed."""
    from postbc.experiments.report import build

    output, jobs = graph.layout.output, graph.jobs
    report = output / "report"
    board = Board([*jobs], title, output / PAGE, told=True, link="report/report.html")
    failed = run_graph(jobs, engine, output / "logs", board)
    for command in graph.rollouts:
        say(f"A robot has to be played on before its rollouts can be learnt from:\n  {command}\nand then this command again.")
    parts = [output / part for part in ("posterior", "pretraining", "evaluation", *finetuners)]
    if any((output / f).is_dir() for f in ("evaluation", *finetuners)):
        build([output] if whole else [part for part in parts if part.is_dir()], report, title)
    raise_failures(failed)
    return report
