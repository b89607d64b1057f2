"""DPPO of one seed, from a pretrained policy to results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from postbc.agents.dppo import DPPO, DPPOAgent, DPPOConfig, Networks
from postbc.environments.registry import Environment
from postbc.errors import require
from postbc.nn import check_memory
from postbc.policies.base import Policy
from postbc.schemas import plain
from postbc.training.online import OnlineConfig, finetune_online

#: DPPO's published settings for robomimic's Lift: 81 iterations of 300 chunks in 50 environments, evaluated every tenth.
TRAINING = OnlineConfig(
    budget_env_steps=4_860_000, num_envs=50, initial_steps=0, eval_every=600_000, reward="sparse", terminate_on="never"
)


def finetune_dppo(
    policy: Policy,
    environment: Environment | str,
    output: str | Path,
    config: DPPOConfig | None = None,
    training: OnlineConfig | None = None,
    **options: Any,
) -> DPPOAgent:
    """Finetune `policy` by DPPO and write one seed's run directory: results.json, agent.safetensors, metrics.csv.

    Args:
        policy: with a `network` and a `chain` (:class:`postbc.policies.chains.Chained`); its own weights are not changed.
        environment: where, or its name.
        output: the run directory.
        options: seed, compute, resume, source, allow_version_mismatch of :func:`postbc.training.online.finetune_online`. `before` is
            not taken: the pretrained policy is measured as its chain is sampled here.

    Raises:
        InputError: a policy without a chain, a budget shorter than an iteration; and what
            :func:`~postbc.training.online.finetune_online` refuses. Nothing was written then.
        NotFiniteError: the learner diverged; the last checkpoint is good.
    """
    config, training, source = config or DPPOConfig(), training or TRAINING, options.get("source")
    options.pop("before", None)

    def check(policy: Policy, device: torch.device) -> None:
        require(
            hasattr(policy, "chain") and hasattr(policy, "network"), "DPPO needs a policy that is sampled by a chain.", file=source,
            key="chain", found=type(policy).__name__, expected="a diffusion or flow policy, or a class with `network` and `chain`",
        )  # fmt: skip
        policy.chain(config.sampling_steps)  # type: ignore[attr-defined]
        iteration = config.n_steps * training.num_envs * policy.chunk
        require(
            training.budget_env_steps >= iteration, "The budget ends before the first iteration does.", key="training.budget_env_steps",
            found=f"{training.budget_env_steps:,}", expected=f"at least n_steps · num_envs · chunk = {iteration:,}",
            remedy="raise it, or lower --dppo.n-steps or --training.num-envs",
        )  # fmt: skip
        require(
            training.initial_steps == 0, "DPPO learns from its own iterations alone.", key="training.initial_steps",
            found=training.initial_steps, expected=0,
        )  # fmt: skip
        with torch.device("meta"):
            check_memory(Networks(config, policy, torch.Generator()), 4, device, "dppo.critic_hidden")

    return finetune_online(  # type: ignore[no-any-return]
        policy, environment, output, training, {"dppo": plain(config)}, check,
        lambda policy, generator, compute: DPPO(config, policy, generator, compute), DPPOAgent.load, **options,
    )  # fmt: skip
