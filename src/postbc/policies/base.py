"""The policy protocol: whoever has `encode`, `loss` and `sample` can be PostBC-pretrained and finetuned by DSRL and Best-of-N.

A policy is one policy of one seed. It owns its encoder and its normalisation; what sees features never sees pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from postbc.data.normalization import Normalization

#: Named observations of B states: "state" (B, S) float32, "image.<camera>" (B, C, H, W) uint8, "language" (B, E) float32; with
#: `observation_steps` > 1 a time axis stands after B, the newest last. Raw units.
Observation = Mapping[str, Tensor]
#: Name -> shape of one observation without batch and time axes: {"state": (19,)}.
Shapes = Mapping[str, tuple[int, ...]]


@runtime_checkable
class Policy(Protocol):
    """A generative policy over action chunks.

    Attributes:
        chunk: T, actions a sample.
        action_dim: A.
        feature_dim: F, width of :meth:`encode`'s result.
        observation_steps: newest observations that it looks at (1: the current one).
        shapes: the observations that it reads.
        normalization: raw <-> normalised actions (and states), a module with buffers.
    """

    chunk: int
    action_dim: int
    feature_dim: int
    observation_steps: int
    shapes: Shapes
    normalization: Normalization

    def encode(self, observation: Observation) -> Tensor:
        """Raw named observations of B states -> features (B, F). For states alone the normalised vector itself."""
        ...

    def loss(self, features: Tensor, chunk: Tensor, generator: torch.Generator, weight: Tensor | None = None) -> Tensor:
        """(B, F), normalised chunks (B, T, A) -> (B,): the policy's own supervised loss, its randomness drawn from `generator`.

        `weight` (B,) multiplies the losses.
        """
        ...

    def sample(self, features: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """(B, F) -> normalised chunks (B, T, A); given latent `noise` (B, T, A) it must be deterministic to serve DSRL."""
        ...


#: kind -> "module:Class" of the policies that a file can hold. A class has a `Config` (a schema with a field `kind`), a constructor
#: (config, shapes, action_dim, chunk, normalization, generator, observation_steps=1, about=None), and is a torch.nn.Module.
#: A package of your own adds its kind here when it is imported.
POLICIES: dict[str, str] = {
    "diffusion": "postbc.policies.diffusion:DiffusionPolicy",
    "flow": "postbc.policies.flow:FlowPolicy",
}


def policy_class(kind: str) -> Any:
    """The class of a kind. InputError for one that nobody has registered."""
    from postbc.errors import require

    require(kind in POLICIES, "There is no such kind of policy.", key="kind", found=kind, expected=", ".join(POLICIES),
            remedy="import the package that defines it first, which adds it to postbc.policies.POLICIES")  # fmt: skip
    module, name = POLICIES[kind].split(":")
    return getattr(importlib.import_module(module), name)
