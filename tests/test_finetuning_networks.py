"""The finetuners' networks: the MLP against its layers, frozen parameters, twin critics as separate networks."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from postbc.finetuning.networks import Critics, select_members
from postbc.nn import StackedMLP, frozen, make_generators, perceptrons, randn

torch.set_num_threads(1)


def make(members: int, activation: type[nn.Module], layer_norm: bool, hidden: tuple[int, ...] = (16, 24)) -> StackedMLP:
    net = StackedMLP(members, 5, hidden, 3, make_generators([0]), activation, layer_norm).double()
    for k, parameter in enumerate(net.parameters()):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return net


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Mish])
@pytest.mark.parametrize("hidden", [(16, 24), (16,), ()])
def test_the_network_equals_its_layers_one_by_one(
    members: int, layer_norm: bool, activation: Any, hidden: tuple[int, ...]
) -> None:
    net = make(members, activation, layer_norm, hidden)
    x = randn(make_generators(range(members)), 7, 5).double().requires_grad_()
    weight = randn(make_generators(range(members), 1), 7, 3).double()
    wanted = [x, *net.parameters()]
    plain = nn.Sequential.forward(net, x)
    expected = torch.autograd.grad((plain * weight).sum(), wanted)
    found = net(x)
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=1e-10)
    for a, b in zip(torch.autograd.grad((net(x) * weight).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    only = torch.autograd.grad((net(x.detach()) * weight).sum(), wanted[1:])  # the input's gradient is not asked for
    for a, b in zip(only, expected[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    (inner,) = torch.autograd.grad((perceptrons(x, frozen(net.layers)) * weight).sum(), [x])
    torch.testing.assert_close(inner, expected[0], atol=1e-12, rtol=1e-10)
    assert not perceptrons(x.detach(), frozen(net.layers)).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain.detach(), atol=1e-12, rtol=1e-10)


PRINT_BITS = """
import hashlib, torch
from torch import nn
from postbc.finetuning.dsrl import DSRL, DSRLConfig
from postbc.finetuning.iql import IQL, IQLConfig
from postbc.finetuning.replay import Replay
from postbc.members import AdamState
from postbc.nn import StackedMLP, make_generators, rand, randn
from postbc.posterior.member import train_member

torch.set_num_threads(1)

def digest(tensors):
    print(hashlib.md5(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest())

x = torch.randn(2, 64, 19, generator=torch.Generator().manual_seed(1))
for activation in (nn.ReLU, nn.Tanh, nn.Mish):
    net = StackedMLP(2, 19, (64, 64), 28, make_generators([0]), activation, layer_norm=True)
    for _ in range(4):  # TorchScript runs its first calls otherwise than later ones
        y = net(x)
        digest([y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))])
net = StackedMLP(1, 19, (64, 64), 28, make_generators([0]))
for reduced in (False, True):
    values = [p.detach()[0] for p in net.parameters()]
    state = AdamState(values, *[[torch.zeros_like(v) for v in values] for _ in range(2)], torch.zeros(()), 1e-3)
    for _ in range(4):
        loss = train_member(state, x, x.repeat(1, 1, 2)[..., :28], False, [], reduced, [], 0.0)
        digest([loss, *values])

class Policy:
    members, observation_dim, chunk, action_dim = 2, 19, 4, 7
    def sample(self, observation, noise):
        return noise.tanh()

g = make_generators([0, 1])
replay = Replay(2, 90, 19, 28)
replay.add(randn(g, 90, 19), randn(g, 90, 28), randn(g, 90, 19), randn(g, 90), rand(g, 90))
for activation in ("tanh", "relu", "mish"):
    iql = IQL(IQLConfig(hidden=(32, 32), batch_size=16, activation=activation), 19, 28, g)
    iql.train(replay, 7, g)
    digest(list(iql.networks.parameters()))
    for variant in ("na", "sac"):
        dsrl = DSRL(DSRLConfig(variant, hidden=32, layers=2, batch_size=16, utd=7, activation=activation), Policy(), g)
        dsrl.train(replay, g, g)
        digest(list(dsrl.networks.parameters()))
"""


def test_torchscript_gives_the_same_bits_as_python() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", PRINT_BITS],
            env=os.environ | {"PYTORCH_JIT": jit},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for jit in ("0", "1")
    ]
    assert found[0] == found[1]
    lines = found[1].split()
    assert len(lines) == 29
    assert all(len(set(lines[k : k + 4])) == 1 for k in (0, 4, 8))


def test_twin_critics_are_separate_networks() -> None:
    both = Critics(3, 4, 2, (8, 8), make_generators([0, 1, 2]))
    observation, action = randn(make_generators([3, 4, 5]), 6, 4), randn(make_generators([6, 7, 8]), 6, 2)
    q = both(observation, action)
    assert q.shape == (3, 2, 6)
    for m in range(3):
        one = Critics(1, 4, 2, (8, 8), make_generators([9]))
        one.load_state_dict(select_members(both, [m], 3))
        torch.testing.assert_close(one(observation[m : m + 1], action[m : m + 1])[0], q[m], atol=1e-6, rtol=1e-5)
    gradients = torch.autograd.grad(q[1].sum(), list(both.parameters()))
    assert all(bool(g[[0, 1, 4, 5]].eq(0).all()) and bool(g[[2, 3]].ne(0).any()) for g in gradients)
