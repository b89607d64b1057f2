"""The jobs of a recipe: record demonstrations, fit a posterior, pretrain and evaluate a policy, finetune it; each of one seed."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

from postbc.data.libero_tasks import IMAGE
from postbc.data.training_set import TrainingSetConfig
from postbc.environments.registry import find_environment
from postbc.errors import InputError
from postbc.evaluation import Evaluation
from postbc.experiments.layout import PIXELS, Layout, shares_encoder
from postbc.experiments.recipe import Finetuner, Recipe
from postbc.pretraining import Method
from postbc.progress import say
from postbc.stages.demos import Collect, Convert
from postbc.stages.evaluate import EPISODES, Evaluate, evaluate_stage
from postbc.stages.finetuning import load_base
from postbc.stages.posterior import PosteriorFit, fit_posterior
from postbc.stages.pretrain import Pretrain, pretrain_policy
from postbc.training.best_of_n import finetune_best_of_n
from postbc.training.dppo import finetune_dppo
from postbc.training.dsrl import finetune_dsrl
from postbc.training.residual import finetune_residual


def data_of(recipe: Recipe[Any], layout: Layout) -> TrainingSetConfig:
    """The training sets of the recipe."""
    values = {f.name: getattr(recipe.data, f.name) for f in dataclasses.fields(recipe.data)}  # type: ignore[arg-type]
    return TrainingSetConfig(**{**values, "demonstrations": layout.demonstrations(recipe)})


def collection(recipe: Recipe[Any], layout: Layout) -> Collect:
    """The recording of scripted operators. InputError for operators that do not exist."""
    from postbc.data.scripted.operators import find_operators

    find_operators(recipe.collect_operators)
    task, drawn = PIXELS.sub("", recipe.environment.removeprefix("postbc/")), PIXELS.search(recipe.environment)
    seen: dict[str, Any] = {}
    if drawn and not task.startswith("libero/"):  # cheap to draw: while they are recorded
        seen = {"images": True, "image_size": int(drawn[1]) if drawn[1] else None}
    output = layout.states(recipe) if drawn and not seen else layout.demonstrations(recipe)
    assert recipe.collect_num is not None  # a recipe that wants a file is refused first
    return Collect(output, task, num=recipe.collect_num, operators=recipe.collect_operators, seed=recipe.collect_seed, **seen)


def collect(recipe: Recipe[Any], layout: Layout) -> None:
    """Record demonstrations, where none are given or there; those for cameras are recorded as states, and drawn."""
    if recipe.demonstrations is not None or layout.demonstrations(recipe).exists():
        return
    recording, drawn = collection(recipe, layout), PIXELS.search(recipe.environment)
    if not recording.output.exists():
        recording.run()
    if drawn and not recording.images:
        Convert(recording.output, layout.demonstrations(recipe), image_size=int(drawn[1] or IMAGE), jobs=recipe.jobs).run()


def posterior_of(recipe: Recipe[Any], layout: Layout, seed: int) -> PosteriorFit:
    """The fit of one seed's posterior. InputError for a combination that has no meaning."""
    encoder = layout.pretraining(recipe, "bc") if shares_encoder(recipe) else None
    compute = replace(recipe.compute, precision=recipe.ensemble_precision)
    return PosteriorFit(
        data_of(recipe, layout), layout.posterior(recipe), encoder, (seed,), recipe.posterior_kind, recipe.ensemble, recipe.closed_form,
        recipe.ensemble_epochs, compute, resume=True,
    )  # fmt: skip


def fit(recipe: Recipe[Any], layout: Layout, seed: int) -> None:
    """One seed's posterior."""
    fit_posterior(posterior_of(recipe, layout, seed), seed)


def pretrain(recipe: Recipe[Any], layout: Layout, method: Method, seed: int) -> None:
    """Pretrain one seed by one method."""
    own, where = layout.own(recipe, method), layout.pretraining(recipe, method)
    posterior = layout.posterior(recipe) if method == "postbc" else None
    config = Pretrain(
        data_of(own, layout), where, own.policy, posterior, (seed,), own.pretraining, own.value_dice,
        None if method == "value-dice" else own.pretraining_epochs, own.compute, resume=True,
    )  # fmt: skip
    pretrain_policy(config, seed)


def evaluate(recipe: Recipe[Any], layout: Layout, method: Method, seed: int) -> None:
    """Evaluate what one seed's pretraining gave."""
    own, policies = layout.own(recipe, method), layout.pretraining(recipe, method)
    evaluate_stage(_evaluation(own, policies, layout.evaluation(recipe, method), seed), seed)


def finetune(
    recipe: Recipe[Any], layout: Layout, finetuner: Finetuner, method: Method, seed: int, place: str | None = None
) -> None:
    """Finetune the policy of one seed and method: from the evaluation that it already has, in a `place` of `finetune_in`, or from its
    rollouts on a robot."""
    own, policies = layout.own(recipe, method), layout.pretraining(recipe, method)
    where = layout.finetuning(recipe, finetuner, method, place)
    own = own if place is None else replace(own, environment=place, finetune_in=())
    policy = load_base(policies / f"seed_{seed}", deterministic=finetuner == "dsrl")
    run = where / f"seed_{seed}"
    real = find_environment(own.environment).robot is not None
    evaluated_before = place is None and not real
    before = Evaluation.load(layout.evaluation(recipe, method) / f"seed_{seed}" / EPISODES) if evaluated_before else None
    common: dict[str, Any] = {
        "seed": seed, "compute": own.compute, "resume": True, "before": before, "source": policies / f"seed_{seed}",
        "allow_version_mismatch": own.data.allow_version_mismatch,
    }  # fmt: skip
    evaluated: dict[str, Any] = {"eval_episodes": own.episodes, "horizon": own.horizon}
    online = {**evaluated, "eval_envs": own.num_envs}
    if finetuner == "dsrl":
        finetune_dsrl(policy, own.environment, run, own.dsrl, replace(own.training, **online), **common)
    elif finetuner == "dppo":
        finetune_dppo(policy, own.environment, run, own.dppo, replace(own.dppo_training, **online), **common)
    elif finetuner == "residual":
        demonstrations = data_of(own, layout).demonstrations if own.residual_demonstrations else None
        training = replace(own.residual_training, **online)
        finetune_residual(policy, own.environment, run, own.residual, training, demonstrations, **common)
    else:
        config = replace(own.best_of_n, **evaluated, num_envs=own.num_envs)
        if real:
            config, common["rollouts"] = replace(config, eval_episodes=0), layout.rollouts(recipe, method) / f"seed_{seed}"
        finetune_best_of_n(policy, None if real else own.environment, run, config, own.iql, own.transitions, **common)
    if recipe.videos and not real:
        films = replace(_evaluation(own, where, layout.shown(where), seed), videos=recipe.videos, episodes=10)
        try:
            evaluate_stage(films, seed)
        except InputError as error:  # no OpenGL here: the numbers stand without pictures
            say(f"no videos of {finetuner} from {method}, seed {seed}: {error}", stderr=True)


def _evaluation(recipe: Recipe[Any], policy: Path, output: Path, seed: int) -> Evaluate:
    return Evaluate(
        policy, output, recipe.environment, (seed,), recipe.episodes, recipe.horizon, num_envs=recipe.num_envs, videos=0,
        allow_version_mismatch=recipe.data.allow_version_mismatch, compute=recipe.compute, resume=True,
    )  # fmt: skip
