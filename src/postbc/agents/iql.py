"""Implicit Q-learning (Kostrikov et al. 2021, arXiv 2110.06169), critics only: what Best-of-N ranks its chunks with.

V is an expectile of min_i Q̄_i(s, a) over the data's actions, Q a one-chunk backup of V: no action outside the data is ever judged.
IQL's actor is not trained: Best-of-N takes its actions from the pretrained policy (the paper lists β = 3, which only that actor uses).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from postbc.errors import InputError
from postbc.finetuning.networks import Activation, Critics, Info, Values, averages, copy_into, q_values, values
from postbc.finetuning.replay import Batch, Replay
from postbc.members import Adam, AdamState, descend, each, number_of_parts, scripted, split
from postbc.nn import Generators, Layers, polyak

BLOCK, STRIDE = 32, 8  # steps whose batches are drawn and gathered at once; steps in a row of one member


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

    @property
    def layers(self) -> "NetworkLayers":
        """The same for the functions below, in the same memory."""
        return NetworkLayers(self.values.net.layers, self.critics.net.layers, self.target_critics.net.layers)


class NetworkLayers(NamedTuple):
    """:class:`Networks` as TorchScript takes them."""

    values: Layers
    critics: Layers
    target_critics: Layers


def make_critics(config: IQLConfig, observation_dim: int, action_dim: int, generators: Generators) -> Critics:
    """Q alone, which is all that acting needs."""
    nets = (config.hidden, generators, config.activation, config.layer_norm)
    return Critics(len(generators), observation_dim, action_dim, *nets, critics=config.critics)


# -- losses --------------------------------------------------------------------------------------------------------------------
@scripted
def value_loss(networks: NetworkLayers, batch: Batch, expectile: float, combine: str = "min") -> tuple[Tensor, Info]:
    """mean |τ − 1(x < 0)|·x², x = min_i Q̄_i(s, a) − V(s), (M,) (IQL, equation 5)."""
    with torch.no_grad():
        q = q_values(batch.observation, batch.action, networks.target_critics)
        q = q.amin(1) if combine == "min" else q.mean(1)
    value = values(batch.observation, networks.values)
    advantage = q - value
    weight = torch.where(advantage.detach() < 0, 1 - expectile, expectile)
    loss = (weight * advantage.square()).mean(-1)
    return loss, {"value/loss": loss.detach(), "value/v": value.detach(), "value/advantage": advantage.detach()}


@scripted
def critic_loss(networks: NetworkLayers, batch: Batch) -> tuple[Tensor, Info]:
    """Σ_i mean (r + γ(1−d)·V(s') − Q_i(s, a))², (M,) (IQL, equation 6)."""
    with torch.no_grad():
        target = torch.addcmul(batch.reward, batch.discount, values(batch.next_observation, networks.values))
    q = q_values(batch.observation, batch.action, networks.critics)
    loss = (q - target.unsqueeze(1)).square().mean(-1).sum(-1)
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach()}


# -- update --------------------------------------------------------------------------------------------------------------------
@scripted
def learn(
    networks: NetworkLayers,
    of_values: AdamState,
    of_critics: AdamState,
    batches: list[Batch],
    expectile: float,
    combine: str,
    tau: float,
) -> Info:
    """For each batch a step of V, then of Q, then of the target (the authors' order, their actor left out). Info of the last."""
    info: Info = {}
    for batch in batches:
        loss, info = value_loss(networks, batch, expectile, combine)
        descend(of_values, networks.values.parameters, loss)
        loss, of_loss = critic_loss(networks, batch)
        descend(of_critics, networks.critics.parameters, loss)
        polyak(networks.target_critics.parameters, of_critics.values, tau)
        info.update(of_loss)
    return info


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

    def update(self, *batches: Batch) -> Info:
        """:func:`learn` on the batches, all members. Info of the last."""
        config, parts = self.config, len(self.parts)
        divided = list(zip(*(batch.divide(parts) for batch in batches), strict=True))

        def work(part: int, rows: slice) -> Info:
            return learn(
                self.parts[part].layers, self.optimizers["value"].states[part], self.optimizers["critic"].states[part],
                divided[part][rows], config.expectile, config.value_targets, config.tau,
            )  # fmt: skip

        return averages(each(work, parts, len(batches), STRIDE))

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
