"""Whole experiments by name: demonstrations → posterior → pretraining by each method → finetuning → report.

The paper's Robomimic tables are recipes, and so are smaller, honest presets that a laptop carries. Every field can be overridden on
the command line (`postbc run lift-laptop --seeds 0 1`). A recipe that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from postbc.demonstrations.training_set import TrainingSetConfig, load_training_sets
from postbc.errors import InputError
from postbc.evaluation import Evaluation
from postbc.experiments.jobs import run_jobs
from postbc.finetuning.best_of_n import BestOfNConfig, finetune_best_of_n
from postbc.finetuning.dsrl import DSRLConfig
from postbc.finetuning.dsrl_training import DSRLTraining, finetune_dsrl
from postbc.finetuning.iql import IQLConfig
from postbc.finetuning.rollouts import TransitionConfig
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.posterior import EnsembleConfig
from postbc.pretraining import Method, PretrainingConfig
from postbc.pretraining_command import PosteriorFit, Pretrain, fit_posterior, fit_seed, pretrain_policy
from postbc.runs import Run

Finetuner = Literal["dsrl", "best-of-n"]
#: Fields that may change between two runs into one directory: the stages that they concern check them against their own records.
REVISABLE = (
    "methods",
    "finetuners",
    "dsrl",
    "dsrl_training",
    "sigma_bc_utd",
    "best_of_n",
    "iql",
    "sigma_bc_expectile",
    "transitions",
)


@dataclass(frozen=True)
class Recipe:
    """One experiment. The same demonstrations, seeds and budgets for every method."""

    output: Path
    """Directory of the experiment."""
    task: Literal["Lift", "Can", "Square"] = "Lift"
    """Robosuite task."""
    demonstrations: Path | None = None
    """Demonstrations (robomimic HDF5); by default scripted operators record some."""
    collect_num: int = 60
    """Scripted demonstrations to record, if no file is given."""
    collect_operators: tuple[str, ...] = ("all",)
    """Who records them (see `postbc demos collect`)."""
    collect_seed: int = 0
    """Seed of that recording."""
    num_trajectories: int | None = 5
    """Demonstrations that a seed is pretrained on."""
    subset_seed: int | None = None
    """One subset for all seeds; by default each seed draws its own."""
    filter_key: str | None = None
    """Robomimic filter to draw them from."""
    statistics: Literal["full", "subset"] = "full"
    """Normalise by the whole file's ranges or by the subset's."""
    allow_version_mismatch: bool = False
    """Use demonstrations of another robosuite version than the installed one (robomimic's v1.5 files, say)."""
    methods: tuple[Method, ...] = ("bc", "sigma-bc", "postbc")
    """Ways to pretrain."""
    finetuners: tuple[Finetuner, ...] = ("best-of-n", "dsrl")
    """Ways to finetune."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Side by side: each is a pretraining and one RL run."""
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    ensemble_epochs: int | None = None
    """Epochs of the ensemble instead of ensemble.steps."""
    policy: DiffusionConfig = field(default_factory=DiffusionConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    pretraining_epochs: int | None = None
    """Epochs of pretraining instead of pretraining.steps."""
    dsrl: DSRLConfig = field(default_factory=DSRLConfig)
    dsrl_training: DSRLTraining = field(default_factory=DSRLTraining)
    sigma_bc_utd: int | None = None
    """dsrl.utd for σ-BC, where it differs (paper: 10 against 20)."""
    best_of_n: BestOfNConfig = field(default_factory=BestOfNConfig)
    iql: IQLConfig = field(default_factory=IQLConfig)
    sigma_bc_expectile: float | None = None
    """iql.expectile for σ-BC, where it differs (paper, Lift: 0.7 against 0.5)."""
    transitions: TransitionConfig = field(default_factory=TransitionConfig)
    episodes: int = 200
    """Evaluation episodes a seed, before and after finetuning."""
    horizon: int | None = None
    """Environment steps of an episode; default the task's."""
    envs_per_member: int = 10
    """Environments a seed, for rollouts and evaluation."""
    jobs: int = 1
    """Stages worked on at the same time, each in a process of its own (2 on 2 cores)."""
    videos: int = 0
    """Videos of successes and of failures of each finetuned policy in the report."""

    def run(self) -> None:
        """Run what has not been run yet, then report."""
        run_recipe(self)


def run_recipe(recipe: Recipe) -> Path:
    """Run `recipe` to its report, going on where a former run was stopped; returns the report's directory.

    Raises:
        InputError: an input cannot be used, or the output directory holds another experiment.
    """
    from postbc.experiments.report_command import Report

    output = recipe.output
    Run(output, recipe, resume=True, volatile=("output", "jobs", "videos"), revisable=REVISABLE)
    data = _data(recipe)
    if recipe.demonstrations is None:
        _collect(recipe)
    if "postbc" in recipe.methods:
        posterior = _posterior(recipe, data)
        Run(posterior.output, posterior, resume=True)
        run_jobs({f"posterior-{seed}": (_fit_seed, (posterior, seed)) for seed in recipe.seeds}, recipe.jobs, output / "logs")
        fit_posterior(posterior)  # the pictures: the ensembles are there
    run_jobs({method: (_pretrain, (recipe, data, method)) for method in recipe.methods}, recipe.jobs, output / "logs")
    pairs = [(finetuner, method) for finetuner in recipe.finetuners for method in recipe.methods]
    run_jobs({f"{f}-{m}": (_finetune, (recipe, f, m)) for f, m in pairs}, recipe.jobs, output / "logs")
    report = output / "report"
    Report((output,), report, title=f"{recipe.task}: {', '.join(recipe.methods)}").run()
    return report


def _data(recipe: Recipe) -> TrainingSetConfig:
    path = recipe.demonstrations or recipe.output / "demonstrations.hdf5"
    return TrainingSetConfig(
        path,
        recipe.num_trajectories,
        recipe.subset_seed,
        recipe.filter_key,
        recipe.policy.chunk,
        statistics=recipe.statistics,
        allow_version_mismatch=recipe.allow_version_mismatch,
    )


def _collect(recipe: Recipe) -> None:
    from postbc.demonstrations.commands import Collect

    path = recipe.output / "demonstrations.hdf5"
    if path.exists():
        return
    if recipe.task == "Square":
        raise InputError(
            "There are no scripted operators for Square.", key="demonstrations", found="none given",
            remedy="give --demonstrations FILE (`postbc demos download` fetches robomimic's)",
        )  # fmt: skip
    Collect(path, recipe.task, recipe.collect_num, recipe.collect_operators, recipe.collect_seed).run()


def _posterior(recipe: Recipe, data: TrainingSetConfig) -> PosteriorFit:
    where = recipe.output / "posterior"
    return PosteriorFit(data, where, recipe.seeds, recipe.ensemble, recipe.ensemble_epochs, resume=True)


def _fit_seed(posterior: PosteriorFit, seed: int) -> None:
    """One seed's posterior."""
    (data,) = load_training_sets(posterior.data, [seed])
    fit_seed(posterior, seed, data)


def _pretrain(recipe: Recipe, data: TrainingSetConfig, method: Method) -> None:
    """Pretrain by one method and evaluate what comes out."""
    where, posterior = recipe.output / "pretraining" / method, recipe.output / "posterior"
    config = replace(recipe.pretraining, method=method)
    pretrain_policy(
        Pretrain(data, where, posterior if method == "postbc" else None, recipe.seeds, config, recipe.policy,
                 recipe.pretraining_epochs, resume=True)
    )  # fmt: skip
    _evaluate(recipe, where, recipe.output / "evaluation" / method, 0)


def _finetune(recipe: Recipe, finetuner: Finetuner, method: Method) -> None:
    """Finetune the policy of one method by one finetuner, starting from the evaluation that it already has."""
    where, directory = recipe.output / "pretraining" / method, recipe.output / finetuner / method
    policy, sigma = DiffusionPolicy.load(where), method == "sigma-bc"
    before = _evaluate(recipe, where, recipe.output / "evaluation" / method, 0)
    common: dict[str, Any] = {
        "eval_episodes": recipe.episodes, "horizon": recipe.horizon, "envs_per_member": recipe.envs_per_member
    }  # fmt: skip
    if finetuner == "dsrl":
        dsrl = replace(recipe.dsrl, utd=recipe.sigma_bc_utd) if sigma and recipe.sigma_bc_utd else recipe.dsrl
        training = replace(recipe.dsrl_training, **common)
        finetune_dsrl(policy, directory, dsrl, training, task=recipe.task, resume=True, source=where, before=before)
    else:
        iql = replace(recipe.iql, expectile=recipe.sigma_bc_expectile) if sigma and recipe.sigma_bc_expectile else recipe.iql
        finetune_best_of_n(
            policy, directory, replace(recipe.best_of_n, **common), iql, recipe.transitions, task=recipe.task, resume=True,
            source=where, before=before,
        )  # fmt: skip
    if recipe.videos:
        _evaluate(
            replace(recipe, episodes=10), directory, recipe.output / "evaluation" / f"{method}-{finetuner}", recipe.videos
        )


def _evaluate(recipe: Recipe, policy: Path, output: Path, videos: int) -> Evaluation:
    """Evaluate a policy or a finetuned agent; without videos where there is no OpenGL: the numbers stand without pictures."""
    from postbc.evaluation_command import Evaluate, run_evaluation

    config = Evaluate(
        policy,
        output,
        recipe.episodes,
        recipe.task,
        recipe.horizon,
        envs_per_member=recipe.envs_per_member,
        videos=videos,
        resume=True,
    )
    if videos:
        try:
            return run_evaluation(config)
        except InputError as error:
            Console(stderr=True).print(f"no videos: {error}", markup=False, style="yellow")
    return run_evaluation(replace(config, videos=0))


# -- the paper's tables (paper.md section 6) -----------------------------------------------------------------------------------
def _robomimic(task: Literal["Lift", "Can", "Square"], finetuner: Finetuner, **values: Any) -> Recipe:
    """The paper's numbers that hold for a task, with those of one experiment on top."""
    wide = task != "Lift"
    values = {"num_trajectories": 5, "alpha": 1.0, "sigma": 0.1, "chunk": 4, "members": 100, **values}
    alpha, sigma, chunk, members = (values.pop(k) for k in ("alpha", "sigma", "chunk", "members"))
    hidden = 1024 if wide else 512
    return Recipe(
        output=Path("runs") / f"{task.lower()}-{finetuner}", task=task, finetuners=(finetuner,),
        policy=DiffusionConfig(
            chunk, hidden, time_dim=32 if wide else 16, condition_hidden=(512, 64) if task == "Square" else (),
            sampler="ddim" if finetuner == "dsrl" else "ddpm", inference_steps=8,
        ),
        ensemble=EnsembleConfig(members, hidden), pretraining=PretrainingConfig(posterior_weight=alpha, sigma=sigma),
        pretraining_epochs=3000, dsrl=DSRLConfig(
            discount=0.999 if task == "Square" else 0.99, noise_critic_steps=10 if wide else 20
        ),
        dsrl_training=DSRLTraining(
            initial_steps=32_000 if task == "Square" else 24_000, budget_env_steps=2_000_000,
            eval_every=64_000 if task == "Square" else 48_000,
        ),
        sigma_bc_utd=10, iql=IQLConfig(expectile=0.7 if wide else 0.5, layer_norm=not wide),
        sigma_bc_expectile=None if wide else 0.7, **values,
    )  # fmt: skip


LAPTOP_ENSEMBLE = EnsembleConfig(20, hidden=256, steps=2000, batch_size=128, learning_rate=3e-4)
LAPTOP_PRETRAINING = PretrainingConfig(posterior_weight=1.0, steps=10_000, learning_rate=3e-4)
LAPTOP_IQL = IQLConfig(steps=15_000, expectile=0.7, discount=0.99)
# discount, temperature, step size, utd and initial steps: swept on BC (results/lift-laptop/README.md), the same for every method
LAPTOP_DSRL = DSRLConfig(
    "sac", hidden=128, layers=2, utd=8, noise_critic_steps=0, lr=6e-4, discount=0.95, first_temperature=0.2
)
LAPTOP_DSRL_TRAINING = DSRLTraining(
    budget_env_steps=48_000, num_envs=8, initial_steps=16_000, eval_every=24_000, curve_episodes=40
)


def _laptop(output: str, **values: Any) -> Recipe:
    """The paper's Lift at a size that two cores carry: smaller networks, K = 20, Best-of-N from 300 rollouts, DSRL-SAC."""
    base = Recipe(
        output=Path("runs") / output,
        collect_operators=("better",),
        ensemble=LAPTOP_ENSEMBLE,
        policy=DiffusionConfig(hidden=256),
        pretraining=LAPTOP_PRETRAINING,
        dsrl=LAPTOP_DSRL,
        dsrl_training=LAPTOP_DSRL_TRAINING,
        best_of_n=BestOfNConfig(episodes=300, samples=32),
        iql=LAPTOP_IQL,
        jobs=2,
    )
    return replace(base, **values)


RECIPES: Mapping[str, Recipe] = {
    # a quarter of an hour on two cores: two seeds, fewer steps, rollouts and episodes than lift-laptop
    "demo": _laptop(
        "demo", seeds=(0, 1), episodes=100, videos=1, ensemble=replace(LAPTOP_ENSEMBLE, steps=1500),
        pretraining=replace(LAPTOP_PRETRAINING, steps=3000), best_of_n=BestOfNConfig(episodes=200),
        iql=replace(LAPTOP_IQL, steps=5000),
        dsrl_training=replace(LAPTOP_DSRL_TRAINING, budget_env_steps=24_000, initial_steps=8000),
    ),
    "lift-laptop": _laptop("lift-laptop"),
    "paper-lift-dsrl": _robomimic("Lift", "dsrl", ensemble_epochs=10_000),
    "paper-can-dsrl": _robomimic("Can", "dsrl", num_trajectories=10, ensemble_epochs=6000, alpha=0.5),
    "paper-square-dsrl": _robomimic("Square", "dsrl", num_trajectories=30, ensemble_epochs=3000, sigma=0.05),
    "paper-lift-best-of-n": _robomimic("Lift", "best-of-n", num_trajectories=20, chunk=1, ensemble_epochs=3000),
    "paper-lift-best-of-n-2000": _robomimic(
        "Lift", "best-of-n", num_trajectories=20, chunk=1, ensemble_epochs=3000, alpha=2.0, members=10,
        best_of_n=BestOfNConfig(episodes=2000),
    ),
    "paper-can-best-of-n": _robomimic(
        "Can", "best-of-n", num_trajectories=300, chunk=1, ensemble_epochs=500, members=10, sigma=0.025
    ),
    "paper-square-best-of-n": _robomimic(
        "Square", "best-of-n", num_trajectories=300, chunk=1, ensemble_epochs=500, members=10, sigma=0.025
    ),
    "paper-square-best-of-n-2000": _robomimic(
        "Square", "best-of-n", num_trajectories=300, chunk=1, ensemble_epochs=500, members=10, sigma=0.025, alpha=2.0,
        best_of_n=BestOfNConfig(episodes=2000),
    ),
}  # fmt: skip

#: What `postbc run` parses: one subcommand a recipe, with the recipe's values as the defaults of every option.
RunRecipe = tyro.extras.subcommand_type_from_defaults(dict(RECIPES), prefix_names=False)
