"""The networks of the finetuners: a tanh-Gaussian actor, critics Q and values V, all stacked over members (seeds)."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from postbc.nn import Generators, StackedLayerNorm, StackedLinear, StackedMLP

T = TypeVar("T")
Activation = Literal["tanh", "relu", "mish"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "mish": nn.Mish}

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # stable-baselines3, sac/policies.py
TANH_EPSILON = 1e-6  # stable-baselines3, SquashedDiagGaussianDistribution: keeps log(1 - tanh²) finite


WIDE = 2**14  # B·H from which a network is better computed alone than in a stack: then its activations stay in the cache
_pool: tuple[int, ThreadPoolExecutor] | None = None


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def each(work: Callable[[int], T], members: int) -> list[T]:
    """[work(0), work(1), ...], the members shared among torch's number of threads, each with products of one thread.

    Two members on two threads take less than two threads on one member after the other, whose matrices are too small to be divided
    well. It also makes a member's numbers independent of the number of threads.
    """
    global _pool
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    if min(threads, members) < 2:
        return [work(m) for m in range(members)]
    if _pool is None or _pool[0] != threads:
        _pool = (threads, ThreadPoolExecutor(threads, "postbc-members", torch.set_num_threads, (1,)))

    def some(first: int) -> list[T]:
        with torch.inference_mode() if inference else torch.no_grad():  # either is a thread's own
            return [work(m) for m in range(first, members, threads)]

    torch.set_num_threads(1)  # part of it (MKL's) holds for the whole process
    try:
        parts = list(_pool[1].map(some, range(min(threads, members))))
    finally:
        torch.set_num_threads(threads)
    return [parts[m % threads][m // threads] for m in range(members)]


class _Chain(torch.autograd.Function):
    """Multilayer perceptrons (M, B, i) -> (M, B, o), member by member, as one node of the graph with the backward pass written out.

    Linear → [LayerNorm] → Tanh or ReLU is what every finetuner trains. Both activations are differentiated from their output, torch's
    layer-norm kernel does its three gradients in one pass, and gradients that nobody asked for are not computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool, eps: float | None, *parameters: Tensor) -> Tensor:
        keep, layers = any(ctx.needs_input_grad), _per_member(parameters)
        output = x.new_empty(*x.shape[:2], parameters[-1].shape[-1])

        def work(m: int) -> list[Tensor]:
            kept = _forward(x[m], tanh, eps, [p[m] for p in layers], output[m])
            return kept if keep else []

        saved = [tensor for kept in each(work, len(x)) for tensor in kept]
        if keep:
            ctx.save_for_backward(x, *parameters, *saved)
            ctx.layout = (tanh, eps, len(parameters))
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tanh, eps, count = ctx.layout
        x, *rest = ctx.saved_tensors
        parameters, saved = rest[:count], rest[count:]
        wanted = ctx.needs_input_grad[3]  # of the parameters: all or none
        gradients = [torch.empty_like(p) for p in parameters] if wanted else []
        inner = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        layers, filled, share = _per_member(parameters), _per_member(gradients), len(saved) // len(x)

        def work(m: int) -> None:
            _backward(
                gradient[m], x[m], saved[m * share : (m + 1) * share], tanh, eps, [p[m] for p in layers], [g[m] for g in filled],
                None if inner is None else inner[m],
            )  # fmt: skip

        each(work, len(x))
        nothing: list[Tensor | None] = [None] * count
        return inner, None, None, *(gradients if wanted else nothing)


def _per_member(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Views a member: weights (i, o), gains (1, o), biases and shifts (o,)."""
    return [(t.squeeze(1) if k % 2 else t).unbind(0) for k, t in enumerate(tensors)]


def _forward(x: Tensor, tanh: bool, eps: float | None, parameters: Sequence[Tensor], output: Tensor) -> list[Tensor]:
    """Fill `output` (B, o); returns each hidden layer's output, with LayerNorm [linear, mean, rstd] before it."""
    saved: list[Tensor] = []
    per_layer = 2 if eps is None else 4
    for k in range(0, len(parameters) - 2, per_layer):
        x = torch.addmm(parameters[k + 1], x, parameters[k])
        if eps is not None:
            gain, shift = parameters[k + 2].flatten(), parameters[k + 3]
            saved.append(x)
            x, mean, rstd = torch.native_layer_norm(x, gain.shape, gain, shift, eps)
            saved += [mean, rstd]
        x = x.tanh_() if tanh else x.relu_()
        saved.append(x)
    torch.addmm(parameters[-1], x, parameters[-2], out=output)
    return saved


def _backward(
    gradient: Tensor, x: Tensor, saved: Sequence[Tensor], tanh: bool, eps: float | None, parameters: Sequence[Tensor],
    gradients: Sequence[Tensor], inner: Tensor | None,
) -> None:  # fmt: skip
    """Fill `gradients` (of the parameters; may be empty) and `inner` (of x; may be None)."""
    per_layer, per_saved = (2, 1) if eps is None else (4, 4)
    for k in range(len(parameters) - 2, -1, -per_layer):
        layer = k // per_layer
        before = saved[layer * per_saved - 1] if layer else x  # this layer's input
        if gradients:
            torch.mm(before.t(), gradient, out=gradients[k])
            torch.sum(gradient, 0, out=gradients[k + 1])
        if not layer:
            if inner is not None:
                torch.mm(gradient, parameters[k].t(), out=inner)
            return
        gradient = torch.mm(gradient, parameters[k].t())
        through = torch.ops.aten.tanh_backward if tanh else torch.ops.aten.threshold_backward
        gradient = through(gradient, before, *(() if tanh else (0,)))
        if eps is not None:
            linear, mean, rstd = saved[(layer - 1) * per_saved : (layer - 1) * per_saved + 3]
            at = k - per_layer + 2  # gain and shift of the layer below
            gain, wanted = parameters[at].flatten(), bool(gradients)
            gradient, of_gain, of_shift = torch.ops.aten.native_layer_norm_backward(
                gradient, linear, gain.shape, mean, rstd, gain, parameters[at + 1], [True, wanted, wanted]
            )
            if wanted:
                gradients[at].copy_(of_gain)
                gradients[at + 1].copy_(of_shift)


class MLP(StackedMLP):
    """A :class:`~postbc.nn.StackedMLP` that computes wide networks by :class:`_Chain`: the same function, faster to train."""

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """(M, B, i) -> (M, B, o); `frozen`: without gradients for the parameters."""
        parameters = [p.detach() for p in self.parameters()] if frozen else list(self.parameters())
        kinds = {type(layer) for layer in self} - {StackedLinear}
        narrow = x.shape[1] * parameters[0].shape[-1] < WIDE or x.is_cuda
        if narrow or kinds - {StackedLayerNorm} not in ({nn.Tanh}, {nn.ReLU}):
            if not frozen:
                return super().forward(x)
            named = dict(zip((name for name, _ in self.named_parameters()), parameters, strict=True))
            return torch.func.functional_call(_Plain(self), {f"net.{k}": v for k, v in named.items()}, x)  # type: ignore
        eps = next((layer.eps for layer in self if isinstance(layer, StackedLayerNorm)), None)
        return _Chain.apply(x, nn.Tanh in kinds, eps, *parameters)  # type: ignore[no-any-return,no-untyped-call]


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
