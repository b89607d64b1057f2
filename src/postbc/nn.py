"""Small networks, averages of weights and states of generators.

Plain layers for everything that a seed trains once; a *stack* where several networks are trained on the same device at once for the
price of one pass: the posterior's K regressors and the twin critics. Nothing else has a members axis.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from postbc.errors import InputError, NotFiniteError, require
from postbc.files import blame

C = TypeVar("C", nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)
Activation = Literal["relu", "tanh", "mish"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "mish": nn.Mish}


# -- plain layers --------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with torch's own initialisation (uniform ±1/√inputs for weight and bias), drawn from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, device=torch.get_default_device())
    fill_uniform(layer.weight.T, 1 / math.sqrt(inputs), generator)
    fill_uniform(layer.bias, 1 / math.sqrt(inputs), generator)
    return layer


@torch.no_grad()
def convolution(kind: type[C], inputs: int, outputs: int, kernel: int, generator: torch.Generator, **options: Any) -> C:
    """A convolution (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d) with torch's own initialisation, drawn from `generator`."""
    layer = nn.utils.skip_init(kind, inputs, outputs, kernel, device=torch.get_default_device(), **options)
    bound = layer.weight[0].numel() ** -0.5  # torch's fan-in: of a transposed convolution outputs·kernel
    fill_uniform(layer.weight, bound, generator)
    if layer.bias is not None:
        fill_uniform(layer.bias, bound, generator)
    return layer


def fill_uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Uniform on [−bound, bound), in place; nothing on "meta"."""
    if not parameter.is_meta:
        drawn = torch.rand(parameter.shape, generator=generator, device=generator.device)
        parameter.copy_((2 * drawn - 1) * bound)


class MLP(nn.Sequential):
    """A multilayer perceptron (..., inputs) -> (..., outputs); linear → [LayerNorm] → activation, the last layer linear."""

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        generator: torch.Generator,
        activation: Activation = "relu",
        layer_norm: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [
                linear(inputs, width, generator),
                *([nn.LayerNorm(width)] if layer_norm else []),
                ACTIVATIONS[activation](),
            ]
            inputs = width
        super().__init__(*layers, linear(inputs, outputs, generator))


def gaussian_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std²), component by component."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


# -- stacks --------------------------------------------------------------------------------------------------------------------
class StackedLinear(nn.Module):
    """M linear layers as one batched product: (M, B, i) -> (M, B, o); the initialisation is that of :func:`linear`."""

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs))
        with torch.no_grad():
            fill_uniform(self.weight, 1 / math.sqrt(inputs), generator)
            fill_uniform(self.bias, 1 / math.sqrt(inputs), generator)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)

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


class StackedMLP(nn.Sequential):
    """M multilayer perceptrons as one: (M, B, inputs) -> (M, B, outputs); a loss summed over members keeps their gradients apart."""

    def __init__(
        self,
        members: int,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        generator: torch.Generator,
        activation: Activation = "relu",
        layer_norm: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for width in hidden:
            layers.append(StackedLinear(members, inputs, width, generator))
            layers += [*([StackedLayerNorm(members, width)] if layer_norm else []), ACTIVATIONS[activation]()]
            inputs = width
        super().__init__(*layers, StackedLinear(members, inputs, outputs, generator))


# -- averages of weights -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def polyak(target: nn.Module | Iterable[Tensor], online: nn.Module | Iterable[Tensor], rate: float) -> None:
    """target <- (1 − rate)·target + rate·online, in place, for the parameters of two modules (or two lists of tensors)."""
    old, new = (list[Tensor](m.parameters() if isinstance(m, nn.Module) else m) for m in (target, online))
    torch._foreach_lerp_(old, new, rate)


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
        self.online = list[Tensor](module.parameters())
        self.names = [name for name, _ in module.named_parameters()]
        self.shadow = [p.detach().clone() for p in self.online]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        torch._foreach_lerp_(self.shadow, self.online, 1.0 - decay)

    @torch.no_grad()
    def copy(self) -> None:
        """Forget the average: shadow <- parameters."""
        torch._foreach_copy_(self.shadow, self.online)

    def state_dict(self) -> dict[str, Tensor]:
        """name -> average; loads into the module itself with `strict=False` for its buffers."""
        return dict(zip(self.names, self.shadow, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, shadow in zip(self.names, self.shadow, strict=True):
            shadow.copy_(state[name])


# -- generators ----------------------------------------------------------------------------------------------------------------
def generator_state(generator: torch.Generator) -> Tensor:
    """(bytes,) uint8 on the CPU: the state of a generator, for a checkpoint."""
    return generator.get_state()


def set_generator_state(generator: torch.Generator, state: Tensor) -> None:
    """Undo :func:`generator_state`.

    Devices have generators of their own kinds: a state from another kind of device seeds this one anew, always in the same way.
    """
    state = state.cpu().clone()
    if state.shape == generator.get_state().shape:
        generator.set_state(state)
    else:
        generator.manual_seed(int.from_bytes(hashlib.sha256(state.numpy().tobytes()).digest()[:7], "little"))


# -- weights from files --------------------------------------------------------------------------------------------------------
_from_file = contextvars.ContextVar("from_file", default=False)


@contextlib.contextmanager
def from_file() -> Iterator[None]:
    """Inside, modules are made whose weights a file holds: none are fetched from elsewhere (:func:`fetches_weights`)."""
    before = _from_file.set(True)
    try:
        yield
    finally:
        _from_file.reset(before)


def fetches_weights(module: nn.Module) -> bool:
    """Whether a module that begins with weights from elsewhere takes them now: neither on "meta" nor :func:`from_file`."""
    return not _from_file.get() and not any(p.is_meta for p in module.parameters())


@contextlib.contextmanager
def header_of(file: str | Path, kind: str) -> Iterator[None]:
    """Making what a file's header asks for: whatever goes wrong inside is an :class:`InputError` that names the file."""
    try:
        with blame(file, f"The header of this {kind} does not fit together."):
            yield
    except InputError as error:
        raise error if str(file) in str(error) else InputError(str(error), file=file) from None


def check_weights(weights: Any, expected: Mapping[str, Tensor], file: str | Path) -> None:
    """Raise :class:`InputError` unless `weights` has the names, shapes and types of `expected`, all finite."""
    require(isinstance(weights, dict), "The file holds no weights.", file=file, key="parameters", found=type(weights).__name__)
    missing, extra = sorted(set(expected) - set(weights)), sorted(map(str, set(weights) - set(expected)))
    require(not missing and not extra, "The weights are not those that the file's configuration asks for.", file=file,
            key=f"parameters/{(missing or extra or ['?'])[0]}", found="missing" if missing else "not expected")  # fmt: skip
    for name, wanted in expected.items():
        value = weights[name]
        found = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__
        require(found == (tuple(wanted.shape), wanted.dtype), "A weight has another shape than the file's configuration asks for.",
                file=file, key=f"parameters/{name}", found=found, expected=(tuple(wanted.shape), wanted.dtype))  # fmt: skip
    check_finite(weights, "The file's weights are not finite.", file)


def check_finite(weights: Mapping[str, Tensor], what: str, file: str | Path | None = None, remedy: str | None = None) -> None:
    """Raise :class:`NotFiniteError` with `what` unless every number of `weights` is finite."""
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NotFiniteError(what, file=file, key=name, found="NaN or infinite", remedy=remedy)


def check_memory(module: nn.Module, copies: int, device: str | torch.device, key: str) -> None:
    """Raise :class:`InputError` if `copies` of a module's parameters do not fit the device's memory (a module on "meta" takes none)."""
    needed = copies * sum(p.numel() * p.element_size() for p in module.parameters())
    if torch.device(device).type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
    require(needed < there, "These networks do not fit into memory.", key=key, found=f"{needed / 2**30:,.1f} GiB",
            expected=f"less than {there / 2**30:,.1f} GiB", remedy="choose smaller or fewer networks")  # fmt: skip
