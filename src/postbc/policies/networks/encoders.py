"""From named observations to features: the normalised vector of a state, a small convolutional net for each camera's images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from postbc.data.normalization import Normalization
from postbc.errors import require
from postbc.nn import linear
from postbc.schemas import Width, schema


@schema
class EncoderConfig:
    """How images become features (states need nothing: their features are the normalised vector)."""

    image_features: Width = 64
    """Features of each camera's image."""
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (32, 32, 64)
    """Of the convolutions (3×3, stride 2) that an image goes through."""


class ImageEncoder(nn.Module):
    """(N, C, H, W) uint8 -> (N, E) in [−1, 1]: strided convolutions, one linear layer, LayerNorm, tanh (as DrQ's encoder ends)."""

    def __init__(self, config: EncoderConfig, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for outputs in config.channels:
            layers += [_convolution(channels, outputs, generator), nn.GroupNorm(1, outputs), nn.ReLU()]
            channels, height, width = outputs, (height + 1) // 2, (width + 1) // 2
        self.convolutions = nn.Sequential(*layers)
        self.output = linear(channels * height * width, config.image_features, generator)
        self.norm = nn.LayerNorm(config.image_features)

    def forward(self, image: Tensor) -> Tensor:
        x = image.to(torch.float32) / 127.5 - 1
        return torch.tanh(self.norm(self.output(self.convolutions(x).flatten(1)).float()))


@torch.no_grad()
def _convolution(inputs: int, outputs: int, generator: torch.Generator) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
    if not layer.weight.is_meta:
        for parameter in (layer.weight, layer.bias):
            assert parameter is not None
            drawn = torch.rand(parameter.shape, generator=generator, device=generator.device)
            parameter.copy_((2 * drawn - 1) / (9 * inputs) ** 0.5)
    return layer


class Encoder(nn.Module):
    """Named observations -> features (B, F), F = `feature_dim`: those of each name, in the order of `shapes`, side by side.

    Args:
        config: of the image encoders.
        shapes: name -> shape: "state" (S,), "image.<camera>" (C, H, W); another name's vector (E,) is taken as it is.
        observation_steps: observations stand (B, To, ...) where it is above 1; their features are put side by side, the newest last.
        generator: source of the initialisation; states draw nothing.
    """

    def __init__(
        self, config: EncoderConfig, shapes: Mapping[str, tuple[int, ...]], observation_steps: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.shapes, self.observation_steps = {name: tuple(shape) for name, shape in shapes.items()}, observation_steps
        for name, shape in self.shapes.items():
            image = name.startswith("image.")
            require(len(shape) == (3 if image else 1), "An observation has a shape that cannot be encoded.", key=name, found=shape,
                    expected="(channels, height, width)" if image else "(width,)")  # fmt: skip
        # module names cannot hold dots
        self.images = nn.ModuleDict(
            {
                name.replace(".", "/"): ImageEncoder(config, shape, generator)
                for name, shape in self.shapes.items()
                if len(shape) == 3
            }
        )
        widths = (config.image_features if len(shape) == 3 else shape[0] for shape in self.shapes.values())
        self.feature_dim = observation_steps * sum(widths)

    def forward(self, observation: Mapping[str, Tensor], normalization: Normalization) -> Tensor:
        parts = []
        for name, shape in self.shapes.items():
            require(name in observation, "The observation lacks what the policy reads.", key=name, found=", ".join(observation),
                    expected=", ".join(self.shapes))  # fmt: skip
            value = observation[name]
            leading = (len(value), self.observation_steps) if self.observation_steps > 1 else (len(value),)
            require(tuple(value.shape) == (*leading, *shape), "An observation has another shape than the policy was made for.",
                    key=name, found=tuple(value.shape), expected=(*leading, *shape))  # fmt: skip
            if len(shape) == 3:
                value = self.images[name.replace(".", "/")](value.reshape(-1, *shape))
            elif name == "state":
                value = normalization.normalize_state(value.to(torch.float32))
            parts.append(value.reshape(leading[0], -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
