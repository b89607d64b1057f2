"""`postbc evaluate`: a pretrained policy, or a finetuned agent, in the simulator."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv
from rich.console import Console
from rich.table import Table

from postbc.errors import InputError
from postbc.evaluation import EVALUATION_SEED, Actor, Evaluation, PolicyActor, evaluate
from postbc.policies.base import Policy
from postbc.runs import Run, versions, write_json

EPISODES = "episodes.jsonl"


def load_actor(path: Path, inference_steps: int | None = None) -> tuple[Actor, dict[str, Any]]:
    """A policy file or directory, or the directory of a finetuning run -> (actor, what it says about itself).

    Raises:
        InputError: neither of them.
    """
    overrides = {} if inference_steps is None else {"inference_steps": inference_steps}
    finetuner = finetuner_of(path)
    if path.is_file() or (finetuner is None and (path / "policy.safetensors").is_file()):
        from postbc.policies.diffusion import DiffusionPolicy

        policy = DiffusionPolicy.load(path, **overrides)
        if not 1 <= policy.config.inference_steps <= policy.config.denoising_steps:
            raise InputError(
                "The policy cannot take that many inference steps.", key="inference_steps",
                found=policy.config.inference_steps, expected=f"1 to {policy.config.denoising_steps}",
            )  # fmt: skip
        return PolicyActor(policy), policy.about
    if finetuner is None:
        raise InputError(
            "There is no policy here." if path.exists() else "There is no such file or directory.", file=path,
            expected="policy.safetensors of `postbc pretrain`, or the directory of a `postbc finetune` run that has finished",
        )  # fmt: skip
    if overrides:
        raise InputError("Inference steps are fixed by the finetuning run.", key="inference_steps", found=inference_steps)
    if finetuner.startswith("dsrl"):
        from postbc.finetuning.dsrl import DSRLActor

        actor: Any = DSRLActor.load(path)
    else:
        from postbc.finetuning.best_of_n import BestOfNActor

        actor = BestOfNActor.load(path)
    about = getattr(actor, "about", None) or getattr(getattr(actor, "policy", None), "about", {})
    return actor, dict(about)


def finetuner_of(path: Path) -> str | None:
    """The finetuner whose results.json lies in `path` ("dsrl-sac", "dsrl-na", "best-of-n"), or None."""
    try:
        return str(json.loads((path / "results.json").read_text())[0]["finetuner"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def task_name(name: str) -> str:
    """Our name of a task, given ours or robosuite's ("PickPlaceCan" -> "Can")."""
    from postbc.environments import TASKS

    for key, task in TASKS.items():
        if name in (key, task.robosuite_name):
            return key
    raise InputError("There is no such task.", key="task", found=name, expected=", ".join(TASKS))


def check_task(asked: str | None, about: dict[str, Any], file: Path) -> str:
    """The task to evaluate on: `asked`, or the policy's own. InputError if they differ, or if neither is known."""
    trained = about.get("task")
    if asked is None and trained is None:
        raise InputError(
            "The policy does not say what task it was trained on.",
            file=file,
            key="task",
            remedy="give --task, for example Lift",
        )
    if asked is not None and trained is not None and task_name(asked) != task_name(trained):
        raise InputError(
            "The policy was trained on another task.", file=file, key="task", found=task_name(trained), expected=task_name(asked),
            remedy="leave --task out, or give a policy of that task",
        )  # fmt: skip
    return task_name(asked or str(trained))


def check_sizes(actor: Actor | Policy, task: str, file: Path) -> None:
    """InputError if the policy's observations or actions do not have the sizes of `task`'s."""
    from postbc.environments import TASKS

    for what, have, needed in (
        ("observation", actor.observation_dim, TASKS[task].observation_dim), ("action", actor.action_dim, TASKS[task].action_dim)
    ):  # fmt: skip
        if have != needed:
            raise InputError(
                f"The policy's {what} size is not the environment's.", file=file, key=f"{what}_dim", found=have,
                expected=f"{needed} ({task})", remedy="give a policy that was trained on this task",
            )  # fmt: skip


def environment_factory(
    task: str, chunk: int, horizon: int | None = None, num_threads: int | None = None
) -> Callable[[int], VectorEnv]:
    """N -> the vector environment that :func:`postbc.evaluation.evaluate` expects."""

    def make_env(num_envs: int) -> VectorEnv:
        from postbc.environments import make

        return make(
            task, num_envs=num_envs, chunk=chunk, horizon=horizon, reward="sparse", terminate_on="chunk_success",
            num_threads=num_threads, autoreset="disabled",
        )  # fmt: skip

    return make_env


@dataclass(frozen=True)
class Evaluate:
    """Roll out every member of a policy on the same fixed episodes; success by both definitions with Wilson intervals.

    Writes episodes.jsonl (one line an episode), evaluation.json (rates, intervals, versions) and videos/*.mp4.
    """

    policy: Path
    """policy.safetensors or its directory, or the directory of a finetuning run."""
    output: Path
    """Directory of the run."""
    episodes: int = 200
    """Episodes a member (paper: 200 on Robomimic)."""
    task: str | None = None
    """Lift, Can or Square; default: the task that the policy was trained on."""
    horizon: int | None = None
    """Environment steps after which an episode has failed; default: the task's (300, 300, 400)."""
    seed: int = EVALUATION_SEED
    """First episode seed, 10⁹ or more: the same number gives the same initial states to any policy."""
    envs_per_member: int = 10
    """Environments a member, side by side (part of the random stream: other numbers give other noise)."""
    inference_steps: int | None = None
    """DDIM steps instead of the policy's own."""
    videos: int = 3
    """Up to so many videos of successes, and of failures; 0 for none."""
    threads: int | None = None
    """Simulator threads; default: one a processor."""
    resume: bool = False
    """Go on in the output directory: an evaluation that was interrupted starts again, a finished one is only shown."""

    def run(self) -> None:
        """Evaluate, write, print."""
        evaluation = run_evaluation(self)
        Console().print(table(evaluation, self.output))


def run_evaluation(config: Evaluate) -> Evaluation:
    """What `postbc evaluate` does, short of printing; returns the episodes.

    Raises:
        InputError: the policy is not one, is of another task or size, the directory holds another run, or videos
            are asked for and cannot be rendered here. Nothing is written then.
    """
    if config.videos < 0 or config.envs_per_member < 1 or config.episodes < 1:
        raise InputError("episodes and envs_per_member start at 1, videos at 0.", key="episodes, envs_per_member, videos")
    if not EVALUATION_SEED <= config.seed <= 2**32 - config.episodes:
        raise InputError(
            "Evaluation seeds are kept apart from training seeds.", key="seed", found=config.seed,
            expected=f"{EVALUATION_SEED} to {2**32 - config.episodes}",
        )  # fmt: skip
    actor, about = load_actor(config.policy, config.inference_steps)
    task = check_task(config.task, about, config.policy)
    check_sizes(actor, task, config.policy)
    from postbc.environments import TASKS, make

    def scene() -> VectorEnv:
        return make(task, num_envs=1, chunk=1, horizon=10**9, terminate_on="never", autoreset="disabled")

    if config.videos:
        from postbc.videos import check_rendering, record

        check_rendering(scene)
    run = Run(config.output, config, resume=config.resume, volatile=("output", "resume", "threads"))
    path = config.output / EPISODES
    if path.exists():
        return Evaluation.load(path)
    evaluation = evaluate(
        actor, environment_factory(task, actor.chunk, config.horizon, config.threads), episodes=config.episodes,
        seed=config.seed, envs_per_member=config.envs_per_member, record_actions=config.videos > 0,
    )  # fmt: skip
    evaluation.save(path)
    write_json(
        config.output / "evaluation.json",
        {
            "task": task, "policy": str(config.policy), "method": about.get("method"), "seed": config.seed,
            "horizon": config.horizon or TASKS[task].horizon, "chunk": actor.chunk, "members": evaluation.summary(),
            "versions": versions(),
        },
    )  # fmt: skip
    run.close()
    if config.videos:
        record(evaluation, scene, config.output / "videos", config.videos)
    return evaluation


def table(evaluation: Evaluation, output: Path) -> Table:
    """The rates with their intervals, one row a member."""
    grid = Table(title=f"Evaluation: {output}", caption="95 % Wilson intervals over the episodes of one policy")
    for name in ("seed", "episodes", "success (any step)", "success (whole chunk)", "mean steps"):
        grid.add_column(name, justify="right")
    for row in evaluation.summary():
        rates = ["{:.3f}  [{:.2f}, {:.2f}]".format(row[k], *row[f"{k}_interval"]) for k in ("success", "chunk_success")]
        grid.add_row(str(row["seed"]), str(row["episodes"]), *rates, f"{row['mean_steps']:.0f}")
    if evaluation.members > 1:
        rates = [f"{r.mean():.3f}" for r in (evaluation.success_rate, evaluation.chunk_success_rate)]
        grid.add_row("all", str(len(evaluation.episodes)), *rates, "")
    return grid
