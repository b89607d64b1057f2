"""The policy protocol: whoever implements `loss` and `sample` can be PostBC-pretrained and finetuned by DSRL and Best-of-N."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from postbc.demonstrations.normalization import EPSILON, Normalization
from postbc.nn import Generators


@runtime_checkable
class Policy(Protocol):
    """A generative policy over action chunks, in normalised units, with a leading members axis (M = 1 for a single policy).

    Attributes:
        members: M.
        observation_dim: S.
        chunk: T, actions a sample.
        action_dim: A.
    """

    members: int
    observation_dim: int
    chunk: int
    action_dim: int

    def loss(self, observation: Tensor, chunk: Tensor, generators: Generators) -> Tensor:
        """(M, B, S), (M, B, T, A) -> (M,): the policy's own supervised loss, its randomness drawn from `generators` (one a member)."""
        ...

    def sample(self, observation: Tensor, noise: Tensor | None = None, generators: Generators | None = None) -> Tensor:
        """(M, B, S) -> (M, B, T, A): action chunks; given latent `noise` (M, B, T, A) it must be deterministic."""
        ...


class NormalizationTensors:
    """Per-member normalisation as tensors: raw (M, B, ·) <-> normalised (M, B, ·), x -> 2(x − low)/(high − low + 1e-6) − 1 (DPPO).

    Args:
        normalizations: one `demonstrations.Normalization` a member, or a single one shared by all.
        members: M.
    """

    def __init__(self, normalizations: Sequence[Normalization], members: int, device: str | torch.device = "cpu") -> None:
        if len(normalizations) not in (1, members):
            raise ValueError(f"{len(normalizations)} normalisations for {members} members")
        expanded = list(normalizations) * (members if len(normalizations) == 1 else 1)

        def stack(values: list[Any]) -> Tensor:  # float64 until here: differences of float32 would lose digits
            return torch.stack([torch.tensor(v, dtype=torch.float32) for v in values]).unsqueeze(1).to(device)

        self.observation_low = stack([n.observation_low for n in expanded])
        self.action_low = stack([n.action_low for n in expanded])
        self.observation_scale = stack([2 / (n.observation_high - n.observation_low + EPSILON) for n in expanded])
        self.action_scale = stack([2 / (n.action_high - n.action_low + EPSILON) for n in expanded])

    def normalize_observation(self, observation: Tensor) -> Tensor:
        """Raw (M, B, S) -> normalised (M, B, S)."""
        return (observation - self.observation_low) * self.observation_scale - 1

    def normalize_chunk(self, chunk: Tensor) -> Tensor:
        """Raw (M, B, T, A) -> normalised (M, B, T, A)."""
        return (chunk - self.action_low.unsqueeze(1)) * self.action_scale.unsqueeze(1) - 1

    def unnormalize_chunk(self, chunk: Tensor) -> Tensor:
        """Normalised (M, B, T, A) -> raw (M, B, T, A)."""
        return (chunk + 1) / self.action_scale.unsqueeze(1) + self.action_low.unsqueeze(1)
