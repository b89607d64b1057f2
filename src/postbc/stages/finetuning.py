"""What the stages of finetuning share: their common options, the policy that they begin from, their table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from postbc.devices import Compute
from postbc.errors import require
from postbc.policies.base import load_policy
from postbc.progress import say
from postbc.schemas import Count, Seed, schema
from postbc.stages.evaluate import environment_of
from postbc.stages.seeds import agent_of, require_seed
from postbc.training.results import Result, read_result

#: finetuner -> module of its stage, and its options there. A module has `run_seed(options, seed)`.
FINETUNERS = {
    "dsrl": ("postbc.stages.dsrl", "FinetuneDSRL"),
    "dppo": ("postbc.stages.dppo", "FinetuneDPPO"),
    "residual": ("postbc.stages.residual", "FinetuneResidual"),
    "best-of-n": ("postbc.stages.best_of_n", "FinetuneBestOfN"),
}


@schema
class Finetune:
    """The options of every finetuner."""

    policy: Path
    """policy.safetensors or its directory, or the directory of `postbc pretrain` with its seeds."""
    output: Path
    """Directory of the stage; each seed's run is seed_<seed> in it."""
    environment: str | None = None
    """postbc/Lift, postbc/PushT, gymnasium:SomeId-v1, …; default: the task that the policy was trained on."""
    seeds: tuple[Seed, ...] | None = None
    """Seeds of the policy to finetune; default: every one that is there."""
    inference_steps: Count | None = None
    """Sampling steps of the frozen policy; default its own (paper: 8)."""
    allow_version_mismatch: bool = False
    """Go on although policy or rollouts were made with another version of the simulator."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    jobs: Count = 1
    """Seeds at a time, each a process of its own."""
    resume: bool = False
    """Go on with the runs in the output directory."""

    def __post_init__(self) -> None:
        seeds = self.seeds
        require(
            seeds is None or (seeds and len(set(seeds)) == len(seeds)), "Each seed is given once.", key="seeds",
            found=seeds or "none", expected="at least one seed, or no --seeds for all",
        )  # fmt: skip


def load_base(path: Path, inference_steps: int | None = None, deterministic: bool = False) -> Any:
    """The pretrained policy, with other sampling steps where asked for; `deterministic`: by DDIM whatever it was saved with."""
    overrides: dict[str, Any] = {} if inference_steps is None else {"inference_steps": inference_steps}
    policy = load_policy(path, **overrides)
    if deterministic and getattr(policy.config, "sampler", "ddim") != "ddim":
        say(f"note: {path} samples by {policy.config.sampler.upper()}; DSRL plays it by DDIM, which its noise decides")
        policy = load_policy(path, **overrides, sampler="ddim")
    return policy


def base_of(config: Finetune, seed: int, deterministic: bool = False) -> tuple[Path, Any]:
    """Where a seed's pretrained policy lies, and the policy. InputError if it is another seed's; see :func:`load_base`."""
    path = agent_of(config.policy, seed)
    policy = load_base(path, config.inference_steps, deterministic)
    require_seed(policy.about, seed, path)
    return path, policy


def finetune_seed(
    finetune: Callable[..., Any], config: Finetune, seed: int, *algorithm: Any, deterministic: bool = False
) -> Result:
    """One seed of an online finetuner, resumable: `finetune` of its policy in its environment, with the `algorithm`'s own arguments.

    Raises:
        InputError: see `finetune`, and :func:`base_of`.
    """
    path, policy = base_of(config, seed, deterministic)
    output = config.output / f"seed_{seed}"
    finetune(
        policy, environment_of(config.environment, policy.about, path), output, *algorithm, seed=seed, compute=config.compute,
        resume=config.resume, source=path, allow_version_mismatch=config.allow_version_mismatch,
    )  # fmt: skip
    return read_result(output)


def table(output: Path, seeds: list[int]) -> Table:
    """Success before and after, one row a seed."""
    results = [read_result(output / f"seed_{seed}") for seed in seeds]
    first = results[0]
    shown = Table(title=Text(f"{first.finetuner} from {first.pretraining}, {first.episodes} episodes: {output}"))
    for heading in ("seed", "environment steps", "before", "after"):
        shown.add_column(heading, justify="right")
    for r in results:
        values = ("–" if rate is None else f"{rate:.3f}" for rate in (r.success_before, r.success_after))
        steps = r.curve[-1][0] if r.curve else r.budget_env_steps
        shown.add_row(str(r.seed), f"{steps:,}", *values)
    return shown
