"""DPPO's diffusion MLP: time embedding, one pre-activation residual block, Mish; stacked over members."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from postbc.nn import Generators, StackedLinear, StackedMLP


def sinusoidal_embedding(steps: int, dim: int) -> Tensor:
    """(T, dim): sin ‖ cos of t·exp(−log 10⁴/(dim/2 − 1)·i) (DPPO's `SinusoidalPosEmb`)."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    angle = torch.arange(steps)[:, None] * frequency[None]
    return torch.cat((angle.sin(), angle.cos()), -1)


class ResidualBlock(nn.Module):
    """x + W₂·mish(W₁·mish(x)): two layers, pre-activation."""

    def __init__(self, members: int, hidden: int, generators: Generators) -> None:
        super().__init__()
        self.first = StackedLinear(members, hidden, hidden, generators)
        self.second = StackedLinear(members, hidden, hidden, generators)

    def forward(self, x: Tensor) -> Tensor:
        mish = nn.functional.mish
        return x + self.second(mish(self.first(mish(x))))


class DiffusionMLP(nn.Module):
    """Predicts ε from [noisy chunk ‖ time embedding ‖ observation] (DPPO's `DiffusionMLP`).

    Args:
        members: M.
        observation_dim: S.
        chunk_dim: D = T·A.
        hidden: width; `layers` counts hidden layers as the tables do ("3 layers" is one residual block).
        time_dim: width of the time embedding (16 for 512, 32 for 1024).
        condition_hidden: widths of DPPO's observation MLP (`cond_mlp`, (512, 64) on Square); empty: the observation itself.
        denoising_steps: T of the schedule.
    """

    def __init__(
        self,
        members: int,
        observation_dim: int,
        chunk_dim: int,
        generators: Generators,
        hidden: int = 512,
        layers: int = 3,
        time_dim: int = 16,
        condition_hidden: Sequence[int] = (),
        denoising_steps: int = 100,
    ) -> None:
        super().__init__()
        if layers < 1 or layers % 2 == 0:
            raise ValueError(f"layers must be odd (1 + two a residual block), found {layers}")
        self.register_buffer("steps", sinusoidal_embedding(denoising_steps, time_dim), persistent=False)
        self.time = StackedMLP(members, time_dim, (2 * time_dim,), time_dim, generators, nn.Mish)
        self.condition = (
            StackedMLP(members, observation_dim, condition_hidden[:-1], condition_hidden[-1], generators, nn.Mish)
            if condition_hidden
            else nn.Identity()
        )
        observed = condition_hidden[-1] if condition_hidden else observation_dim
        self.split = (chunk_dim, time_dim, observed)
        self.input = StackedLinear(members, sum(self.split), hidden, generators)
        self.blocks = nn.Sequential(*(ResidualBlock(members, hidden, generators) for _ in range((layers - 1) // 2)))
        self.output = StackedLinear(members, hidden, chunk_dim, generators)
        self.members = members

    def _times(self) -> Tensor:
        """(M, T, time_dim): the embedding of every timestep; cheaper than one a row, as T < B."""
        steps: Tensor = self.steps  # type: ignore[assignment]
        return self.time(steps.expand(self.members, -1, -1))

    def forward(self, x: Tensor, timestep: Tensor, observation: Tensor) -> Tensor:
        """(M, B, D), (M, B) int64, (M, B, S) -> predicted ε (M, B, D)."""
        member = torch.arange(self.members, device=x.device)[:, None]
        times = self._times()[member, timestep]
        return self.output(self.blocks(self.input(torch.cat((x, times, self.condition(observation)), -1))))

    def denoiser(self, observation: Tensor, timesteps: Sequence[int]) -> Callable[[Tensor, int], Tensor]:
        """A function (x (M, B, D), i) -> ε for a fixed observation (M, B, S) and sampling order `timesteps`.

        The first layer's share of the observation and of the time is computed once for all steps: equal to `forward` up to rounding.
        """
        of_x, of_time, of_observation = self.input.weight.split(self.split, 1)
        assert self.input.bias is not None
        base = torch.baddbmm(self.input.bias, self.condition(observation), of_observation)
        times = torch.bmm(self._times()[:, list(timesteps)], of_time)  # (M, steps, hidden)
        of_x = of_x.contiguous()

        def predict(x: Tensor, i: int) -> Tensor:
            return self.output(self.blocks(torch.baddbmm(base + times[:, i : i + 1], x, of_x)))

        return predict
