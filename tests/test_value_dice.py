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
from postbc.devices import Compute
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


def gaussian(data: Dataset, seed: int = 0, hidden: int = 32, chunk: int = T, observation_steps: int = 1) -> GaussianPolicy:
    return GaussianPolicy(
        GaussianConfig(hidden=hidden), data.shapes, A, chunk, Normalization.fit(data), make_generator(seed, "policy/initialisation"),
        observation_steps,
    )  # fmt: skip


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


@pytest.mark.parametrize(("tail", "starts"), [("drop", 4), ("pad", 6)])
def test_transitions_go_to_the_state_after_the_chunk_or_to_the_absorbing_state(tail: Any, starts: int) -> None:
    """Two episodes of states s_0 … s_5, chunks of three: 0→3, 1→4, 2→5, and from 3 (padded: 3, 4, 5) on the end."""
    data = dataset(2, 6)
    policy, windows = gaussian(data, chunk=3), Windows(data, 3, tail=tail)
    found, initial = transitions(policy, windows, absorbing=3)
    assert len(initial) == 2 * starts
    assert len(found.state) == 2 * starts + 6
    end = torch.tensor([0.0, 0, 0, 1])
    for e, episode in enumerate(data):
        s = nn.functional.pad(policy.encode({"state": torch.as_tensor(episode.observations["state"])}), (0, 1))
        actions = policy.normalization.normalize_action(torch.as_tensor(episode.actions))
        for t in range(starts):
            row = e * starts + t
            torch.testing.assert_close(found.state[row], s[t])
            torch.testing.assert_close(found.next_state[row], {0: s[3], 1: s[4], 2: s[5]}.get(t, end))
            chunk = torch.stack([actions[min(t + k, 5)] for k in range(3)])
            torch.testing.assert_close(found.action[row], chunk.flatten())
    for part in (found.state, found.next_state):
        torch.testing.assert_close(part[2 * starts :], end.expand(6, -1))
    assert not found.action[2 * starts :].any()


def test_transitions_of_stacked_observations() -> None:
    """The next state is looked at with as many observations as the state."""
    data = dataset(1, 6)
    policy, windows = gaussian(data, observation_steps=2), Windows(data, T, observation_steps=2)
    found, _ = transitions(policy, windows, absorbing=0)
    state = torch.as_tensor(data[0].observations["state"])
    for t in range(4):
        expected = policy.encode({"state": state[None, [t + 1, t + 2]]})[0]
        torch.testing.assert_close(found.next_state[t, :-1], expected)


def test_one_step_is_the_one_written_out() -> None:
    data = dataset()
    policy = gaussian(data)
    trainer = ValueDICE(policy, Windows(data, T), ValueDICEConfig(batch_size=8, hidden=16), 0)
    expert = Transitions(*(part[:8] for part in trainer.expert))
    noise = normal(8, T * A, seed=1), normal(8, T * A, seed=2)
    of_nu, of_actor = trainer.losses(expert, trainer.initial[:8], torch.full((8, 1), 0.3), noise)
    actions = []
    for s, drawn in zip((expert.next_state, trainer.initial[:8]), noise, strict=True):
        mean, std = policy.distribution(s)
        actions.append(torch.tanh(mean + std * drawn))
    nu = lambda s, a: trainer.nu(torch.cat((s, a), -1))  # noqa: E731
    core = dice_loss(
        nu(expert.state, expert.action), nu(expert.next_state, actions[0]), nu(trainer.initial[:8], actions[1]), 0.99
    )
    norms = []
    for i in range(8):
        first = torch.cat((trainer.initial[i], actions[1][i]))
        for s, a in ((expert.state[i], expert.action[i]), (expert.next_state[i], actions[0][i])):
            mixed = (0.3 * torch.cat((s, a)) + 0.7 * first).detach().requires_grad_(True)
            norms.append(float(torch.autograd.grad(trainer.nu(mixed), mixed)[0].norm()))
    penalty = sum((norm - 1) ** 2 for norm in norms) / 16
    assert float(of_nu.detach()) == pytest.approx(float(core.detach()) + 10 * penalty, rel=1e-4)
    expected = float(-core.detach()) + 1e-4 * float(orthogonal_penalty(policy.network).detach())
    assert float(of_actor.detach()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    networks = nn.ModuleList([trainer.nu, policy.network])
    before = [p.clone() for p in networks.parameters()]
    trainer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, networks.parameters(), strict=True) if a.dim() > 1)


# -- devices, precision --------------------------------------------------------------------------------------------------------
def learnt(steps: int = 8, **compute: Any) -> tuple[ValueDICE, list[float]]:
    """A few steps on the same numbers whatever the device."""
    data, how = dataset(), Compute(**compute)
    trainer = ValueDICE(gaussian(data), Windows(data, T), ValueDICEConfig(batch_size=8, hidden=16, actor_lr=1e-3), 0, how)
    trainer.nu.load_state_dict(Nu(S + 1, T * A, 16, torch.Generator().manual_seed(7)).state_dict())
    device, losses = trainer.initial.device, []
    for k in range(steps):
        expert = Transitions(*(part[k : k + 8] for part in trainer.expert))
        noise = normal(8, T * A, seed=2 * k).to(device), normal(8, T * A, seed=2 * k + 1).to(device)
        losses.append(float(trainer.update(expert, trainer.initial[:8], torch.full((8, 1), 0.3, device=device), noise)))
    return trainer, losses


def test_it_computes_in_the_chosen_precision() -> None:
    (half, found), (plain, expected) = learnt(device="cpu", precision="bfloat16"), learnt(device="cpu")
    assert found != expected
    assert found == pytest.approx(expected, rel=0.05, abs=0.05)
    for a, b in zip(half.policy.parameters(), plain.policy.parameters(), strict=True):
        assert a.dtype == b.dtype == torch.float32


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(InputError, match="differentiates twice"):
        learnt(device="cpu", compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_learns_the_same(compiled: bool) -> None:
    (here, expected), (there, found) = learnt(device="cpu"), learnt(device="cuda", compile=compiled)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    for a, b in ((here.nu, there.nu), (here.policy.network, there.policy.network)):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q.cpu(), atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_goes_on_on_another_device(compiled: bool) -> None:
    former, _ = learnt(device="cpu")
    trainer, _ = learnt(0, device="cuda", compile=compiled)
    state = former.state()
    trainer.load_state({**state, "streams": trainer.state()["streams"]})
    for _ in range(6):
        assert bool(trainer.step().isfinite())
    assert trainer.done == former.done + 6


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
def stage(tmp_path: Path, policy: Any = None, tail: Any = "drop", **options: Any) -> Any:
    path = tmp_path / "data.hdf5"
    if not path.exists():
        made.write_demonstrations(path, trajectories=4, length=12)
    dice = ValueDICEConfig(steps=40, hidden=16, batch_size=16)
    config = Pretrain(
        TrainingSetConfig(path, num_trajectories=2, tail=tail), tmp_path / "out", policy or GaussianConfig(hidden=16),
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
    for options, words in (
        ({"policy": DiffusionConfig(hidden=16)}, "gaussian"), ({"epochs": 3}, "value-dice.steps"), ({"tail": "mask"}, "drop or pad"),
        ({"compute": Compute(device="cpu", compile=True)}, "differentiates twice"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            stage(tmp_path, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no regression"):
        pretrain(gaussian(dataset()), Windows(dataset(), T), PretrainingConfig("value-dice"), 0)
