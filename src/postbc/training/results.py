"""What the finetuners share around the algorithm: does the policy belong here, and results.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from postbc.agents.base import PolicyAgent, about_of
from postbc.environments.chunk import Termination
from postbc.environments.registry import Environment
from postbc.environments.stacked import make_stacked
from postbc.errors import NotFiniteError, require
from postbc.evaluation import Evaluation, TaskRate, check_plays
from postbc.files import write_json
from postbc.policies.base import Policy
from postbc.progress import note
from postbc.runs import Run
from postbc.schemas import Count, CountOrZero, NonNegative, Seed, Share, later, plain, read_json, schema

RESULTS_FILE = "results.json"
EPISODES_FILE = "episodes_{}.jsonl"
"""Beside it, the evaluation episodes "before" and "after"."""


@schema
class Result:
    """results.json: what finetuning one seed gave."""

    task: str
    """Name of the environment."""
    finetuner: str
    """dsrl-na, dsrl-sac, dppo, residual, best-of-n, or one of your own."""
    pretraining: str | None
    """bc, sigma-bc or postbc, or one of your own; None: the policy does not say."""
    seed: Seed
    budget_env_steps: CountOrZero
    """Environment steps that were asked for (online), or that the rollouts took (Best-of-N)."""
    episodes: CountOrZero
    """Evaluation episodes, before and after."""
    success_before: Share | None
    """Of the pretrained policy: any environment step was successful. None: nothing was evaluated."""
    success_after: Share | None
    chunk_success_before: Share | None
    """By the stricter definition: every step of some chunk was."""
    chunk_success_after: Share | None
    curve: tuple[tuple[CountOrZero, Share], ...]
    """(environment steps executed, success) from step 0 on."""
    wall_clock_s: NonNegative
    """Seconds of all attempts together."""
    stopped: bool = False
    """Whether the run ended before its budget, at its target (`stop_at`)."""
    gradient_steps: CountOrZero | None = None
    """Steps of the optimisers, all networks of a step counted once."""
    best_env_steps: CountOrZero | None = None
    """When the milestone of highest success was evaluated (folder `best`). None: nothing was learnt online."""
    success_best: Share | None = None
    """Of that agent, on episodes that did not choose it."""
    policy: str | None = None
    """Kind of the policy: diffusion, flow, …; None: not known."""
    data: str | None = None
    """Name of the demonstrations' file."""
    demonstrations: CountOrZero | None = None
    posterior_weight: NonNegative | None = None
    variant: str | None = later(None)
    """How PostBC was not the paper's: closed form, coherent 4, auto."""
    sigma: NonNegative | None = None
    rollout_episodes: Count | None = None
    """Best-of-N: episodes that the critic was learnt from."""
    rollout_success: Share | None = None
    tasks_before: tuple[TaskRate, ...] = later(())
    """Success by task, where the environment has several."""
    tasks_after: tuple[TaskRate, ...] = later(())
    horizon: Count | None = later(None)
    """Environment steps after which an evaluation episode has failed; None: written before this was, or nothing was evaluated."""
    command: str | None = None
    commit: str | None = None
    format: Literal[2] = 2


def write_result(
    run: Run, policy: Policy, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, **fields: Any
) -> Result:
    """Write results.json; `before` and `after` are :func:`rates`, `fields` the further fields."""
    about, (first, last) = about_of(policy), ({} if r is None else r for r in (before, after))
    result = Result(
        pretraining=about.method, policy=getattr(getattr(policy, "config", None), "kind", None), data=about.data,
        demonstrations=about.demonstrations, posterior_weight=about.posterior_weight, sigma=about.sigma, variant=about.variant,
        success_before=first.get("success"), success_after=last.get("success"), chunk_success_before=first.get("chunk_success"),
        chunk_success_after=last.get("chunk_success"), tasks_before=first.get("tasks", ()), tasks_after=last.get("tasks", ()),
        wall_clock_s=round(run.elapsed, 1), command=run.versions.get("command"), commit=run.versions.get("commit"), **fields,
    )  # fmt: skip
    write_json(run.directory / RESULTS_FILE, plain(result))
    return result


def read_result(directory: str | Path) -> Result:
    """The result of a finished run. InputError if it has not finished, or the file is not one."""
    path = Path(directory) / RESULTS_FILE
    require(
        path.is_file(), "There are no results here.", file=path, remedy="let the run finish: the same command with --resume"
    )
    return read_json(path, Result)


def rates(evaluation: Evaluation) -> dict[str, Any]:
    """Both success rates, and the first by task."""
    return {"success": evaluation.success_rate, "chunk_success": evaluation.chunk_success_rate, "tasks": evaluation.tasks}


# -- does the policy belong here? ------------------------------------------------------------------------------------------------
def check_policy(
    policy: Policy, environment: Environment, horizon: int, file: str | Path | None = None, allow_version_mismatch: bool = False
) -> None:
    """InputError where `policy` cannot play in `environment`: another task, robot or version, or other sizes. Unknowns are said."""
    note(check_plays(PolicyAgent(policy), about_of(policy), environment, horizon, file, allow_version_mismatch))


def make_env(environment: Environment, policy: Policy, num_envs: int, horizon: int, terminate_on: Termination = "never") -> Any:
    """Environments whose chunks and observations are the policy's."""
    return make_stacked(
        environment.make, num_envs, shapes=policy.shapes, observation_steps=policy.observation_steps, chunk=policy.chunk,
        horizon=horizon, terminate_on=terminate_on,
    )  # fmt: skip


def to_device(policy: Policy, device: torch.device) -> Policy:
    """The policy on `device`, frozen, where it is a module."""
    return policy.to(device).eval().requires_grad_(False) if isinstance(policy, nn.Module) else policy  # type: ignore[return-value]


def require_finite_actions(raw: Any, step: int) -> None:
    """NotFiniteError if the agent gives NaN or infinite actions: it is not played on."""
    if not bool(torch.as_tensor(raw).isfinite().all()):
        raise NotFiniteError(
            "The agent's actions are not finite: its networks have diverged, or the policy has.", key="actions",
            found=f"NaN or infinity at environment step {step}", remedy="lower the learning rate (lr)",
        )  # fmt: skip
