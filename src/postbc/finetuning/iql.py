"""Implicit Q-learning (Kostrikov et al. 2021, arXiv 2110.06169), critics only: what Best-of-N ranks its chunks with.

V is an expectile of min_i Q̄_i(s, a) over the data's actions, Q a one-chunk backup of V: no action outside the data is ever judged.
IQL's actor is not trained: Best-of-N takes its actions from the pretrained policy (the paper lists β = 3, which only that actor uses).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postbc.errors import InputError
from postbc.finetuning.networks import Activation, Critics, Values, averages, copy_into
from postbc.finetuning.replay import Batch, Replay
from postbc.members import Adam, each, number_of_parts, split
from postbc.nn import Generators, polyak

Info = dict[str, Tensor]  # metric name -> (M, ...), all of a batch's values
BLOCK, STRIDE = 32, 2  # steps whose batches are drawn and gathered at once; steps in a row of one member


@dataclass(frozen=True)
class IQLConfig:
    """The critic's numbers; defaults are the paper's for Best-of-N on Robomimic Lift (paper.md section 6) unless said otherwise."""

    steps: int = 2_000_000
    """Gradient steps (paper: 2,000,000 Robomimic, 50,000 LIBERO, 100,000 to 700,000 WidowX)."""
    hidden: tuple[int, ...] = (256, 256)
    """Hidden layers of Q and V."""
    layer_norm: bool = True
    """LayerNorm before the activations (paper: on Lift)."""
    activation: Activation = "relu"
    """Activation of Q and V (relu: IQL's authors; tanh: the paper on LIBERO, which learns much more slowly here)."""
    critics: int = 2
    """Critics a seed."""
    lr: float = 3e-4
    """Adam's step size."""
    batch_size: int = 256
    """Transitions a step."""
    discount: float = 0.999
    """γ (paper: 0.999 Robomimic, 0.99 LIBERO, 0.97 WidowX)."""
    tau: float = 0.005
    """The target critics move by this share at every step."""
    expectile: float = 0.5
    """τ of V (paper: Lift 0.5 BC and PostBC, 0.7 σ-BC at 1000 rollouts; Can and Square 0.7; LIBERO 0.9)."""
    value_targets: Literal["min", "mean"] = "min"
    """How V combines the target critics."""

    def __post_init__(self) -> None:
        if not 0 < self.expectile < 1:
            raise InputError("The expectile is out of range.", key="expectile", found=self.expectile, expected="(0, 1)")
        if not 0 <= self.discount <= 1 or not 0 < self.tau <= 1:
            raise InputError(
                "γ or τ is out of range.", key="discount, tau", found=(self.discount, self.tau), expected="[0, 1], (0, 1]"
            )
        for name in ("steps", "critics", "lr", "batch_size"):
            if not getattr(self, name) > 0:
                raise InputError("A number must be positive.", key=name, found=getattr(self, name))


# -- nets ----------------------------------------------------------------------------------------------------------------------
class Networks(nn.Module):
    """V, the critics Q_i and their targets."""

    def __init__(self, config: IQLConfig, observation_dim: int, action_dim: int, generators: Generators) -> None:
        super().__init__()
        members, nets = len(generators), (config.activation, config.layer_norm)
        self.values = Values(members, observation_dim, config.hidden, generators, *nets)
        self.critics = make_critics(config, observation_dim, action_dim, generators)
        self.target_critics = make_critics(config, observation_dim, action_dim, generators)
        copy_into(self.target_critics, self.critics)


def make_critics(config: IQLConfig, observation_dim: int, action_dim: int, generators: Generators) -> Critics:
    """Q alone, which is all that acting needs."""
    nets = (config.hidden, generators, config.activation, config.layer_norm)
    return Critics(len(generators), observation_dim, action_dim, *nets, critics=config.critics)


# -- losses --------------------------------------------------------------------------------------------------------------------
def value_loss(networks: Networks, batch: Batch, expectile: float, combine: str = "min") -> tuple[Tensor, Info]:
    """mean |τ − 1(x < 0)|·x², x = min_i Q̄_i(s, a) − V(s), (M,) (IQL, equation 5)."""
    with torch.no_grad():
        q = networks.target_critics(batch.observation, batch.action)
        q = q.amin(1) if combine == "min" else q.mean(1)
    value = networks.values(batch.observation)
    advantage = q - value
    weight = torch.where(advantage.detach() < 0, 1 - expectile, expectile)
    loss = (weight * advantage.square()).mean(-1)
    return loss, {"value/loss": loss.detach(), "value/v": value.detach(), "value/advantage": advantage.detach()}


def critic_loss(networks: Networks, batch: Batch) -> tuple[Tensor, Info]:
    """Σ_i mean (r + γ(1−d)·V(s') − Q_i(s, a))², (M,) (IQL, equation 6)."""
    with torch.no_grad():
        target = torch.addcmul(batch.reward, batch.discount, networks.values(batch.next_observation))
    q = networks.critics(batch.observation, batch.action)
    loss = (q - target.unsqueeze(1)).square().mean(-1).sum(-1)
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach()}


# -- update --------------------------------------------------------------------------------------------------------------------
class IQL:
    """The learner, M members.

    Args:
        config: the critic's numbers.
        observation_dim: S.
        action_dim: D, of a flattened chunk.
        generators: one a member, for initialisation.
    """

    def __init__(self, config: IQLConfig, observation_dim: int, action_dim: int, generators: Generators) -> None:
        self.config = config
        self.networks = Networks(config, observation_dim, action_dim, generators)
        parts = number_of_parts(len(generators), config.batch_size, max(config.hidden, default=0))
        self.parts = split(self.networks, parts)
        self.optimizers = {
            "value": Adam([list(part.values.parameters()) for part in self.parts], config.lr),
            "critic": Adam([list(part.critics.parameters()) for part in self.parts], config.lr),
        }
        self._online = [[p.detach() for p in part.critics.parameters()] for part in self.parts]
        self._target = [list(part.target_critics.parameters()) for part in self.parts]

    def update(self, *batches: Batch) -> Info:
        """For each batch one step of V, then Q, then the target (the authors' order, their actor left out). Info of the last."""
        divided = [batch.divide(len(self.parts)) for batch in batches]
        infos = each(lambda part, k: self._update(part, divided[k][part]), len(self.parts), len(batches), STRIDE)
        return averages(infos)

    def _update(self, part: int, batch: Batch) -> Info:
        networks, config = self.parts[part], self.config
        loss, info = value_loss(networks, batch, config.expectile, config.value_targets)
        self.optimizers["value"].step(loss, part)
        loss, extra = critic_loss(networks, batch)
        self.optimizers["critic"].step(loss, part)
        polyak(self._target[part], self._online[part], config.tau)
        return info | extra

    def train(self, data: Replay, steps: int, sampling: Generators) -> Info:
        """`steps` updates on batches of `data`; info of the last one."""
        info: Info = {}
        for done in range(0, steps, BLOCK):
            block = min(BLOCK, steps - done)
            info = self.update(*data.sample(sampling, block * self.config.batch_size).split(self.config.batch_size))
        return info

    # -- state -----------------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Parameters and optimiser moments."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {"networks": self.networks.state_dict(), "optimizers": optimizers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.networks.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
