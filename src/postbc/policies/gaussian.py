"""The tanh-Gaussian policy of ValueDICE: one network, no chain; deterministic given the noise."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from postbc.nn import MLP, gaussian_log_density
from postbc.policies.base import weighted
from postbc.policies.encoding import EncodingPolicy
from postbc.policies.networks.encoders import EncoderConfig
from postbc.schemas import Layers, Width, schema

LOG_STD = (-5.0, 2.0)
EDGE = 1 - 1e-3
"""Actions are moved this far inside (−1, 1) before their density is asked: at the bound itself it is infinite."""


@schema
class GaussianConfig:
    """Architecture of a tanh-Gaussian policy (ValueDICE's published actor)."""

    kind: Literal["gaussian"] = "gaussian"
    """A squashed Gaussian over action chunks."""
    hidden: Width = 256
    """Width of the MLP."""
    layers: Layers = 2
    """Hidden layers."""
    encoder: EncoderConfig = EncoderConfig()
    """From images to features."""


@torch.no_grad()
def orthogonal(network: nn.Module, generator: torch.Generator) -> None:
    """Orthogonal weights and zero biases for every linear layer, drawn from `generator`; nothing on "meta"."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.is_meta:
            rows, columns = layer.weight.shape
            drawn = torch.randn(max(rows, columns), min(rows, columns), generator=generator, device=generator.device)
            q, r = torch.linalg.qr(drawn)
            q = q * torch.sign(torch.diagonal(r))
            layer.weight.copy_(q if rows >= columns else q.T)
            if layer.bias is not None:
                layer.bias.zero_()


class GaussianPolicy(EncodingPolicy):
    """a = tanh(N(mean, diag(std²))) of [features ‖ 0]; in normalised units (:class:`~postbc.policies.base.Policy`).

    The last input is ValueDICE's indicator of the absorbing state, in which nobody plays. log std is tanh-mapped to [−5, 2].
    """

    Config = GaussianConfig
    config: GaussianConfig

    def __init__(self, config: GaussianConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        generator = kwargs["generator"] if "generator" in kwargs else args[4]
        hidden = (config.hidden,) * config.layers
        self.network = MLP(self.feature_dim + 1, hidden, 2 * self.chunk * self.action_dim, generator, "relu")
        orthogonal(self.network, generator)

    def distribution(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F + 1) -> mean and standard deviation before the tanh, (B, D) each."""
        mean, raw = self.network(state).float().chunk(2, -1)
        low, high = LOG_STD
        return mean, (low + 0.5 * (high - low) * (torch.tanh(raw) + 1)).exp()

    def _state(self, features: Tensor) -> Tensor:
        return nn.functional.pad(features, (0, 1))

    def loss(self, features: Tensor, chunk: Tensor, generator: torch.Generator, weight: Tensor | None = None) -> Tensor:
        """(B, F), (B, T, A) -> (B,): −log π(chunk | s)/D, without randomness; times `weight` (B,) or (B, T)."""
        mean, std = self.distribution(self._state(features))
        action = chunk.flatten(1).clamp(-EDGE, EDGE)
        log_density = gaussian_log_density(torch.atanh(action), mean, std) - torch.log(1 - action.square())
        return weighted(-log_density, weight)

    def sample(self, features: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """(B, F) -> chunks (B, T, A); deterministic given `noise` (B, T, A).

        Raises:
            ValueError: neither noise nor a generator.
        """
        shape = (len(features), self.chunk * self.action_dim)
        if noise is None:
            if generator is None:
                raise ValueError("sampling needs latent noise, or a generator to draw it from")
            noise = torch.randn(shape, generator=generator, device=features.device)
        mean, std = self.distribution(self._state(features))
        return torch.tanh(mean + std * noise.reshape(shape)).view(-1, self.chunk, self.action_dim)
