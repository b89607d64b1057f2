"""`postbc pretrain`."""

from __future__ import annotations

from typing import Any

from postbc.cli import given, options
from postbc.jobs import run_seeds
from postbc.policies.base import policy_class
from postbc.progress import console
from postbc.stages.pretrain import Pretrain, pretrain_policy


def parse(args: list[str]) -> Pretrain[Any]:
    kind = given(args, "--policy.kind", "diffusion")
    chosen: Pretrain[Any] = options(Pretrain[policy_class(kind).Config], "pretrain", args)  # type: ignore[misc]
    return chosen


def run(config: Pretrain[Any]) -> None:
    run_seeds(pretrain_policy, config, config.seeds, config.jobs, config.output)
    console().print(f"{config.pretraining.method} policy of {len(config.seeds)} seed(s): {config.output}", markup=False)
