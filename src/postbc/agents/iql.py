"""Implicit Q-learning (Kostrikov et al. 2021, arXiv 2110.06169), critics only: what Best-of-N ranks its chunks with.

V is an expectile of min_i Q̄_i(s, a) over the data's actions, Q a one-chunk backup of V: no action outside the data is ever judged.
IQL's actor is not trained: Best-of-N takes its actions from the pretrained policy (the paper lists β = 3, which only that actor uses).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from postbc.agents.base import Batch
from postbc.agents.networks import (
    Critics,
    Info,
    Optimized,
    Value,
    adam,
    copy_into,
    descend,
)
from postbc.devices import Compute
from postbc.nn import Activation, polyak
from postbc.schemas import Count, OpenShare, Positive, Share, StepShare, Width, schema

BLOCK = 32  # steps whose batches are drawn and gathered at once


# -- networks ------------------------------------------------------------------------------------------------------------------
class Networks(nn.Module):
    """V, the critics Q_i and their targets."""

    def __init__(self, config: IQLConfig, feature_dim: int, action_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.value = Value(feature_dim, config.hidden, generator, config.activation, config.layer_norm)
        self.critics = make_critics(config, feature_dim, action_dim, generator)
        self.target_critics = make_critics(config, feature_dim, action_dim, generator)
        copy_into(self.target_critics, self.critics)


def make_critics(config: IQLConfig, feature_dim: int, action_dim: int, generator: torch.Generator) -> Critics:
    """Q alone, which is all that acting needs."""
    return Critics(feature_dim, action_dim, config.hidden, generator, config.activation, config.layer_norm, config.critics)


# -- losses --------------------------------------------------------------------------------------------------------------------
def value_loss(networks: Networks, batch: Batch, expectile: float, combine: str = "min") -> tuple[Tensor, Info]:
    """mean |τ − 1(x < 0)|·x², x = min_i Q̄_i(s, a) − V(s) (IQL, equation 5)."""
    with torch.no_grad():
        q = networks.target_critics(batch.features, batch.action)
        q = q.amin(0) if combine == "min" else q.mean(0)
    value = networks.value(batch.features)
    advantage = q - value
    weight = torch.where(advantage.detach() < 0, 1 - expectile, expectile)
    loss = (weight * advantage.square()).mean()
    return loss, {"value/loss": loss.detach(), "value/v": value.detach(), "value/advantage": advantage.detach()}


def critic_loss(networks: Networks, batch: Batch) -> tuple[Tensor, Info]:
    """Σ_i mean (r + γ(1−d)·V(s') − Q_i(s, a))² (IQL, equation 6)."""
    with torch.no_grad():
        target = torch.addcmul(batch.reward, batch.discount, networks.value(batch.next_features))
    q = networks.critics(batch.features, batch.action)
    loss = (q - target).square().mean(-1).sum()
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach()}


# -- update --------------------------------------------------------------------------------------------------------------------
class IQL(Optimized):
    """The learner.

    Args:
        config: the critic's numbers.
        feature_dim: F.
        action_dim: D, of a flattened chunk.
        generator: for initialisation; its device is the networks'.
        compute: precision, and whether the update is compiled.
    """

    networks: Networks

    def __init__(
        self, config: IQLConfig, feature_dim: int, action_dim: int, generator: torch.Generator, compute: Compute | None = None
    ) -> None:
        self.config = config
        self.compute = (compute or Compute(device=generator.device.type)).resolved()  # type: ignore[arg-type]
        self.networks = Networks(config, feature_dim, action_dim, generator).to(generator.device)
        self.optimizers = {
            "value": adam(self.networks.value.parameters(), config.lr, self.compute.captures),
            "critic": adam(self.networks.critics.parameters(), config.lr, self.compute.captures),
        }
        self._update = self.compute.compiled(self._step)

    def _step(self, *batch: Tensor) -> Info:
        config, networks, transitions = self.config, self.networks, Batch(*batch)
        with self.compute.autocast():
            loss, info = value_loss(networks, transitions, config.expectile, config.value_targets)
        descend(self.optimizers["value"], loss)
        with self.compute.autocast():
            loss, of_loss = critic_loss(networks, transitions)
        descend(self.optimizers["critic"], loss)
        polyak(networks.target_critics, networks.critics, config.tau)
        return info | of_loss

    def update(self, batch: Batch) -> Info:
        """A step of V, then of Q, then of the target (the authors' order, their actor left out)."""
        self.gradient_steps += 1
        return self._update(*batch)

    def learn(self, sample: Callable[[int], Batch], steps: int) -> Info:
        """`steps` updates on batches of `sample`, which draws that many transitions; info of the last one."""
        info: Info = {}
        for done in range(0, steps, BLOCK):
            block = min(BLOCK, steps - done)
            for batch in sample(block * self.config.batch_size).split(self.config.batch_size):
                info = self.update(batch)
        return info


# -- configuration -------------------------------------------------------------------------------------------------------------
@schema
class IQLConfig:
    """The critic's numbers; defaults are the paper's for Best-of-N on Robomimic Lift unless said otherwise."""

    steps: Count = 2_000_000
    """Gradient steps (paper: 2,000,000 Robomimic, 50,000 LIBERO, 100,000 to 700,000 WidowX)."""
    hidden: Annotated[tuple[Width, ...], Field(max_length=99)] = (256, 256)
    """Hidden layers of Q and V."""
    layer_norm: bool = True
    """LayerNorm before the activations (paper: on Lift)."""
    activation: Activation = "relu"
    """Activation of Q and V (relu: IQL's authors; tanh: the paper on LIBERO, which learns much more slowly here)."""
    critics: Annotated[int, Field(ge=1, le=99)] = 2
    """Critics."""
    lr: Positive = 3e-4
    """Adam's step size."""
    batch_size: Count = 256
    """Transitions a step."""
    discount: Share = 0.999
    """γ (paper: 0.999 Robomimic, 0.99 LIBERO, 0.97 WidowX)."""
    tau: StepShare = 0.005
    """The target critics move by this share at every step."""
    expectile: OpenShare = 0.5
    """τ of V (paper, Lift: BC 0.5, σ-BC 0.7, PostBC 0.5 at 1000 rollouts and 0.7 at 2000; Can and Square 0.7; LIBERO 0.9)."""
    value_targets: Literal["min", "mean"] = "min"
    """How V combines the target critics."""
