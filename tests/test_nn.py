"""Stacked layers against torch's own, generators, EMA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from postbc.nn import (
    EMA,
    StackedLayerNorm,
    StackedLinear,
    StackedMLP,
    generator_states,
    make_generators,
    polyak,
    randint,
    randn,
    set_generator_states,
)


def test_stacked_mlp_equals_separate_networks():
    stacked = StackedMLP(3, 5, (8, 8), 2, make_generators([0, 1, 2]), nn.Tanh, layer_norm=True)
    x = torch.randn(3, 7, 5)
    y = stacked(x)
    for m in range(3):
        layers = []
        for layer in stacked:
            if isinstance(layer, StackedLinear):
                plain = nn.Linear(*layer.weight.shape[1:])
                plain.weight.data, plain.bias.data = layer.weight[m].T.clone(), layer.bias[m, 0].clone()
                layers.append(plain)
            elif isinstance(layer, StackedLayerNorm):
                layers.append(nn.LayerNorm(8))
            else:
                layers.append(nn.Tanh())
        torch.testing.assert_close(nn.Sequential(*layers)(x[m]), y[m])


def test_gradients_of_members_stay_apart():
    stacked = StackedMLP(2, 3, (4,), 1, make_generators([0, 1]))
    stacked(torch.randn(2, 5, 3))[0].sum().backward()
    assert all(p.grad[1].abs().max() == 0 and p.grad[0].abs().max() > 0 for p in stacked.parameters())


def test_initialisation_belongs_to_the_seed_and_has_the_linear_layers_range():
    both = StackedLinear(4, 9, 6, make_generators([3, 7]))
    alone = StackedLinear(2, 9, 6, make_generators([7]))
    torch.testing.assert_close(both.weight[2:], alone.weight, rtol=0, atol=0)
    assert both.weight.abs().max() <= 1 / 3
    assert both.weight.std().item() == pytest.approx((1 / 3) / 3**0.5, rel=0.2)


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_streams_differ(a, b, s, t):
    x, y = (torch.randint(2**62, (4,), generator=make_generators([seed], stream)[0]) for seed, stream in ((a, s), (b, t)))
    assert torch.equal(x, y) == ((a, s) == (b, t))


def test_draws_do_not_depend_on_company_and_states_restore():
    together, alone = make_generators([4, 5]), make_generators([5])
    assert torch.equal(randn(together, 3)[1], randn(alone, 3)[0])
    states = generator_states(together)
    first = randint(together, [10, 1000], 6)
    assert first[0].max() < 10
    set_generator_states(together, states)
    assert torch.equal(randint(together, [10, 1000], 6), first)


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
