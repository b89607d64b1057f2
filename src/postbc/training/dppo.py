"""DPPO of one seed, from a pretrained policy to results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from typing_extensions import Unpack

from postbc.agents.dppo import DPPO, DPPOAgent, DPPOConfig, Networks, trained_steps
from postbc.environments.chunk import Termination
from postbc.environments.registry import Environment
from postbc.errors import require
from postbc.nn import check_memory
from postbc.policies.base import Policy
from postbc.schemas import Count, CountOrZero, plain, schema
from postbc.training.online import OnlineConfig, RunOptions, finetune_online


@schema
class DPPOTraining(OnlineConfig):
    """DPPO's published settings for robomimic's Lift: 81 iterations of 300 chunks in 50 environments, evaluated every tenth."""

    budget_env_steps: Count = 4_860_000
    """Environment steps (Lift 81 iterations of 60,000; Can 151; Square 201 of 80,000)."""
    num_envs: Annotated[int, Field(ge=1, le=1000)] = 50
    """Environments; a vector step advances each by one chunk."""
    initial_steps: CountOrZero = 0
    """None: an iteration is the policy's own."""
    eval_every: Count = 600_000
    """Environment steps between evaluations."""
    reward: Literal["negative", "sparse", "environment"] = "sparse"
    """An environment step earns success − 1, success, or what the environment itself gives."""
    terminate_on: Termination = "never"
    """What ends a training episode besides the horizon."""


def finetune_dppo(
    policy: Policy,
    environment: Environment | str,
    output: str | Path,
    config: DPPOConfig | None = None,
    training: OnlineConfig | None = None,
    **options: Unpack[RunOptions],
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
    config, training, source = config or DPPOConfig(), training or DPPOTraining(), options.get("source")
    options.pop("before", None)

    def check(policy: Policy, device: torch.device) -> None:
        require(
            hasattr(policy, "chain") and hasattr(policy, "network"), "DPPO needs a policy that is sampled by a chain.", file=source,
            key="chain", found=type(policy).__name__, expected="a diffusion or flow policy, or a class with `network` and `chain`",
        )  # fmt: skip
        chain = policy.chain(config.sampling_steps)  # type: ignore[attr-defined]
        if config.max_noise_std is not None:
            require(
                not chain.std.any(), "Learnt noise is for a chain that has none of its own.", file=source, key="dppo.max_noise_std",
                found=type(policy).__name__, expected="a flow policy", remedy="leave --dppo.max-noise-std out",
            )  # fmt: skip
            require(
                config.min_sampling_std < config.max_noise_std, "The noise's bounds leave nothing between them.",
                key="dppo.max_noise_std", found=config.max_noise_std, expected=f"above min_sampling_std, {config.min_sampling_std}",
            )  # fmt: skip
        iteration = config.n_steps * training.num_envs * policy.chunk
        require(
            training.budget_env_steps >= iteration, "The budget ends before the first iteration does.", key="training.budget_env_steps",
            found=f"{training.budget_env_steps:,}", expected=f"at least n_steps · num_envs · chunk = {iteration:,}",
            remedy="raise it, or lower --dppo.n-steps or --training.num-envs",
        )  # fmt: skip
        decisions = config.n_steps * training.num_envs * trained_steps(config, chain)
        require(
            decisions >= 2, "An iteration of one decision has no advantage over another.", key="dppo.n_steps", found=config.n_steps,
            expected="n_steps · num_envs · ft_denoising_steps of at least 2",
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
