"""From named observations to features: the normalised vector of a state, a small convolutional net for each camera's images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from postbc.data.episodes import is_image
from postbc.data.normalization import Normalization
from postbc.errors import require
from postbc.nn import fill_uniform
from postbc.schemas import Width, schema


@schema
class EncoderConfig:
    """How images become features (states need nothing: their features are the normalised vector)."""

    keypoints: Annotated[int, Field(ge=1, le=4096)] = 32
    """K points that each camera's image is reduced to; its features are their 2·K coordinates."""
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (16, 32, 32)
    """Of the 3×3 convolutions that an image goes through."""


class ImageEncoder(nn.Module):
    """(N, C, H, W) uint8 -> (N, 2·K) in [−1, 1]: convolutions, then where each of K maps is large (robomimic's spatial softmax).

    A convolution halves what is larger than 16 pixels, so that the maps of small images stay fine enough to point.
    """

    def __init__(self, config: EncoderConfig, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for outputs in config.channels:
            stride = 2 if max(height, width) > 16 else 1
            layers += [_convolution(channels, outputs, 3, stride, generator), nn.GroupNorm(1, outputs), nn.ReLU()]
            channels, height, width = outputs, -(-height // stride), -(-width // stride)
        self.convolutions = nn.Sequential(*layers, _convolution(channels, config.keypoints, 1, 1, generator))
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.places: Tensor
        self.register_buffer("places", torch.stack((x.flatten(), y.flatten()), -1), persistent=False)  # (h·w, 2)

    def forward(self, image: Tensor) -> Tensor:
        maps = self.convolutions(image.to(torch.float32) / 127.5 - 1)
        return (maps.flatten(2).float().softmax(-1) @ self.places).flatten(1)


@torch.no_grad()
def _convolution(inputs: int, outputs: int, kernel: int, stride: int, generator: torch.Generator) -> nn.Conv2d:
    """With torch's own initialisation, drawn from `generator`."""
    layer = nn.utils.skip_init(
        nn.Conv2d, inputs, outputs, kernel, stride=stride, padding=kernel // 2, device=torch.get_default_device()
    )
    fill_uniform(layer.weight, (kernel**2 * inputs) ** -0.5, generator)
    fill_uniform(layer.bias, (kernel**2 * inputs) ** -0.5, generator)
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
            image = is_image(name)
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
        widths = (2 * config.keypoints if len(shape) == 3 else shape[0] for shape in self.shapes.values())
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
