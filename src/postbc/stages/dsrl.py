"""`postbc finetune dsrl`: RL over the latent noise of each seed's pretrained policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from postbc.agents.dsrl import DSRLConfig
from postbc.devices import Compute
from postbc.errors import require
from postbc.policies.base import load_policy
from postbc.schemas import Count, Seed, schema
from postbc.stages.evaluate import environment_of
from postbc.stages.seeds import agent_of
from postbc.training.dsrl import finetune_dsrl
from postbc.training.online import OnlineConfig
from postbc.training.results import Result, read_result


@schema
class Dsrl:
    """Finetune a pretrained policy by DSRL: SAC over its latent noise, the policy itself frozen.

    Writes, in seed_<seed>/ of the output directory, results.json, agent.safetensors, base_policy.safetensors and metrics.csv.
    """

    policy: Path
    """policy.safetensors or its directory, or the directory of `postbc pretrain` with its seeds."""
    output: Path
    """Directory of the stage; each seed's run is seed_<seed> in it."""
    environment: str | None = None
    """postbc/Lift, postbc/PushT, gymnasium:SomeId-v1, …; default: the task that the policy was trained on."""
    seeds: tuple[Seed, ...] | None = None
    """Seeds of the policy to finetune; default: every one that is there."""
    dsrl: DSRLConfig = DSRLConfig()
    training: OnlineConfig = OnlineConfig()
    inference_steps: Count | None = None
    """Sampling steps of the frozen policy; default its own (paper: 8)."""
    allow_version_mismatch: bool = False
    """Go on although the policy's data were made with another version of the simulator."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    jobs: Count = 1
    """Seeds at a time, each a process of its own."""
    resume: bool = False
    """Go on with the runs in the output directory."""

    def __post_init__(self) -> None:
        check_seeds(self.seeds)


def run_seed(config: Dsrl, seed: int) -> Result:
    """DSRL for one seed of the policy, resumable.

    Raises:
        InputError: see :func:`postbc.training.dsrl.finetune_dsrl`.
    """
    path = agent_of(config.policy, seed)
    policy = load_base(path, config.inference_steps, deterministic=True)
    finetune_dsrl(
        policy, environment_of(config.environment, policy.about, path), config.output / f"seed_{seed}", config.dsrl, config.training,
        seed=seed, compute=config.compute, resume=config.resume, source=path, allow_version_mismatch=config.allow_version_mismatch,
    )  # fmt: skip
    return read_result(config.output / f"seed_{seed}")


# -- shared with Best-of-N -------------------------------------------------------------------------------------------------------
def check_seeds(seeds: tuple[int, ...] | None) -> None:
    """InputError for no seed at all, or one that is there twice."""
    require(seeds is None or (seeds and len(set(seeds)) == len(seeds)), "Each seed is given once.", key="seeds", found=seeds)


def load_base(path: Path, inference_steps: int | None = None, deterministic: bool = False) -> Any:
    """The pretrained policy, with other sampling steps where asked for; `deterministic`: by DDIM whatever it was saved with."""
    overrides: dict[str, Any] = {} if inference_steps is None else {"inference_steps": inference_steps}
    policy = load_policy(path, **overrides)
    if deterministic and getattr(policy.config, "sampler", "ddim") != "ddim":
        policy = load_policy(path, **overrides, sampler="ddim")
    return policy


def table(output: Path, seeds: list[int]) -> Table:
    """Success before and after, one row a seed."""
    results = [read_result(output / f"seed_{seed}") for seed in seeds]
    first = results[0]
    shown = Table(title=Text(f"{first.finetuner} from {first.pretraining}, {first.episodes} episodes: {output}"))
    for heading in ("seed", "environment steps", "before", "after"):
        shown.add_column(heading, justify="right")
    for r in results:
        values = ("–" if rate is None else f"{rate:.3f}" for rate in (r.success_before, r.success_after))
        shown.add_row(str(r.seed), f"{r.budget_env_steps:,}", *values)
    return shown
