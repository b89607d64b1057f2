"""What plays: an agent maps raw named observations to raw action chunks. A file of one plays alone."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from postbc.policies.base import Observation, Policy, Shapes


@runtime_checkable
class Agent(Protocol):
    """An agent of one seed.

    Attributes:
        chunk: T, actions it decides at once.
        action_dim: A.
        observation_steps: newest observations that it looks at.
        shapes: the observations that it reads.
        device: where its tensors are.
    """

    chunk: int
    action_dim: int
    observation_steps: int
    shapes: Shapes

    @property
    def device(self) -> torch.device: ...

    def act(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """Raw named observations of B states -> raw chunks (B, T, A); randomness from `generator`, which is on `device`."""
        ...


class PolicyAgent:
    """A policy as it is: encode, sample, undo the normalisation.

    Args:
        policy: of normalised units.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.chunk, self.action_dim = policy.chunk, policy.action_dim
        self.observation_steps, self.shapes = policy.observation_steps, policy.shapes

    @property
    def device(self) -> torch.device:
        return self.policy.normalization.action_low.device

    @torch.no_grad()
    def act(self, observation: Observation, generator: torch.Generator) -> Tensor:
        features = self.policy.encode(observation)
        return self.policy.normalization.unnormalize_action(self.policy.sample(features, generator=generator))
