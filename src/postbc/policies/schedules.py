"""DDPM and DDIM, on their own: noise schedules and reverse steps, equal to diffusers' (tested), with nothing else in them.

Conventions of DPPO, which PostBC inherits: cosine ᾱ, ε-prediction, the denoised sample clamped at every step, DDIM with "leading"
steps, η = 0 and ε recomputed from the clamped sample (diffusers: `use_clipped_model_output=True`), ᾱ = 1 after the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, int], Tensor]  # (x_t, index of the step in the sampling order) -> predicted ε


def cosine_betas(steps: int, offset: float = 0.008, maximum: float = 0.999) -> Tensor:
    """(T,) float64 β of Nichol and Dhariwal's cosine schedule (diffusers: `squaredcos_cap_v2`)."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2

    return torch.tensor(
        [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), maximum) for i in range(steps)], dtype=torch.float64
    )


@dataclass(frozen=True)
class Schedule:
    """What the forward process x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε needs. `alpha_bars`: (T,) float64."""

    betas: Tensor
    alpha_bars: Tensor

    @classmethod
    def cosine(cls, steps: int) -> Schedule:
        """The cosine schedule with T = `steps`."""
        betas = cosine_betas(steps)
        return cls(betas, torch.cumprod(1 - betas, 0))

    @property
    def scales(self) -> Tensor:
        """(T, 2) float32: √ᾱ_t and √(1−ᾱ_t), what :func:`add_noise` takes."""
        return torch.stack((self.alpha_bars.sqrt(), (1 - self.alpha_bars).sqrt()), -1).float()

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    def ddim_timesteps(self, steps: int) -> list[int]:
        """Leading spacing, descending: (S−1)·⌊T/S⌋, ..., ⌊T/S⌋, 0 (T = 100, S = 8: 84, 72, ..., 12, 0)."""
        return [i * (self.steps // steps) for i in reversed(range(steps))]


def add_noise(scales: Tensor, sample: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε for `scales` (T, 2), sample and noise (B, D), timestep (B,)."""
    of_sample, of_noise = scales[timestep].split(1, -1)
    return of_sample * sample + of_noise * noise


def ddim(denoiser: Denoiser, schedule: Schedule, noise: Tensor, steps: int, clip: float | None = 1.0) -> Tensor:
    """Deterministic sampling (DDIM, η = 0): latent noise in, sample out, any shape.

    A step is x ← √ᾱ'·x̂0 + √(1−ᾱ')·ε̂ with ε̂ = (x − √ᾱ·x̂0)/√(1−ᾱ), which is linear in (x̂0, x): two scalars a step.
    """
    timesteps = schedule.ddim_timesteps(steps)
    alpha_bars = schedule.alpha_bars.tolist()
    x = noise
    for i, t in enumerate(timesteps):
        now, after = alpha_bars[t], alpha_bars[timesteps[i + 1]] if i + 1 < steps else 1.0
        denoised = torch.add(x, denoiser(x, i), alpha=-math.sqrt(1 - now)).div_(math.sqrt(now))
        if clip is not None:
            denoised.clamp_(-clip, clip)
        keep = math.sqrt(1 - after) / math.sqrt(1 - now)
        x = (
            torch.add(denoised * (math.sqrt(after) - keep * math.sqrt(now)), x, alpha=keep)
            if keep
            else denoised * math.sqrt(after)
        )
    return x


def ddpm(
    denoiser: Denoiser,
    schedule: Schedule,
    noise: Tensor,
    step_noise: Callable[[], Tensor],
    clip: float | None = 1.0,
    minimum_std: float = 1e-3,
    noise_clip: float | None = 10.0,
) -> Tensor:
    """Ancestral sampling (DDPM, posterior variance β̃, none at the last step).

    Args:
        step_noise: draws standard normal noise of the sample's shape, once a step but the last.
        minimum_std: DPPO's floor on the standard deviation of a step (0 for the textbook sampler).
        noise_clip: DPPO's clamp on a step's standard normal noise.
    """
    alpha_bars, betas = schedule.alpha_bars.tolist(), schedule.betas.tolist()
    x = noise
    for i, t in enumerate(reversed(range(schedule.steps))):
        now, after = alpha_bars[t], alpha_bars[t - 1] if t else 1.0
        denoised = torch.add(x, denoiser(x, i), alpha=-math.sqrt(1 - now)).div_(math.sqrt(now))
        if clip is not None:
            denoised.clamp_(-clip, clip)
        x = denoised * (math.sqrt(after) * betas[t] / (1 - now)) + x * (math.sqrt(1 - betas[t]) * (1 - after) / (1 - now))
        if t:
            std = max(math.sqrt(max((1 - after) / (1 - now) * betas[t], 1e-20)), minimum_std)
            fresh = step_noise()
            x = torch.add(x, fresh.clamp_(-noise_clip, noise_clip) if noise_clip is not None else fresh, alpha=std)
    return x
