"""Where the runs of recipes lie: one recipe's by name; those of several in one directory, told apart by what decides them.

    one recipe                              several recipes
    demonstrations.hdf5                     demonstrations/TASK-1a2b3c4d.hdf5
    posterior/seed_s                        posterior/1a2b3c4d/seed_s
    pretraining/METHOD/seed_s               pretraining/METHOD-1a2b3c4d/seed_s
    evaluation/METHOD/seed_s                evaluation/METHOD-1a2b3c4d/seed_s
    rollouts/METHOD/seed_s                  rollouts/METHOD-1a2b3c4d/seed_s      (of a robot, by `postbc robot rollout`)
    FINETUNER/METHOD/seed_s                 FINETUNER/METHOD-1a2b3c4d/seed_s
    FINETUNER/METHOD/ENVIRONMENT/seed_s     FINETUNER/METHOD-1a2b3c4d/ENVIRONMENT/seed_s

The tag is a digest of all options of the run and of the runs that it builds on: what two recipes have in common is made once, and a
recipe that has changed has other runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from postbc.data.libero_tasks import IMAGE
from postbc.experiments.recipe import Finetuner, Recipe
from postbc.files import digest
from postbc.pretraining import Method, PretrainingConfig
from postbc.schemas import plain

DEMONSTRATIONS, STATES = "demonstrations.hdf5", "demonstrations_states.hdf5"
#: What of LIBERO's names says that cameras are observed.
PIXELS = re.compile(r"-pixels(\d+)?$")
#: What decides a finetuner's run, beside policy and evaluation.
OPTIONS: dict[Finetuner, tuple[str, ...]] = {
    "dsrl": ("dsrl", "training"),
    "dppo": ("dppo", "dppo_training"),
    "residual": ("residual", "residual_training", "residual_demonstrations"),
    "best-of-n": ("best_of_n", "iql", "transitions"),
}


@dataclass(frozen=True)
class Layout:
    """Directories of the runs, without their seed_s."""

    output: Path
    tagged: bool = False
    """Whether runs of several recipes lie here."""

    def demonstrations(self, recipe: Recipe[Any]) -> Path:
        """The file: the recipe's, or the one that scripted operators record."""
        if recipe.demonstrations is not None:
            return recipe.demonstrations
        if not self.tagged:
            return self.output / DEMONSTRATIONS
        task = re.sub("[^0-9A-Za-z]+", "-", recipe.environment.removeprefix("postbc/"))
        return self.output / "demonstrations" / f"{task}-{_tag(_recorded(recipe))}.hdf5"

    def states(self, recipe: Recipe[Any]) -> Path:
        """Of demonstrations that are drawn: the states that were recorded."""
        made = self.demonstrations(recipe)
        return made.with_name(STATES if not self.tagged else f"{made.stem}_states.hdf5")

    def own(self, recipe: Recipe[Any], method: Method) -> Recipe[Any]:
        """The recipe as it is for a method. Where recipes share runs: what that method does not heed is at its default."""
        own = recipe.of_method(method)
        if not self.tagged or method == "value-dice":
            return own
        kept = {"bc": (), "sigma-bc": ("sigma",), "postbc": ("posterior_weight", "diagonal", "coherent")}[method]
        heedless = [name for name in ("sigma", "posterior_weight", "diagonal", "coherent") if name not in kept]
        default = PretrainingConfig(method=method)
        own = replace(own, pretraining=replace(own.pretraining, **{name: getattr(default, name) for name in heedless}))
        return replace(own, value_dice=type(own.value_dice)())

    def posterior(self, recipe: Recipe[Any]) -> Path:
        return self._of("posterior", recipe, None)

    def pretraining(self, recipe: Recipe[Any], method: Method) -> Path:
        return self._of("pretraining", recipe, method)

    def evaluation(self, recipe: Recipe[Any], method: Method) -> Path:
        return self._of("evaluation", recipe, method)

    def rollouts(self, recipe: Recipe[Any], method: Method) -> Path:
        """Where the sessions of a method's policies on a robot are."""
        return self._of("rollouts", recipe, method)

    def finetuning(self, recipe: Recipe[Any], finetuner: Finetuner, method: Method, place: str | None) -> Path:
        """Directory of a finetuning, in an environment of its own where `place` names one."""
        made = self._of(finetuner, recipe, method)
        return made if place is None else made / place.replace("/", "_")

    def shown(self, finetuned: Path) -> Path:
        """Where a finetuned agent's videos are."""
        finetuner, method, *place = finetuned.relative_to(self.output).parts
        return self.output / "evaluation" / f"{method}-{finetuner}" / Path(*place)

    def _of(self, stage: str, recipe: Recipe[Any], method: Method | None) -> Path:
        if not self.tagged:
            return self.output / stage / (method or "")
        tag = _tag(_decides(stage, recipe, method))
        return self.output / stage / (f"{method}-{tag}" if method else tag)


def shares_encoder(recipe: Recipe[Any]) -> bool:
    """Whether the posterior looks at images through the encoder of the BC policy."""
    return bool(recipe.data.image_keys) and recipe.ensemble.encoder == "features"


def _tag(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _recorded(recipe: Recipe[Any]) -> Any:
    """What decides the demonstrations."""
    if recipe.demonstrations is not None:
        status = recipe.demonstrations.stat() if recipe.demonstrations.exists() else None
        return _digest(recipe.demonstrations, *(() if status is None else (status.st_mtime_ns, status.st_size)))
    drawn = PIXELS.search(recipe.environment)
    size = int(drawn[1] or IMAGE) if drawn else None
    return [PIXELS.sub("", recipe.environment), size, recipe.collect_num, list(recipe.collect_operators), recipe.collect_seed]


@functools.lru_cache(maxsize=64)
def _digest(path: Path, *_: int) -> str:
    return digest(path)


def _decides(stage: str, recipe: Recipe[Any], method: Method | None) -> Any:
    """Everything on which the runs of a stage depend, the seed left out."""
    names: tuple[str, ...]
    if stage == "posterior":
        names = ("posterior_kind", "ensemble", "closed_form", "ensemble_epochs", "ensemble_precision", "compute")
        encoder = _decides("pretraining", recipe, "bc") if shares_encoder(recipe) else None
        return [_recorded(recipe), _data(recipe), *(plain(getattr(recipe, n)) for n in names), encoder]
    assert method is not None
    own = Layout(Path(), tagged=True).own(recipe, method)
    if stage == "pretraining":
        names = ("policy", "pretraining", "value_dice", "pretraining_epochs", "compute")
        posterior = _decides("posterior", recipe, None) if method == "postbc" else None
        return [_recorded(recipe), _data(own), *(plain(getattr(own, n)) for n in names), posterior]
    if stage == "rollouts":
        return [_decides("pretraining", recipe, method), own.environment]
    played = [
        own.environment,
        list(recipe.finetune_in),
        own.episodes,
        own.horizon,
        own.num_envs,
        own.data.allow_version_mismatch,
    ]
    if stage == "evaluation":
        return [_decides("pretraining", recipe, method), played[0], *played[2:]]
    names = OPTIONS[stage]  # type: ignore[index]
    return [_decides("pretraining", recipe, method), played, own.videos, *(plain(getattr(own, n)) for n in names)]


def _data(recipe: Recipe[Any]) -> Any:
    return plain(replace(recipe.data, demonstrations=Path()))
