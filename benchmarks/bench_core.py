"""Ensemble training against one network at a time, the closed form against the ensemble, and policy sampling against diffusers'
scheduler; both sides in one run, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from postbc.data.normalization import Normalization
from postbc.devices import Compute
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.posterior.closed_form import fit_closed_form
from postbc.posterior.ensemble import BLOCK, Ensemble, EnsembleConfig, EnsembleTraining, fit_ensemble
from postbc.seeding import make_generator

OBSERVATION_DIM, CHUNK, ACTION_DIM = 19, 4, 7


def alternate(ours: Callable[[], None], theirs: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of each, measured in turn."""
    ours(), theirs()  # warm-up
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, function in enumerate((ours, theirs)):
            begin = time.perf_counter()
            function()
            times[side].append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def ensemble_member_step(
    members: int = 100, hidden: int = 512, batch: int = 256, steps: int = BLOCK, repeats: int = 5
) -> dict[str, object]:
    """One gradient step of one member: K members of ours against one network after another (torch.nn and torch.optim.Adam).

    Both sides train `steps` steps of a member before they go on to the next, as `fit_ensemble` does. One thread each, as a seed's
    process has.
    """
    torch.set_num_threads(1)
    n = 600
    observations, chunks = 2 * torch.rand(n, OBSERVATION_DIM) - 1, 2 * torch.rand(n, CHUNK, ACTION_DIM) - 1
    config, compute = (
        EnsembleConfig(ensemble_size=members, hidden=hidden, batch_size=batch),
        Compute(device="cpu", precision="auto"),
    )
    ensemble = Ensemble(config, OBSERVATION_DIM, CHUNK, ACTION_DIM, make_generator(0, "ensemble/initialisation"))
    training = EnsembleTraining(ensemble, observations, chunks, torch.arange(n) // 100, 0, compute)
    targets = chunks.flatten(1)
    networks = []
    for _ in range(members):
        layers: list[nn.Module] = []
        width = OBSERVATION_DIM
        for _ in range(config.layers):
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        network = nn.Sequential(*layers, nn.Linear(width, CHUNK * ACTION_DIM))
        networks.append((network, torch.optim.Adam(network.parameters(), lr=config.learning_rate)))

    def one_at_a_time() -> None:
        for network, optimiser in networks:
            for _ in range(steps):
                index = torch.randint(n, (batch,))
                loss = nn.functional.mse_loss(network(observations[index]), targets[index])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()

    ours, theirs = alternate(lambda: [training.train(steps), None][1], one_at_a_time, repeats)
    return {
        "ours": 1e3 * ours / members / steps, "theirs": 1e3 * theirs / members / steps, "unit": "ms a member-step",
        "ratio": theirs / ours,
        "what": f"ensemble training, K={members}, {hidden}x3, batch {batch}, {steps} steps a member in a row, against one torch.nn "
        f"network after another; ours with products in {compute.resolved().precision}; one thread each",
    }  # fmt: skip


def closed_form_posterior(
    members: int = 100, hidden: int = 512, steps: int = BLOCK, whole: int = 6000, repeats: int = 3
) -> dict[str, object]:
    """The closed form's posterior against the ensemble's at the same width and steps: three regressors and linear algebra, or K.

    Both train `steps` steps a network in this run, in turn, which stand for `whole`: what comes after training is timed as it is.
    """
    torch.set_num_threads(1)
    n = 600
    features, chunks = 2 * torch.rand(n, OBSERVATION_DIM) - 1, 2 * torch.rand(n, CHUNK, ACTION_DIM) - 1
    episode = torch.arange(n) // 60
    config = EnsembleConfig(ensemble_size=members, hidden=hidden, steps=steps)
    compute = Compute(device="cpu", precision="auto")

    def fit(config: EnsembleConfig) -> None:
        fit_ensemble(features, chunks, episode, config, 0, compute)

    def close() -> None:
        fit_closed_form(features, chunks, episode, replace(config, steps=1), None, 0, compute)

    own, training = alternate(lambda: fit(replace(config, ensemble_size=3)), lambda: fit(config), repeats)
    algebra = alternate(close, lambda: None, repeats)[0]
    ours, theirs = own * whole / steps + algebra, training * whole / steps
    return {
        "ours": ours, "theirs": theirs, "unit": "s a posterior", "ratio": theirs / ours,
        "what": f"closed form against the ensemble of K={members}, {hidden}x3, {whole} steps (extrapolated from {steps}), 10 "
        f"trajectories of 60 windows; ridge and layer chosen; {algebra:.1f} s of it linear algebra; "
        f"products in {compute.resolved().precision}; one thread each",
    }  # fmt: skip


def ddim_sampling(batch: int = 32, steps: int = 8, repeats: int = 60) -> dict[str, object]:
    """DDIM sampling of a chunk for a batch of states: our loop against diffusers' DDIMScheduler around the same network."""
    torch.set_num_threads(1)
    from diffusers import DDIMScheduler

    normalization = Normalization.identity(OBSERVATION_DIM, ACTION_DIM)
    policy = DiffusionPolicy(
        DiffusionConfig(inference_steps=steps), {"state": (OBSERVATION_DIM,)}, ACTION_DIM, CHUNK, normalization,
        make_generator(0, "policy/initialisation"),
    )  # fmt: skip
    policy.eval().requires_grad_(False)
    scheduler = DDIMScheduler(
        100, beta_schedule="squaredcos_cap_v2", clip_sample=True, timestep_spacing="leading", set_alpha_to_one=True
    )
    observation, noise = torch.randn(batch, OBSERVATION_DIM), torch.randn(batch, CHUNK, ACTION_DIM)

    def theirs() -> torch.Tensor:
        scheduler.set_timesteps(steps)
        x = noise.flatten(1)
        for t in scheduler.timesteps:
            predicted = policy.network(x, t.expand(batch), observation)
            x = scheduler.step(predicted, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
        return x

    with torch.inference_mode():
        torch.testing.assert_close(policy.sample(observation, noise).flatten(1), theirs(), rtol=1e-3, atol=1e-3)
        our_time, their_time = alternate(
            lambda: [policy.sample(observation, noise), None][1], lambda: [theirs(), None][1], repeats
        )
    return {
        "ours": batch / our_time, "theirs": batch / their_time, "unit": "chunks/s", "ratio": their_time / our_time,
        "what": f"DDIM {steps} steps, batch {batch}, 512x3: against diffusers' DDIMScheduler, same network; one thread each",
    }  # fmt: skip


def run() -> dict[str, dict[str, object]]:
    """All of this file's figures."""
    return {
        "ensemble_member_step": ensemble_member_step(),
        "closed_form_posterior": closed_form_posterior(),
        "ddim_sampling": ddim_sampling(),
    }
