"""The networks of the finetuners: a tanh-Gaussian actor, critics Q and values V, all stacked over members (seeds)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from postbc.members import scripted
from postbc.nn import NAMES, Generators, Layers, StackedMLP, perceptrons

Activation = Literal["tanh", "relu", "mish"]
ACTIVATIONS = {name: activation for activation, name in NAMES.items()}
Info = dict[str, Tensor]  # metric name -> (M, ...), all of a batch's values


class TanhGaussianActor(nn.Module):
    """π(u|s) = tanh(N(mean(s), diag(std(s)²))): (M, B, S) -> u in (−1, 1)^D.

    One output layer holds mean and log std side by side (stable-baselines3 has two layers of the same input: the same function).
    """

    def __init__(
        self,
        members: int,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        generators: Generators,
        activation: Activation = "tanh",
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        self.net = StackedMLP(members, observation_dim, hidden, 2 * action_dim, generators, ACTIVATIONS[activation], layer_norm)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(M, B, S) -> mean (M, B, D), log std (M, B, D) clamped to [−20, 2]."""
        return mean_and_log_std(observation, self.net.layers)

    def sample(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(M, B, S), standard normal `noise` (M, B, D) -> u (M, B, D), log π(u|s) (M, B), differentiable in both."""
        return play(observation, noise, self.net.layers)

    def mode(self, observation: Tensor) -> Tensor:
        """(M, B, S) -> tanh(mean) (M, B, D)."""
        return torch.tanh(self(observation)[0])


class Critics(nn.Module):
    """`critics` functions Q(s, a) a member as one stack of M·C networks, member-major: -> (M, C, B)."""

    def __init__(
        self,
        members: int,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        generators: Generators,
        activation: Activation = "tanh",
        layer_norm: bool = True,
        critics: int = 2,
    ) -> None:
        super().__init__()
        self.net = StackedMLP(
            members * critics, observation_dim + action_dim, hidden, 1, generators, ACTIVATIONS[activation], layer_norm
        )

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """(M, B, S), (M, B, D) -> (M, C, B)."""
        return q_values(observation, action, self.net.layers)


class Values(nn.Module):
    """V(s), one network a member: (M, B, S) -> (M, B)."""

    def __init__(
        self,
        members: int,
        observation_dim: int,
        hidden: Sequence[int],
        generators: Generators,
        activation: Activation = "tanh",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.net = StackedMLP(members, observation_dim, hidden, 1, generators, ACTIVATIONS[activation], layer_norm)

    def forward(self, observation: Tensor) -> Tensor:
        return values(observation, self.net.layers)


# -- the same as functions of the layers, for TorchScript ------------------------------------------------------------------------
@scripted
def mean_and_log_std(observation: Tensor, actor: Layers) -> tuple[Tensor, Tensor]:
    """(M, B, S) -> :class:`TanhGaussianActor`'s mean (M, B, D), log std (M, B, D) clamped to [−20, 2]."""
    mean, log_std = perceptrons(observation, actor).chunk(2, -1)
    return mean, log_std.clamp(-20.0, 2.0)  # stable-baselines3, sac/policies.py


@scripted
def play(observation: Tensor, noise: Tensor, actor: Layers) -> tuple[Tensor, Tensor]:
    """(M, B, S), standard normal (M, B, D) -> u (M, B, D), log π(u|s) (M, B)."""
    mean, log_std = mean_and_log_std(observation, actor)
    u = torch.tanh(torch.addcmul(mean, log_std.exp(), noise))
    # log N(x) with (x − mean)/std = noise, minus the tanh correction; stable-baselines3's 1e-6 keeps log(1 − tanh²) finite
    gaussian = -0.5 * noise.square().sum(-1) - log_std.sum(-1) - 0.5 * math.log(2 * math.pi) * noise.shape[-1]
    return u, gaussian - torch.log(1 - u.square() + 1e-6).sum(-1)


@scripted
def q_values(observation: Tensor, action: Tensor, critics: Layers) -> Tensor:
    """(M, B, S), (M, B, D) -> Q of each of :class:`Critics` (M, C, B)."""
    inputs = torch.cat((observation, action), -1)
    members, batch, width = inputs.shape
    inputs = inputs.unsqueeze(1).expand(members, critics.parameters[0].shape[0] // members, batch, width)
    return perceptrons(inputs.flatten(0, 1), critics).view(members, -1, batch)


@scripted
def values(observation: Tensor, net: Layers) -> Tensor:
    """(M, B, S) -> V of :class:`Values` (M, B)."""
    return perceptrons(observation, net).squeeze(-1)


def averages(infos: Sequence[Info]) -> Info:
    """Metrics of the parts (m, ...) side by side, each averaged over all but the members: name -> (M,).

    Losses leave that to whoever reads a metric: of many steps only the last one's are.
    """
    return {name: torch.cat([info[name].reshape(len(info[name]), -1).mean(1) for info in infos]) for name in infos[0]}


def copy_into(target: nn.Module, source: nn.Module) -> None:
    """target <- source, and no gradients for the target (a target network)."""
    target.load_state_dict(source.state_dict())
    target.requires_grad_(False)


def select_members(module: nn.Module, members: Sequence[int], total: int) -> dict[str, Tensor]:
    """The parameters of some members (each may stand for several rows, as a critic stack does) as a state dictionary."""
    chosen = {}
    for name, value in module.state_dict().items():
        share = value.shape[0] // total
        rows = [m * share + i for m in members for i in range(share)]
        chosen[name] = value[rows].clone()
    return chosen
