"""DSRL: one SAC update against stable-baselines3, distillation against an identity denoiser, the magnitude, and what seeds share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from postbc.demonstrations.normalization import Normalization
from postbc.finetuning.dsrl import DSRL, DSRLActor, DSRLConfig, distillation_loss, make_actor
from postbc.finetuning.networks import Critics, TanhGaussianActor
from postbc.finetuning.replay import Batch, Replay
from postbc.nn import StackedLayerNorm, StackedLinear, make_generators, rand, randn
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from toy import ToyPolicy

S, D, B = 4, 4, 32


def random_batch(members: int, seed: int = 0, batch: int = B) -> Batch:
    g = make_generators(range(members), 900 + seed)
    done = rand(g, batch) < 0.2
    u = 2 * rand(g, batch, D) - 1
    return Batch(randn(g, batch, S), u, randn(g, batch, S), -4 * rand(g, batch), torch.where(done, 0.0, 0.97))


def perturb(module: nn.Module, generators: Sequence[torch.Generator]) -> None:
    """Random gains and biases too, so that an exchanged or forgotten one shows."""
    for parameter in module.parameters():
        share = len(parameter) // len(generators)
        parameter.data += 0.1 * randn(generators, share, *parameter.shape[1:]).flatten(0, 1)


# -- stable-baselines3 ---------------------------------------------------------------------------------------------------------
class SpaceEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (S,))
    action_space = gymnasium.spaces.Box(-1, 1, (D,))


def sb3_sac(config: DSRLConfig, target_entropy: float) -> Any:
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import configure

    def activation() -> nn.Module:
        act = nn.Tanh() if config.activation == "tanh" else nn.ReLU()
        return nn.Sequential(nn.LayerNorm(config.hidden), act) if config.layer_norm else act

    kwargs = {"net_arch": [config.hidden] * config.layers, "activation_fn": activation}
    model = SAC(
        "MlpPolicy", SpaceEnv(), policy_kwargs=kwargs, device="cpu", learning_rate=config.lr, gamma=0.97, tau=config.tau,
        ent_coef=f"auto_{config.first_temperature}", target_entropy=target_entropy,
    )  # fmt: skip
    model.set_logger(configure(None, []))
    return model


def stacks(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (StackedLinear, StackedLayerNorm))]


def flat_layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]


def pairs(ours: nn.Module, row: int, theirs: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """(our parameter of `row`, theirs) in torch's layout; the actor's mean and log std are one layer here and two there."""
    mine: list[Tensor] = []
    for layer in stacks(ours):
        weight, bias = layer.weight[row], layer.bias[row].squeeze(0)  # type: ignore[index]
        mine += [weight.T if isinstance(layer, StackedLinear) else weight.squeeze(0), bias]
    flat = [p for layer in theirs for p in (layer.weight, layer.bias)]
    if len(flat) == len(mine) + 2:
        *rest, weight, bias = mine
        half = len(weight) // 2
        mine = [*rest, weight[:half], bias[:half], weight[half:], bias[half:]]
    assert [a.shape for a in mine] == [b.shape for b in flat]  # type: ignore[union-attr]
    return list(zip(mine, flat, strict=True))  # type: ignore[arg-type]


def all_pairs(agent: DSRL, member: int, model: Any) -> list[tuple[Tensor, Tensor]]:
    networks, found = agent.networks, pairs(agent.networks.actor, member, flat_layers(model.actor))
    for mine, theirs in ((networks.critics, model.critic), (networks.target_critics, model.critic_target)):
        for i, q in enumerate(theirs.q_networks):
            found += pairs(mine, 2 * member + i, flat_layers(q))
    return [*found, (networks.log_temperature[member : member + 1], model.log_ent_coef)]


@pytest.mark.parametrize(
    ("layer_norm", "activation", "target_entropy"), [(True, "tanh", 0.0), (False, "relu", "auto"), (False, "tanh", 0.0)]
)
def test_sac_updates_equal_stable_baselines3(
    monkeypatch: pytest.MonkeyPatch, layer_norm: bool, activation: Any, target_entropy: Any
) -> None:
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    config = DSRLConfig(
        variant="sac", hidden=24, layers=2, layer_norm=layer_norm, activation=activation, lr=3e-4, first_temperature=0.3,
        target_entropy=target_entropy,
    )  # fmt: skip
    agent = DSRL(config, ToyPolicy((0, 1)), make_generators([0, 1]))
    for module in (agent.networks.actor, agent.networks.critics, agent.networks.target_critics):
        perturb(module, make_generators([0, 1], 5))
    models = [sb3_sac(config, -float(D) if target_entropy == "auto" else target_entropy) for _ in range(2)]
    for m, model in enumerate(models):
        for mine, theirs in all_pairs(agent, m, model):
            theirs.data.copy_(mine)

    queue: list[Tensor] = []
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", lambda shape, dtype, device: queue.pop(0))
    g = make_generators([0, 1], 6)
    for update in range(4):
        batch, noise, next_noise = random_batch(2, update), randn(g, B, D), randn(g, B, D)
        agent.update(batch, noise, next_noise)
        for m, model in enumerate(models):
            queue[:] = [noise[m], next_noise[m]]
            done = (batch.discount[m] == 0).float()
            sample = ReplayBufferSamples(
                batch.observation[m], batch.action[m], batch.next_observation[m], done.unsqueeze(1), batch.reward[m].unsqueeze(1)
            )  # fmt: skip
            model.replay_buffer.sample = lambda *_, sample=sample, **__: sample
            model.train(1, B)
            assert not queue
        worst = max(float((a - b).detach().abs().max()) for m in range(2) for a, b in all_pairs(agent, m, models[m]))
        assert worst < 1e-5, f"update {update}"


def test_log_prob_is_that_of_the_tanh_transformed_normal() -> None:
    actor = TanhGaussianActor(2, S, D, (16,), make_generators([0, 1]))
    perturb(actor, make_generators([0, 1], 2))
    observation, noise = randn(make_generators([3, 4]), B, S), randn(make_generators([5, 6]), B, D)
    u, log_prob = actor.sample(observation, noise)
    mean, log_std = actor(observation)
    transformed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform(cache_size=1)
    )
    expected = transformed.log_prob(u).sum(-1)
    inside = (u.abs() < 0.99).all(-1)  # nearer to ±1 the 1e-6 of stable-baselines3 shows
    assert inside.sum() > B // 2
    torch.testing.assert_close(log_prob[inside], expected[inside], atol=2e-3, rtol=1e-4)


# -- DSRL-NA -------------------------------------------------------------------------------------------------------------------
class IdentityPolicy(ToyPolicy):
    """DP(s, w) = w."""

    def sample(self, observation: Tensor, noise: Tensor | None = None, generators: Any = None) -> Tensor:
        assert noise is not None
        return noise


def test_with_an_identity_denoiser_distillation_gives_q_itself() -> None:
    config = DSRLConfig(variant="na", hidden=64, layers=2, lr=3e-3, action_magnitude=1.5, batch_size=256)
    agent = DSRL(config, IdentityPolicy((0, 1)), make_generators([0, 1]))
    perturb(agent.networks.critics, make_generators([0, 1], 3))
    assert agent.networks.noise_critics is not None
    g = make_generators([0, 1], 4)

    def error() -> tuple[float, float]:
        observation, w = randn(make_generators([8, 9]), 2000, S), randn(make_generators([6, 7]), 2000, D)
        q = agent.networks.critics(observation, w).detach()
        return float((agent.networks.noise_critics(observation, w / 1.5) - q).detach().square().mean()), float(q.var())  # type: ignore[misc]

    first, variance = error()
    for _ in range(15):
        agent.distill(randn(g, 20 * 256, S), randn(g, 20 * 256, D), 20)
    last, _ = error()
    assert last < 0.03 * variance < first  # explains 97 % of Q's variance, and did not before


def test_distillation_is_member_to_member_and_leaves_the_critics_alone() -> None:
    agent = DSRL(DSRLConfig(variant="na", hidden=16, layers=1), IdentityPolicy((0,)), make_generators([0]))
    critics = agent.networks.noise_critics
    assert critics is not None
    observation, w = randn(make_generators([1]), B, S), randn(make_generators([2]), B, D)
    target = agent.networks.critics(observation, w).detach()
    expected = sum(0.5 * nn.functional.mse_loss(critics(observation, w / 1.5)[0, i], target[0, i]) for i in range(2))
    loss, _ = distillation_loss(critics.net.layers, observation, w / 1.5, target)
    torch.testing.assert_close(loss[0], torch.as_tensor(expected))
    before = {k: v.clone() for k, v in agent.networks.state_dict().items()}
    agent.distill(observation, w)
    changed = {k for k, v in agent.networks.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith("noise_critics") for k in changed)


def test_na_backs_up_the_real_chunk_and_climbs_the_noise_critic() -> None:
    """One NA update written out with autograd and torch's plain Adam."""
    config = DSRLConfig(variant="na", hidden=16, layers=1, lr=1e-2, backup="mean", first_temperature=0.5)
    policy = ToyPolicy((0,))
    agent, by_hand = DSRL(config, policy, make_generators([0])), DSRL(config, policy, make_generators([0]))
    batch, noise, next_noise = random_batch(1), randn(make_generators([1]), B, D), randn(make_generators([2]), B, D)
    agent.update(batch, noise, next_noise)

    networks = by_hand.networks
    u, log_prob = networks.actor.sample(batch.observation, noise)
    with torch.no_grad():
        next_u, next_log_prob = networks.actor.sample(batch.next_observation, next_noise)
        next_chunk = policy.sample(batch.next_observation, noise=1.5 * next_u.view(1, B, 2, 2)).flatten(2)
        next_q = networks.target_critics(batch.next_observation, next_chunk).mean(1) - 0.5 * next_log_prob
        y = batch.reward + batch.discount * next_q
    q = networks.critics(batch.observation, batch.action)
    plain = {"critics": 0.5 * ((q[:, 0] - y) ** 2).mean() + 0.5 * ((q[:, 1] - y) ** 2).mean()}
    assert networks.noise_critics is not None
    plain["actor"] = (0.5 * log_prob - networks.noise_critics(batch.observation, u).min(1).values).mean()
    for name, loss in plain.items():
        optimizer = torch.optim.Adam(getattr(networks, name).parameters(), lr=1e-2)
        optimizer.zero_grad()
        loss.backward(inputs=list(getattr(networks, name).parameters()))
        optimizer.step()
    for name in plain:
        for a, b in zip(getattr(agent.networks, name).parameters(), getattr(networks, name).parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# -- magnitude -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["na", "sac"])
def test_the_magnitude_is_honoured(variant: Any) -> None:
    """Acting, the backup, the distillation and the saved agent all give the policy magnitude·u."""
    policy = ToyPolicy((0,))
    config = DSRLConfig(variant=variant, hidden=16, layers=1, action_magnitude=1.5)
    agent = DSRL(config, policy, make_generators([0]))
    agent.networks.actor.net[-1].bias.data[..., :D] = 20.0  # tanh = 1 # type: ignore[union-attr, index]
    agent.networks.actor.net[-1].bias.data[..., D:] = -20.0  # type: ignore[union-attr, index]
    observation = randn(make_generators([1]), B, S)
    chunk, action = agent.act(observation, make_generators([2]))
    torch.testing.assert_close(policy.seen[-1], torch.full((1, B, 2, 2), 1.5))
    torch.testing.assert_close(action, torch.ones(1, B, D) if variant == "sac" else chunk.flatten(2))
    DSRLActor(policy, agent.networks.actor, 1.5, deterministic=True).act(observation, make_generators([2]))
    torch.testing.assert_close(policy.seen[-1], torch.full((1, B, 2, 2), 1.5))
    if variant == "na":
        w = 3 * randn(make_generators([3]), B, D)  # beyond the magnitude, and not clipped
        agent.distill(observation, w)
        torch.testing.assert_close(policy.seen[-1].flatten(2), w)
        agent.update(random_batch(1), randn(make_generators([1]), B, D), randn(make_generators([2]), B, D))
        torch.testing.assert_close(policy.seen[-1], torch.full((1, B, 2, 2), 1.5))


@pytest.mark.parametrize("variant", ["na", "sac"])
def test_initial_rollouts_are_the_base_policy_denoised_once(variant: Any) -> None:
    policy = ToyPolicy((0,))
    agent = DSRL(DSRLConfig(variant=variant, hidden=16, layers=1, action_magnitude=0.7), policy, make_generators([0]))
    observation = randn(make_generators([1]), 4000, S)
    chunk, action = agent.act_pretrained(observation, make_generators([2]))
    assert len(policy.seen) == 1
    w = policy.seen[0].flatten(2)
    normal = randn(make_generators([2]), 4000, D)
    torch.testing.assert_close(w, normal.clamp(-0.7, 0.7) if variant == "sac" else normal)
    torch.testing.assert_close(action, w / 0.7 if variant == "sac" else chunk.flatten(2))


# -- members, state ------------------------------------------------------------------------------------------------------------
def trained(seeds: tuple[int, ...], variant: Any = "na", steps: int = 3) -> DSRL:
    config = DSRLConfig(variant=variant, hidden=16, layers=2, utd=3, noise_critic_steps=2, batch_size=16)
    agent = DSRL(config, ToyPolicy(seeds), make_generators(seeds, 1))
    replay, g = Replay(len(seeds), 100, S, D), make_generators(seeds, 2)
    replay.add(randn(g, 60, S), randn(g, 60, D), randn(g, 60, S), randn(g, 60), rand(g, 60))
    sampling, noise = make_generators(seeds, 3), make_generators(seeds, 4)
    for _ in range(steps):
        info = agent.train(replay, sampling, noise)
    assert all(value.shape == (len(seeds),) for value in info.values())
    return agent


@pytest.mark.parametrize("variant", ["na", "sac"])
def test_a_seed_alone_equals_the_seed_beside_others(variant: Any) -> None:
    together, alone = trained((5, 7, 11), variant), trained((7,), variant)
    for name, value in alone.networks.state_dict().items():
        share = len(value)
        torch.testing.assert_close(together.networks.state_dict()[name][share : 2 * share], value, atol=1e-6, rtol=1e-4)


def test_state_resumes_bit_for_bit() -> None:
    reference, resumed = trained((0, 1)), trained((0, 1), steps=1)
    resumed.load_state_dict(reference.state_dict())
    batch, noise = random_batch(2), randn(make_generators([1, 2]), B, D)
    for agent in (reference, resumed):
        agent.update(batch, noise, noise)
        agent.distill(batch.observation, noise)
    for a, b in zip(reference.networks.state_dict().values(), resumed.networks.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_an_agent_is_loaded_without_demonstrations(tmp_path: Any) -> None:
    normalization = Normalization(np.zeros(3), np.arange(1.0, 4.0), -2 * np.ones(2), np.ones(2))
    config = DiffusionConfig(chunk=2, hidden=16, time_dim=8, denoising_steps=10, inference_steps=2)
    policy = DiffusionPolicy(config, 3, 2, [4, 9], make_generators([4, 9]), [normalization], {"method": "bc"})
    policy.eval().requires_grad_(False)
    dsrl = DSRLConfig(hidden=16, layers=2, action_magnitude=1.2)
    actor = make_actor(dsrl, policy)
    perturb(actor, make_generators([0, 1]))
    original = DSRLActor(policy, actor, 1.2)
    original.save(tmp_path, dsrl)
    loaded = DSRLActor.load(tmp_path)
    observation = randn(make_generators([1, 2]), 5, 3)
    raw = original.act(observation, make_generators([3, 4]))
    assert torch.equal(raw, loaded.act(observation, make_generators([3, 4])))
    assert raw.shape == (2, 5, 2, 2)
    assert loaded.seeds == (4, 9)
    assert loaded.about == {"method": "bc"}
    assert float(raw.min()) >= -2 - 1e-5
    assert float(raw.max()) <= 1 + 1e-5
    assert float(raw.min()) < -1.2
    greedy = DSRLActor.load(tmp_path, deterministic=True)
    assert torch.equal(greedy.act(observation, make_generators([3, 4])), greedy.act(observation, make_generators([5, 6])))


def test_initialisation_is_that_of_torch_linear() -> None:
    critics = Critics(40, S, D, (64, 64), make_generators(range(40)), critics=2)
    weight = critics.net[3].weight if isinstance(critics.net[3], StackedLinear) else stacks(critics)[2].weight
    assert weight.shape == (80, 64, 64)
    assert abs(float(weight.detach().std()) - 1 / math.sqrt(3 * 64)) < 1e-3
