"""DSRL of one seed, from a pretrained policy to results.json."""

from __future__ import annotations

from pathlib import Path

import torch
from typing_extensions import Unpack

from postbc.agents.dsrl import DSRL, DSRLAgent, DSRLConfig, Networks
from postbc.environments.registry import Environment
from postbc.errors import require
from postbc.nn import check_memory
from postbc.policies.base import Policy
from postbc.schemas import plain
from postbc.training.online import OnlineConfig, RunOptions, finetune_online


def finetune_dsrl(
    policy: Policy,
    environment: Environment | str,
    output: str | Path,
    config: DSRLConfig | None = None,
    training: OnlineConfig | None = None,
    **options: Unpack[RunOptions],
) -> DSRLAgent:
    """Finetune `policy` by DSRL and write one seed's run directory: results.json, agent.safetensors, metrics.csv.

    Args:
        policy: its `sample(features, noise)` must be deterministic; its weights are not changed.
        environment: where, or its name.
        output: the run directory.
        options: seed, compute, resume, before, source, allow_version_mismatch of :func:`postbc.training.online.finetune_online`.

    Raises:
        InputError: a stochastic sampler; and what :func:`~postbc.training.online.finetune_online` refuses. Nothing was written then.
        NotFiniteError: the learner diverged; the last checkpoint is good.
    """
    config, source = config or DSRLConfig(), options.get("source")

    def check(policy: Policy, device: torch.device) -> None:
        check_deterministic(policy, device, source)
        with torch.device("meta"):
            networks = Networks(config, policy.feature_dim, policy.chunk * policy.action_dim, torch.Generator())
            check_memory(networks, 4, device, "dsrl.hidden")

    return finetune_online(  # type: ignore[no-any-return]
        policy, environment, output, training or OnlineConfig(), {"dsrl": plain(config)}, check,
        lambda policy, generator, compute: DSRL(config, policy, generator, compute), DSRLAgent.load, **options,
    )  # fmt: skip


def check_deterministic(policy: Policy, device: str | torch.device = "cpu", source: str | Path | None = None) -> None:
    """InputError if two samples from one latent noise differ: then the noise does not decide the action."""
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(2, policy.feature_dim, generator=generator, device=device)
    noise = torch.randn(2, policy.chunk, policy.action_dim, generator=generator, device=device)
    what = "DSRL needs a policy that is deterministic given its latent noise."
    remedy = "sample a diffusion policy by DDIM (sampler=ddim)"
    try:
        with torch.no_grad():
            first, second = (policy.sample(features, noise=noise.clone()) for _ in range(2))
    except (TypeError, ValueError) as error:  # it asks for more than the noise
        require(False, what, file=source, key="sample", found=str(error), remedy=remedy)
    require(
        first.shape == noise.shape, "The policy's samples are no chunks.", file=source, key="sample", found=tuple(first.shape),
        expected=tuple(noise.shape),
    )  # fmt: skip
    require(
        torch.equal(first, second),
        what,
        file=source,
        key="sample",
        found="two samples from one noise that differ",
        remedy=remedy,
    )
