"""What the diffusion and the flow policy share: an encoder, a normalisation and DPPO's MLP over chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from postbc.data.normalization import Normalization
from postbc.policies.base import About, Observation, Shapes
from postbc.policies.networks.encoders import Encoder
from postbc.policies.networks.mlp import DiffusionMLP


class EncodingPolicy(nn.Module):
    """An encoder and a normalisation: what every policy of the product has, whatever its network.

    Args:
        config: `encoder`, and whatever the network needs.
        shapes: what it observes.
        action_dim: A.
        chunk: T.
        normalization: of states and actions.
        generator: source of the initialisation.
        observation_steps: newest observations that it looks at.
        about: what a reader of its file should know; saved with it.
    """

    def __init__(
        self,
        config: Any,
        shapes: Shapes,
        action_dim: int,
        chunk: int,
        normalization: Normalization,
        generator: torch.Generator,
        observation_steps: int = 1,
        about: About | None = None,
    ) -> None:
        super().__init__()
        self.config, self.action_dim, self.chunk, self.about = config, action_dim, chunk, about or About()
        self.encoder = Encoder(config.encoder, shapes, observation_steps, generator)
        self.shapes, self.observation_steps, self.feature_dim = self.encoder.shapes, observation_steps, self.encoder.feature_dim
        self.normalization = normalization

    def encode(self, observation: Observation) -> Tensor:
        """Raw named observations of B states -> features (B, F)."""
        features: Tensor = self.encoder(observation, self.normalization)
        return features


class MLPPolicy(EncodingPolicy):
    """A policy whose network predicts a chunk-shaped vector from a noisy chunk, a time and features; arguments as those above.

    Its configuration says hidden, layers, time_dim and condition_hidden.
    """

    def __init__(self, config: Any, shapes: Shapes, action_dim: int, chunk: int, normalization: Normalization,
                 generator: torch.Generator, observation_steps: int = 1, about: About | None = None) -> None:  # fmt: skip
        super().__init__(config, shapes, action_dim, chunk, normalization, generator, observation_steps, about)
        self.network = DiffusionMLP(
            self.feature_dim, chunk * action_dim, generator, config.hidden, config.layers, config.time_dim, config.condition_hidden
        )  # fmt: skip
