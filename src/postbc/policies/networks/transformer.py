"""The diffusion transformer over the tokens of a chunk (Dasari et al. 2024, arXiv 2410.10088: the DiT-Block policy).

Observation tokens go through a self-attention encoder; its l-th layer's tokens, averaged, and the time condition the decoder's l-th
block by adaLN-zero (Peebles and Xie 2023, arXiv 2212.09748): nothing attends from actions to observations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from postbc.errors import require
from postbc.nn import fill_uniform, linear
from postbc.policies.networks.mlp import sinusoidal_embedding
from postbc.schemas import Layers, Width, schema

Even = Annotated[int, Field(ge=4, le=2**20, multiple_of=2)]


@schema
class TransformerConfig:
    """The diffusion transformer (PostBC's on LIBERO; its tokens are as wide as the rest)."""

    hidden: Even = 256
    """Width of every token."""
    heads: Width = 8
    """Attention heads; they divide `hidden`."""
    layers: Layers = 4
    """Of the encoder of observations, and as many of the decoder of chunks."""
    feed_forward: Width = 512
    """Width of the feed-forward networks."""
    time_dim: Even = 256
    """Width of the time embedding."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the residuals that training drops (published: 0.1); inference drops nothing."""

    def __post_init__(self) -> None:
        require(self.hidden % self.heads == 0, "The heads of a transformer share its width evenly.", key="transformer.heads",
                found=self.heads, expected=f"a divisor of hidden = {self.hidden}")  # fmt: skip


def _xavier(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer of Glorot's uniform weights, as published, and no bias to begin with."""
    layer = _zero(inputs, outputs)
    fill_uniform(layer.weight.data, math.sqrt(6 / (inputs + outputs)), generator)
    return layer


def _zero(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that begins at zero: it draws nothing."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, device=torch.get_default_device())
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention: queries and keys of `where`, values of `what`, both (B, N, H) -> (B, N, H)."""

    def __init__(self, config: TransformerConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key = _xavier(config.hidden, 2 * config.hidden, generator)
        self.value = _xavier(config.hidden, config.hidden, generator)
        self.output = _xavier(config.hidden, config.hidden, generator)

    def forward(self, where: Tensor, what: Tensor) -> Tensor:
        parts = (*self.query_key(where).chunk(2, -1), self.value(what))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, heads, N, H/heads)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.output(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Two layers with GELU between."""

    def __init__(self, config: TransformerConfig, generator: torch.Generator) -> None:
        super().__init__(
            _xavier(config.hidden, config.feed_forward, generator), nn.GELU(approximate="tanh"), nn.Dropout(config.dropout),
            _xavier(config.feed_forward, config.hidden, generator),
        )  # fmt: skip


class EncoderLayer(nn.Module):
    """DETR's: a token's place is added to queries and keys; normalised after each residual."""

    def __init__(self, config: TransformerConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config, generator), FeedForward(config, generator)
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden), nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, place: Tensor) -> Tensor:
        tokens = self.norm1(tokens + self.dropout(self.attention(tokens + place, tokens)))
        return self.norm2(tokens + self.dropout(self.feed_forward(tokens)))


class DecoderLayer(nn.Module):
    """adaLN-zero: shift, scale and gate of both residuals are linear in SiLU(condition), and zero at first: the identity."""

    def __init__(self, config: TransformerConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config, generator), FeedForward(config, generator)
        self.norm = nn.LayerNorm(config.hidden, elementwise_affine=False, eps=1e-6)
        self.modulation = _zero(config.hidden, 6 * config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """(B, T, H), (B, H) -> (B, T, H)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(nn.functional.silu(condition))[:, None].chunk(6, -1)
        x = self.norm(tokens) * (1 + scale1) + shift1
        tokens = tokens + gate1 * self.dropout(self.attention(x, x))
        x = self.norm(tokens) * (1 + scale2) + shift2
        return tokens + gate2 * self.dropout(self.feed_forward(x))


class DiffusionTransformer(nn.Module):
    """A chunk-shaped prediction from a noisy chunk, a time and features: one token an action, one a part of the features.

    The modulation's scales are DiT's 1 + s, and the last normalisation is applied (the DiT-Block policy's code multiplies by s and
    forgets it).

    Args:
        config: sizes.
        widths: of the parts that stand side by side in the features (a name at a time step each), F their sum.
        chunk: T.
        action_dim: A.
        generator: source of the initialisation.
    """

    def __init__(
        self, config: TransformerConfig, widths: Sequence[int], chunk: int, action_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        hidden = config.hidden
        self.widths, self.shape, self.time_dim = list(widths), (chunk, action_dim), config.time_dim
        self.parts = nn.ModuleList(linear(width, hidden, generator) for width in widths)
        self.places: Tensor
        self.register_buffer("places", sinusoidal_embedding(torch.arange(len(self.widths)), hidden), persistent=False)  # (P, H)
        self.encoder = nn.ModuleList(EncoderLayer(config, generator) for _ in range(config.layers))
        self.time = nn.Sequential(linear(config.time_dim, hidden, generator), nn.SiLU(), linear(hidden, hidden, generator))
        self.actions = nn.Sequential(
            linear(action_dim, action_dim, generator), nn.GELU(approximate="tanh"), linear(action_dim, hidden, generator)
        )
        self.order = nn.Parameter(torch.empty(chunk, hidden))
        fill_uniform(self.order.data, math.sqrt(6 / (hidden * (1 + chunk))), generator)
        self.decoder = nn.ModuleList(DecoderLayer(config, generator) for _ in range(config.layers))
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.modulation = _zero(hidden, 2 * hidden)
        self.output = _zero(hidden, action_dim)

    def observe(self, features: Tensor) -> list[Tensor]:
        """(B, F) -> after each layer of the encoder the mean of its tokens, (B, H)."""
        parts = zip(self.parts, features.split(self.widths, -1), strict=True)
        tokens, means = torch.stack([layer(part) for layer, part in parts], 1), []
        for layer in self.encoder:
            tokens = layer(tokens, self.places)
            means.append(tokens.mean(1))
        return means

    def embed(self, time: Tensor) -> Tensor:
        """(N,) -> (N, H)."""
        embedded: Tensor = self.time(sinusoidal_embedding(time, self.time_dim))
        return embedded

    def decode(self, x: Tensor, time: Tensor, means: Sequence[Tensor]) -> Tensor:
        """(B, D), an embedded time (B or 1, H), what :meth:`observe` says -> (B, D)."""
        tokens = self.actions(x.unflatten(1, self.shape)) + self.order
        for layer, mean in zip(self.decoder, means, strict=True):
            tokens = layer(tokens, mean + time)
        shift, scale = self.modulation(nn.functional.silu(means[-1] + time))[:, None].chunk(2, -1)
        return self.output(self.norm(tokens) * (1 + scale) + shift).flatten(1)

    def forward(self, x: Tensor, time: Tensor, features: Tensor) -> Tensor:
        """(B, D), (B,), (B, F) -> (B, D)."""
        return self.decode(x, self.embed(time), self.observe(features))

    def predictor(self, features: Tensor, times: Tensor) -> Callable[[Tensor, int], Tensor]:
        """A function (x (B, D), i) -> forward(x, times[i], features) for fixed features (B, F) and sampling order `times` (n,).

        Observations are encoded once for all steps.
        """
        means, embedded = self.observe(features), self.embed(times)
        return lambda x, i: self.decode(x, embedded[i : i + 1], means)
