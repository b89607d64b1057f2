"""DSRL of one seed, from a pretrained policy to results.json."""

from __future__ import annotations

from pathlib import Path

import torch
from typing_extensions import Unpack

from postbc.agents.dsrl import DSRL, DSRLAgent, DSRLConfig, Networks
from postbc.data.episodes import is_image
from postbc.environments.registry import Environment
from postbc.errors import require
from postbc.nn import check_memory
from postbc.policies.base import Policy, seen_dim
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
        require(
            config.variant == "sac" or seen_dim(policy) == policy.feature_dim,
            "na samples from the policy at remembered states, and of each this one reads too many numbers to keep.",
            file=source, key="dsrl.variant", found=f"na; {policy.feature_dim:,} numbers a state", expected="sac",
            remedy="--dsrl.variant sac, which remembers what actor and critics see",
        )  # fmt: skip
        check_deterministic(policy, device, source)
        with torch.device("meta"):
            networks = Networks(config, policy, torch.Generator())
            check_memory(networks, 4, device, "dsrl.hidden")

    return finetune_online(  # type: ignore[no-any-return]
        policy, environment, output, training or OnlineConfig(), {"dsrl": plain(config)}, check,
        lambda policy, generator, compute: DSRL(config, policy, generator, compute), DSRLAgent.load, **options,
    )  # fmt: skip


def check_deterministic(policy: Policy, device: str | torch.device = "cpu", source: str | Path | None = None) -> None:
    """InputError if two samples from one latent noise differ: then the noise does not decide the action."""
    generator = torch.Generator(device).manual_seed(0)
    steps = (policy.observation_steps,) if policy.observation_steps > 1 else ()
    observation = {
        name: torch.randn(2, *steps, *shape, generator=generator, device=device) for name, shape in policy.shapes.items()
    }
    frames = {name: (64 * value).clamp(0, 255).to(torch.uint8) for name, value in observation.items() if is_image(name)}
    with torch.no_grad():
        features = policy.encode(observation | frames)
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
