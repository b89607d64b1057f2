"""DPPO's diffusion MLP: time embedding, pre-activation residual blocks, Mish. Diffusion and flow policies share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from postbc.nn import MLP, linear


def sinusoidal_embedding(time: Tensor, dim: int) -> Tensor:
    """Times (N,) -> (N, dim): sin ‖ cos of t·exp(−log 10⁴/(dim/2 − 1)·i) (DPPO's `SinusoidalPosEmb`)."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=time.device) * -(math.log(10000) / (half - 1)))
    angle = time[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), -1)


def mish(x: Tensor) -> Tensor:
    """x·tanh(log(1 + eˣ)) = x·n/(n + 2) with n = eˣ(eˣ + 2).

    Without gradients, on a CPU, as few vectorised passes: a third of the time of torch's own, which decides how fast a policy acts.
    """
    if x.requires_grad or x.device.type != "cpu":
        return nn.functional.mish(x)
    e = x.clamp(max=20).exp_()
    n = (e + 2).mul_(e)
    return n.div_(n + 2).mul_(x)


class ResidualBlock(nn.Module):
    """x + W₂·mish(W₁·mish(x)): two layers, pre-activation."""

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = linear(hidden, hidden, generator)
        self.second = linear(hidden, hidden, generator)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(mish(self.first(mish(x))))


class DiffusionMLP(nn.Module):
    """A chunk-shaped prediction from [noisy chunk ‖ time embedding ‖ features] (DPPO's `DiffusionMLP`).

    Args:
        feature_dim: F.
        chunk_dim: D = T·A.
        generator: source of the initialisation.
        hidden: width; `layers` counts hidden layers as the tables do ("3 layers" is one residual block).
        time_dim: width of the time embedding (16 for 512, 32 for 1024).
        condition_hidden: widths of DPPO's observation MLP (`cond_mlp`, (512, 64) on Square); empty: the features themselves.
    """

    def __init__(
        self,
        feature_dim: int,
        chunk_dim: int,
        generator: torch.Generator,
        hidden: int = 512,
        layers: int = 3,
        time_dim: int = 16,
        condition_hidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.time_dim = time_dim
        self.time = MLP(time_dim, (2 * time_dim,), time_dim, generator, "mish")
        self.condition = (
            MLP(feature_dim, condition_hidden[:-1], condition_hidden[-1], generator, "mish")
            if condition_hidden
            else nn.Identity()
        )
        self.split = (chunk_dim, time_dim, condition_hidden[-1] if condition_hidden else feature_dim)
        self.input = linear(sum(self.split), hidden, generator)
        self.blocks = nn.Sequential(*(ResidualBlock(hidden, generator) for _ in range((layers - 1) // 2)))
        self.output = linear(hidden, chunk_dim, generator)

    def forward(self, x: Tensor, time: Tensor, features: Tensor) -> Tensor:
        """(B, D), (B,), (B, F) -> (B, D)."""
        times = self.time(sinusoidal_embedding(time, self.time_dim))
        return self.output(self.blocks(self.input(torch.cat((x, times, self.condition(features)), -1))))

    def predictor(self, features: Tensor, times: Tensor) -> Callable[[Tensor, int], Tensor]:
        """A function (x (B, D), i) -> forward(x, times[i], features) for fixed features (B, F) and sampling order `times` (n,).

        The first layer's share of the features and of the time is computed once for all steps: equal to `forward` up to rounding.
        """
        of_x, of_time, of_features = self.input.weight.t().split(self.split)
        base = torch.addmm(self.input.bias, self.condition(features), of_features)
        of_times = self.time(sinusoidal_embedding(times, self.time_dim)) @ of_time  # (n, hidden)
        of_x = of_x.contiguous()

        def predict(x: Tensor, i: int) -> Tensor:
            return self.output(self.blocks(torch.addmm(base + of_times[i], x, of_x)))

        return predict
