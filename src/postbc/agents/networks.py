"""The networks of the finetuners: a tanh-Gaussian actor, twin critics Q and a value V; and one gradient step.

Losses are pure functions of networks and a batch, (networks, batch, …) -> (loss, info), in the file of their algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postbc.errors import NotFiniteError
from postbc.nn import MLP, Activation, StackedMLP

Info = dict[str, Tensor]  # metric name -> values of a batch, without gradient; whoever reads one takes the mean


class Actor(nn.Module):
    """π(u|s) = tanh(N(mean(s), diag(std(s)²))): (B, F) -> u in (−1, 1)^D.

    One output layer holds mean and log std side by side (stable-baselines3 has two layers of the same input: the same function).
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        activation: Activation = "tanh",
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        self.net = MLP(feature_dim, hidden, 2 * action_dim, generator, activation, layer_norm)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F) -> mean (B, D), log std (B, D) clamped to [−20, 2]."""
        mean, log_std = self.net(features).float().chunk(2, -1)
        return mean, log_std.clamp(-20.0, 2.0)  # stable-baselines3, sac/policies.py

    def sample(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F), standard normal `noise` (B, D) -> u (B, D), log π(u|s) (B,), differentiable in both."""
        mean, log_std = self(features)
        u = torch.tanh(torch.addcmul(mean, log_std.exp(), noise))
        # log N(x) with (x − mean)/std = noise, minus the tanh correction; stable-baselines3's 1e-6 keeps log(1 − tanh²) finite
        gaussian = -0.5 * noise.square().sum(-1) - log_std.sum(-1) - 0.5 * math.log(2 * math.pi) * noise.shape[-1]
        return u, gaussian - torch.log(1 - u.square() + 1e-6).sum(-1)

    def mode(self, features: Tensor) -> Tensor:
        """(B, F) -> tanh(mean) (B, D)."""
        return torch.tanh(self(features)[0])


class Critics(nn.Module):
    """`critics` functions Q(s, a) as one stack: (B, F), (B, D) -> (C, B)."""

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        activation: Activation = "tanh",
        layer_norm: bool = True,
        critics: int = 2,
    ) -> None:
        super().__init__()
        self.critics = critics
        self.net = StackedMLP(critics, feature_dim + action_dim, hidden, 1, generator, activation, layer_norm)

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        inputs = torch.cat((features, action), -1)
        return self.net(inputs.expand(self.critics, *inputs.shape)).float().squeeze(-1)


class Value(nn.Module):
    """V(s): (B, F) -> (B,)."""

    def __init__(
        self,
        feature_dim: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        activation: Activation = "relu",
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        self.net = MLP(feature_dim, hidden, 1, generator, activation, layer_norm)

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features).float().squeeze(-1)


def copy_into(target: nn.Module, source: nn.Module) -> None:
    """target <- source, and no gradients for the target (a target network)."""
    target.load_state_dict(source.state_dict())
    target.requires_grad_(False)


# -- a step --------------------------------------------------------------------------------------------------------------------
def adam(parameters: Iterable[Tensor], lr: float, captured: bool = False) -> torch.optim.Adam:
    """Adam, in its fused form where there is one (a pass over memory instead of about ten); fit to be `captured` as a CUDA graph."""
    parameters = list(parameters)
    device = parameters[0].device.type
    return torch.optim.Adam(parameters, lr=lr, fused=device in ("cpu", "cuda"), capturable=captured)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step on `loss`, with gradients for the optimiser's own parameters alone: the actor's loss costs none of the critics'."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Adam's state, parameter by parameter: step, exp_avg, exp_avg_sq; empty before the first step."""
    return [dict(optimizer.state[p]) for p in optimizer.param_groups[0]["params"] if p in optimizer.state]


def set_optimizer_state(optimizer: torch.optim.Optimizer, state: Sequence[Mapping[str, Any]]) -> None:
    """Undo :func:`optimizer_state`, on any device; the tensors are copied."""
    own = {k: {name: value.clone() for name, value in entry.items()} for k, entry in enumerate(state)}
    optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})


class Optimized:
    """Networks and their optimisers, saved and restored together: what every learner keeps."""

    networks: nn.Module
    optimizers: dict[str, torch.optim.Adam]
    gradient_steps: int = 0
    on_policy = False
    causes: Mapping[str, tuple[str, ...]] = {"too large steps or too many of them": ()}
    """What usually makes it fall below its pretrained policy -> the options that this depends on."""

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimiser moments, gradient steps."""
        optimizers = {name: optimizer_state(optimizer) for name, optimizer in self.optimizers.items()}
        return {"networks": self.networks.state_dict(), "optimizers": optimizers, "gradient_steps": self.gradient_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.networks.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            set_optimizer_state(optimizer, state["optimizers"][name])
        self.gradient_steps = int(state["gradient_steps"])


def means(info: Info, step: int) -> dict[str, float]:
    """The metrics' means. NotFiniteError names the first that is not finite, and the step."""
    found = torch.stack([value.detach().float().mean() for value in info.values()]).tolist() if info else []
    for name, value in zip(info, found, strict=True):
        if not math.isfinite(value):
            raise NotFiniteError(
                "A number of the update is not finite.", key=name, found=f"{value} at step {step}",
                remedy="lower the learning rate (lr); with --resume the run goes on from its last checkpoint",
            )  # fmt: skip
    return dict(zip(info, found, strict=True))
