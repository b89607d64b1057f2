"""The graph of a recipe's runs: demonstrations → per seed posterior, pretraining of each method, evaluation, finetunings.

On a robot nothing is evaluated, and finetuned is what has been rolled out there already (`postbc robot rollout`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postbc.environments.registry import find_environment
from postbc.experiments import steps
from postbc.experiments.layout import Layout, shares_encoder
from postbc.experiments.recipe import Finetuner, Recipe
from postbc.jobs import Job
from postbc.policies.base import POLICY_FILE
from postbc.posterior.saved import POSTERIOR_FILE
from postbc.pretraining import Method
from postbc.robot.recorded import is_session
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
        self.rollouts: list[str] = []
        """Commands that play on a robot what is to be learnt from, and has not been played yet."""

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
        robot = find_environment(recipe.environment).robot
        if robot is not None:
            self._from_rollouts(recipe, robot, pretrained)
            return
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

    def _from_rollouts(self, recipe: Recipe[Any], robot: str, pretrained: dict[tuple[Method, int], str]) -> None:
        """Best-of-N from the sessions that are there."""
        for method in recipe.methods if recipe.finetuners else ():
            policies, sessions = self.layout.pretraining(recipe, method), self.layout.rollouts(recipe, method)
            there = [seed for seed in recipe.seeds if is_session(sessions / f"seed_{seed}")]
            for seed in there:
                arguments = (recipe, self.layout, "best-of-n", method, seed)
                where = self.layout.finetuning(recipe, "best-of-n", method, None)
                self._of_seed(where, seed, steps.finetune, arguments, (pretrained[method, seed],), RESULTS_FILE)
            if len(there) < len(recipe.seeds):
                self.rollouts.append(
                    f"postbc robot rollout --policy {policies} --robot {robot} --episodes {recipe.best_of_n.episodes} "
                    f"--output {sessions}"
                )

    def _of_seed(self, where: Path, seed: int, function: Any, arguments: Any, needs: tuple[str, ...], makes: str) -> str:
        folder = where / f"seed_{seed}"
        return self._job(folder, function, arguments, needs, folder / makes)

    def _job(self, where: Path, function: Any, arguments: Any, needs: tuple[str, ...], makes: Path) -> str:
        """The job's name: its directory's."""
        name = "-".join(where.relative_to(self.layout.output).parts)
        self.jobs.setdefault(name, Job(function, arguments, needs, makes))
        return name
