"""A recipe, run: demonstrations → per seed and method posterior, pretraining, evaluation, finetuning → report.

    OUTPUT/config.yaml, demonstrations.hdf5 (scripted), posterior/seed_s, pretraining/METHOD/seed_s, evaluation/METHOD/seed_s,
    rollouts/METHOD/seed_s (of a robot, by `postbc robot rollout`), FINETUNER/METHOD/seed_s (FINETUNER/METHOD/ENVIRONMENT/seed_s of
    `finetune_in`), evaluation/METHOD-FINETUNER/seed_s (videos), logs/, report/

Every stage keeps its own record, so a recipe that was stopped goes on, and methods, finetuners and seeds can be added to a directory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from postbc.data.belonging import Facts, check_belongs
from postbc.data.libero_tasks import IMAGE, KITCHEN, find_tasks
from postbc.data.scripted.hands import GEOMETRIES
from postbc.data.training_set import TrainingSetConfig, load_training_set
from postbc.environments.registry import Environment, find_environment
from postbc.errors import InputError, require
from postbc.evaluation import Evaluation, check_shapes
from postbc.experiments.recipe import FINETUNING, Finetuner, Recipe
from postbc.jobs import JobError, run_jobs
from postbc.policies.base import POLICY_FILE, policy_class
from postbc.posterior.closed_form import check_closed_form
from postbc.posterior.saved import POSTERIOR_FILE
from postbc.pretraining import Method
from postbc.progress import say
from postbc.robot.recorded import is_session
from postbc.runs import Run, digest
from postbc.stages.demos import Collect, Convert
from postbc.stages.evaluate import EPISODES, SUMMARY, Evaluate, evaluate_stage
from postbc.stages.finetuning import load_base
from postbc.stages.posterior import PosteriorFit, fit_posterior
from postbc.stages.pretrain import Pretrain, pretrain_policy
from postbc.training.best_of_n import finetune_best_of_n
from postbc.training.dppo import finetune_dppo
from postbc.training.dsrl import finetune_dsrl
from postbc.training.residual import finetune_residual
from postbc.training.results import RESULTS_FILE

DEMONSTRATIONS, STATES = "demonstrations.hdf5", "demonstrations_states.hdf5"
#: What of LIBERO's names says that cameras are observed.
PIXELS = re.compile(r"-pixels(\d+)?$")
#: Fields that do not belong to the experiment, and those that may change between two runs into one directory: their stages
#: check them against their own records.
VOLATILE = ("output", "jobs", "videos", "about", "source", "size")
REVISABLE = ("methods", "finetuners", "finetune_in", "seeds", *FINETUNING, "per_method", "compute")


class Job(NamedTuple):
    """A stage of one seed and method."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[Path, ...]
    """Files of former stages without which it cannot begin."""
    makes: Path
    """Its last file but for pictures."""


def run_recipe(recipe: Recipe[Any], output: Path, resume: bool = True) -> Path:
    """Run `recipe` to its report, going on where a former run was stopped (unless `resume` is off); the report's directory.

    A job that fails is one line; those that do not need what it should have made go on, and the report shows what is there.

    Raises:
        InputError: an input cannot be used, or `output` holds another experiment (nothing was written then); or a job raised it.
        JobError: a job was killed, or failed by a bug.
    """
    from postbc.experiments.report import build

    check(recipe, output)
    failed: list[Exception] = []
    inputs = {} if recipe.demonstrations is None else {"demonstrations": digest(recipe.demonstrations)}
    with Run(output, recipe, resume=resume, inputs=inputs, volatile=VOLATILE, revisable=REVISABLE) as run:
        collect(recipe, output)
        for phase in phases(recipe, output):
            failed += _run(phase, recipe.jobs, output)
        for command in missing_rollouts(recipe, output):
            say(
                f"A robot has to be played on before its rollouts can be learnt from:\n  {command}\nand then this command again."
            )
        report, title = output / "report", f"{recipe.environment.removeprefix('postbc/')}: {', '.join(recipe.methods)}"
        found = [output / part for part in ("posterior", "pretraining", "evaluation", *recipe.finetuners)]
        if any((output / f).is_dir() for f in ("evaluation", *recipe.finetuners)):
            build([folder for folder in found if folder.is_dir()], report, title)
        if failed:
            kind = InputError if any(isinstance(error, InputError) for error in failed) else JobError
            raise failed[0] if len(failed) == 1 else kind("\n".join(map(str, failed)))
        run.finish()
    return report


def _run(jobs: Iterable[Job], at_once: int, output: Path) -> list[Exception]:
    ready: list[Job] = []
    for job in jobs:
        missing = [path for path in job.needs if not path.exists()]
        if missing:
            say(f"{job.name} is left out: there is no {missing[0].relative_to(output)}", stderr=True)
        else:
            ready.append(job)
    failed: list[Exception] = []
    # those that are done check their records, here: a process of its own would take longer to start
    for some, number in (([j for j in ready if j.makes.exists()], 1), ([j for j in ready if not j.makes.exists()], at_once)):
        try:
            if some:
                run_jobs({job.name: (job.function, job.arguments) for job in some}, number, output / "logs")
        except (InputError, JobError) as error:
            failed.append(error)
    return failed


def rollouts_of(output: Path, method: Method) -> Path:
    """Where the sessions of a method's policies on a robot are."""
    return output / "rollouts" / method


def missing_rollouts(recipe: Recipe[Any], output: Path) -> list[str]:
    """Commands that play on the robot what is to be learnt from; none where the environment is simulated, or all are there."""
    robot = find_environment(recipe.environment).robot
    if robot is None or not recipe.finetuners:
        return []
    return [
        f"postbc robot rollout --policy {output / 'pretraining' / method} --robot {robot} --episodes {recipe.best_of_n.episodes} "
        f"--output {rollouts_of(output, method)}"
        for method in recipe.methods
        if any(not is_session(_seed(output, f"rollouts/{method}", seed)) for seed in recipe.seeds)
    ]


# -- before anything is written ------------------------------------------------------------------------------------------------
def check(recipe: Recipe[Any], output: Path) -> None:
    """Whatever can be known before the first stage.

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
        not _shares_encoder(recipe) or "postbc" not in recipe.methods or "bc" in recipe.methods,
        "PostBC from images takes the encoder of the BC policy of the same seed.", key="methods", found=", ".join(recipe.methods),
        remedy="pretrain by bc too, or give --ensemble.encoder own",
    )  # fmt: skip
    require(
        recipe.ensemble.encoder == "features" or recipe.data.image_keys or "postbc" not in recipe.methods,
        "There are no images for encoders.", key="ensemble.encoder", found="own, and no data.image_keys", expected="features",
    )  # fmt: skip
    if "postbc" in recipe.methods:
        posterior_of(recipe, output, recipe.seeds[0])
        _check_posterior(recipe)
    if recipe.demonstrations is not None or (output / DEMONSTRATIONS).exists():
        data = load_training_set(data_of(recipe, output), recipe.seeds[0])
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
        (recipe.data.num_trajectories or 1) <= recipe.collect_num, "There are fewer demonstrations than a seed is trained on.",
        key="collect_num", found=recipe.collect_num, expected=f"at least {recipe.data.num_trajectories}",
    )  # fmt: skip
    collection(recipe, output)


def _check_facts(found: Facts, environment: Environment, recipe: Recipe[Any]) -> None:
    check_belongs(
        found, environment.belonging(), file=str(recipe.demonstrations), allow_version_mismatch=recipe.data.allow_version_mismatch,
        remedy="give demonstrations of this environment, or --environment",
    )  # fmt: skip


def _has_operators(name: str) -> bool:
    """Whether scripted operators know all tasks of an environment."""
    if name.startswith("libero/"):
        tasks = find_tasks(PIXELS.sub("", name.removeprefix("libero/")))
        return all(task.name in KITCHEN for task in tasks)
    return PIXELS.sub("", name.removeprefix("postbc/")) in GEOMETRIES


# -- the stages ----------------------------------------------------------------------------------------------------------------
def data_of(recipe: Recipe[Any], output: Path) -> TrainingSetConfig:
    """The training sets of the recipe."""
    values = {f.name: getattr(recipe.data, f.name) for f in dataclasses.fields(recipe.data)}  # type: ignore[arg-type]
    return TrainingSetConfig(**{**values, "demonstrations": recipe.demonstrations or output / DEMONSTRATIONS})


def collection(recipe: Recipe[Any], output: Path) -> Collect:
    """The recording of scripted operators. InputError for operators that do not exist."""
    from postbc.data.scripted.operators import find_operators

    find_operators(recipe.collect_operators)
    task, drawn = PIXELS.sub("", recipe.environment.removeprefix("postbc/")), PIXELS.search(recipe.environment)
    seen: dict[str, Any] = {}
    if drawn and not task.startswith("libero/"):  # cheap to draw: while they are recorded
        seen = {"images": True, "image_size": int(drawn[1]) if drawn[1] else None}
    return Collect(
        output / (STATES if drawn and not seen else DEMONSTRATIONS), task, num=recipe.collect_num,
        operators=recipe.collect_operators, seed=recipe.collect_seed, **seen,
    )  # fmt: skip


def collect(recipe: Recipe[Any], output: Path) -> None:
    """Record demonstrations, where none are given or there; those for cameras are recorded as states, and drawn."""
    if recipe.demonstrations is not None or (output / DEMONSTRATIONS).exists():
        return
    recording, drawn = collection(recipe, output), PIXELS.search(recipe.environment)
    if not recording.output.exists():
        recording.run()
    if drawn and not recording.images:
        Convert(recording.output, output / DEMONSTRATIONS, image_size=int(drawn[1] or IMAGE), jobs=recipe.jobs).run()


def phases(recipe: Recipe[Any], output: Path) -> list[list[Job]]:
    """Jobs by phase: none needs what one of the same phase makes. A posterior that shares BC's encoder waits for it."""
    shares, real = _shares_encoder(recipe), find_environment(recipe.environment).robot is not None

    def posterior_job(seed: int) -> Job:
        needs = (_seed(output, "pretraining/bc", seed) / POLICY_FILE,) if shares else ()
        return Job(
            f"posterior-seed_{seed}", fit, (recipe, output, seed), needs, _seed(output, "posterior", seed) / POSTERIOR_FILE
        )

    def pretrain_job(method: Method, seed: int) -> Job:
        needs = (_seed(output, "posterior", seed) / POSTERIOR_FILE,) if method == "postbc" else ()
        evaluated, policy = _seed(output, f"evaluation/{method}", seed) / SUMMARY, _seed(output, f"pretraining/{method}", seed)
        makes = policy / POLICY_FILE if real else evaluated
        return Job(f"{method}-seed_{seed}", pretrain, (recipe, output, method, seed), needs, makes)

    def finetune_job(finetuner: Finetuner, method: Method, seed: int, place: str | None) -> Job:
        needs = (
            _seed(output, f"pretraining/{method}", seed) / POLICY_FILE,
            _seed(output, f"rollouts/{method}", seed) / "episodes"
            if real
            else _seed(output, f"evaluation/{method}", seed) / SUMMARY,
        )
        where = _where(finetuner, method, place)
        makes = _seed(output, where, seed) / RESULTS_FILE
        return Job(
            f"{where.replace('/', '-')}-seed_{seed}", finetune, (recipe, output, finetuner, method, seed, place), needs, makes
        )

    postbc = [m for m in recipe.methods if m == "postbc"]
    posteriors = [posterior_job(s) for _ in postbc for s in recipe.seeds]
    first = [pretrain_job(m, s) for m in recipe.methods if m != "postbc" for s in recipe.seeds]
    second = [pretrain_job(m, s) for m in postbc for s in recipe.seeds]
    finetuners = sorted(recipe.finetuners, key=["dppo", "dsrl", "residual", "best-of-n"].index)  # the longest first
    places = recipe.finetune_in or (None,)
    last = [finetune_job(f, m, s, place) for f in finetuners for place in places for m in recipe.methods for s in recipe.seeds]
    return [first, posteriors, second, last] if shares else [posteriors, first + second, last]


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


def _shares_encoder(recipe: Recipe[Any]) -> bool:
    """Whether the posterior looks at images through the encoder of the BC policy."""
    return bool(recipe.data.image_keys) and recipe.ensemble.encoder == "features"


def _seed(output: Path, stage: str, seed: int) -> Path:
    return output / stage / f"seed_{seed}"


def _where(finetuner: Finetuner, method: Method, place: str | None) -> str:
    """Directory of a finetuning, in an environment of its own where `place` names one."""
    return f"{finetuner}/{method}" + ("" if place is None else f"/{place.replace('/', '_')}")


def posterior_of(recipe: Recipe[Any], output: Path, seed: int) -> PosteriorFit:
    """The fit of one seed's posterior. InputError for a combination that has no meaning."""
    encoder = output / "pretraining/bc" if _shares_encoder(recipe) else None
    compute = replace(recipe.compute, precision=recipe.ensemble_precision)
    return PosteriorFit(
        data_of(recipe, output), output / "posterior", encoder, (seed,), recipe.posterior_kind, recipe.ensemble, recipe.closed_form,
        recipe.ensemble_epochs, compute, resume=True,
    )  # fmt: skip


def fit(recipe: Recipe[Any], output: Path, seed: int) -> None:
    """One seed's posterior."""
    fit_posterior(posterior_of(recipe, output, seed), seed)


def pretrain(recipe: Recipe[Any], output: Path, method: Method, seed: int) -> None:
    """Pretrain one seed by one method, and evaluate what comes out."""
    own, where = recipe.of_method(method), output / "pretraining" / method
    posterior = output / "posterior" if method == "postbc" else None
    config = Pretrain(
        data_of(own, output), where, own.policy, posterior, (seed,), own.pretraining, own.value_dice,
        None if method == "value-dice" else own.pretraining_epochs, own.compute, resume=True,
    )  # fmt: skip
    pretrain_policy(config, seed)
    if find_environment(recipe.environment).robot is not None:
        return
    evaluate_stage(_evaluation(own, where, output / "evaluation" / method, seed), seed)


def finetune(
    recipe: Recipe[Any], output: Path, finetuner: Finetuner, method: Method, seed: int, place: str | None = None
) -> None:
    """Finetune the policy of one seed and method: from the evaluation that it already has, or in a `place` of `finetune_in`."""
    own, policies, where = recipe.of_method(method), output / "pretraining" / method, output / _where(finetuner, method, place)
    own = own if place is None else replace(own, environment=place, finetune_in=())
    policy = load_base(_seed(output, f"pretraining/{method}", seed), deterministic=finetuner == "dsrl")
    run = where / f"seed_{seed}"
    real = find_environment(own.environment).robot is not None
    before = Evaluation.load(_seed(output, f"evaluation/{method}", seed) / EPISODES) if place is None and not real else None
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
        demonstrations = data_of(own, output).demonstrations if own.residual_demonstrations else None
        training = replace(own.residual_training, **online)
        finetune_residual(policy, own.environment, run, own.residual, training, demonstrations, **common)
    else:
        config = replace(own.best_of_n, **evaluated, num_envs=own.num_envs)
        if real:
            config, common["rollouts"] = replace(config, eval_episodes=0), _seed(output, f"rollouts/{method}", seed)
        finetune_best_of_n(policy, None if real else own.environment, run, config, own.iql, own.transitions, **common)
    if recipe.videos and not real:
        shown = output / "evaluation" / f"{method}-{finetuner}" / where.relative_to(output / finetuner / method)
        films = replace(_evaluation(own, where, shown, seed), videos=recipe.videos, episodes=10)
        try:
            evaluate_stage(films, seed)
        except InputError as error:  # no OpenGL here: the numbers stand without pictures
            say(f"no videos of {finetuner} from {method}, seed {seed}: {error}", stderr=True)


def _evaluation(recipe: Recipe[Any], policy: Path, output: Path, seed: int) -> Evaluate:
    return Evaluate(
        policy, output, recipe.environment, (seed,), recipe.episodes, recipe.horizon, num_envs=recipe.num_envs, videos=0,
        allow_version_mismatch=recipe.data.allow_version_mismatch, compute=recipe.compute, resume=True,
    )  # fmt: skip
