"""A policy's sampling as a Markov chain of Gaussians, which policy gradients go through: x_{k+1} ~ N(mean(x_k, k, s), std_k²).

For diffusion it is DDIM with η = 1 (Song et al. 2021, equations 12, 16): over all T steps that is DDPM, to rounding. For flow matching
it is Euler's step, whose standard deviation is 0: noise is what the finetuner injects (ReinFlow, Zhang et al. 2025, arXiv
2505.22094).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from postbc.policies.schedules import Schedule


@dataclass(frozen=True)
class Chain:
    """The S steps of a chain, in the order of sampling, each a row (S,) of numbers.

    The endpoint that a network's prediction p says is x̂ = clip(a·x + b·p), the next step's mean c·x̂ + e·x.
    """

    time: Tensor
    """What the network is told."""
    a: Tensor
    b: Tensor
    c: Tensor
    e: Tensor
    std: Tensor
    clip: Tensor
    """Bound of x̂; infinite where there is none."""

    def __len__(self) -> int:
        """S."""
        return len(self.time)

    def to(self, device: str | torch.device) -> Chain:
        """The chain on a device."""
        return Chain(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def mean(self, predicted: Tensor, x: Tensor, index: Any) -> Tensor:
        """(B, D), (B, D), a step or steps (B,) -> the next step's mean (B, D)."""
        a, b, c, e, clip = (getattr(self, name)[index].unsqueeze(-1) for name in ("a", "b", "c", "e", "clip"))
        endpoint = a * x + b * predicted
        return c * torch.minimum(torch.maximum(endpoint, -clip), clip) + e * x

    def distribution(self, network: nn.Module, features: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F), (B, D), steps (B,) -> mean (B, D) and standard deviation (B, 1) of the next x, differentiable in the network."""
        return self.mean(network(x, self.time[index], features).float(), x, index), self.std[index].unsqueeze(-1)


class Chained(Protocol):
    """What a policy needs for it: its network, and how it samples.

    Attributes:
        network: (x (B, D), time (B,), features (B, F)) -> prediction (B, D), with `predictor(features, times)` for whole chains.
    """

    network: Any

    def chain(self, steps: int | None = None) -> Chain:
        """The chain of `steps` steps; default the policy's own."""
        ...


def diffusion_chain(schedule: Schedule, steps: int, clip: float | None) -> Chain:
    """DDIM with η = 1 over `steps` leading timesteps; over all of them it is DDPM."""
    rows = []
    times = schedule.ddim_timesteps(steps)
    alpha_bars = schedule.alpha_bars.tolist()
    for i, t in enumerate(times):
        now, after = alpha_bars[t], alpha_bars[times[i + 1]] if i + 1 < steps else 1.0
        variance = (1 - after) / (1 - now) * (1 - now / after)
        direction = math.sqrt(max(1 - after - variance, 0.0)) / math.sqrt(1 - now)  # of ε̂ = (x − √ᾱ·x̂)/√(1−ᾱ)
        rows.append(
            (t, 1 / math.sqrt(now), -math.sqrt(1 - now) / math.sqrt(now), math.sqrt(after) - direction * math.sqrt(now), direction,
             math.sqrt(variance), math.inf if clip is None else clip)
        )  # fmt: skip
    time, *others = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    return Chain(time.long(), *(other.float() for other in others))


def flow_chain(steps: int, clip: float | None, time_scale: float) -> Chain:
    """Euler's steps of a flow on straight paths; the sample alone is clipped, as when the policy plays."""
    t = torch.arange(steps, dtype=torch.float64) / steps
    c = 1 / (steps * (1 - t))
    bound = torch.full((steps,), math.inf, dtype=torch.float64)
    bound[-1] = math.inf if clip is None else clip
    others = (torch.ones_like(t), 1 - t, c, 1 - c, torch.zeros_like(t), bound)
    return Chain((time_scale * t).float(), *(other.float() for other in others))
