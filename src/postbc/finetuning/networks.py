"""The networks of the finetuners: a tanh-Gaussian actor, critics Q and values V, all stacked over members (seeds)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postbc.nn import Generators, StackedLayerNorm, StackedLinear, StackedMLP

Activation = Literal["tanh", "relu", "mish"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "mish": nn.Mish}

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # stable-baselines3, sac/policies.py
TANH_EPSILON = 1e-6  # stable-baselines3, SquashedDiagGaussianDistribution: keeps log(1 - tanh²) finite


class _Chain(torch.autograd.Function):
    """A whole multilayer perceptron, (M, B, i) -> (M, B, o), as one node of the graph with its backward pass written out.

    Linear → [LayerNorm] → Tanh or ReLU is what every finetuner trains. Both activations are differentiated from their output, torch's
    layer-norm kernel does its three gradients in one pass, and gradients that nobody asked for are not computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool, eps: float | None, *parameters: Tensor) -> Tensor:
        keep, per_layer = any(ctx.needs_input_grad), 2 if eps is None else 4
        saved: list[Tensor] = [x]
        for k in range(0, len(parameters) - 2, per_layer):
            weight, bias, *norm = parameters[k : k + per_layer]
            linear = torch.baddbmm(bias, x, weight)
            x = torch.empty_like(linear) if keep and norm else linear
            for m in range(len(linear) if norm else 0):  # the kernel takes one gain and bias
                gain, shift = norm[0][m, 0], norm[1][m, 0]
                normalised, mean, rstd = torch.native_layer_norm(linear[m], gain.shape, gain, shift, eps)  # type: ignore[arg-type]
                torch.tanh(normalised, out=x[m]) if tanh else torch.clamp(normalised, min=0, out=x[m])
                saved += [mean, rstd]
            if norm:
                saved.append(linear)
            else:
                x = linear.tanh_() if tanh else linear.relu_()
            saved.append(x)
        if keep:
            ctx.save_for_backward(*saved, *parameters)
            ctx.layout = (tanh, eps, per_layer, len(saved))
        return torch.baddbmm(parameters[-1], x, parameters[-2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tanh, eps, per_layer, count = ctx.layout
        saved, parameters = list(ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        gradients: list[Tensor | None] = [None] * len(parameters)
        wanted = ctx.needs_input_grad[3]  # of the parameters, all or none
        for k in range(len(parameters) - 2, -1, -per_layer):
            y = saved[-1]  # this layer's input
            if k < len(parameters) - 2:
                gradient = _activation_backward(gradient, output, tanh)
                if eps is not None:
                    linear, statistics = hidden
                    gradient, gradients[k + 2], gradients[k + 3] = _norm_backward(
                        gradient, linear, statistics, parameters[k + 2], parameters[k + 3], wanted
                    )
            if wanted:
                gradients[k], gradients[k + 1] = torch.bmm(y.transpose(1, 2), gradient), gradient.sum(1, keepdim=True)
            if k or ctx.needs_input_grad[0]:
                gradient = torch.bmm(gradient, parameters[k].transpose(1, 2))
            output = saved.pop()
            if eps is not None and k:
                linear = saved.pop()
                members = 2 * len(linear)
                hidden = (linear, saved[-members:])
                del saved[-members:]
        return gradient if ctx.needs_input_grad[0] else None, None, None, *gradients


def _activation_backward(gradient: Tensor, output: Tensor, tanh: bool) -> Tensor:
    if tanh:
        return torch.ops.aten.tanh_backward(gradient, output)  # type: ignore[no-any-return]
    return torch.ops.aten.threshold_backward(gradient, output, 0)  # type: ignore[no-any-return]


def _norm_backward(
    gradient: Tensor, linear: Tensor, statistics: Sequence[Tensor], gain: Tensor, shift: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    parts = [
        torch.ops.aten.native_layer_norm_backward(
            gradient[m], linear[m], gain.shape[2:], statistics[2 * m], statistics[2 * m + 1], gain[m, 0], shift[m, 0],
            [True, wanted, wanted],
        )
        for m in range(len(linear))
    ]  # fmt: skip
    if len(parts) == 1:
        first, gains, shifts = (None if part is None else part.unsqueeze(0) for part in parts[0])
    else:
        first, gains, shifts = (None if part[0] is None else torch.stack(part) for part in zip(*parts, strict=True))
    return first, gains if gains is None else gains.unsqueeze(1), shifts if shifts is None else shifts.unsqueeze(1)  # type: ignore


class MLP(StackedMLP):
    """A :class:`~postbc.nn.StackedMLP`, computed as one node where its layers allow that: the same function, faster to train."""

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """(M, B, i) -> (M, B, o); `frozen`: without gradients for the parameters."""
        kinds = {type(layer) for layer in self} - {StackedLinear}
        eps = next((layer.eps for layer in self if isinstance(layer, StackedLayerNorm)), None)
        parameters = [p.detach() for p in self.parameters()] if frozen else list(self.parameters())
        if kinds - {StackedLayerNorm} not in ({nn.Tanh}, {nn.ReLU}, set()):
            return (
                torch.func.functional_call(self, dict(zip(dict(self.named_parameters()), parameters)), x)
                if frozen
                else super().forward(x)
            )
        return _Chain.apply(x, nn.Tanh in kinds, eps, *parameters)  # type: ignore[no-any-return]


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
        self.net = MLP(members, observation_dim, hidden, 2 * action_dim, generators, ACTIVATIONS[activation], layer_norm)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(M, B, S) -> mean (M, B, D), log std (M, B, D) clamped to [−20, 2]."""
        mean, log_std = self.net(observation).chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def sample(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(M, B, S), standard normal `noise` (M, B, D) -> u (M, B, D), log π(u|s) (M, B), differentiable in both."""
        mean, log_std = self(observation)
        u = torch.tanh(torch.addcmul(mean, log_std.exp(), noise))
        # log N(x) with (x − mean)/std = noise, minus the tanh correction
        gaussian = -0.5 * noise.square().sum(-1) - log_std.sum(-1) - 0.5 * math.log(2 * math.pi) * noise.shape[-1]
        return u, gaussian - torch.log(1 - u.square() + TANH_EPSILON).sum(-1)

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
        self.members, self.critics = members, critics
        self.net = MLP(
            members * critics, observation_dim + action_dim, hidden, 1, generators, ACTIVATIONS[activation], layer_norm
        )

    def forward(self, observation: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """(M, B, S), (M, B, D) -> (M, C, B); `frozen`: without gradients for the parameters."""
        inputs = torch.cat((observation, action), -1)
        members, batch, width = inputs.shape
        inputs = inputs.unsqueeze(1).expand(-1, self.critics, -1, -1).reshape(members * self.critics, batch, width)
        return self.net(inputs, frozen).view(members, self.critics, batch)


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
        self.net = MLP(members, observation_dim, hidden, 1, generators, ACTIVATIONS[activation], layer_norm)

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(observation).squeeze(-1)


def adam(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Adam in its fused form: one pass over memory instead of about ten (the same rule, tested against stable-baselines3)."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimiser step on `loss` (M,), summed over members so that their gradients stay apart.

    Gradients are taken for the optimiser's parameters alone: the actor's loss, say, costs no gradients of the critics' weights.
    """
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss.sum(), parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, Any]) -> None:
    """Restore the moments of `optimizer.state_dict()["state"]`; copied, as torch would go on using the very tensors it is given."""
    optimizer.load_state_dict({"state": copy.deepcopy(state), "param_groups": optimizer.state_dict()["param_groups"]})


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
