"""What policies share: an encoder and a normalisation; and the networks over chunks that diffusion and flow choose from."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from postbc.data.normalization import Normalization
from postbc.policies.base import About, Observation, Shapes
from postbc.policies.networks.encoders import Encoder
from postbc.policies.networks.mlp import DiffusionMLP
from postbc.policies.networks.transformer import DiffusionTransformer
from postbc.policies.networks.unet import DiffusionUNet

Network = Literal["mlp", "transformer", "unet"]


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
        self.encoder = Encoder(config.encoder, shapes, observation_steps, generator, normalization.state_features)
        self.shapes, self.observation_steps, self.feature_dim = self.encoder.shapes, observation_steps, self.encoder.feature_dim
        self.normalization = normalization

    @property
    def augments(self) -> bool:
        """Whether training gives :meth:`encode` a generator."""
        return self.encoder.crops

    def encode(self, observation: Observation, generator: torch.Generator | None = None) -> Tensor:
        """Raw named observations of B states -> features (B, F); of random crops where training gives a generator."""
        features: Tensor = self.encoder(observation, self.normalization, generator)
        return features


class NetworkPolicy(EncodingPolicy):
    """A policy whose `network` predicts a chunk-shaped vector from a noisy chunk, a time and features; arguments as those above.

    Its configuration says which: the MLP has hidden, layers, time_dim and condition_hidden, the others their own options.
    """

    def __init__(self, config: Any, shapes: Shapes, action_dim: int, chunk: int, normalization: Normalization,
                 generator: torch.Generator, observation_steps: int = 1, about: About | None = None) -> None:  # fmt: skip
        super().__init__(config, shapes, action_dim, chunk, normalization, generator, observation_steps, about)
        self.network: Any
        if config.network == "transformer":
            self.network = DiffusionTransformer(config.transformer, self.encoder.widths, chunk, action_dim, generator)
        elif config.network == "unet":
            self.network = DiffusionUNet(config.unet, self.feature_dim, chunk, action_dim, generator)
        else:
            sizes = (config.hidden, config.layers, config.time_dim, config.condition_hidden)
            self.network = DiffusionMLP(self.feature_dim, chunk * action_dim, generator, *sizes)
