"""The finetuners' networks: log-probabilities, twin critics as separate networks, a step's gradients, the optimiser's state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from postbc.agents.networks import (
    Actor,
    Critics,
    Value,
    adam,
    copy_into,
    descend,
    means,
    optimizer_state,
    set_optimizer_state,
)
from postbc.devices import Compute, _Captured
from postbc.errors import InputError, NotFiniteError
from postbc.nn import MLP

F, D, B = 4, 4, 32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def perturb(module: nn.Module, seed: int = 0) -> None:
    """Random gains and biases too, so that an exchanged or forgotten one shows."""
    g = generator(seed)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)


def test_log_prob_is_that_of_the_tanh_transformed_normal() -> None:
    actor = Actor(F, D, (16,), generator(0))
    perturb(actor, 2)
    features, noise = normal(B, F, seed=3), normal(B, D, seed=5)
    u, log_prob = actor.sample(features, noise)
    mean, log_std = actor(features)
    transformed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform(cache_size=1)
    )
    inside = (u.abs() < 0.99).all(-1)  # nearer to ±1 the 1e-6 of stable-baselines3 shows
    assert inside.sum() > B // 2
    torch.testing.assert_close(log_prob[inside], transformed.log_prob(u).sum(-1)[inside], atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(actor.mode(features), torch.tanh(mean))


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "relu", "mish"])
@pytest.mark.parametrize("hidden", [(16, 24), (16,), ()])
def test_twin_critics_are_separate_networks(hidden: tuple[int, ...], activation: str, layer_norm: bool) -> None:
    both = Critics(F, 2, hidden, generator(0), activation, layer_norm)  # type: ignore[arg-type]
    perturb(both)
    features, action = normal(6, F), normal(6, 2, seed=1)
    q = both(features, action)
    assert q.shape == (2, 6)
    for c in range(2):
        one = MLP(F + 2, hidden, 1, generator(9), activation, layer_norm)  # type: ignore[arg-type]
        for mine, stacked in zip(one.parameters(), both.parameters(), strict=True):
            share = stacked[c].detach()
            mine.data.copy_(share.T if mine.ndim == 2 else share.squeeze(0))
        torch.testing.assert_close(one(torch.cat((features, action), 1)).squeeze(-1), q[c], atol=1e-6, rtol=1e-5)
    gradients = torch.autograd.grad(q[1].sum(), list(both.parameters()))
    assert all(bool(g[0].eq(0).all()) and bool(g[1].ne(0).any()) for g in gradients)


def test_initialisation_is_that_of_torch_linear() -> None:
    critics = Critics(F, D, (64, 64), generator(1), critics=80)
    weight = next(p for p in critics.parameters() if p.shape == (80, 64, 64))
    assert abs(float(weight.detach().std()) - 1 / math.sqrt(3 * 64)) < 1e-3
    target = Critics(F, D, (64, 64), generator(2), critics=80)
    copy_into(target, critics)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), critics.parameters(), strict=True))
    assert not any(p.requires_grad for p in target.parameters())


def test_a_step_takes_no_gradients_of_others_parameters() -> None:
    actor, critics = Actor(F, D, (8,), generator(0)), Critics(F, D, (8,), generator(1))
    features = normal(B, F)
    loss = -critics(features, actor.sample(features, normal(B, D, seed=1))[0]).mean()
    before = [p.clone() for p in actor.parameters()]
    descend(adam(actor.parameters(), 1e-3), loss)
    assert all(p.grad is None for p in critics.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True))


def test_the_optimisers_state_goes_on_alike() -> None:
    nets = [Value(F, (8,), generator(0)) for _ in range(2)]
    optimizers = [adam(net.parameters(), 1e-2) for net in nets]
    set_optimizer_state(optimizers[1], optimizer_state(optimizers[0]))  # before its first step there is none
    x = normal(B, F)
    for _ in range(3):
        descend(optimizers[0], nets[0](x).square().mean())
    nets[1].load_state_dict(nets[0].state_dict())
    set_optimizer_state(optimizers[1], optimizer_state(optimizers[0]))
    for net, optimizer in zip(nets, optimizers, strict=True):
        descend(optimizer, net(x).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_metrics_that_are_not_finite_name_themselves_and_the_step() -> None:
    assert means({"a": torch.tensor([1.0, 2.0])}, 3) == {"a": 1.5}
    assert means({}, 3) == {}
    with pytest.raises(NotFiniteError, match=r"critic/loss[\s\S]*step 40"):
        means({"a": torch.zeros(2), "critic/loss": torch.tensor([1.0, math.nan])}, 40)


def test_adam_is_fit_for_capture_only_where_it_is_captured() -> None:
    """torch warns of, and pays for, one that is and is not."""
    net = Value(F, (4,), generator(0))
    assert not adam(net.parameters(), 1e-3).defaults["capturable"]
    assert adam(net.parameters(), 1e-3, captured=True).defaults["capturable"]
    assert not Compute(device="cpu", compile=True).captures


def test_float32_is_float32_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own default rounds the inputs of a GPU's convolutions to 10 bits, and takes what is quickest."""
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    before = cudnn.allow_tf32, cudnn.deterministic
    try:
        for precision, rounded in (("float32", False), ("bfloat16", True), ("float32", False)):
            cudnn.deterministic = False
            Compute(device="cpu", precision=precision).start()  # type: ignore[arg-type]
            assert (cudnn.allow_tf32, cudnn.deterministic) == (rounded, True)
    finally:
        cudnn.allow_tf32, cudnn.deterministic = before
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_a_gpus_convolutions_are_float32() -> None:
    device = Compute(device="cuda").start()
    x, weight = normal(4, 64, 32, 32, seed=0), normal(64, 64, 3, 3, seed=1)
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    there = torch.nn.functional.conv2d(x.to(device), weight.to(device)).cpu().double()
    assert float((there - exact).abs().max() / exact.abs().max()) < 1e-5  # TF32: about 3e-4


@pytest.mark.gpu
def test_a_captured_update_gives_the_same_numbers() -> None:
    losses = []
    for compiled in (False, True):
        net = Value(F, (32,), generator(0)).cuda()
        optimizer = adam(net.parameters(), 1e-3, captured=compiled)

        def update(x: torch.Tensor, net: Value = net, optimizer: torch.optim.Adam = optimizer) -> torch.Tensor:
            loss = net(x).square().mean()
            descend(optimizer, loss)
            return loss.detach()

        run = Compute(device="cuda", compile=compiled).compiled(update)
        losses.append([float(run(normal(B, F, seed=k).cuda())) for k in range(12)])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-6, rtol=1e-5)


class Recorded:
    """Stands for a CUDA graph that has been recorded."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.mark.parametrize("rows", [1, B - 1])
def test_a_captured_update_refuses_batches_of_another_size(rows: int) -> None:
    """One row would be broadcast without a word."""
    captured, graph = _Captured(lambda x: x.sum()), Recorded()
    captured.calls, captured.inputs, captured.graph, captured.result = captured.WARM_UP, [normal(B, F)], graph, None  # type: ignore[assignment]
    with pytest.raises(InputError, match=rf"recorded with[\s\S]*{rows}, {F}[\s\S]*{B}, {F}"):
        captured(normal(rows, F))
    assert graph.replays == 0
    given = normal(B, F, seed=1)
    captured(given)
    assert graph.replays == 1
    assert torch.equal(captured.inputs[0], given)
