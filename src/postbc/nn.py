"""Networks with a leading *members* axis: K regressors, two critics or M seeds for the price of one pass.

A stacked layer maps (M, B, i) to (M, B, o) with one batched product. Adam is elementwise and needs nothing new; a loss summed over
members keeps their gradients apart. Every seed owns its generators, so a member's result does not depend on who shares the pass.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from postbc.members import scripted

Generators = Sequence[torch.Generator]
NAMES: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.Mish: "mish"}


def make_generators(seeds: Iterable[int], stream: int = 0, device: str | torch.device = "cpu") -> list[torch.Generator]:
    """One generator a seed. `stream` separates uses (initialisation, data order, noise, ...) so that they never share numbers."""
    generators = []
    for seed in seeds:
        if seed < 0:
            raise ValueError(f"a seed must be a non-negative integer, found {seed}")
        generator = torch.Generator(device=device)
        # splitmix64 of (seed, stream): neighbouring seeds and streams start far apart
        state = (seed * 0x9E3779B97F4A7C15 + (stream + 1) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        generator.manual_seed((state ^ (state >> 31)) % 2**63)
        generators.append(generator)
    return generators


def generator_states(generators: Generators) -> Tensor:
    """(M, bytes) uint8: the states of the generators, for a checkpoint."""
    return torch.stack([g.get_state() for g in generators])


def set_generator_states(generators: Generators, states: Tensor) -> None:
    """Undo :func:`generator_states`."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state.cpu().clone())  # a view with an offset crashes torch


def randn(generators: Generators, *shape: int) -> Tensor:
    """(M, *shape) standard normal, member m drawn from `generators[m]`."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def rand(generators: Generators, *shape: int) -> Tensor:
    """(M, *shape) uniform on [0, 1), member m drawn from `generators[m]`."""
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])


def randint(generators: Generators, high: int | Sequence[int], *shape: int) -> Tensor:
    """(M, *shape) int64 uniform on [0, high) (or `high[m]`), member m drawn from `generators[m]`."""
    highs = [high] * len(generators) if isinstance(high, int) else high
    return torch.stack([torch.randint(h, shape, generator=g, device=g.device) for g, h in zip(generators, highs, strict=True)])


class StackedLinear(nn.Module):
    """M linear layers as one: (M, B, i) -> (M, B, o).

    Args:
        members: M. A multiple of the number of generators: each generator initialises an equal, consecutive share of the members.
        generators: one a seed; the initialisation is that of `torch.nn.Linear` (uniform ±1/√i for weight and bias).
    """

    def __init__(self, members: int, inputs: int, outputs: int, generators: Generators, bias: bool = True) -> None:
        super().__init__()
        if members % len(generators):
            raise ValueError(f"{members} members cannot be shared equally by {len(generators)} generators")
        share, bound = members // len(generators), 1.0 / math.sqrt(inputs)

        def uniform(*shape: int) -> Tensor:
            return ((2 * rand(generators, share, *shape) - 1) * bound).flatten(0, 1)

        self.weight = nn.Parameter(uniform(inputs, outputs))
        self.bias = nn.Parameter(uniform(1, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight) if self.bias is not None else torch.bmm(x, self.weight)

    def extra_repr(self) -> str:
        return "members={}, inputs={}, outputs={}".format(*self.weight.shape)


class StackedLayerNorm(nn.Module):
    """M layer normalisations over the last axis, each with its own gain and bias: (M, B, i) -> (M, B, i)."""

    def __init__(self, members: int, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, features))
        self.bias = nn.Parameter(torch.zeros(members, 1, features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps), self.weight)


class Layers(NamedTuple):
    """A :class:`StackedMLP` as TorchScript takes it."""

    parameters: list[Tensor]
    """weight, bias [, gain, shift] of each layer, stacked."""
    activation: str
    """tanh, relu or mish."""
    eps: float
    """Of LayerNorm; 0: there is none."""


class StackedMLP(nn.Sequential):
    """M multilayer perceptrons as one: (M, B, inputs) -> (M, B, outputs); linear → [LayerNorm] → activation, the last layer linear."""

    def __init__(
        self,
        members: int,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        generators: Generators,
        activation: type[nn.Module] = nn.ReLU,
        layer_norm: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for width in hidden:
            layers.append(StackedLinear(members, inputs, width, generators))
            if layer_norm:
                layers.append(StackedLayerNorm(members, width))
            layers.append(activation())
            inputs = width
        super().__init__(*layers, StackedLinear(members, inputs, outputs, generators))
        self.eps = 1e-5 if layer_norm else 0.0
        self.activation = NAMES[activation]
        self.stacked: list[Tensor] = list(self.parameters())

    @property
    def layers(self) -> Layers:
        """Its parameters, in the same memory, and what it does with them."""
        return Layers(self.stacked, self.activation, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """(M, B, i) -> (M, B, o)."""
        return perceptrons(x, self.layers)


@scripted
def perceptrons(x: Tensor, layers: Layers) -> Tensor:
    """M multilayer perceptrons, (M, B, i) -> (M, B, o), layer after layer.

    Activations use their input's memory, and a member's layer normalisation is torch's own, in one pass with gain and shift.
    """
    parameters, activation, eps = layers.parameters, layers.activation, layers.eps
    per_layer = 4 if eps > 0 else 2
    for k in range(0, len(parameters) - 2, per_layer):
        x = torch.baddbmm(parameters[k + 1], x, parameters[k])
        if eps > 0:
            gains, shifts = parameters[k + 2].unbind(), parameters[k + 3].unbind()
            normal = [torch.layer_norm(x[m], gains[m].shape[1:], gains[m][0], shifts[m][0], eps) for m in range(len(gains))]
            x = normal[0].unsqueeze(0) if len(normal) == 1 else torch.stack(normal)
        if activation == "tanh":
            x = x.tanh_()
        elif activation == "relu":
            x = x.relu_()
        else:
            x = torch.nn.functional.mish(x)
    return torch.baddbmm(parameters[-1], x, parameters[-2])


@scripted
def frozen(layers: Layers) -> Layers:
    """The same without gradients for the parameters."""
    return Layers([p.detach() for p in layers.parameters], layers.activation, layers.eps)


@scripted
def polyak(target: list[Tensor], online: list[Tensor], rate: float) -> None:
    """target <- (1 − rate)·target + rate·online, in place (tensor by tensor: TorchScript drops `_foreach_lerp_`)."""
    for k in range(len(target)):
        target[k].lerp_(online[k], rate)


class EMA:
    """Exponential moving average of a module's parameters (DPPO: decay 0.995, a plain copy before it starts).

    The n-th update uses min(decay, n/(n + 9)): without such a warm-up a short training ends with an average of its first steps
    (DPPO's counter has the same flaw: its average was all but untrained until v0.7).

    Args:
        module: its parameters are followed; `shadow` lists the averages in `module.parameters()` order.
        decay: weight of the old average at each :meth:`update`.
    """

    def __init__(self, module: nn.Module, decay: float = 0.995) -> None:
        self.decay = decay
        self.online = list(module.parameters())
        self.names = [name for name, _ in module.named_parameters()]
        self.shadow = [p.detach().clone() for p in self.online]
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.online], 1.0 - decay)

    @torch.no_grad()
    def copy(self) -> None:
        """Forget the average: shadow <- parameters."""
        torch._foreach_copy_(self.shadow, [p.detach() for p in self.online])

    def state_dict(self) -> dict[str, Tensor]:
        """name -> average; loads into the module itself with `strict=False` for its buffers."""
        return dict(zip(self.names, self.shadow, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, shadow in zip(self.names, self.shadow, strict=True):
            shadow.copy_(state[name])
