"""ValueDICE: its loss by hand, its gradient against the logarithm itself, transitions, penalties, and a policy of the gaussian kind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import made
from postbc.data.episodes import Dataset
from postbc.data.normalization import Normalization
from postbc.data.training_set import TrainingSetConfig
from postbc.data.windows import Windows
from postbc.errors import InputError
from postbc.policies.base import load_policy, save_policy
from postbc.policies.diffusion import DiffusionConfig
from postbc.policies.gaussian import GaussianConfig, GaussianPolicy
from postbc.pretraining import PretrainingConfig, pretrain, train
from postbc.seeding import make_generator
from postbc.stages.pretrain import Pretrain, pretrain_policy
from postbc.value_dice import (
    Nu,
    Transitions,
    ValueDICE,
    ValueDICEConfig,
    dice_loss,
    gradient_penalty,
    orthogonal_penalty,
    transitions,
)
from toy import stopped

S, A, T = 3, 2, 2


def dataset(episodes: int = 4, length: int = 12) -> Dataset:
    rng = np.random.default_rng(0)
    states = [rng.uniform(-1, 1, (length, S)).astype(np.float32) for _ in range(episodes)]
    return Dataset.from_arrays(states, [0.8 * np.tanh(2 * s[:, :A]) for s in states])


def gaussian(data: Dataset, seed: int = 0, hidden: int = 32) -> GaussianPolicy:
    return GaussianPolicy(
        GaussianConfig(hidden=hidden), data.shapes, A, T, Normalization.fit(data), make_generator(seed, "policy/initialisation")
    )


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- losses --------------------------------------------------------------------------------------------------------------------
def test_the_loss_by_hand_and_its_gradient_is_that_of_the_logarithm() -> None:
    at, after, first = (normal(5, seed=k).requires_grad_(True) for k in range(3))
    loss = dice_loss(at, after, first, 0.9)
    d = [float(a) - 0.9 * float(b) for a, b in zip(at.detach(), after.detach(), strict=True)]
    total = sum(map(math.exp, d))
    expected = sum(math.exp(v) / total * v for v in d) - 0.1 * float(first.detach().mean())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    found = torch.autograd.grad(loss, (at, after, first))
    plain = torch.logsumexp(at - 0.9 * after, 0) - 0.1 * first.mean()
    for a, b in zip(found, torch.autograd.grad(plain, (at, after, first)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_penalty_of_a_linear_function() -> None:
    nu = Nu(2, 2, 8, torch.Generator().manual_seed(0))
    nu.net = nn.Sequential(nn.Linear(4, 1, bias=False))  # type: ignore[assignment]
    nu.net[0].weight.data = torch.tensor([[3.0, 0.0, 4.0, 0.0]])  # type: ignore[union-attr]
    found = gradient_penalty(nu, normal(6, 4), normal(6, 4, seed=1), torch.rand(6, 1))
    assert float(found.detach()) == pytest.approx(16.0)


def test_the_orthogonal_penalty_by_hand() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0]])
    assert float(orthogonal_penalty(nn.Sequential(layer)).detach()) == 2 * 6.0**2
    policy = gaussian(dataset())
    assert float(orthogonal_penalty(nn.Sequential(policy.network[2])).detach()) < 1e-8  # square, and orthogonal to begin with
    assert Nu(3, 2, 8, torch.Generator().manual_seed(0)).net[-1].bias is None


def test_transitions_end_in_the_absorbing_state() -> None:
    data = dataset(2, 6)
    policy, windows = gaussian(data), Windows(data, T)  # five windows an episode
    found, initial = transitions(policy, windows, absorbing=3)
    assert len(initial) == 10
    assert len(found.state) == 10 + 6
    end = torch.tensor([0.0, 0, 0, 1])
    for i in range(10):
        inside = i % 5 + T < 5
        torch.testing.assert_close(found.next_state[i], found.state[i + T] if inside else end)
        assert float(found.state[i, -1]) == 0
    for part in (found.state, found.next_state):
        torch.testing.assert_close(part[10:], end.expand(6, -1))
    assert not found.action[10:].any()


def test_one_step_is_the_one_written_out() -> None:
    data = dataset()
    policy = gaussian(data)
    trainer = ValueDICE(policy, Windows(data, T), ValueDICEConfig(batch_size=8, hidden=16), 0)
    expert = Transitions(*(part[:8] for part in trainer.expert))
    state = trainer.streams["noise"].get_state()
    of_nu, of_actor = trainer.losses(expert, trainer.initial[:8], torch.full((8, 1), 0.3))
    trainer.streams["noise"].set_state(state)
    actions = []
    for s in (expert.next_state, trainer.initial[:8]):
        mean, std = policy.distribution(s)
        actions.append(torch.tanh(mean + std * torch.randn(mean.shape, generator=trainer.streams["noise"])))
    nu = lambda s, a: trainer.nu(torch.cat((s, a), -1))  # noqa: E731
    core = dice_loss(
        nu(expert.state, expert.action), nu(expert.next_state, actions[0]), nu(trainer.initial[:8], actions[1]), 0.99
    )
    mixed = 0.3 * torch.cat((expert.state, expert.action), -1) + 0.7 * torch.cat((trainer.initial[:8], actions[1]), -1)
    mixed = mixed.detach().requires_grad_(True)
    gradient = torch.autograd.grad(trainer.nu(mixed).sum(), mixed)[0]
    penalty = ((gradient.norm(dim=1) - 1) ** 2).mean()
    assert float(of_nu.detach()) == pytest.approx(float(core.detach() + 10 * penalty), rel=1e-4)
    expected = float(-core.detach()) + 1e-4 * float(orthogonal_penalty(policy.network).detach())
    assert float(of_actor.detach()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    networks = nn.ModuleList([trainer.nu, policy.network])
    before = [p.clone() for p in networks.parameters()]
    trainer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, networks.parameters(), strict=True) if a.dim() > 1)


# -- learning ------------------------------------------------------------------------------------------------------------------
def test_it_imitates() -> None:
    """After a while the policy's mean is nearer to the demonstrated chunks than before."""
    data = dataset(8, 20)
    policy, windows = gaussian(data), Windows(data, T)
    rows = torch.arange(len(windows))
    features, chunks = policy.encode(windows.observation(rows)), policy.normalization.normalize_action(windows.chunk(rows))

    def error() -> float:
        return float((policy.sample(features, noise=torch.zeros(len(rows), T, A)) - chunks).abs().mean().detach())

    before = error()
    train(ValueDICE(policy, windows, ValueDICEConfig(steps=2500, actor_lr=1e-3, hidden=64), 0), "test", 2500)
    assert error() < 0.6 * before


def test_a_gaussian_policy_is_a_policy_like_any_other(tmp_path: Path) -> None:
    data = dataset(6, 20)
    policy, windows = gaussian(data, hidden=64), Windows(data, T)
    pretrain(policy, windows, PretrainingConfig("bc", steps=600, learning_rate=3e-3), 0)
    rows = torch.arange(len(windows))
    features, chunks = policy.encode(windows.observation(rows)), policy.normalization.normalize_action(windows.chunk(rows))
    noise = torch.zeros(len(rows), T, A)
    assert (
        float((policy.sample(features, noise=noise) - chunks)[:, 0].abs().mean()) < 0.1
    )  # the second is of a state that is not seen
    mean, std = policy.distribution(nn.functional.pad(features[:3], (0, 1)))
    base = torch.distributions.Normal(mean, std)
    squashed = torch.distributions.TransformedDistribution(base, [torch.distributions.TanhTransform()])
    action = chunks[:3].flatten(1).clamp(-0.999, 0.999)
    torch.testing.assert_close(
        policy.loss(features[:3], chunks[:3], torch.Generator()), -squashed.log_prob(action).mean(1), atol=1e-3, rtol=1e-3
    )
    save_policy(tmp_path / "policy.safetensors", policy)
    again = load_policy(tmp_path)
    torch.testing.assert_close(again.sample(features, noise=noise), policy.sample(features, noise=noise))
    with pytest.raises(ValueError, match="noise"):
        policy.sample(features)


# -- the stage -----------------------------------------------------------------------------------------------------------------
def stage(tmp_path: Path, policy: Any = None, **options: Any) -> Any:
    path = tmp_path / "data.hdf5"
    if not path.exists():
        made.write_demonstrations(path, trajectories=4, length=12)
    dice = ValueDICEConfig(steps=40, hidden=16, batch_size=16)
    config = Pretrain(
        TrainingSetConfig(path, num_trajectories=2), tmp_path / "out", policy or GaussianConfig(hidden=16),
        pretraining=PretrainingConfig("value-dice"), value_dice=dice, resume=True, **options,
    )  # fmt: skip
    return pretrain_policy(config, 0)


def test_the_stage_pretrains_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = stage(tmp_path / "whole")
    assert policy.about.method == "value-dice"
    assert policy.about.steps == 40
    with monkeypatch.context() as patch:
        patch.setattr("postbc.runs.Checkpoints.due", property(lambda self: True))
        with stopped(ValueDICE, "step", 25, RuntimeError("stop")):
            stage(tmp_path / "cut")
    again = stage(tmp_path / "cut")
    for a, b in zip(policy.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for options, words in (({"policy": DiffusionConfig(hidden=16)}, "gaussian"), ({"epochs": 3}, "value-dice.steps")):
        with pytest.raises(InputError, match=words):
            stage(tmp_path, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no regression"):
        pretrain(gaussian(dataset()), Windows(dataset(), T), PretrainingConfig("value-dice"), 0)
