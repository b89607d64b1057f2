"""The flow-matching policy: straight paths from noise to chunks, integrated by Euler; deterministic given the noise."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from postbc.errors import require
from postbc.policies.base import weighted
from postbc.policies.chains import Chain, flow_chain
from postbc.policies.diffusion import Steps, Widths
from postbc.policies.encoding import Network, NetworkPolicy, check_network
from postbc.policies.networks.encoders import EncoderConfig
from postbc.policies.networks.transformer import TransformerConfig
from postbc.policies.networks.unet import UNetConfig
from postbc.schemas import Layers, Positive, Width, later, schema

TIME_SCALE = 100.0
"""Times in [0, 1] are embedded as a diffusion of this many steps would be."""


@schema
class FlowConfig:
    """Architecture and sampling of a flow-matching policy (Lipman et al. 2023; straight paths)."""

    kind: Literal["flow"] = "flow"
    """Flow matching over action chunks."""
    hidden: Width = 512
    """Width of the MLP."""
    layers: Layers = 3
    """Hidden layers, odd: 1 + two a residual block."""
    time_dim: Annotated[int, Field(ge=4, le=4096, multiple_of=2)] = 16
    """Width of the time embedding."""
    condition_hidden: Widths = ()
    """Widths of an MLP on the features; none by default."""
    inference_steps: Steps = 8
    """Euler steps at inference."""
    sample_clip: Positive | None = 1.0
    """Clamp of the sampled chunk, normalised units."""
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


class FlowPolicy(NetworkPolicy):
    """A flow-matching policy, in normalised units (:class:`~postbc.policies.base.Policy`); arguments as those of `NetworkPolicy`.

    A path is x_t = (1 − t)·noise + t·chunk, its velocity chunk − noise.
    """

    Config = FlowConfig
    config: FlowConfig

    def loss(self, features: Tensor, chunk: Tensor, generator: torch.Generator, weight: Tensor | None = None) -> Tensor:
        """(B, F), (B, T, A) -> (B,): ‖chunk − noise − v_θ(x_t, t, s)‖²/D, t uniform on [0, 1), one noise a row; times `weight`."""
        end = chunk.flatten(1)
        start = torch.randn(end.shape, generator=generator, device=end.device)
        time = torch.rand(len(end), generator=generator, device=end.device)
        velocity = self.network(torch.lerp(start, end, time[:, None]), TIME_SCALE * time, features)
        return weighted((velocity - (end - start)).square(), weight)

    def sample(self, features: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """(B, F) -> chunks (B, T, A); deterministic given `noise` (B, T, A).

        Raises:
            ValueError: neither noise nor a generator.
        """
        shape, steps = (len(features), self.chunk * self.action_dim), self.config.inference_steps
        if noise is None:
            if generator is None:
                raise ValueError("sampling needs latent noise, or a generator to draw it from")
            noise = torch.randn(shape, generator=generator, device=features.device)
        x = noise.reshape(shape)
        velocity = self.network.predictor(features, torch.arange(steps, device=features.device) * (TIME_SCALE / steps))
        for i in range(steps):
            x = torch.add(x, velocity(x, i), alpha=1 / steps)
        if self.config.sample_clip is not None:
            x = x.clamp(-self.config.sample_clip, self.config.sample_clip)
        return x.view(-1, self.chunk, self.action_dim)

    def chain(self, steps: int | None = None) -> Chain:
        """Sampling as a chain of Gaussians of no width: Euler's steps."""
        return flow_chain(self.config.inference_steps if steps is None else steps, self.config.sample_clip, TIME_SCALE)
