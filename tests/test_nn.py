"""Layers against torch's own, initialisation, averages, states of generators, weights from files."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from postbc.errors import InputError, NotFiniteError
from postbc.nn import (
    EMA,
    MLP,
    StackedLayerNorm,
    StackedLinear,
    StackedMLP,
    check_memory,
    check_weights,
    generator_state,
    linear,
    polyak,
    set_generator_state,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_stacked_mlp_equals_separate_networks():
    stacked = StackedMLP(3, 5, (8, 8), 2, generator(), "tanh", layer_norm=True)
    x = torch.randn(3, 7, 5)
    y = stacked(x)
    for m in range(3):
        layers: list[nn.Module] = []
        for layer in stacked:
            if isinstance(layer, StackedLinear):
                plain = nn.Linear(*layer.weight.shape[1:])
                plain.weight.data, plain.bias.data = layer.weight[m].T.clone(), layer.bias[m, 0].clone()
                layers.append(plain)
            else:
                layers.append(nn.LayerNorm(8) if isinstance(layer, StackedLayerNorm) else nn.Tanh())
        torch.testing.assert_close(nn.Sequential(*layers)(x[m]), y[m])


def test_gradients_of_members_stay_apart():
    stacked = StackedMLP(2, 3, (4,), 1, generator())
    stacked(torch.randn(2, 5, 3))[0].sum().backward()
    assert all(p.grad[1].abs().max() == 0 and p.grad[0].abs().max() > 0 for p in stacked.parameters())


def test_a_stack_of_one_and_a_plain_network_begin_alike_and_agree():
    x = torch.randn(6, 5)
    for norm in (False, True):
        stacked, plain = (
            StackedMLP(1, 5, (8,), 2, generator(3), layer_norm=norm),
            MLP(5, (8,), 2, generator(3), layer_norm=norm),
        )
        torch.testing.assert_close(stacked(x[None])[0], plain(x))


def test_initialisation_has_the_linear_layers_range():
    layer = linear(9, 400, generator())
    assert layer.weight.abs().max() <= 1 / 3
    assert layer.weight.std().item() == pytest.approx((1 / 3) / 3**0.5, rel=0.05)
    assert layer.weight[0, 0].item() == pytest.approx((2 * torch.rand(1, generator=generator()).item() - 1) / math.sqrt(9))
    with torch.device("meta"):
        assert MLP(2**20, (2**20, 2**20), 3, generator())[2].weight.is_meta


def test_ema_and_polyak():
    module = nn.Linear(2, 2)
    ema = EMA(module, decay=0.9)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    ema.updates = 1000  # past the warm-up
    ema.update()
    for shadow, old in zip(ema.shadow, before):
        torch.testing.assert_close(shadow, 0.9 * old + 0.1 * (old + 1))
    fresh = EMA(module, decay=0.995)
    with torch.no_grad():
        module.weight.add_(1)
    fresh.update()
    torch.testing.assert_close(fresh.shadow[0], module.weight.detach() - 0.1)
    ema.copy()
    torch.testing.assert_close(ema.shadow[0], module.weight.detach())
    target = [torch.zeros(3)]
    polyak(target, [torch.ones(3)], 0.25)
    torch.testing.assert_close(target[0], torch.full((3,), 0.25))
    other = nn.Linear(2, 2)
    expected = 0.5 * (other.weight + module.weight)
    polyak(other, module, 0.5)
    torch.testing.assert_close(other.weight, expected)


def test_generators_come_back_and_cross_devices_in_one_way():
    g = generator(5)
    torch.rand(3, generator=g)
    state, following = generator_state(g), torch.rand(4, generator=g)
    set_generator_state(g, state)
    assert torch.equal(torch.rand(4, generator=g), following)
    foreign = torch.arange(16, dtype=torch.uint8)  # a CUDA generator's state has 16 bytes
    draws = []
    for seed in (1, 2):
        g = generator(seed)
        set_generator_state(g, foreign)
        draws.append(torch.rand(4, generator=g))
    assert torch.equal(*draws)


def test_weights_that_do_not_fit_are_refused_by_name():
    expected = dict(nn.Linear(3, 2).state_dict())
    check_weights(expected, expected, "f")
    for bad, words in (
        (None, "no weights"), ({"weight": expected["weight"]}, "parameters/bias"), ({**expected, "more": torch.zeros(1)}, "more"),
        ({**expected, "bias": torch.zeros(3)}, "another shape"), ({**expected, "bias": expected["bias"].double()}, "another shape"),
        ({**expected, "bias": [0.0, 0.0]}, "another shape"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            check_weights(bad, expected, "f")
    with pytest.raises(NotFiniteError, match="bias"):
        check_weights({**expected, "bias": torch.tensor([0.0, math.nan])}, expected, "f")


def test_networks_larger_than_the_memory_are_refused():
    with torch.device("meta"):
        huge = nn.Linear(2**20, 2**20)
    with pytest.raises(InputError, match="do not fit into memory"):
        check_memory(huge, 4, "cpu", "hidden")
    check_memory(nn.Linear(3, 3), 4, "cpu", "hidden")
