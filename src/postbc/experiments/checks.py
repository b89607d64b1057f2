"""Whatever can be known of a recipe before its first stage runs."""

from __future__ import annotations

from typing import Any

from postbc.data.belonging import Facts, check_belongs
from postbc.data.download import TASKS as DOWNLOADS
from postbc.data.download import filename_of
from postbc.data.libero_tasks import KITCHEN, find_tasks
from postbc.data.scripted.hands import GEOMETRIES
from postbc.data.training_set import load_training_set
from postbc.environments.registry import Environment, find_environment
from postbc.errors import require
from postbc.evaluation import check_shapes
from postbc.experiments.layout import PIXELS, Layout, shares_encoder
from postbc.experiments.recipe import Recipe
from postbc.experiments.steps import collection, data_of, posterior_of
from postbc.policies.base import policy_class
from postbc.posterior.closed_form import check_closed_form


def check(recipe: Recipe[Any], layout: Layout) -> None:
    """Refuse what cannot work.

    Raises:
        InputError: the environment cannot run here, demonstrations that are missing, cannot be used or are of another task, a policy
            or budget that a finetuner cannot use.
    """
    environment = find_environment(recipe.environment)
    environment.check()
    others = [f for f in recipe.finetuners if f != "best-of-n"]
    offline = environment.robot is None or not (others or recipe.finetune_in)
    require(offline, "On a robot only Best-of-N learns, from recorded rollouts.", key="finetuners", found=", ".join(others),
            expected="best-of-n")  # fmt: skip
    for place in map(find_environment, recipe.finetune_in):
        check_belongs(environment.belonging(), place.belonging(), file=f"finetune_in: {place.name}",
                      remedy="name environments that share the robot and observations of --environment")  # fmt: skip
    for method in recipe.methods:
        own = recipe.of_method(method)
        for finetuner, training in (("residual", own.residual_training), ("dppo", own.dppo_training)):
            if finetuner in recipe.finetuners:
                training.require_learning(recipe.data.chunk)
        require(
            "dppo" not in recipe.finetuners or hasattr(policy_class(own.policy.kind), "chain"),
            "DPPO needs a policy that is sampled by a chain.", key="policy.kind", found=f"{own.policy.kind} ({method})",
            expected="diffusion or flow", remedy="leave DPPO or this method out",
        )  # fmt: skip
        if "dsrl" not in recipe.finetuners:
            continue
        require(
            getattr(own.policy, "sampler", None) != "ddpm", "DSRL needs a policy that is deterministic given its noise.",
            key="policy.sampler", found="ddpm", expected="ddim",
        )  # fmt: skip
        own.training.require_learning(recipe.data.chunk)
    require(
        not shares_encoder(recipe) or "postbc" not in recipe.methods or "bc" in recipe.methods,
        "PostBC from images takes the encoder of the BC policy of the same seed.", key="methods", found=", ".join(recipe.methods),
        remedy="pretrain by bc too, or give --ensemble.encoder own",
    )  # fmt: skip
    require(
        recipe.ensemble.encoder == "features" or recipe.data.image_keys or "postbc" not in recipe.methods,
        "There are no images for encoders.", key="ensemble.encoder", found="own, and no data.image_keys", expected="features",
    )  # fmt: skip
    if "postbc" in recipe.methods:
        posterior_of(recipe, layout, recipe.seeds[0])
        _check_posterior(recipe)
    if recipe.demonstrations is None:
        _check_recorded(recipe)
    if recipe.demonstrations is not None or layout.demonstrations(recipe).exists():
        data = load_training_set(data_of(recipe, layout), recipe.seeds[0])
        _check_facts(data.facts, environment, recipe)
        if environment.robot is not None:
            return
        env = environment.make(1, chunk=1, horizon=1, terminate_on="never")
        try:
            check_shapes(data.dataset.shapes, data.dataset.action_dim, env, recipe.demonstrations)
        finally:
            env.close()
        return
    require(
        _has_operators(environment.name), f"There are no scripted operators for {environment.name}.", key="demonstrations",
        found="none given", remedy="give --demonstrations FILE (`postbc demos download` fetches robomimic's and LIBERO's)",
    )  # fmt: skip
    require(
        (recipe.data.num_trajectories or 1) <= (recipe.collect_num or 0), "There are fewer demonstrations than a seed is trained on.",
        key="collect_num", found=recipe.collect_num, expected=f"at least {recipe.data.num_trajectories}",
    )  # fmt: skip
    collection(recipe, layout)


def _check_facts(found: Facts, environment: Environment, recipe: Recipe[Any]) -> None:
    check_belongs(
        found, environment.belonging(), file=str(recipe.demonstrations), allow_version_mismatch=recipe.data.allow_version_mismatch,
        remedy="give demonstrations of this environment, or --environment",
    )  # fmt: skip


def _check_recorded(recipe: Recipe[Any]) -> None:
    """InputError, with the command that fetches them, for a recipe of recorded demonstrations where nobody asks for scripted ones."""
    task, remedy = recipe.environment.removeprefix("postbc/").lower(), "give --demonstrations FILE"
    if task in DOWNLOADS:
        remedy = (
            f"postbc demos download --task {task} --dataset mh --version v1.4.1, then --demonstrations "
            f"data/{filename_of(task, 'mh', 'v1.4.1')}"
        )
    require(
        recipe.collect_num is not None, "This recipe's numbers are of recorded demonstrations, not of scripted ones.",
        key="demonstrations", found="none given", expected="robomimic's multi-human file" if task in DOWNLOADS else "a file",
        remedy=f"{remedy}; `postbc run … --collect-num {max(60, recipe.data.num_trajectories or 0)}` records scripted ones instead",
    )  # fmt: skip


def _has_operators(name: str) -> bool:
    """Whether scripted operators know all tasks of an environment."""
    if name.startswith("libero/"):
        tasks = find_tasks(PIXELS.sub("", name.removeprefix("libero/")))
        return all(task.name in KITCHEN for task in tasks)
    return PIXELS.sub("", name.removeprefix("postbc/")) in GEOMETRIES


def _check_posterior(recipe: Recipe[Any]) -> None:
    """InputError where the posterior that will be fitted cannot give what PostBC's pretraining asks of it."""
    own, count, kind = recipe.of_method("postbc").pretraining, recipe.data.num_trajectories, recipe.posterior_kind
    members: int | None = recipe.ensemble.ensemble_size
    if kind == "closed-form":
        members = (
            None if count is None else min(count, recipe.closed_form.blocks)
        )  # all of a file: its length is not known here
        if count is not None:
            check_closed_form(count, recipe.ensemble.layers, recipe.closed_form)
    require(
        own.posterior_weight != "auto" or kind == "closed-form" or recipe.ensemble.bootstrap == "trajectory",
        "Only members that leave whole trajectories out can be held against them.", key="ensemble.bootstrap",
        found=f"{recipe.ensemble.bootstrap}, and pretraining.posterior_weight auto", expected="trajectory",
    )  # fmt: skip
    require(members is None or own.coherent < members, "The posterior has not so many directions.", key="pretraining.coherent",
            found=own.coherent, expected=f"less than {members}")  # fmt: skip
