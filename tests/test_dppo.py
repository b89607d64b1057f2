"""DPPO: its chain against DDPM and a hand-computed one, ratio 1 before the first update, GAE against stable-baselines3's, a bandit."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd

from kills import in_a_process, kill_and_resume, kill_at_every_operation
from postbc.agents.base import Batch, load_agent
from postbc.agents.dppo import (
    DPPO,
    Denoising,
    DPPOAgent,
    DPPOConfig,
    RewardScale,
    Rows,
    actor_loss,
    advantages,
    clip_range,
    log_probability,
)
from postbc.agents.networks import adam, descend
from postbc.data.normalization import Normalization
from postbc.devices import Compute
from postbc.errors import InputError
from postbc.policies.base import About, policy_class
from postbc.policies.schedules import ddpm
from postbc.seeding import make_generator
from postbc.training.dppo import finetune_dppo
from postbc.training.online import Online, OnlineConfig
from postbc.training.results import Result, read_result
from toy import PointReach, ToyPolicy, environment, stopped

F, T, A = 4, 2, 2
D = T * A
CONFIG = DPPOConfig(ft_denoising_steps=3, n_steps=6, batch_size=32, epochs=2, critic_hidden=16, critic_warmup_iterations=1)
TRAINING = OnlineConfig(
    budget_env_steps=200, num_envs=4, initial_steps=0, eval_every=100, eval_episodes=5, reward="sparse", terminate_on="never",
    checkpoint_seconds=1e9,
)  # fmt: skip


def policy(kind: str = "diffusion", steps: int = 8, seed: int = 0, **options: Any) -> Any:
    small = {"diffusion": {"denoising_steps": steps, "inference_steps": min(4, steps)}, "flow": {"inference_steps": steps}}[
        kind
    ]
    made = policy_class(kind)
    return made(
        made.Config(hidden=16, **small, **options), {"state": (F,)}, A, T, Normalization.identity(F, A),
        make_generator(seed, "policy/initialisation"), about=About(seed=seed),
    ).eval().requires_grad_(False)  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the chain -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [1.0, None])
def test_the_whole_chain_is_ddpm(clip: float | None) -> None:
    """The same noises through `schedules.ddpm` (tested against diffusers) and through the chain."""
    made, features = policy(steps=20, denoised_clip=clip), normal(5, F)
    chain = made.chain()
    noises = iter([normal(5, D, seed=k) for k in range(1, 20)])
    predictor = made.network.predictor(features, torch.arange(19, -1, -1))
    expected = ddpm(predictor, made.schedule, normal(5, D, seed=0), lambda: next(noises), clip, 0.0, None)
    x = normal(5, D, seed=0)
    for i in range(20):
        mean, std = chain.distribution(made.network, features, x, torch.full((5,), i))
        x = mean + (std * normal(5, D, seed=i + 1) if i < 19 else 0)
        assert std.shape == (5, 1)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
    assert float(chain.std[-1]) == 0


def test_fewer_steps_are_ddim_with_eta_1() -> None:
    from diffusers import DDIMScheduler

    made, features = policy(steps=20), normal(5, F)
    scheduler = DDIMScheduler(
        20, beta_schedule="squaredcos_cap_v2", clip_sample=True, set_alpha_to_one=True, timestep_spacing="leading"
    )
    scheduler.set_timesteps(5)
    chain, x = made.chain(5), normal(5, D)
    y = x
    for i, t in enumerate(scheduler.timesteps):
        assert int(chain.time[i]) == int(t)
        fresh = normal(5, D, seed=i + 1)
        predicted = made.network(y, t.repeat(5), features)
        y = scheduler.step(predicted, t, y, eta=1.0, use_clipped_model_output=True, variance_noise=fresh).prev_sample
        mean, std = chain.distribution(made.network, features, x, torch.full((5,), i))
        x = mean + std * fresh
        torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-4)


def test_the_flows_chain_without_noise_is_its_sample() -> None:
    made, features, noise = policy("flow", steps=6), normal(5, F), normal(5, D)
    chain, x = made.chain(), noise
    for i in range(6):
        x, std = chain.distribution(made.network, features, x, torch.full((5,), i))
        assert float(std.max()) == 0
    torch.testing.assert_close(x.view(5, T, A), made.sample(features, noise=noise.view(5, T, A)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_what_is_kept_of_a_chain_is_what_was_played(kind: str) -> None:
    made, learner = policy(kind), None
    learner = DPPO(CONFIG, made, make_generator(0, "online/initialisation"))
    chunk, flat = learner.act(normal(6, F), torch.Generator().manual_seed(1))
    chains = flat.view(6, 4, D)
    torch.testing.assert_close(chunk.flatten(1), chains[:, -1].clamp(-1, 1))
    _, again = Denoising(replace(CONFIG, ft_denoising_steps=8), made, torch.device("cpu")).sample(
        learner.networks.actor, normal(6, F), torch.Generator().manual_seed(1), True
    )
    torch.testing.assert_close(again[:, -4:], chains)  # whichever network takes the first steps, they are the same one's
    mean, std = learner.chain.distribution(made.network, normal(6, F), chains[:, 0], torch.full((6,), 5))
    z = (chains[:, 1] - mean) / std.clamp(min=0.1)
    assert float(z.abs().max()) <= 3.001


def test_log_probabilities_of_a_chain_by_hand() -> None:
    learner = DPPO(CONFIG, policy(), make_generator(0, "online/initialisation"))
    features, x, after, step = normal(7, F), normal(7, D, seed=1), normal(7, D, seed=2), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    found = learner.log_probabilities(features, x, after, step)
    made = learner.policy
    for i in range(7):
        t = 2 - int(step[i])
        now, before = made.schedule.alpha_bars[t], made.schedule.alpha_bars[t - 1] if t else torch.tensor(1.0)
        beta = made.schedule.betas[t]
        eps = made.network(x[i : i + 1], torch.tensor([t]), features[i : i + 1])[0]
        x0 = ((x[i] - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        mean = before.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * x[i]
        std = ((1 - before) / (1 - now) * beta).sqrt().clamp(min=0.1)
        each = torch.distributions.Normal(mean, std).log_prob(after[i].double()).clamp(-5, 2)
        assert float(found[i].detach()) == pytest.approx(float(each.mean()), abs=1e-4)


# -- losses --------------------------------------------------------------------------------------------------------------------
def test_advantages_are_those_of_stable_baselines3() -> None:
    n, envs, gamma, lam = 9, 3, 0.97, 0.9
    rng = np.random.default_rng(0)
    reward, value, ended = rng.normal(size=(n, envs)), rng.normal(size=(n, envs)), rng.random((n, envs)) < 0.3
    last = rng.normal(size=envs)
    space = gymnasium.spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(n, space, space, "cpu", lam, gamma, envs)
    starts = np.concatenate((np.zeros((1, envs)), ended[:-1]))
    for t in range(n):
        zeros = torch.zeros(envs)
        buffer.add(np.zeros((envs, 1)), np.zeros((envs, 1)), reward[t], starts[t], torch.as_tensor(value[t]), zeros)
    buffer.compute_returns_and_advantage(torch.as_tensor(last), ended[-1].astype(np.float32))
    following = np.concatenate((value[1:], last[None]))
    tensors = [torch.as_tensor(v, dtype=torch.float32) for v in (reward, value, following, np.where(ended, 0.0, gamma))]
    found = advantages(*tensors, torch.as_tensor(ended), gamma * lam)
    torch.testing.assert_close(found, torch.as_tensor(buffer.advantages), atol=1e-5, rtol=1e-5)


def test_a_time_limit_bootstraps_from_its_own_last_observation_or_as_published_from_the_next_first() -> None:
    for rule in ("final_obs", "reset"):
        learner = DPPO(
            replace(CONFIG, time_limit=rule, reward_scaling=False, n_steps=3),
            policy(),
            make_generator(0, "online/initialisation"),
        )  # type: ignore[arg-type]
        memory, rows = learner.memory(0, 1), []
        for t in range(3):
            features, following = normal(1, F, seed=t), normal(1, F, seed=10 + t if t == 1 else t + 1)
            _, action = learner.act(features, torch.Generator().manual_seed(t))
            rows.append(Batch(features, action, following, torch.tensor([1.0]), torch.tensor([learner.discount])))
            memory.remember(rows[-1], torch.tensor([True]), torch.tensor([t == 1]))  # the second runs out of time
        found = learner.rows(memory)
        v = lambda x, learner=learner: float(learner.networks.critic(x).detach())  # noqa: E731
        g, lam = learner.discount, learner.config.gae_lambda
        own = [1 + g * v(r.next_features) - v(r.features) for r in rows]
        published = 1 + g * v(rows[2].features) - v(rows[1].features)
        last = own[2]
        second = own[1] if rule == "final_obs" else published + g * lam * last
        expected = [own[0] + g * lam * second, second, last]
        np.testing.assert_allclose(found.advantage.view(3, 3)[:, 0], expected, atol=1e-5)
        np.testing.assert_allclose(
            found.target.view(3, 3)[:, 0], [e + v(r.features) for e, r in zip(expected, rows, strict=True)], atol=1e-5
        )


@pytest.mark.parametrize("noise", [None, 0.3])
def test_the_ratio_is_exactly_one_before_the_first_update(noise: float | None) -> None:
    learner, memory = filled() if noise is None else filled(replace(CONFIG, max_noise_std=noise), "flow")
    rows = learner.rows(memory)
    new = learner.log_probabilities(rows.features[:50], rows.x[:50], rows.following[:50], rows.step[:50])
    again = learner.log_probabilities(rows.features[:50], rows.x[:50], rows.following[:50], rows.step[:50])
    assert torch.equal(new, again)
    part = Rows(*(field[: CONFIG.batch_size] for field in rows))
    _, info = actor_loss(learner.log_probabilities(part.features, part.x, part.following, part.step), part, 3, CONFIG)
    assert torch.equal(info["actor/ratio"], torch.ones(CONFIG.batch_size))
    assert float(info["actor/kl"].abs().max()) == 0


def test_the_clipped_loss_by_hand() -> None:
    rows = Rows(normal(6, F), normal(6, D), normal(6, D), torch.tensor([0, 1, 2, 0, 1, 2]), normal(6, seed=3) * 0.01, normal(6, seed=4),
                normal(6))  # fmt: skip
    new = rows.log_probability + torch.tensor([0.02, -0.02, 0.02, -0.0005, 0.0, -0.03])
    loss, _ = actor_loss(new, rows, 3, CONFIG)
    a = (rows.advantage - rows.advantage.mean()) / (rows.advantage.std() + 1e-8)
    total = 0.0
    for i in range(6):
        k = int(rows.step[i])
        eps = 0.001 + 0.009 * (math.exp(3 * k / 2) - 1) / (math.exp(3) - 1)
        assert float(clip_range(rows.step[i : i + 1], 3, CONFIG)) == pytest.approx(eps)
        ratio, adv = math.exp(float(new[i] - rows.log_probability[i])), float(a[i]) * 0.99 ** (2 - k)
        total += max(-adv * ratio, -adv * min(max(ratio, 1 - eps), 1 + eps)) / 6
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_rewards_are_scaled_by_the_running_deviation_of_their_sums() -> None:
    rng, scale, reference = np.random.default_rng(0), RewardScale(3, "cpu"), RunningMeanStd(shape=())
    sums = np.zeros(3)
    for _ in range(4):
        reward, ended = rng.random((5, 3)), rng.random((5, 3)) < 0.3
        rows = []
        for t in range(5):
            sums = reward[t] + 0.99 * sums
            rows.append(sums.copy())
            sums[ended[t]] = 0
        reference.update(np.array(rows).reshape(-1))
        found = scale(torch.as_tensor(reward), torch.as_tensor(ended))
        np.testing.assert_allclose(found, np.clip(reward / np.sqrt(reference.var + 1e-8), -10, 10), rtol=1e-5)


# -- learning ------------------------------------------------------------------------------------------------------------------
def filled(config: DPPOConfig = CONFIG, kind: str = "diffusion") -> tuple[DPPO, Any]:
    learner = DPPO(config, policy(kind), make_generator(0, "online/initialisation"))
    memory, generator = learner.memory(0, 4), torch.Generator().manual_seed(0)
    for t in range(config.n_steps):
        state = normal(4, F, seed=t)
        _, action = learner.act(state, generator)
        ended = torch.tensor([t % 3 == 2] * 4)
        discount = torch.where(ended, 0.0, 0.9)
        batch = Batch(state, action, normal(4, F, seed=t + 1), normal(4, seed=t), discount)
        memory.remember(batch, torch.ones(4, dtype=torch.bool), ended)
    return learner, memory


def test_the_critic_alone_learns_first_and_the_frozen_steps_never() -> None:
    learner, memory = filled()
    before, base = (
        [p.clone() for p in learner.networks.actor.parameters()],
        [p.clone() for p in learner.policy.network.parameters()],
    )
    generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    learner.learn(memory, *generators)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.networks.actor.parameters(), strict=True))
    assert len(memory) == 0
    assert learner.gradient_steps == 2 * 2  # 72 decisions in batches of 32, twice
    learner.iterations = 5
    learner2, memory2 = filled()
    learner2.iterations = 5
    info = learner2.learn(memory2, *generators)
    assert not all(torch.equal(a, b) for a, b in zip(before, learner2.networks.actor.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(base, learner2.policy.network.parameters(), strict=True))
    assert "actor/kl" in info


def test_a_policy_that_has_moved_too_far_ends_the_iteration() -> None:
    learner, memory = filled(replace(CONFIG, actor_lr=10.0, target_kl=1e-6))
    learner.iterations = 5
    learner.learn(memory, torch.Generator().manual_seed(1), torch.Generator())
    assert learner.gradient_steps < 4


@pytest.mark.parametrize("size", [71, 32, 24, 2, 100])
def test_every_minibatch_is_of_one_size(size: int) -> None:
    """72 decisions: no remainder, whose advantages could not be normalised, or that a recorded graph would not take."""
    learner, memory = filled(replace(CONFIG, batch_size=size))
    parts = list(learner.minibatches(72, torch.Generator().manual_seed(0)))
    assert {len(part) for part in parts} == {min(size, 72)}
    assert len(parts) == max(1, 72 // size)
    every = torch.cat(parts)
    assert len(every.unique()) == len(every)
    assert torch.equal(every, torch.randperm(72, generator=torch.Generator().manual_seed(0))[: len(every)])
    learner.iterations = 5
    info = learner.learn(memory, torch.Generator().manual_seed(1), torch.Generator())
    assert all(bool(value.isfinite().all()) for value in info.values())
    assert all(bool(p.isfinite().all()) for p in learner.networks.parameters())


@pytest.mark.parametrize(("kind", "most"), [("diffusion", None), ("flow", None), ("flow", 0.3)])
def test_on_a_bandit_it_finds_the_optimum(kind: str, most: float | None) -> None:
    """One state, reward −|first action − 0.5|: the policy's mean goes there, whatever it was."""
    config = DPPOConfig(
        ft_denoising_steps=4, n_steps=8, batch_size=256, epochs=4, critic_hidden=16, critic_warmup_iterations=2, actor_lr=1e-3,
        clip=0.2, clip_first=0.2, discount=0.0, sampling_steps=4, max_noise_std=most,
    )  # fmt: skip
    learner = DPPO(config, policy(kind), make_generator(0, "online/initialisation"))
    sampling, noise, acting = (torch.Generator().manual_seed(k) for k in range(3))
    memory, state = learner.memory(0, 64), torch.zeros(64, F)
    for _ in range(60 * config.n_steps):
        chunk, action = learner.act(state, acting)
        reward = -(chunk[:, 0, 0] - 0.5).abs()
        memory.remember(
            Batch(state, action, state, reward, torch.zeros(64)),
            torch.ones(64, dtype=torch.bool),
            torch.ones(64, dtype=torch.bool),
        )
        learner.learn(memory, sampling, noise)
    agent = learner.agent()
    played = agent.act({"state": torch.zeros(256, F)}, torch.Generator().manual_seed(9))[:, 0, 0]
    assert float((played - 0.5).abs().mean()) < 0.12
    if (
        most is not None
    ):  # the noise of the component that is rewarded, at the last step, is less than the others', which matter not
        std = learner.networks.noise(state[:1], torch.tensor([3]))[0].detach()
        assert float(std[0]) < 0.9 * float(std[1:].mean())


def test_learnt_noise_by_hand() -> None:
    """Between its bounds, of the state and the step; log-probabilities are of it; what is drawn has it; it learns with the actor."""
    config = replace(CONFIG, max_noise_std=0.3)
    learner = DPPO(config, policy("flow"), make_generator(0, "online/initialisation"))
    noise, features, step = learner.networks.noise, normal(6, F), torch.tensor([0, 1, 2, 0, 1, 2])
    std = noise(100 * features, step).detach()
    assert std.shape == (6, D)
    assert 0.1 <= float(std.min()) < float(std.max()) <= 0.3
    x, after = normal(6, D, seed=1), normal(6, D, seed=2)
    mean, _ = learner.chain.distribution(learner.networks.actor, features, x, step + 5)
    expected = torch.distributions.Normal(mean, noise(features, step)).log_prob(after).clamp(-5, 2).mean(-1)
    torch.testing.assert_close(learner.log_probabilities(features, x, after, step), expected)
    many = features[:1].expand(20_000, F)
    chains = learner.act(many, torch.Generator().manual_seed(0))[1].view(-1, 4, D)
    mean, _ = learner.chain.distribution(learner.networks.actor, many, chains[:, 2], torch.full((20_000,), 7))
    drawn = (chains[:, 3] - mean).detach().std(0)
    torch.testing.assert_close(drawn, noise(many[:1], torch.tensor([2]))[0].detach(), rtol=0.05, atol=0)
    learner, memory = filled(config, "flow")
    learner.iterations = 1
    before = [p.clone() for p in learner.networks.noise.parameters()]
    learner.learn(memory, torch.Generator().manual_seed(0), torch.Generator().manual_seed(0))
    assert all(not torch.equal(a, b) for a, b in zip(before, learner.networks.noise.parameters(), strict=True))


# -- devices -------------------------------------------------------------------------------------------------------------------
def same_learning(kind: str, noise: float | None, device: str, compiled: bool) -> None:
    """A few updates: as plain ones on the CPU, from the same weights."""
    config = replace(CONFIG, max_noise_std=noise, actor_lr=3e-4, critic_lr=3e-4)
    first = DPPO(config, policy(kind), make_generator(0, "online/initialisation"))
    n, learners = 20, []
    for where, how in (("cpu", False), (device, compiled)):
        compute = Compute(device=where, compile=how)  # type: ignore[arg-type]
        learner = DPPO(config, policy(kind).to(where), make_generator(0, "online/initialisation", where), compute)
        learner.load_state_dict(first.state_dict())  # a checkpoint goes to another device
        for k in range(8):
            features, x, after, step = (
                normal(n, F, seed=k),
                normal(n, D, seed=k + 50),
                normal(n, D, seed=k + 99),
                torch.arange(n) % 3,
            )
            old = first.log_probabilities(features, x, after, step).detach() + 0.02 * normal(n, seed=k)
            rows = Rows(features, x, after, step, old, normal(n, seed=k + 1), normal(n, seed=k + 2))
            learner.update(Rows(*(part.to(where) for part in rows)))
        learners.append(learner)
    before, here, there = (list(learner.networks.parameters()) for learner in (first, *learners))
    assert not any(torch.equal(a, b) for a, b in zip(before, here, strict=True))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("kind", "noise"), [("diffusion", None), ("flow", 0.3)])
def test_a_gpu_learns_the_same(kind: str, noise: float | None, compiled: bool) -> None:
    same_learning(kind, noise, "cuda", compiled)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "noise"), [("diffusion", None), ("flow", 0.3)])
def test_a_compiled_update_gives_the_same_numbers(kind: str, noise: float | None) -> None:
    same_learning(kind, noise, "cpu", True)


@pytest.mark.gpu
def test_a_recorded_update_learns_from_iterations_that_no_batch_size_divides() -> None:
    config = replace(CONFIG, critic_warmup_iterations=0)  # 72 decisions in batches of 32
    made, compute = policy().to("cuda"), Compute(device="cuda", compile=True)
    learner = DPPO(config, made, make_generator(0, "online/initialisation", "cuda"), compute)
    sampling, noise, acting = (torch.Generator("cuda").manual_seed(k) for k in range(3))
    for _ in range(3):
        memory = learner.memory(0, 4)
        for t in range(config.n_steps):
            state, on = normal(4, F, seed=t).cuda(), torch.ones(4, dtype=torch.bool, device="cuda")
            _, action = learner.act(state, acting)
            memory.remember(Batch(state, action, state, normal(4, seed=t).cuda(), 0.9 * on.float()), on, ~on)
        info = learner.learn(memory, sampling, noise)
        assert all(bool(value.isfinite().all()) for value in info.values())
    assert learner.gradient_steps == 3 * 2 * 2


# -- the loop ------------------------------------------------------------------------------------------------------------------
def finetune(directory: Path, made: Any = None, config: DPPOConfig = CONFIG, **options: Any) -> Result:
    changes = {k: options.pop(k) for k in list(options) if k in OnlineConfig.__dataclass_fields__}
    finetune_dppo(
        made or policy(seed=3), environment(), directory, config, replace(TRAINING, **changes), seed=3, resume=True, **options
    )
    return read_result(directory)


def test_a_run_and_its_agent(tmp_path: Path) -> None:
    result = finetune(tmp_path)
    assert (result.finetuner, result.policy, result.gradient_steps) == ("dppo", "diffusion", 4 * 2 * 2)
    agent, _ = load_agent(tmp_path)
    assert isinstance(agent, DPPOAgent)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "actor/kl" in rows[0]
    assert sum("," in row for row in rows) > 4


def test_before_it_has_learnt_it_plays_as_the_policy_by_ddpm() -> None:
    made = policy(sampler="ddpm")
    learner = DPPO(CONFIG, made, make_generator(0, "online/initialisation"))
    online = Online(learner, PointReach(4), TRAINING, 0)
    played = online.agent().act({"state": normal(4, F)}, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        played, made.sample(normal(4, F), generator=torch.Generator().manual_seed(0)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("kind", "noise"), [("diffusion", None), ("flow", 0.3)])
def test_a_resumed_run_ends_bit_for_bit(tmp_path: Path, kind: str, noise: float | None) -> None:
    made, config = policy(kind, seed=3), replace(CONFIG, max_noise_std=noise)
    whole = finetune(tmp_path / "whole", made, config)
    with stopped(Online, "step", 9, RuntimeError("stop")):  # in the middle of the second iteration
        finetune(tmp_path / "cut", made, config, checkpoint_seconds=0.0)
    assert finetune(tmp_path / "cut", made, config, checkpoint_seconds=0.0).curve == whole.curve
    assert (tmp_path / "cut/agent.safetensors").read_bytes() == (tmp_path / "whole/agent.safetensors").read_bytes()
    assert (tmp_path / "cut/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


def stage(directory: Path) -> None:
    finetune(directory, checkpoint_seconds=0.0, eval_episodes=2, eval_every=50)


IGNORED = ("results.json:wall_clock_s", "results.json:commit", "results.json:command")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["at random", "at every operation"])
def test_kills_change_nothing(tmp_path: Path, when: str) -> None:
    in_a_process(__file__, tmp_path, when)


# -- bad input -----------------------------------------------------------------------------------------------------------------
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for made, config, changes, words in (
        (ToyPolicy(), CONFIG, {}, "sampled by a chain"),
        (None, replace(CONFIG, sampling_steps=9), {}, "more steps"),
        (None, CONFIG, {"budget_env_steps": 47}, "first iteration"),
        (None, CONFIG, {"initial_steps": 10}, "its own iterations"),
        (None, replace(CONFIG, max_noise_std=0.3), {}, "none of its own"),
        (policy("flow"), replace(CONFIG, max_noise_std=0.1), {}, "nothing between them"),
        (None, replace(CONFIG, n_steps=1, ft_denoising_steps=1), {"num_envs": 1}, "one decision"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            finetune(tmp_path / "run", made, config, **changes)
    assert not (tmp_path / "run").exists()


def test_a_batch_of_one_decision_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size"):
        DPPOConfig(batch_size=1)


def test_log_probabilities_are_clamped_as_published() -> None:
    mean, std = torch.zeros(1, 2), torch.full((1, 1), 0.1)
    assert float(log_probability(mean, std, torch.tensor([[50.0, 0.0]]))) == pytest.approx((-5 + 1.3836) / 2, abs=1e-3)
    assert float(log_probability(mean, torch.full((1, 1), 1e-3), mean)) == 2.0


if __name__ == "__main__":
    weight = torch.zeros(1, requires_grad=True)
    descend(adam([weight], 1e-3), weight.sum())  # imports much at its first step, which the forks then have already
    if sys.argv[2] == "at random":
        kill_and_resume(stage, Path(sys.argv[1]), sys.argv[2], IGNORED)
    else:
        kill_at_every_operation(stage, Path(sys.argv[1]), IGNORED, stride=29)
