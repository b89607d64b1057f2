"""`postbc finetune dsrl` and `postbc finetune best-of-n`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from postbc.finetuning.best_of_n import BestOfNConfig, finetune_best_of_n
from postbc.finetuning.dsrl import DSRLConfig
from postbc.finetuning.dsrl_training import DSRLTraining, finetune_dsrl
from postbc.finetuning.iql import IQLConfig
from postbc.finetuning.results import read_results
from postbc.finetuning.rollouts import TransitionConfig
from postbc.policies.diffusion import DiffusionPolicy


@dataclass(frozen=True)
class Dsrl:
    """Finetune a pretrained policy by DSRL: SAC over its latent noise, the policy itself frozen; all its seeds side by side.

    Writes results.json, agent.safetensors, metrics.csv and checkpoints into the output directory.
    """

    policy: Path
    """policy.safetensors or its directory."""
    output: Path
    """Directory of the run."""
    task: str | None = None
    """Lift, Can or Square; default: the task that the policy was trained on."""
    seeds: tuple[int, ...] | None = None
    """Seeds of the policy to finetune; default all."""
    dsrl: DSRLConfig = field(default_factory=DSRLConfig)
    training: DSRLTraining = field(default_factory=DSRLTraining)
    inference_steps: int | None = None
    """DDIM steps of the frozen policy; default its own (paper: 8)."""
    resume: bool = False
    """Go on with the run in the output directory."""

    def run(self) -> None:
        """Finetune, write, print."""
        overrides: dict[str, Any] = {"sampler": "ddim"}  # deterministic given the noise, whatever it was saved with
        if self.inference_steps is not None:
            overrides["inference_steps"] = self.inference_steps
        policy = DiffusionPolicy.load(self.policy, **overrides)
        finetune_dsrl(
            policy,
            self.output,
            self.dsrl,
            self.training,
            task=self.task,
            seeds=self.seeds,
            resume=self.resume,
            source=self.policy,
        )
        Console().print(table(read_results(self.output), self.output))


@dataclass(frozen=True)
class BestOfN:
    """Play the pretrained policy, fit an IQL critic on its rollouts, then play the best of N sampled chunks at every step.

    Writes rollouts_seed_<seed>.hdf5, agent.safetensors, results.json and metrics.csv into the output directory.
    """

    policy: Path
    """policy.safetensors or its directory."""
    output: Path
    """Directory of the run."""
    task: str | None = None
    """Lift, Can or Square; default: the task that the policy was trained on."""
    seeds: tuple[int, ...] | None = None
    """Seeds of the policy to finetune; default all."""
    rollouts: tuple[Path, ...] = ()
    """Learn from these files (robomimic HDF5, also of a real robot) instead of collecting: one for all seeds, or one a seed."""
    best_of_n: BestOfNConfig = field(default_factory=BestOfNConfig)
    iql: IQLConfig = field(default_factory=IQLConfig)
    transitions: TransitionConfig = field(default_factory=TransitionConfig)
    inference_steps: int | None = None
    """DDIM steps of the policy; default its own."""
    resume: bool = False
    """Go on with the run in the output directory."""

    def run(self) -> None:
        """Finetune, write, print."""
        overrides = {} if self.inference_steps is None else {"inference_steps": self.inference_steps}
        policy = DiffusionPolicy.load(self.policy, **overrides)
        finetune_best_of_n(
            policy, self.output, self.best_of_n, self.iql, self.transitions, task=self.task, seeds=self.seeds,
            rollouts=self.rollouts or None, resume=self.resume, source=self.policy,
        )  # fmt: skip
        Console().print(table(read_results(self.output), self.output))


def table(results: Sequence[dict[str, Any]], output: Path) -> Table:
    """Success before and after, one row a seed."""
    first = results[0]
    shown = Table(title=f"{first['finetuner']} from {first['pretraining']}, {first['episodes']} episodes: {output}")
    for heading in ("seed", "environment steps", "before", "after"):
        shown.add_column(heading, justify="right")
    for r in results:
        rates = ("–" if r[k] is None else f"{r[k]:.3f}" for k in ("success_before", "success_after"))
        shown.add_row(str(r["seed"]), f"{r['budget_env_steps']:,}", *rates)
    return shown
