"""The graph of a recipe's runs: demonstrations → per seed posterior, pretraining of each method, evaluation, finetunings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postbc.experiments import steps
from postbc.experiments.layout import Layout, shares_encoder
from postbc.experiments.recipe import Finetuner, Recipe
from postbc.jobs import Job
from postbc.policies.base import POLICY_FILE
from postbc.posterior.saved import POSTERIOR_FILE
from postbc.pretraining import Method
from postbc.stages.evaluate import SUMMARY
from postbc.training.results import RESULTS_FILE

LONGEST: tuple[Finetuner, ...] = ("dppo", "dsrl", "residual", "best-of-n")
"""Finetuners, the longest first: that one should not begin when all others have ended."""


class Graph:
    """Jobs by name, each once however many recipes ask for it; in the order in which they should begin."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.jobs: dict[str, Job] = {}
        self.recipes: dict[Path, list[str]] = {}
        """Directory of finetunings -> recipes that they belong to."""

    def add(self, recipe: Recipe[Any], title: str = "") -> None:
        """The runs of a recipe."""
        demonstrations: tuple[str, ...] = ()
        if recipe.demonstrations is None:
            file = self.layout.demonstrations(recipe)
            demonstrations = (self._job(file.with_suffix(""), steps.collect, (recipe, self.layout), (), file),)
        shares, pretrained = shares_encoder(recipe), dict[tuple[Method, int], str]()

        def posterior(seed: int) -> str:
            needs = (*demonstrations, *((pretrained["bc", seed],) if shares else ()))
            where = self.layout.posterior(recipe)
            return self._of_seed(where, seed, steps.fit, (recipe, self.layout, seed), needs, POSTERIOR_FILE)

        def pretrain(method: Method, seed: int, needs: tuple[str, ...]) -> None:
            where = self.layout.pretraining(recipe, method)
            arguments = (recipe, self.layout, method, seed)
            pretrained[method, seed] = self._of_seed(where, seed, steps.pretrain, arguments, needs, POLICY_FILE)

        def others() -> None:
            for method in (m for m in recipe.methods if m != "postbc"):
                for seed in recipe.seeds:
                    pretrain(method, seed, demonstrations)

        if shares:
            others()
        if "postbc" in recipe.methods:
            fitted = {seed: posterior(seed) for seed in recipe.seeds}
        if not shares:
            others()
        if "postbc" in recipe.methods:
            for seed in recipe.seeds:
                pretrain("postbc", seed, (fitted[seed],))
        evaluated = {
            (method, seed): self._of_seed(
                self.layout.evaluation(recipe, method), seed, steps.evaluate, (recipe, self.layout, method, seed), (needed,), SUMMARY
            )
            for (method, seed), needed in pretrained.items()
        }  # fmt: skip
        for finetuner in sorted(recipe.finetuners, key=LONGEST.index):
            for place in recipe.finetune_in or (None,):
                for method in recipe.methods:
                    where = self.layout.finetuning(recipe, finetuner, method, place)
                    for seed in recipe.seeds:
                        needs = evaluated if place is None else pretrained
                        arguments = (recipe, self.layout, finetuner, method, seed, place)
                        self._of_seed(where, seed, steps.finetune, arguments, (needs[method, seed],), RESULTS_FILE)
                    self.recipes.setdefault(where, []).append(title)

    def _of_seed(self, where: Path, seed: int, function: Any, arguments: Any, needs: tuple[str, ...], makes: str) -> str:
        folder = where / f"seed_{seed}"
        return self._job(folder, function, arguments, needs, folder / makes)

    def _job(self, where: Path, function: Any, arguments: Any, needs: tuple[str, ...], makes: Path) -> str:
        """The job's name: its directory's."""
        name = "-".join(where.relative_to(self.layout.output).parts)
        self.jobs.setdefault(name, Job(function, arguments, needs, makes))
        return name
