"""Residual RL of one seed, from a pretrained policy (and its demonstrations) to results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from typing_extensions import Unpack

from postbc.agents.base import Batch, about_of
from postbc.agents.residual import Networks, Residual, ResidualAgent, ResidualConfig, with_proposals
from postbc.data.readers import list_dataset
from postbc.data.transitions import TransitionConfig
from postbc.environments.registry import Environment
from postbc.errors import require
from postbc.nn import check_memory
from postbc.policies.base import Policy, seen_dim
from postbc.progress import say
from postbc.runs import digest
from postbc.schemas import Count, CountOrZero, plain, schema
from postbc.seeding import make_generator
from postbc.training.online import OnlineConfig, RunOptions, finetune_online
from postbc.training.results import to_device
from postbc.training.rollouts import read_rollouts, transition_batch


@schema
class ResidualTraining(OnlineConfig):
    """Where it differs from DSRL's: fewer rollouts before learning, success as the reward (measured: results/lift-finetuners)."""

    budget_env_steps: Count = 60_000
    """Environment steps, the initial rollouts included."""
    num_envs: Annotated[int, Field(ge=1, le=1000)] = 8
    """Environments; a vector step advances each by one chunk."""
    initial_steps: CountOrZero = 5000
    """Environment steps of rollouts with the base policy before learning starts."""
    eval_every: Count = 7500
    """Environment steps between evaluations."""
    reward: Literal["negative", "sparse", "environment"] = "sparse"
    """An environment step earns success − 1, success, or what the environment itself gives (without demonstrations)."""


def finetune_residual(
    policy: Policy,
    environment: Environment | str,
    output: str | Path,
    config: ResidualConfig | None = None,
    training: OnlineConfig | None = None,
    demonstrations: str | Path | None = None,
    **options: Unpack[RunOptions],
) -> ResidualAgent:
    """Finetune `policy` by a residual on its chunks; writes one seed's run directory: results.json, agent.safetensors, metrics.csv.

    Args:
        policy: its weights are not changed.
        environment: where, or its name.
        output: the run directory.
        demonstrations: a file (robomimic HDF5, zarr) whose rewards say what success is: those that the policy was trained on, where
            its content is that of the policy's file; else all. Which is said. None: learn from rollouts alone.
        options: seed, compute, resume, before, source, allow_version_mismatch of :func:`postbc.training.online.finetune_online`.

    Raises:
        InputError: demonstrations of another task, without any success, or with rollouts that do not end at it; and what
            :func:`~postbc.training.online.finetune_online` refuses. Nothing was written then.
        NotFiniteError: the learner diverged; the last checkpoint is good.
    """
    config, training, seed = config or ResidualConfig(), training or ResidualTraining(), options.get("seed", 0)
    require(
        demonstrations is None or config.demonstration_share > 0, "The demonstrations would never be learnt from.", file=demonstrations,
        key="residual.demonstration_share", found=config.demonstration_share, expected="above 0", remedy="or leave them out",
    )  # fmt: skip
    found: list[Batch] = []
    content = None if demonstrations is None else digest(demonstrations)

    def check(policy: Policy, device: torch.device) -> None:
        require(
            seen_dim(policy) == policy.feature_dim, "Residual RL keeps of every state all that the policy reads: too much of this one.",
            file=options.get("source"), key="policy", found=f"{policy.feature_dim:,} numbers a state",
            remedy="postbc finetune dsrl --dsrl.variant sac, or best-of-n",
        )  # fmt: skip
        with torch.device("meta"):
            networks = Networks(config, policy.feature_dim, policy.chunk * policy.action_dim, torch.Generator())
            check_memory(networks, 4, device, "residual.hidden")
        if demonstrations is not None and content is not None:
            generator = make_generator(seed, "residual/demonstrations", device)
            mismatch = options.get("allow_version_mismatch", False)
            found.append(of_demonstrations(demonstrations, content, policy, config, training, generator, mismatch))
        else:
            say("note: residual RL learns from its rollouts alone; demonstrations with rewards would be part of every batch")

    return finetune_online(  # type: ignore[no-any-return]
        policy, environment, output, training, {"residual": plain(config)}, check,
        lambda policy, generator, compute: Residual(config, policy, generator, compute, found[0] if found else None),
        ResidualAgent.load, inputs={} if content is None else {"demonstrations": content}, **options,
    )  # fmt: skip


def of_demonstrations(
    path: str | Path,
    content: str,
    policy: Policy,
    config: ResidualConfig,
    training: OnlineConfig,
    generator: torch.Generator,
    allow_version_mismatch: bool = False,
) -> Batch:
    """Every window of the demonstrations as an n-step transition between the learner's states; `content` is the file's digest.

    Raises:
        InputError: they do not belong to `policy`, say no success, or rollouts are rewarded otherwise: by the environment itself, which
            no file holds, or also after the first success, where a demonstration ends.
    """
    require(
        training.terminate_on == "success", "Demonstrations end at their first success, and rollouts would not.", file=path,
        key="training.terminate_on", found=training.terminate_on, expected="success", remedy="or leave the demonstrations out",
    )  # fmt: skip
    require(
        training.reward != "environment", "Demonstrations do not say the environment's own reward.", file=path,
        key="training.reward", found="environment", expected="sparse or negative", remedy="or leave the demonstrations out",
    )  # fmt: skip
    about, names, there = about_of(policy), None, set(list_dataset(path).names)
    if about.trajectories is not None and about.is_of(Path(path), content):
        names = [name for name in about.trajectories if name in there]
        require(names, "The trajectories that the policy was trained on are not in this file.", file=path,
                found=", ".join(sorted(there))[:80], expected=", ".join(about.trajectories)[:80])  # fmt: skip
        say(f"residual RL learns from {len(names)} of the {len(there)} demonstrations of {path}: those of the policy")
    else:
        say(
            f"note: residual RL learns from all {len(there)} demonstrations of {path}, which is not known to be the policy's own file"
        )
    dataset = read_rollouts(path, policy, None, allow_version_mismatch, names=names)
    rules = TransitionConfig(
        reward="negative" if training.reward == "negative" else "sparse", stride=1, chunk_reward=training.chunk_reward,
        chunk_discount=training.chunk_discount,
    )  # fmt: skip
    policy = to_device(policy, generator.device)
    batch, _ = transition_batch(dataset, policy, config.discount, rules, generator.device, steps=config.n_step)
    states = [
        torch.cat([with_proposals(policy, part, config.proposals, generator) for part in features.split(256)])
        for features in (batch.features, batch.next_features)
    ]
    return batch._replace(features=states[0], next_features=states[1])
