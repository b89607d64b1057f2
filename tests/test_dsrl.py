"""DSRL: one SAC update against stable-baselines3, distillation against an identity denoiser, the magnitude, the saved agent."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mutations import mutate
from postbc.agents.base import AGENT_FILE, BASE_POLICY_FILE, Batch, PolicyAgent, load_agent
from postbc.agents.dsrl import DSRL, DSRLAgent, DSRLConfig, distillation_loss, make_actor
from postbc.agents.networks import means
from postbc.agents.replay import Replay
from postbc.data.episodes import COORDINATES
from postbc.data.normalization import Normalization
from postbc.devices import Compute
from postbc.errors import InputError, NotFiniteError
from postbc.files import load_tree, save_tree
from postbc.nn import StackedLayerNorm, StackedLinear
from postbc.policies.base import About, load_policy, save_policy
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.schemas import plain
from postbc.seeding import make_generator
from postbc.training.dsrl import finetune_dsrl
from test_iql import random_batch as old_batch
from toy import ToyPolicy

F, D, B = 4, 4, 32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def learner(config: DSRLConfig, policy: Any = None, seed: int = 0, **more: Any) -> DSRL:
    return DSRL(config, policy or ToyPolicy(), make_generator(seed, "online/initialisation"), **more)


def random_batch(seed: int = 0, batch: int = B) -> Batch:
    g = generator(900 + seed)
    done = torch.rand(batch, generator=g) < 0.2
    u = 2 * torch.rand(batch, D, generator=g) - 1
    s, following, reward = normal(batch, F, seed=seed), normal(batch, F, seed=seed + 1), -4 * torch.rand(batch, generator=g)
    return Batch(s, u, following, reward, torch.where(done, 0.0, 0.97))


def perturb(module: nn.Module, seed: int = 0) -> None:
    """Random gains and biases too, so that an exchanged or forgotten one shows."""
    g = generator(seed)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)


# -- stable-baselines3 ---------------------------------------------------------------------------------------------------------
class SpaceEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (F,))
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
        ent_coef=f"auto_{config.init_temperature}", target_entropy=target_entropy,
    )  # fmt: skip
    model.set_logger(configure(None, []))
    return model


def layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (nn.Linear, nn.LayerNorm, StackedLinear, StackedLayerNorm))]


def pairs(ours: nn.Module, row: int | None, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(our parameter, theirs) in torch's layout, of a stack its `row`; the actor's mean and log std are one layer here, two there."""
    mine: list[Tensor] = []
    for layer in layers(ours):
        weight, bias = layer.weight, layer.bias
        if row is not None:
            weight, bias = weight[row], bias[row].squeeze(0)  # type: ignore[index]
            weight = weight.T if isinstance(layer, StackedLinear) else weight.squeeze(0)
        mine += [weight, bias]  # type: ignore[list-item]
    flat = [p for layer in layers(theirs) for p in (layer.weight, layer.bias)]
    if len(flat) == len(mine) + 2:
        *rest, weight, bias = mine
        half = len(weight) // 2
        mine = [*rest, weight[:half], bias[:half], weight[half:], bias[half:]]
    assert [a.shape for a in mine] == [b.shape for b in flat]  # type: ignore[union-attr]
    return list(zip(mine, flat, strict=True))  # type: ignore[arg-type]


def all_pairs(agent: DSRL, model: Any) -> list[tuple[Tensor, Tensor]]:
    networks, found = agent.networks, pairs(agent.networks.actor, None, model.actor)
    for mine, theirs in ((networks.critics, model.critic), (networks.target_critics, model.critic_target)):
        for i, q in enumerate(theirs.q_networks):
            found += pairs(mine, i, q)
    return [*found, (networks.log_temperature.view(1), model.log_ent_coef)]


@pytest.mark.parametrize(
    ("layer_norm", "activation", "target_entropy"), [(True, "tanh", 0.0), (False, "relu", "auto"), (False, "tanh", 0.0)]
)
def test_sac_updates_equal_stable_baselines3(
    monkeypatch: pytest.MonkeyPatch, layer_norm: bool, activation: Any, target_entropy: Any
) -> None:
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    config = DSRLConfig(
        variant="sac", hidden=24, layers=2, layer_norm=layer_norm, activation=activation, lr=3e-4, init_temperature=0.3,
        target_entropy=target_entropy,
    )  # fmt: skip
    agent = learner(config)
    for module in (agent.networks.actor, agent.networks.critics, agent.networks.target_critics):
        perturb(module, 5)
    model = sb3_sac(config, -float(D) if target_entropy == "auto" else target_entropy)
    for mine, theirs in all_pairs(agent, model):
        theirs.data.copy_(mine)

    queue: list[Tensor] = []
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", lambda shape, dtype, device: queue.pop(0))
    for update in range(4):
        batch, noise, next_noise = random_batch(update), normal(B, D, seed=60 + update), normal(B, D, seed=70 + update)
        agent.update(batch, noise, next_noise)
        queue[:] = [noise, next_noise]
        done = (batch.discount == 0).float()
        sample = ReplayBufferSamples(*batch[:3], done.unsqueeze(1), batch.reward.unsqueeze(1))
        model.replay_buffer.sample = lambda *_, sample=sample, **__: sample
        model.train(1, B)
        assert not queue
        worst = max(float((a - b).detach().abs().max()) for a, b in all_pairs(agent, model))
        assert worst < 1e-5, f"update {update}"


# -- DSRL-NA -------------------------------------------------------------------------------------------------------------------
class IdentityPolicy(ToyPolicy):
    """DP(s, w) = w."""

    def sample(self, features: Tensor, noise: Tensor | None = None, generator: Any = None) -> Tensor:
        assert noise is not None
        return noise


def test_with_an_identity_denoiser_distillation_gives_q_itself() -> None:
    config = DSRLConfig(variant="na", hidden=64, layers=2, lr=3e-3, action_magnitude=1.5, batch_size=128)
    agent = learner(config, IdentityPolicy())
    perturb(agent.networks.critics, 3)
    assert agent.networks.noise_critics is not None

    def error() -> tuple[float, float]:
        features, w = normal(2000, F, seed=8), normal(2000, D, seed=6)
        q = agent.networks.critics(features, w).detach()
        return float((agent.networks.noise_critics(features, w / 1.5) - q).detach().square().mean()), float(q.var())  # type: ignore[misc]

    first, variance = error()
    for k in range(15):
        agent.distill(normal(20 * 128, F, seed=100 + k), normal(20 * 128, D, seed=200 + k), 20)
    last, _ = error()
    assert last < 0.03 * variance < first  # explains 97 % of Q's variance, and did not before


def test_distillation_is_critic_to_critic_and_leaves_the_critics_alone() -> None:
    agent = learner(DSRLConfig(variant="na", hidden=16, layers=1), IdentityPolicy())
    critics = agent.networks.noise_critics
    assert critics is not None
    features, w = normal(B, F, seed=1), normal(B, D, seed=2)
    target = agent.networks.critics(features, w).detach()
    expected = sum(0.5 * nn.functional.mse_loss(critics(features, w / 1.5)[i], target[i]) for i in range(2))
    loss, _ = distillation_loss(agent.networks, features, w / 1.5, target)
    torch.testing.assert_close(loss, torch.as_tensor(expected))
    before = {k: v.clone() for k, v in agent.networks.state_dict().items()}
    agent.distill(features, w)
    changed = {k for k, v in agent.networks.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith("noise_critics") for k in changed)


def test_na_backs_up_the_real_chunk_and_climbs_the_noise_critic() -> None:
    """One NA update written out with autograd and torch's plain Adam."""
    config = DSRLConfig(variant="na", hidden=16, layers=1, lr=1e-2, backup="mean", init_temperature=0.5)
    policy = ToyPolicy()
    agent, by_hand = learner(config, policy), learner(config, policy)
    batch, noise, next_noise = random_batch(1), normal(B, D, seed=1), normal(B, D, seed=2)
    agent.update(batch, noise, next_noise)

    networks = by_hand.networks
    u, log_prob = networks.actor.sample(batch.features, noise)
    with torch.no_grad():
        next_u, next_log_prob = networks.actor.sample(batch.next_features, next_noise)
        next_chunk = policy.sample(batch.next_features, noise=1.5 * next_u.view(B, 2, 2)).flatten(1)
        next_q = networks.target_critics(batch.next_features, next_chunk).mean(0) - 0.5 * next_log_prob
        y = batch.reward + batch.discount * next_q
    q = networks.critics(batch.features, batch.action)
    plain = {"critics": 0.5 * ((q[0] - y) ** 2).mean() + 0.5 * ((q[1] - y) ** 2).mean()}
    assert networks.noise_critics is not None
    plain["actor"] = (0.5 * log_prob - networks.noise_critics(batch.features, u).min(0).values).mean()
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
    """Acting, the backup, the distillation and the agent all give the policy magnitude·u."""
    policy = ToyPolicy()
    agent = learner(DSRLConfig(variant=variant, hidden=16, layers=1, action_magnitude=1.5), policy)
    agent.networks.actor.net[-1].bias.data[:D] = 20.0  # tanh = 1
    agent.networks.actor.net[-1].bias.data[D:] = -20.0
    features, whole = normal(B, F, seed=1), torch.full((B, 2, 2), 1.5)
    chunk, action = agent.act(features, generator(2))
    torch.testing.assert_close(policy.seen[-1], whole)
    torch.testing.assert_close(action, torch.ones(B, D) if variant == "sac" else chunk.flatten(1))
    agent.agent(deterministic=True).act({"state": features}, generator(2))
    torch.testing.assert_close(policy.seen[-1], whole)
    if variant == "na":
        w = 3 * normal(B, D, seed=3)  # beyond the magnitude, and not clipped
        agent.distill(features, w)
        torch.testing.assert_close(policy.seen[-1].flatten(1), w)
        agent.update(random_batch(1), normal(B, D, seed=1), normal(B, D, seed=2))
        torch.testing.assert_close(policy.seen[-1], whole)


@pytest.mark.parametrize("variant", ["na", "sac"])
def test_initial_rollouts_are_the_base_policy_denoised_once(variant: Any) -> None:
    policy = ToyPolicy()
    agent = learner(DSRLConfig(variant=variant, hidden=16, layers=1, action_magnitude=0.7), policy)
    features = normal(4000, F, seed=1)
    chunk, action = agent.act_base(features, generator(2))
    assert len(policy.seen) == 1
    w = policy.seen[0].flatten(1)
    drawn = torch.randn(4000, D, generator=generator(2))
    torch.testing.assert_close(w, drawn.clamp(-0.7, 0.7) if variant == "sac" else drawn)
    torch.testing.assert_close(action, w / 0.7 if variant == "sac" else chunk.flatten(1))


# -- tied noise ----------------------------------------------------------------------------------------------------------------
def test_tied_noise_is_learnt_as_that_of_a_single_action() -> None:
    """sac never sees the chunk: its updates are those of a policy whose chunks are one action long, to the bit."""
    numbers: dict[str, Any] = {"variant": "sac", "hidden": 16, "layers": 1, "target_entropy": "auto"}
    tied, one = learner(DSRLConfig(latent="tied", **numbers), ToyPolicy()), learner(DSRLConfig(**numbers), ToyPolicy(chunk=1))
    assert tied.target_entropy == one.target_entropy == -2
    for seed in range(3):
        batch = random_batch(seed)._replace(action=normal(B, 2, seed=seed).tanh())
        for agent in (tied, one):
            agent.update(batch, normal(B, 2, seed=10 + seed), normal(B, 2, seed=20 + seed))
    for name, value in one.networks.state_dict().items():
        assert torch.equal(tied.networks.state_dict()[name], value), name


@pytest.mark.parametrize("variant", ["na", "sac"])
def test_tied_noise_is_the_same_for_every_action(variant: Any, tmp_path: Path) -> None:
    """Acting, initial rollouts, the backup, the distillation, the saved agent; na's critics see whole chunks."""
    policy: Any = ToyPolicy(chunk=3)
    config = DSRLConfig(variant=variant, latent="tied", hidden=16, layers=1, utd=2, noise_critic_grad_steps=2, batch_size=4)
    agent, features = learner(config, policy), normal(B, F, seed=1)
    for act in (agent.act, agent.act_base):
        chunk, action = act(features, generator(2))
        assert chunk.shape == (B, 3, 2)
        assert action.shape == (B, 2 if variant == "sac" else 6)
        torch.testing.assert_close(action, policy.seen[-1][:, 0] / 1.5 if variant == "sac" else chunk.flatten(1))
    memory = agent.memory(20, B)
    one = torch.ones(B)
    memory.remember(Batch(features, action, features, one, one), one.bool(), one.bool())
    agent.learn(memory, generator(3), generator(4))
    agent.agent().act({"state": features}, generator(5))
    assert len(policy.seen) > 2
    for noise in policy.seen:
        assert torch.equal(noise, noise[:, :1].expand_as(noise))
        assert len(noise.unique()) > 2
    base = diffusion_policy()
    made = DSRLAgent(base, make_actor(config, base, generator(1)), config)
    made.save(tmp_path)
    again: Any = load_agent(tmp_path)[0]
    assert again.config.latent == "tied"
    observation = {"state": normal(5, 3)}
    assert torch.equal(again.act(observation, generator(0)), made.act(observation, generator(0)))


def test_full_noise_is_what_was_before_there_was_a_choice() -> None:
    assert "latent" not in plain(DSRLConfig())
    assert plain(DSRLConfig(latent="tied"))["latent"] == "tied"


# -- the posterior's coordinates -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("latent", ["posterior", "posterior+full"])
@pytest.mark.parametrize("variant", ["na", "sac"])
def test_chosen_coordinates_are_those_that_the_policy_observes(variant: Any, latent: Any, steps: int, tmp_path: Path) -> None:
    """What is played is what the policy plays where its observation holds the chosen g; the episode's own g decides nothing."""
    policy = diffusion_policy(shapes={"state": (3,), COORDINATES: (3,)}, observation_steps=steps)
    config = DSRLConfig(variant=variant, latent=latent, hidden=16, layers=1, utd=2, noise_critic_grad_steps=2, batch_size=4)
    agent, size = learner(config, policy), 3 + (4 if latent == "posterior+full" else 0)
    assert agent.latent_dim == size

    def observation(g: Tensor) -> dict[str, Tensor]:
        of_steps = g if steps == 1 else g[:, None].expand(-1, steps, -1)
        return {"state": normal(B, *([steps] if steps > 1 else []), 3), COORDINATES: of_steps}

    played, w = [], normal(B, size, seed=7)
    for seed in (1, 2):  # two episodes' own coordinates
        features = policy.encode(observation(normal(B, 3, seed=seed)))
        played.append(agent.denoise(features, w / config.action_magnitude).view(B, 2, 2))
        assert agent.act(features, generator(3))[1].shape == (B, size if variant == "sac" else 4)
    noise = w[:, 3:].view(B, 2, 2) if size > 3 else torch.zeros(B, 2, 2)
    expected = policy.sample(policy.encode(observation(w[:, :3])), noise=noise)
    for chunk in played:
        torch.testing.assert_close(chunk, expected)
    memory, one = agent.memory(20, B), torch.ones(B)
    _, action = agent.act(features, generator(3))
    memory.remember(Batch(features, action, features, one, one), one.bool(), one.bool())
    assert memory.sample(generator(0), 4).features.shape == (4, 3 * steps)
    agent.learn(memory, generator(3), generator(4))
    made = agent.agent()
    assert torch.equal(*(made.act(observation(normal(B, 3, seed=seed)), generator(5)) for seed in (1, 2)))
    made.save(tmp_path)
    again = load_agent(tmp_path)[0]
    assert torch.equal(*(each.act(observation(normal(B, 3)), generator(0)) for each in (again, made)))


def test_only_a_coherent_policy_has_coordinates_to_choose(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)Only a coherent policy has coordinates.*dsrl\.latent"):
        finetune_dsrl(diffusion_policy(), "postbc/Lift", tmp_path / "run", DSRLConfig(latent="posterior"))
    assert not (tmp_path / "run").exists()


# -- numbers, state --------------------------------------------------------------------------------------------------------------
def trained(variant: Any = "na", steps: int = 5, seed: int = 3) -> tuple[DSRL, dict[str, float]]:
    config = DSRLConfig(
        variant=variant, hidden=16, layers=2, utd=3, noise_critic_grad_steps=2, batch_size=16, init_temperature=0.3
    )
    agent, replay = learner(config, seed=seed), Replay(100, F, D)
    replay.add(old_batch())
    sampling, noise = make_generator(seed, "online/data"), make_generator(seed, "online/noise")
    for _ in range(steps):
        info = agent.learn(replay, sampling, noise)
    return agent, means(info, steps)


#: variant -> metrics, sums of the parameters' sizes, first chunk that the actor plays, first initial action: of postbc 0.1, one seed
GOLDEN: dict[str, Any] = {
    "na": (
        {
            "critic/loss": 3.061544,
            "critic/q": -0.395364,
            "critic/target": -1.652696,
            "actor/loss": -0.326435,
            "actor/magnitude": 0.514649,
            "temperature/value": 0.298760,
            "temperature/loss": -2.669613,
            "actor/entropy": 2.209737,
            "noise_critic/loss": 0.200787,
        },
        [
            1.208421,
            16.191448,
            4.479385,
            16.003642,
            0.044760,
            29.948835,
            2.493025,
            15.962838,
            0.051640,
            15.912449,
            1.031335,
            43.037953,
            5.680855,
            31.994420,
            0.124366,
            61.295801,
            3.567848,
            32.017211,
            0.141745,
            3.740604,
            0.329717,
            43.084646,
            5.629356,
            31.999759,
            0.004797,
            61.280595,
            3.536893,
            32.000653,
            0.005528,
            3.719788,
            0.321116,
            43.736861,
            6.031741,
            32.002683,
            0.071486,
            63.791461,
            4.077436,
            31.968809,
            0.073810,
            3.953204,
            0.203217,
        ],
        [-0.417064, 0.983500, -0.330899, -0.319120],
        [-0.372451, 1.000000, -1.000000, -0.436899],
    ),
    "sac": (
        {
            "critic/loss": 3.390316,
            "critic/q": -0.400712,
            "critic/target": -1.835426,
            "actor/loss": -0.161829,
            "actor/magnitude": 0.507604,
            "temperature/value": 0.298765,
            "temperature/loss": -3.164874,
            "actor/entropy": 2.619720,
        },
        [
            1.208403,
            16.193866,
            4.477036,
            16.005326,
            0.044930,
            29.954912,
            2.493928,
            15.956641,
            0.057651,
            15.913400,
            1.027097,
            43.042609,
            5.676075,
            31.988283,
            0.120703,
            61.285816,
            3.567112,
            32.017048,
            0.139241,
            3.743158,
            0.329566,
            43.084648,
            5.629239,
            31.999502,
            0.004693,
            61.280258,
            3.536897,
            32.000679,
            0.005482,
            3.719974,
            0.321113,
        ],
        [-0.413802, 0.987031, -0.330068, -0.314760],
        [0.554867, 0.740643, -0.719025, -1.000000],
    ),
}


@pytest.mark.parametrize("variant", ["na", "sac"])
def test_the_numbers_are_those_of_the_first_house(variant: str) -> None:
    agent, info = trained(variant)
    metrics, sums, played, first = GOLDEN[variant]
    assert info == pytest.approx(metrics, abs=1e-4)
    found = [float(p.detach().double().abs().sum()) for p in agent.networks.parameters()]
    assert sorted(found) == pytest.approx(sorted(sums), abs=1e-4)
    features = old_batch().features[:5]
    chunk, _ = agent.act(features, make_generator(3, "online/acting"))
    assert chunk[0].flatten().tolist() == pytest.approx(played, abs=1e-5)
    _, action = agent.act_base(features, make_generator(3, "online/base"))
    assert action[0].tolist() == pytest.approx(first, abs=1e-5)


def test_state_resumes_bit_for_bit() -> None:
    (reference, _), (resumed, _) = trained(), trained(steps=1)
    resumed.load_state_dict(copy.deepcopy(reference.state_dict()))
    batch, noise = random_batch(2), normal(B, D, seed=1)
    for agent in (reference, resumed):
        agent.update(batch, noise, noise)
        agent.distill(batch.features, noise)
    for a, b in zip(reference.networks.state_dict().values(), resumed.networks.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def same_learning(variant: Any, device: str, compiled: bool) -> None:
    """A few updates and distillations: as plain ones on the CPU, from the same weights."""
    config, agents = DSRLConfig(variant=variant, hidden=16, layers=2), []
    for where, how in (("cpu", False), (device, compiled)):
        compute = Compute(device=where, compile=how)  # type: ignore[arg-type]
        agent = DSRL(config, IdentityPolicy(), make_generator(0, "online/initialisation", where), compute)
        agent.load_state_dict(learner(config, IdentityPolicy()).state_dict())  # a checkpoint goes to another device
        for k in range(8):
            batch = Batch(*(part.to(where) for part in random_batch(k)))
            agent.update(batch, normal(B, D, seed=1).to(where), normal(B, D, seed=2).to(where))
            if variant == "na":
                agent.distill(batch.features, normal(B, D, seed=3).to(where))
        agents.append(agent)
    for a, b in zip(*(agent.networks.parameters() for agent in agents), strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("variant", ["na", "sac"])
def test_a_gpu_learns_the_same(variant: Any, compiled: bool) -> None:
    same_learning(variant, "cuda", compiled)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:.*capturable.*")
@pytest.mark.parametrize("network", ["mlp", "transformer", "unet"])
def test_a_captured_update_goes_through_a_denoiser(network: Any) -> None:
    """DSRL-NA asks the policy for chunks inside its update and its distillation: recorded as graphs they are the same."""
    found, policy = [], diffusion_policy(network=network).cuda()
    for compiled in (False, True):
        compute = Compute(device="cuda", compile=compiled)
        agent = DSRL(
            DSRLConfig(variant="na", hidden=16, layers=2), policy, make_generator(0, "online/initialisation", "cuda"), compute
        )
        for k in range(8):
            batch = Batch(
                normal(B, 3, seed=k), normal(B, 4, seed=k).tanh(), normal(B, 3, seed=k + 1), -torch.ones(B), torch.ones(B)
            )
            agent.update(Batch(*(part.cuda() for part in batch)), normal(B, 4, seed=1).cuda(), normal(B, 4, seed=2).cuda())
            agent.distill(batch.features.cuda(), normal(B, 4, seed=3).cuda())
        found.append(torch.cat([p.detach().flatten() for p in agent.networks.parameters()]))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["na", "sac"])
def test_a_compiled_update_gives_the_same_numbers(variant: Any) -> None:
    same_learning(variant, "cpu", True)


# -- the saved agent -------------------------------------------------------------------------------------------------------------
CONFIG = DSRLConfig(hidden=16, layers=2, action_magnitude=1.2)


def diffusion_policy(shapes: Any = None, observation_steps: int = 1, **changes: Any) -> DiffusionPolicy:
    normalization = Normalization(np.zeros(3), np.arange(1.0, 4.0), -2 * np.ones(2), np.ones(2))
    config = DiffusionConfig(**{"hidden": 16, "time_dim": 8, "denoising_steps": 10, "inference_steps": 2, **changes})
    shapes, about = shapes or {"state": (3,)}, About(method="bc", seed=4)
    policy = DiffusionPolicy(config, shapes, 2, 2, normalization, generator(4), observation_steps, about)
    return policy.eval().requires_grad_(False)


def saved(directory: Path, policy: Any = None) -> DSRLAgent:
    policy = policy or diffusion_policy()
    actor = make_actor(CONFIG, policy, generator(1)).requires_grad_(False)
    perturb(actor)
    agent = DSRLAgent(policy, actor, CONFIG)
    agent.save(directory)
    return agent


def test_an_agent_is_loaded_without_demonstrations(tmp_path: Path) -> None:
    original = saved(tmp_path)
    loaded, about = load_agent(tmp_path)
    observation = {"state": normal(5, 3)}
    raw = original.act(observation, generator(3))
    assert torch.equal(raw, loaded.act(observation, generator(3)))
    assert raw.shape == (5, 2, 2)
    assert (about.method, about.seed) == ("bc", 4)
    assert float(raw.min()) >= -2 - 1e-5
    assert float(raw.max()) <= 1 + 1e-5
    assert float(raw.min()) < -1.2
    greedy = DSRLAgent.load(tmp_path, deterministic=True)
    assert torch.equal(greedy.act(observation, generator(3)), greedy.act(observation, generator(5)))


def test_a_policy_alone_is_an_agent_too(tmp_path: Path) -> None:
    save_policy(tmp_path / "policy.safetensors", diffusion_policy())
    agent, about = load_agent(tmp_path, inference_steps=5)
    assert isinstance(agent, PolicyAgent)
    assert agent.policy.config.inference_steps == 5
    assert about.method == "bc"
    with pytest.raises(InputError, match="no such setting"):
        load_agent(tmp_path, inference_step=5)


def test_agents_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    agent = saved(tmp_path)
    with pytest.raises(InputError, match=r"no policy and no agent[\s\S]*let it finish"):
        load_agent(tmp_path / "..")
    with pytest.raises(InputError, match="fixed by its run"):
        load_agent(tmp_path, inference_steps=5)
    for other in (diffusion_policy(inference_steps=3), diffusion_policy(denoised_clip=0.9)):  # only the sampler differs
        with pytest.raises(InputError, match="another base policy"):
            DSRLAgent.load(tmp_path, other)
    save_policy(tmp_path / BASE_POLICY_FILE, diffusion_policy(hidden=24))
    with pytest.raises(InputError, match="another base policy"):
        load_agent(tmp_path)
    (tmp_path / BASE_POLICY_FILE).unlink()
    with pytest.raises(InputError, match="not beside it"):
        load_agent(tmp_path)
    agent.actor.net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="not saved"):
        agent.save(tmp_path / "nan")
    assert not (tmp_path / "nan").exists()


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path)
    content = bytearray((tmp_path / AGENT_FILE).read_bytes())
    content[-7] ^= 1
    (tmp_path / AGENT_FILE).write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_agent(tmp_path)


@pytest.fixture(scope="module")
def agent_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DSRLAgent, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("agent")
    return directory, saved(directory), load_tree(directory / AGENT_FILE)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_changed_file_is_refused_or_plays_the_same(agent_files: Any, data: st.DataObject) -> None:
    directory, original, tree = agent_files
    tree = copy.deepcopy(tree)
    mutate(tree, data)
    save_tree(directory / AGENT_FILE, tree)
    refused, agent = "", original
    try:
        agent, _ = load_agent(directory)
    except InputError as error:
        refused = str(error)
    assert not refused or AGENT_FILE in refused
    if agent.config == original.config and not agent.deterministic:
        weights = zip(agent.actor.parameters(), original.actor.parameters(), strict=True)
        same = all(torch.equal(a, b) for a, b in weights)
        observation = {"state": normal(5, 3)}
        assert same == torch.equal(agent.act(observation, generator(3)), original.act(observation, generator(3)))
    assert bool(agent.act({"state": normal(5, 3)}, generator(3)).isfinite().all())


@pytest.mark.parametrize(
    "change",
    [{"hidden": 0}, {"layers": 0}, {"lr": float("inf")}, {"lr": float("nan")}, {"lr": 1e30}, {"lr": 0.0}, {"batch_size": 0}, {"utd": 0},
     {"discount": 1.1}, {"tau": 0.0}, {"action_magnitude": -1.0}, {"noise_critic_grad_steps": 0}, {"variant": "nb"},
     {"target_entropy": float("nan")}, {"first_temperature": 1.0}],
)  # fmt: skip
def test_refuses_impossible_numbers(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        DSRLConfig(**change)
    assert dataclasses.replace(CONFIG, variant="sac", noise_critic_grad_steps=0).noise_critic_grad_steps == 0


def test_a_policy_loaded_elsewhere_is_the_same_base_policy(tmp_path: Path) -> None:
    saved(tmp_path)
    policy = load_policy(tmp_path / BASE_POLICY_FILE)
    assert DSRLAgent.load(tmp_path, policy).policy is policy
