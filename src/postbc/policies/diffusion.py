"""The diffusion policy: a network over chunks (DPPO's MLP by default), its loss and its samplers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from postbc.errors import require
from postbc.policies.base import weighted
from postbc.policies.chains import Chain, diffusion_chain
from postbc.policies.encoding import Network, NetworkPolicy, check_network
from postbc.policies.networks.encoders import EncoderConfig
from postbc.policies.networks.transformer import TransformerConfig
from postbc.policies.networks.unet import UNetConfig
from postbc.policies.schedules import Schedule, add_noise, ddim, ddpm
from postbc.schemas import Layers, Positive, Width, later, schema

Steps = Annotated[int, Field(ge=1, le=10_000)]
Widths = Annotated[tuple[Width, ...], Field(max_length=9)]


@schema
class DiffusionConfig:
    """Architecture and sampling of a diffusion policy (paper, Table of pretraining; DPPO)."""

    kind: Literal["diffusion"] = "diffusion"
    """Denoising diffusion over action chunks."""
    hidden: Width = 512
    """Width of the MLP (512 Lift, 1024 Can and Square)."""
    layers: Layers = 3
    """Hidden layers, odd: 1 + two a residual block."""
    time_dim: Annotated[int, Field(ge=4, le=4096, multiple_of=2)] = 16
    """Width of the time embedding (16 for 512, 32 for 1024)."""
    condition_hidden: Widths = ()
    """Widths of an MLP on the features (DPPO uses 512 64 on Square); none by default."""
    denoising_steps: Steps = 100
    """Diffusion steps in training."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """DDIM is deterministic given the latent noise (DSRL needs that); DDPM is ancestral sampling (DPPO)."""
    inference_steps: Steps = 8
    """DDIM steps at inference (DDPM always takes all)."""
    denoised_clip: Positive | None = 1.0
    """Clamp of the denoised chunk at each step, normalised units."""
    encoder: EncoderConfig = EncoderConfig()
    """From images to features."""
    network: Network = later("mlp")
    """mlp (of the sizes above), transformer or unet."""
    transformer: TransformerConfig = later(TransformerConfig())
    """Of network transformer."""
    unet: UNetConfig = later(UNetConfig())
    """Of network unet."""

    def __post_init__(self) -> None:
        require(self.layers % 2 == 1, "The number of layers is odd: 1 + two a residual block.", key="layers", found=self.layers)
        check_network(self)
        require(
            self.inference_steps <= self.denoising_steps, "A policy cannot be sampled in more steps than it was trained with.",
            key="inference_steps", found=self.inference_steps, expected=f"at most denoising_steps = {self.denoising_steps}",
        )  # fmt: skip


class DiffusionPolicy(NetworkPolicy):
    """A diffusion policy, in normalised units (:class:`~postbc.policies.base.Policy`); arguments as those of `NetworkPolicy`."""

    Config = DiffusionConfig
    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.schedule = Schedule.cosine(config.denoising_steps)
        self.scales: Tensor
        self.register_buffer("scales", self.schedule.scales, persistent=False)
        self.times: Tensor  # made here: nothing is copied to a GPU while an update is recorded as a graph
        self.register_buffer("times", torch.tensor(self.schedule.ddim_timesteps(config.inference_steps)), persistent=False)

    def loss(self, features: Tensor, chunk: Tensor, generator: torch.Generator, weight: Tensor | None = None) -> Tensor:
        """(B, F), (B, T, A) -> (B,): ‖ε − ε_θ(x_t, t, s)‖²/D, t uniform, one ε a row; times `weight` (B,) or (B, T)."""
        sample = chunk.flatten(1)
        noise = torch.randn(sample.shape, generator=generator, device=sample.device)
        timestep = torch.randint(self.config.denoising_steps, (len(sample),), generator=generator, device=sample.device)
        predicted = self.network(add_noise(self.scales, sample, noise, timestep), timestep, features)
        return weighted((predicted - noise).square(), weight)

    def sample(self, features: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """(B, F) -> chunks (B, T, A); deterministic given `noise` (B, T, A) under DDIM.

        Raises:
            ValueError: neither noise nor a generator, or DDPM without a generator.
        """
        shape = (len(features), self.chunk * self.action_dim)

        def draw() -> Tensor:
            if generator is None:
                raise ValueError("sampling needs a generator, or latent noise and a deterministic sampler")
            return torch.randn(shape, generator=generator, device=features.device)

        x = draw() if noise is None else noise.reshape(shape)
        clip, count = self.config.denoised_clip, self.config.inference_steps
        if self.config.sampler == "ddim":
            x = ddim(self.network.predictor(features, self.times), self.schedule, x, count, clip)
        else:
            times = torch.arange(self.schedule.steps - 1, -1, -1, device=features.device)
            x = ddpm(self.network.predictor(features, times), self.schedule, x, draw, clip)
        return x.view(-1, self.chunk, self.action_dim)

    def chain(self, steps: int | None = None) -> Chain:
        """Sampling as a chain of Gaussians: DDPM, or DDIM with η = 1 in fewer `steps`."""
        steps = self.config.denoising_steps if steps is None else steps
        require(steps <= self.config.denoising_steps, "A chain has more steps than the policy was trained with.", key="steps",
                found=steps, expected=f"at most denoising_steps = {self.config.denoising_steps}")  # fmt: skip
        return diffusion_chain(self.schedule, steps, self.config.denoised_clip)
