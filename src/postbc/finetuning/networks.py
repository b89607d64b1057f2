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


CACHED = 2**16  # numbers in a hidden layer's activations that are worked on at once: about what a core keeps near


class _Chain(torch.autograd.Function):
    """A whole multilayer perceptron, (M, B, i) -> (M, B, o), as one node of the graph with its backward pass written out.

    Linear → [LayerNorm] → Tanh or ReLU is what every finetuner trains. Both activations are differentiated from their output, torch's
    layer-norm kernel does its three gradients in one pass, gradients that nobody asked for are not computed, and wide networks go
    through a few members at a time, so that their activations stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool, eps: float | None, *parameters: Tensor) -> Tensor:
        members, batch, _ = x.shape
        size = members if x.is_cuda else min(members, max(1, CACHED // (batch * parameters[0].shape[-1])))
        keep, outputs, saved = any(ctx.needs_input_grad), [], [x]
        for part in range(0, members, size):
            own = [p[part : part + size] for p in parameters]
            output, kept = _chain_forward(x[part : part + size], tanh, eps, own, keep)
            outputs.append(output)
            saved += kept
        if keep:
            ctx.save_for_backward(*saved, *parameters)
            ctx.layout = (tanh, eps, size, len(parameters))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tanh, eps, size, count = ctx.layout
        x, *saved = ctx.saved_tensors
        saved, parameters = saved[:-count], saved[-count:]
        wanted = ctx.needs_input_grad[3]  # of the parameters: all or none
        gradients = [torch.empty_like(p) for p in parameters] if wanted else []
        inner = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        groups = len(saved) * size // len(x)  # saved tensors of each group
        for index, part in enumerate(range(0, len(x), size)):
            here = slice(part, part + size)
            _chain_backward(
                gradient[here], x[here], saved[index * groups : (index + 1) * groups], tanh, eps, [p[here] for p in parameters],
                [g[here] for g in gradients], None if inner is None else inner[here],
            )  # fmt: skip
        none: list[Tensor | None] = [None] * count
        return inner, None, None, *(gradients or none)


def _chain_forward(
    x: Tensor, tanh: bool, eps: float | None, parameters: Sequence[Tensor], keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The output, and (if `keep`) what the backward pass needs: a hidden layer's [linear, mean, rstd] and output."""
    saved: list[Tensor] = []
    per_layer = 2 if eps is None else 4
    for k in range(0, len(parameters) - 2, per_layer):
        linear = torch.baddbmm(parameters[k + 1], x, parameters[k])
        if eps is None:
            x = linear.tanh_() if tanh else linear.relu_()
        else:
            x = torch.empty_like(linear) if keep else linear
            means = linear.new_empty(2, *linear.shape[:2], 1)
            for m in range(len(linear)):  # the kernel takes one gain and bias
                gain, shift = parameters[k + 2][m, 0], parameters[k + 3][m, 0]
                normalised, means[0, m], means[1, m] = torch.native_layer_norm(linear[m], gain.shape, gain, shift, eps)
                torch.tanh(normalised, out=x[m]) if tanh else torch.clamp(normalised, min=0, out=x[m])
            saved += [linear, means] if keep else []
        saved += [x] if keep else []
    return torch.baddbmm(parameters[-1], x, parameters[-2]), saved


def _chain_backward(
    gradient: Tensor, x: Tensor, saved: Sequence[Tensor], tanh: bool, eps: float | None, parameters: Sequence[Tensor],
    gradients: Sequence[Tensor], inner: Tensor | None,
) -> None:  # fmt: skip
    """Fill `gradients` (of the parameters, may be empty) and `inner` (of x, may be None)."""
    per_layer, per_saved = (2, 1) if eps is None else (4, 3)
    for k in range(len(parameters) - 2, -1, -per_layer):
        layer = k // per_layer
        before = saved[layer * per_saved - 1] if layer else x  # this layer's input
        if gradients:
            torch.bmm(before.transpose(1, 2), gradient, out=gradients[k])
            torch.sum(gradient, 1, keepdim=True, out=gradients[k + 1])
        if not layer:
            if inner is not None:
                torch.bmm(gradient, parameters[k].transpose(1, 2), out=inner)
            return
        gradient = torch.bmm(gradient, parameters[k].transpose(1, 2))
        if tanh:
            gradient = torch.ops.aten.tanh_backward.grad_input(gradient, before, grad_input=gradient)
        else:
            gradient = torch.ops.aten.threshold_backward.grad_input(gradient, before, 0, grad_input=gradient)
        if eps is not None:
            linear, means = saved[(layer - 1) * per_saved : (layer - 1) * per_saved + 2]
            at = k - per_layer + 2  # gain and shift of the layer below
            parts = []
            for m in range(len(linear)):
                *both, gain, shift = linear[m], means[0, m], means[1, m], parameters[at][m, 0], parameters[at + 1][m, 0]
                found = torch.ops.aten.native_layer_norm_backward(
                    gradient[m], both[0], gain.shape, both[1], both[2], gain, shift, [True, bool(gradients), bool(gradients)]
                )
                parts.append(found[0])
                if gradients:
                    gradients[at][m, 0], gradients[at + 1][m, 0] = found[1], found[2]
            gradient = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


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


class _Plain(nn.Module):
    """The layer-by-layer pass of an :class:`MLP`, as a module of its own."""

    def __init__(self, net: MLP) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return StackedMLP.forward(self.net, x)


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
