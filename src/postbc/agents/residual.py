"""Residual RL: a small actor on top of the frozen policy's chunk, learnt off-policy from rollouts and demonstrations together.

At every chunk the policy proposes M chunks b_1 … b_M, the actor corrects each, a_m = clip(b_m + scale·tanh(f(s, b_m))), and the critics
choose among them. The proposals are drawn when a state is reached and kept with it: the state of the learner is s ‖ b_1 ‖ … ‖ b_M,
acting and the targets of the critics see the same proposals, and no update samples the policy.

The parts and whose they are: a residual on a frozen chunking policy, its size limited, its critics warmed up on base-policy rollouts
(Ankile et al. 2025, ResFiT, arXiv 2509.19301; Ma et al. 2026, DAWN, arXiv 2602.10539); demonstrations as half of every batch and
LayerNorm critics (Ball et al. 2023, RLPD, arXiv 2302.02948); a large ensemble with random pairs in the target (Chen et al. 2021, REDQ,
arXiv 2101.05982); choosing among proposals in acting and in the target (Dong et al. 2025, EXPO, arXiv 2507.07986; IBRL, arXiv
2311.02198); n-step returns over chunks (Li et al. 2025, QC, arXiv 2507.07969).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from postbc.agents.base import Batch, PolicyAgent, load_parameters, read_agent, save_agent
from postbc.agents.networks import Critics, Info, Optimized, adam, copy_into, descend
from postbc.agents.replay import NStepReplay, Replay
from postbc.devices import Compute
from postbc.errors import require
from postbc.nn import MLP, Activation, polyak
from postbc.policies.base import Observation, Policy
from postbc.schemas import Count, CountOrZero, Layers, NonNegative, Positive, Share, StepShare, Width, schema


# -- networks ------------------------------------------------------------------------------------------------------------------
class Networks(nn.Module):
    """All that learns: the residual actor f(s, b), E critics Q(s, a) and their targets.

    Args:
        config: the algorithm's numbers.
        feature_dim: F, of the policy.
        action_dim: D, of a flattened chunk.
        generator: for initialisation.
    """

    def __init__(self, config: ResidualConfig, feature_dim: int, action_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.feature_dim, self.action_dim = config, feature_dim, action_dim
        hidden, kind = (config.hidden,) * config.layers, (config.activation, config.layer_norm)
        self.actor = MLP(feature_dim + action_dim, hidden, action_dim, generator, *kind)
        last = self.actor[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # before it learns the residual is none
        nn.init.zeros_(last.bias)

        def critics() -> Critics:
            return Critics(feature_dim, action_dim, hidden, generator, *kind, critics=config.critics)

        self.critics, self.target_critics = critics(), critics()
        copy_into(self.target_critics, self.critics)

    def proposals(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F + M·D) -> features (B·M, F) and proposed chunks (B·M, D), the M of a state side by side."""
        features, chunks = state.split((self.feature_dim, self.config.proposals * self.action_dim), -1)
        return features.repeat_interleave(self.config.proposals, 0), chunks.reshape(-1, self.action_dim)

    def residual(self, features: Tensor, chunks: Tensor) -> Tensor:
        """tanh f(s, b): (N, F), (N, D) -> (N, D)."""
        return torch.tanh(self.actor(torch.cat((features, chunks), -1)).float())

    def corrected(self, features: Tensor, chunks: Tensor, scale: Tensor | float, noise: Tensor | None = None) -> Tensor:
        """clip(b + scale·clip(tanh f(s, b) + noise)): (N, F), (N, D) -> (N, D)."""
        residual = self.residual(features, chunks)
        if noise is not None:
            residual = (residual + noise).clamp(-1, 1)
        return (chunks + scale * residual).clamp(-1, 1)

    def choose(self, critics: Critics, features: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Of each state's M chunks, (B·M, F) and (B·M, D), that of the highest mean Q: the chunks (B, D), all their values (E, B)."""
        m = self.config.proposals
        q = critics(features, chunks).view(self.config.critics, -1, m)
        best = q.mean(0).argmax(-1)
        rows = torch.arange(len(best), device=best.device)
        return chunks.view(-1, m, self.action_dim)[rows, best], q[:, rows, best]

    def play(self, state: Tensor, scale: Tensor | float, noise: Tensor | None = None) -> Tensor:
        """(B, F + M·D), noise (B·M, D) -> the corrected proposal that the critics like best (B, D)."""
        features, chunks = self.proposals(state)
        return self.choose(self.critics, features, self.corrected(features, chunks, scale, noise))[0]


# -- losses --------------------------------------------------------------------------------------------------------------------
def critic_loss(networks: Networks, batch: Batch, scale: Tensor, subset: Tensor) -> tuple[Tensor, Info]:
    """Σ_i mean (Q_i(s, a) − y)², y = r + γ·min_{i ∈ subset} Q̄_i(s', a'), a' what is chosen at s'.

    Args:
        batch: its features are learner's states (B, F + M·D).
        scale: of the residual at s'.
        subset: (2,) indices of critics (REDQ); all of them for a plain minimum.
    """
    with torch.no_grad():
        features, chunks = networks.proposals(batch.next_features)
        _, next_q = networks.choose(networks.target_critics, features, networks.corrected(features, chunks, scale))
        target = torch.addcmul(batch.reward, batch.discount, next_q[subset].amin(0))
    q = networks.critics(batch.features[:, : networks.feature_dim], batch.action)
    loss = (q - target).square().mean(-1).sum()
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach(), "critic/target": target}


def actor_loss(networks: Networks, state: Tensor, scale: Tensor, penalty: float) -> tuple[Tensor, Info]:
    """mean [−mean_i Q_i(s, b + scale·u) + penalty·‖u‖²/D], u = tanh f(s, b), over all proposals b of the states."""
    features, chunks = networks.proposals(state)
    u = networks.residual(features, chunks)
    q = networks.critics(features, (chunks + scale * u).clamp(-1, 1))
    loss = -q.mean() + penalty * u.square().mean()
    return loss, {"actor/loss": loss.detach(), "actor/residual": u.detach().abs()}


# -- update --------------------------------------------------------------------------------------------------------------------
class Residual(Optimized):
    """The learner: networks, optimisers and the frozen policy.

    Args:
        config: the algorithm's numbers.
        policy: frozen.
        generator: for initialisation; its device is the networks'.
        compute: precision, and whether the update is compiled.
        demonstrations: transitions of demonstrations whose features are learner's states; see :func:`with_proposals`.
    """

    networks: Networks
    name = "residual"
    causes: Mapping[str, tuple[str, ...]] = {
        "an actor that moves while the critics know little": (
            "residual.penalty", "residual.ramp", "residual.critic_warmup", "training.initial_steps",
        ),
        "a correction that is too large": ("residual.scale", "residual.exploration"),
        "too large steps or too many of them": ("residual.lr", "residual.utd"),
    }  # fmt: skip

    def __init__(
        self,
        config: ResidualConfig,
        policy: Policy,
        generator: torch.Generator,
        compute: Compute | None = None,
        demonstrations: Batch | None = None,
    ) -> None:
        self.config, self.policy, self.discount = config, policy, config.discount
        self.compute = (compute or Compute(device=generator.device.type)).resolved()  # type: ignore[arg-type]
        self.action_dim = policy.chunk * policy.action_dim
        networks = self.networks = Networks(config, policy.feature_dim, self.action_dim, generator).to(generator.device)
        self.optimizers = {
            "actor": adam(networks.actor.parameters(), config.lr, self.compute.captures),
            "critic": adam(networks.critics.parameters(), config.lr, self.compute.captures),
        }
        self.scale, self.actor_steps = torch.zeros((), device=generator.device), 0
        self.demonstrations: Replay | None = None
        if demonstrations is not None and config.demonstration_share > 0:
            self.demonstrations = Replay(
                len(demonstrations.reward), demonstrations.features.shape[1], self.action_dim, generator.device
            )
            self.demonstrations.add(demonstrations)
        self._critic_update = self.compute.compiled(self._critic_step)
        self._actor_update = self.compute.compiled(self._actor_step)

    def _critic_step(self, scale: Tensor, subset: Tensor, *batch: Tensor) -> Info:
        with self.compute.autocast():
            loss, info = critic_loss(self.networks, Batch(*batch), scale, subset)
        descend(self.optimizers["critic"], loss)
        polyak(self.networks.target_critics, self.networks.critics, self.config.tau)
        return info

    def _actor_step(self, scale: Tensor, state: Tensor) -> Info:
        with self.compute.autocast():
            loss, info = actor_loss(self.networks, state, scale, self.config.penalty)
        descend(self.optimizers["actor"], loss)
        return info

    def update(self, batch: Batch, subset: Tensor, actor: bool = True) -> Info:
        """A step of the critics with the targets of `subset`, and where `actor`, one of the actor on the batch's first states."""
        self.gradient_steps += 1
        info = self._critic_update(self.scale, subset, *batch)
        if actor:
            self.actor_steps += 1
            self.scale.fill_(self.config.scale * min(1.0, self.actor_steps / max(self.config.ramp, 1)))
            info = info | self._actor_update(self.scale, batch.features[: -(-self.config.batch_size // self.config.proposals)])
        return info

    # -- in the loop (:class:`postbc.training.online.Learner`) -----------------------------------------------------------------
    def memory(self, rows: int, num_envs: int) -> NStepReplay:
        """A replay buffer of n-step transitions."""
        width = self.policy.feature_dim + self.config.proposals * self.action_dim
        return NStepReplay(rows, width, self.action_dim, self.compute.device, steps=self.config.n_step, num_envs=num_envs)

    def state(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """(N, F) -> (N, F + M·D): the features, and M chunks that the policy proposes there."""
        return with_proposals(self.policy, features, self.config.proposals, generator)

    def learn(self, memory: NStepReplay, sampling: torch.Generator, noise: torch.Generator) -> Info:
        """`utd` updates; before the first ones, `critic_warmup` of the critics alone. Info of the last."""
        config, info = self.config, Info()
        if len(memory) == 0:
            return info
        warm = 0 if self.gradient_steps else config.critic_warmup
        for k in range(warm + config.utd):
            subset = torch.randperm(config.critics, generator=noise, device=noise.device)[: config.target_critics]
            info = info | self.update(
                self.batch(memory, sampling), subset, k >= warm and (k - warm + 1) % config.critic_steps_per_actor_step == 0
            )
        return info

    def batch(self, memory: Replay, sampling: torch.Generator) -> Batch:
        """`batch_size` transitions, a share of them from the demonstrations, mixed so that any part of the batch is of both."""
        size = self.config.batch_size
        if self.demonstrations is None:
            return memory.sample(sampling, size)
        of_demonstrations = round(size * self.config.demonstration_share)
        parts = memory.sample(sampling, size - of_demonstrations), self.demonstrations.sample(sampling, of_demonstrations)
        order = torch.randperm(size, generator=sampling, device=sampling.device)
        return Batch(*(torch.cat(pair)[order] for pair in zip(*parts, strict=True)))

    # -- act -------------------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def act(self, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(N, F + M·D) -> the chunk to play (N, T, A), normalised, and what the replay stores: the same, flattened."""
        shape = (len(state) * self.config.proposals, self.action_dim)
        noise = torch.randn(shape, generator=generator, device=state.device) * self.config.exploration
        flat = self.networks.play(state, self.scale, noise)
        return flat.view(-1, self.policy.chunk, self.policy.action_dim), flat

    @torch.no_grad()
    def act_base(self, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The policy's first proposal, as it is."""
        flat = state[:, self.networks.feature_dim : self.networks.feature_dim + self.action_dim].clamp(-1, 1)
        return flat.view(-1, self.policy.chunk, self.policy.action_dim), flat

    def agent(self, deterministic: bool = False) -> ResidualAgent:
        """What has been learnt, in raw units; it shares this learner's networks."""
        return ResidualAgent(self.policy, self.networks, float(self.scale))

    def state_dict(self) -> dict[str, object]:
        """Parameters, optimiser moments, gradient steps."""
        return {**super().state_dict(), "actor_steps": self.actor_steps, "scale": self.scale}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Undo :meth:`state_dict`."""
        super().load_state_dict(state)
        self.actor_steps = int(state["actor_steps"])  # type: ignore[call-overload]
        self.scale.copy_(state["scale"])  # type: ignore[arg-type]


def with_proposals(policy: Policy, features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(N, F) -> (N, F + M·D): the features, and `count` = M chunks that the policy proposes there, all in one batch."""
    with torch.no_grad():
        chunks = policy.sample(features.repeat_interleave(count, 0), generator=generator)
    return torch.cat((features, chunks.reshape(len(features), -1)), -1)


# -- act -----------------------------------------------------------------------------------------------------------------------
class ResidualAgent(PolicyAgent):
    """The policy's proposals, corrected, the best by the critics played (:class:`postbc.agents.base.Agent`); without exploration noise.

    Args:
        policy: the frozen policy.
        networks: actor and critics.
        scale: of the residual (less than the configuration's where its ramp was not over).
    """

    finetuner = "residual"

    def __init__(self, policy: Policy, networks: Networks, scale: float) -> None:
        super().__init__(policy)
        self.networks, self.scale = networks, scale

    @torch.no_grad()
    def act(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """Raw named observations of B states -> raw chunks (B, T, A)."""
        state = with_proposals(self.policy, self.policy.encode(observation), self.networks.config.proposals, generator)
        flat = self.networks.play(state, self.scale)
        return self.policy.normalization.unnormalize_action(flat.view(-1, self.chunk, self.action_dim))

    def save(self, directory: str | Path) -> None:
        """Write agent.safetensors and, for a policy of the registry, base_policy.safetensors: all that playing needs."""
        save_agent(directory, "residual", self.policy, {"config": self.networks.config, "scale": self.scale}, self.networks)

    @classmethod
    def load(cls, directory: str | Path, policy: Policy | None = None, device: str | torch.device = "cpu") -> ResidualAgent:
        """Read :meth:`save`'s files; `policy` replaces the saved one (for classes of your own).

        Raises:
            InputError: there is no agent, it is of another kind, or it belongs to another base policy.
        """
        file, policy = read_agent(directory, _Saved, policy, device)
        dims = (policy.feature_dim, policy.chunk * policy.action_dim)
        networks = load_parameters(lambda generator: Networks(file.header.config, *dims, generator), file, device)
        return cls(policy, networks, file.header.scale)


# -- configuration -------------------------------------------------------------------------------------------------------------
@schema
class ResidualConfig:
    """The algorithm's numbers. None is the paper's, which has no residual finetuner: the defaults are those that were measured at Lift
    (results/lift-finetuners)."""

    scale: Annotated[float, Field(gt=0, le=2)] = 0.3
    """Bound of the residual, normalised units: a component of a chunk is changed by at most this."""
    ramp: CountOrZero = 500
    """Actor steps over which the residual's bound grows from 0 to `scale`."""
    proposals: Annotated[int, Field(ge=1, le=1000)] = 4
    """M: chunks of the policy that the critics choose among, in acting and in their targets. 1: the plain residual."""
    hidden: Width = 128
    """Width of actor and critics."""
    layers: Layers = 2
    """Hidden layers of actor and critics."""
    layer_norm: bool = True
    """LayerNorm before each activation."""
    activation: Activation = "relu"
    """Activation of actor and critics."""
    critics: Layers = 5
    """E, critics; the actor climbs their mean."""
    target_critics: Layers = 2
    """How many of them, drawn anew at every step, the target takes the minimum of."""
    lr: Positive = 6e-4
    """Adam's step size."""
    batch_size: Count = 256
    """Transitions of a step of the critics; the actor's has as many proposals."""
    discount: Share = 0.97
    """γ of a chunk."""
    n_step: Annotated[int, Field(ge=1, le=100)] = 3
    """Chunks whose rewards a return sums before it bootstraps."""
    tau: StepShare = 0.005
    """Target critics move by this share at every step."""
    utd: Count = 16
    """Steps of the critics a vector step."""
    critic_steps_per_actor_step: Count = 2
    """Steps of the critics before each of the actor."""
    critic_warmup: CountOrZero = 1000
    """Steps of the critics on the base policy's rollouts before the actor moves."""
    demonstration_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a batch that comes from the demonstrations, where they are given."""
    exploration: NonNegative = 0.2
    """Standard deviation of the noise on the residual while training, in units of its bound."""
    penalty: NonNegative = 0.0
    """Weight of the residual's mean square in the actor's loss."""

    def __post_init__(self) -> None:
        require(
            self.target_critics <= self.critics, "The target takes the minimum of some of the critics.", key="target_critics",
            found=self.target_critics, expected=f"at most critics = {self.critics}",
        )  # fmt: skip
        require(
            self.utd >= self.critic_steps_per_actor_step, "The actor would never learn.", key="critic_steps_per_actor_step",
            found=self.critic_steps_per_actor_step, expected=f"at most utd = {self.utd}",
        )  # fmt: skip


@schema
class _Saved:
    """What an agent's file says besides its parameters."""

    kind: Literal["agent"]
    agent: Literal["residual"]
    policy: str
    """Fingerprint of the base policy."""
    config: ResidualConfig
    scale: NonNegative
