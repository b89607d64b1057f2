"""DSRL of one seed, from a pretrained policy to results.json."""

from __future__ import annotations

from pathlib import Path

import torch

from postbc.agents.dsrl import DSRL, DSRLAgent, DSRLConfig, Networks
from postbc.devices import Compute
from postbc.environments.registry import Environment, find_environment
from postbc.errors import require
from postbc.evaluation import Evaluation
from postbc.nn import check_memory
from postbc.policies.base import Policy, policy_fingerprint
from postbc.runs import Run
from postbc.schemas import plain
from postbc.seeding import make_generator
from postbc.training.online import Online, OnlineConfig, run_online
from postbc.training.results import RESULTS_FILE, check_policy, make_env, to_device


def finetune_dsrl(
    policy: Policy,
    environment: Environment | str,
    output: str | Path,
    config: DSRLConfig | None = None,
    training: OnlineConfig | None = None,
    *,
    seed: int = 0,
    compute: Compute | None = None,
    resume: bool = False,
    before: Evaluation | None = None,
    source: str | Path | None = None,
    allow_version_mismatch: bool = False,
) -> DSRLAgent:
    """Finetune `policy` by DSRL and write one seed's run directory: results.json, agent.safetensors, metrics.csv.

    Args:
        policy: its `sample(features, noise)` must be deterministic; its weights are not changed.
        environment: where, or its name.
        output: the run directory.
        seed: of everything random.
        resume: go on with the run that `output` holds.
        before: an evaluation of the policy on the same episodes; without it, it is measured first.
        source: the policy's file, for messages.
        allow_version_mismatch: go on although the policy's data come from another version of the simulator.

    Raises:
        InputError: a policy of another task or of other sizes, a stochastic sampler, a budget that leaves no learning, a directory
            with another run. Nothing was written then.
        NotFiniteError: the learner diverged; the last checkpoint is good.
    """
    config, training = config or DSRLConfig(), training or OnlineConfig()
    compute, output = (compute or Compute()).resolved(), Path(output)
    environment = find_environment(environment) if isinstance(environment, str) else environment
    device = compute.start()
    training.require_learning(policy.chunk)
    policy = to_device(policy, device)
    check_deterministic(policy, device, source)
    with torch.device("meta"):
        networks = Networks(config, policy.feature_dim, policy.chunk * policy.action_dim, torch.Generator())
        check_memory(networks, 4, device, "dsrl.hidden")
    horizon = environment.horizon if training.horizon is None else training.horizon
    check_policy(policy, environment, horizon, source, allow_version_mismatch)
    recorded = {
        "environment": environment.name, "seed": seed, "dsrl": plain(config), "training": plain(training), "compute": plain(compute)
    }  # fmt: skip
    with Run(output, recorded, resume=resume, inputs={"policy": policy_fingerprint(policy)}) as run:
        if not (output / RESULTS_FILE).exists():
            learner = DSRL(config, policy, make_generator(seed, "dsrl/initialisation", device), compute)
            env = make_env(environment, policy, training.num_envs, horizon, training.terminate_on)
            try:
                run_online(Online(learner, env, training, seed, device), run, environment, horizon, before)
            finally:
                env.close()
        agent = DSRLAgent.load(output, policy, device=device)
        run.finish()
    return agent


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
