"""The 1-D U-Net over a chunk's time axis with FiLM conditioning (Chi et al. 2023, arXiv 2303.04137: Diffusion Policy's)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from postbc.errors import require
from postbc.nn import MLP, convolution, linear
from postbc.policies.networks.mlp import mish, sinusoidal_embedding
from postbc.schemas import Width, schema


@schema
class UNetConfig:
    """The 1-D U-Net (PostBC's on the WidowX; Diffusion Policy)."""

    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (256, 512, 1024)
    """Of each level; from one to the next the time axis is halved."""
    kernel: Annotated[int, Field(ge=1, le=99)] = 5
    """Width of the convolutions over time, odd."""
    groups: Width = 8
    """Of the group normalisations; they divide `channels`."""
    time_dim: Annotated[int, Field(ge=4, le=4096, multiple_of=2)] = 128
    """Width of the time embedding."""

    def __post_init__(self) -> None:
        require(
            self.kernel % 2 == 1, "A convolution that keeps the length is of odd width.", key="unet.kernel", found=self.kernel
        )
        require(all(width % self.groups == 0 for width in self.channels), "The groups of a normalisation share the channels evenly.",
                key="unet.groups", found=self.groups, expected=f"a divisor of channels = {self.channels}")  # fmt: skip


class ConvolutionBlock(nn.Module):
    """Convolution over time → GroupNorm → Mish: (B, inputs, T) -> (B, outputs, T)."""

    def __init__(self, config: UNetConfig, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.convolution = convolution(nn.Conv1d, inputs, outputs, config.kernel, generator, padding=config.kernel // 2)
        self.norm = nn.GroupNorm(config.groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return mish(self.norm(self.convolution(x)))


class FilmBlock(nn.Module):
    """Two convolution blocks, the first's result scaled and shifted channel by channel (FiLM, Perez et al. 2018), and a residual.

    The 2·outputs scales and shifts are linear in Mish(condition); `film` is that layer, which the network calls.
    """

    def __init__(self, config: UNetConfig, inputs: int, outputs: int, condition: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = ConvolutionBlock(config, inputs, outputs, generator)
        self.second = ConvolutionBlock(config, outputs, outputs, generator)
        self.film = linear(condition, 2 * outputs, generator)
        self.residual = convolution(nn.Conv1d, inputs, outputs, 1, generator) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """(B, inputs, T), (B, 2·outputs) -> (B, outputs, T)."""
        scale, shift = film[..., None].chunk(2, 1)
        return self.second(scale * self.first(x) + shift) + self.residual(x)


class Level(nn.ModuleList):
    """Two FiLM blocks, the first from `inputs` to `outputs` channels; each takes the next of the scales and shifts."""

    def __init__(self, config: UNetConfig, inputs: int, outputs: int, condition: int, generator: torch.Generator) -> None:
        super().__init__(FilmBlock(config, width, outputs, condition, generator) for width in (inputs, outputs))

    def forward(self, x: Tensor, films: Iterator[Tensor]) -> Tensor:
        for block in self:
            x = block(x, next(films))
        return x


class DiffusionUNet(nn.Module):
    """A chunk-shaped prediction from a noisy chunk, a time and features (Diffusion Policy's `ConditionalUnet1D`).

    A chunk of any length T: going up, a level is cut to the length that it had going down. For multiples of 2^(levels − 1) nothing is
    cut, which is the published network.

    Args:
        config: sizes.
        feature_dim: F.
        chunk: T.
        action_dim: A.
        generator: source of the initialisation.
    """

    def __init__(self, config: UNetConfig, feature_dim: int, chunk: int, action_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.shape, self.time_dim, channels = (chunk, action_dim), config.time_dim, config.channels
        self.time = MLP(config.time_dim, (4 * config.time_dim,), config.time_dim, generator, "mish")

        def level(inputs: int, outputs: int) -> Level:
            return Level(config, inputs, outputs, config.time_dim + feature_dim, generator)

        self.down = nn.ModuleList(level(i, o) for i, o in zip((action_dim, *channels), channels))
        self.downsample = nn.ModuleList(
            convolution(nn.Conv1d, width, width, 3, generator, stride=2, padding=1) for width in channels[:-1]
        )
        self.middle = level(channels[-1], channels[-1])
        rising = list(zip(channels[:0:-1], channels[-2::-1]))
        self.up = nn.ModuleList(level(2 * i, o) for i, o in rising)
        self.upsample = nn.ModuleList(
            convolution(nn.ConvTranspose1d, o, o, 4, generator, stride=2, padding=1) for _, o in rising
        )
        self.last = ConvolutionBlock(config, channels[0], channels[0], generator)
        self.output = convolution(nn.Conv1d, channels[0], action_dim, 1, generator)

    def films(self) -> list[nn.Linear]:
        """The FiLM layers, in the order in which :meth:`decode` takes what they say."""
        return [module.film for module in self.modules() if isinstance(module, FilmBlock)]

    def decode(self, x: Tensor, films: Sequence[Tensor]) -> Tensor:
        """(B, D), scales and shifts (B, 2·outputs) of every block -> (B, D)."""
        x, film, levels = x.unflatten(1, self.shape).transpose(1, 2), iter(films), []
        for i, level in enumerate(self.down):
            x = level(x, film)
            levels.append(x)
            x = self.downsample[i](x) if i < len(self.downsample) else x
        x = self.middle(x, film)
        for level, upsample in zip(self.up, self.upsample, strict=True):
            x = level(torch.cat((x, levels.pop()), 1), film)
            x = upsample(x)[..., : levels[-1].shape[-1]]
        predicted: Tensor = self.output(self.last(x)).transpose(1, 2).flatten(1)
        return predicted

    def forward(self, x: Tensor, time: Tensor, features: Tensor) -> Tensor:
        """(B, D), (B,), (B, F) -> (B, D)."""
        condition = mish(torch.cat((self.time(sinusoidal_embedding(time, self.time_dim)), features), -1))
        return self.decode(x, [film(condition) for film in self.films()])

    def predictor(self, features: Tensor, times: Tensor) -> Callable[[Tensor, int], Tensor]:
        """A function (x (B, D), i) -> forward(x, times[i], features) for fixed features (B, F) and sampling order `times` (n,).

        The scales' and shifts' share of the features and of the times is computed once: equal to `forward` up to rounding.
        """
        features, times = mish(features), mish(self.time(sinusoidal_embedding(times, self.time_dim)))
        shares = []
        for film in self.films():
            of_time, of_features = film.weight.split((self.time_dim, features.shape[-1]), 1)
            shares.append((nn.functional.linear(features, of_features, film.bias), nn.functional.linear(times, of_time)))
        return lambda x, i: self.decode(x, [of_features + of_times[i] for of_features, of_times in shares])
