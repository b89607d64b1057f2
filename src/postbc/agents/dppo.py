"""DPPO (Ren et al. 2024, arXiv 2409.00588): PPO on the two-layer MDP of environment steps and denoising steps.

The last K steps of the policy's chain are those of a trainable copy, the steps before stay the pretrained network's. An environment
step is K decisions x_k → x_{k+1}, each Gaussian; all have the environment step's advantage, discounted towards the early ones.

Everything is in normalised units; s are the policy's features. The flow policy's chain has no noise of its own: it is injected
(ReinFlow, Zhang et al. 2025, arXiv 2505.22094), of the minimum standard deviations, or with `max_noise_std` of a network's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from postbc.agents.base import Batch, PolicyAgent, load_parameters, read_agent, save_agent
from postbc.agents.networks import Info, Optimized, adam, descend
from postbc.devices import Compute
from postbc.errors import require
from postbc.nn import gaussian_log_density, linear
from postbc.policies.base import Observation, Policy
from postbc.policies.chains import Chain
from postbc.policies.networks.mlp import ResidualBlock
from postbc.schemas import MANY, Count, CountOrZero, NonNegative, Positive, Share, Width, schema


# -- networks ------------------------------------------------------------------------------------------------------------------
class Critic(nn.Module):
    """V(s) (DPPO's `CriticObs`: a residual MLP with Mish): (B, F) -> (B,)."""

    def __init__(self, feature_dim: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.net = nn.Sequential(
            linear(feature_dim, hidden, generator), ResidualBlock(hidden, generator), linear(hidden, 1, generator)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features).float().squeeze(-1)  # type: ignore[no-any-return]


class Noise(nn.Module):
    """ReinFlow's σ(s, k), between two bounds, evenly in log σ: features (B, F), trained steps k (B,) -> (B, D)."""

    def __init__(self, config: DPPOConfig, feature_dim: int, dim: int, trained: int, generator: torch.Generator) -> None:
        super().__init__()
        self.least, self.most, self.trained = math.log(config.min_sampling_std), math.log(config.max_noise_std or 0), trained
        hidden = config.noise_hidden
        self.net = nn.Sequential(linear(feature_dim + trained, hidden, generator), nn.Tanh(), linear(hidden, dim, generator))

    def forward(self, features: Tensor, step: Tensor) -> Tensor:
        known = torch.cat((features, nn.functional.one_hot(step, self.trained).to(features)), -1)
        share = (torch.tanh(self.net(known).float()) + 1) / 2
        return (self.least + (self.most - self.least) * share).exp()


class Networks(nn.Module):
    """All that learns: the copy of the policy's network, the critic, and where asked for the injected noise."""

    def __init__(self, config: DPPOConfig, policy: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.actor = copy.deepcopy(policy.network).requires_grad_(True)
        self.critic = Critic(policy.feature_dim, config.critic_hidden, generator)
        trained = trained_steps(config, policy.chain(config.sampling_steps))
        dim = policy.chunk * policy.action_dim
        self.noise = None if config.max_noise_std is None else Noise(config, policy.feature_dim, dim, trained, generator)


def trained_steps(config: DPPOConfig, chain: Chain) -> int:
    """K: of the chain's steps, those of the trainable copy."""
    return min(config.ft_denoising_steps, len(chain))


# -- the chain -----------------------------------------------------------------------------------------------------------------
class Denoising:
    """The policy's chain as it is sampled here: its last K steps by a finetuned network, those before by the policy's own.

    Args:
        config: the algorithm's numbers.
        policy: with a `network` and a `chain`.
        device: of the chain.
    """

    def __init__(self, config: DPPOConfig, policy: Any, device: torch.device) -> None:
        self.config, self.policy, self.chain = config, policy, policy.chain(config.sampling_steps).to(device)
        self.trained = trained_steps(config, self.chain)

    def sample(
        self, actor: Any, features: Tensor, generator: torch.Generator, exploring: bool, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor]:
        """(N, F) -> the chunk (N, T, A), normalised, and x_{S−K} … x_S, (N, K + 1, D).

        Args:
            actor: of the K last steps.
            exploring: while collecting, every step has noise, at least of `min_sampling_std`; while playing at least of `eval_min_std`,
                and the last step none.
            noise: of the K steps' standard deviations, instead of the chain's own.
        """
        config, chain, n = self.config, self.chain, len(features)
        least, most = (config.min_sampling_std, config.noise_clip) if exploring else (config.eval_min_std, 10.0)

        def draw() -> Tensor:
            return torch.randn(n, self.policy.chunk * self.policy.action_dim, generator=generator, device=features.device)

        x, kept = draw(), []
        predictors = self.policy.network.predictor(features, chain.time), actor.predictor(features, chain.time)
        for i, std in enumerate(chain.std.clamp(min=least)):
            k = i - (len(chain) - self.trained)
            late = k >= 0
            if late:
                kept.append(x)
                if noise is not None:
                    std = noise(features, torch.full((n,), k, device=features.device))
            x = chain.mean(predictors[late](x, i).float(), x, i)
            if exploring or i + 1 < len(chain):
                x = x + draw().clamp_(-most, most) * std
        return x.clamp(-1, 1).view(n, self.policy.chunk, -1), torch.stack((*kept, x), 1)


def log_probability(mean: Tensor, std: Tensor, following: Tensor) -> Tensor:
    """Mean over the chunk's components of log N(following; mean, std²), each clamped to [−5, 2] as published: (B, D) -> (B,)."""
    return gaussian_log_density(following, mean, std).clamp(-5, 2).mean(-1)


# -- advantages ----------------------------------------------------------------------------------------------------------------
def advantages(reward: Tensor, value: Tensor, next_value: Tensor, discount: Tensor, ended: Tensor, decay: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), (n, N) each.

    Args:
        next_value: V of the observation after a step, its own also where an episode ended.
        discount: γ, and 0 where the episode terminated.
        ended: where the trace stops.
        decay: γ·λ.
    """
    result, trace = torch.empty_like(reward), torch.zeros_like(reward[0])
    surprise = reward + discount * next_value - value
    for t in reversed(range(len(reward))):
        trace = surprise[t] + decay * torch.where(ended[t], 0.0, trace)
        result[t] = trace
    return result


class RewardScale:
    """Rewards over the running standard deviation of their discounted sums, clipped (DPPO: γ 0.99, clip 10)."""

    def __init__(self, num_envs: int, device: str | torch.device, discount: float = 0.99, clip: float = 10.0) -> None:
        self.discount, self.clip = discount, clip
        self.returns = torch.zeros(num_envs, device=device)
        self.mean, self.variance, self.count = 0.0, 1.0, 1e-4

    def __call__(self, reward: Tensor, ended: Tensor) -> Tensor:
        """(n, N) rewards of an iteration, (n, N) where an episode ended after the step -> scaled."""
        sums = torch.empty_like(reward)
        for t in range(len(reward)):
            self.returns = sums[t] = reward[t] + self.discount * self.returns
            self.returns = torch.where(ended[t], 0.0, self.returns)
        fresh = sums.double()
        delta, total = float(fresh.mean()) - self.mean, self.count + fresh.numel()
        m2 = self.variance * self.count + float(fresh.var(unbiased=False)) * fresh.numel()
        self.variance = (m2 + delta**2 * self.count * fresh.numel() / total) / total
        self.mean, self.count = self.mean + delta * fresh.numel() / total, total
        return (reward / (self.variance + 1e-8) ** 0.5).clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, Any]:
        return {"returns": self.returns, "mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require(
            state["returns"].shape == self.returns.shape,
            "The reward's scale is of another number of environments.",
            key="scale",
        )
        self.returns = state["returns"].to(self.returns.device)
        self.mean, self.variance, self.count = (float(state[k]) for k in ("mean", "variance", "count"))


class Rollout:
    """An iteration's vector steps, until they are learnt from."""

    def __init__(self, steps: int, device: str | torch.device = "cpu") -> None:
        self.steps, self.device = steps, device
        self.rows: list[tuple[Batch, Tensor]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def remember(self, batch: Batch, played: Tensor, ended: Tensor) -> None:
        """One vector step. Where nothing was played the trace stops, and its advantage counts for nothing."""
        self.rows.append((batch, ended | ~played))

    def stacked(self) -> tuple[Batch, Tensor]:
        """Everything, (n, N, ·), and where the traces stop (n, N)."""
        return Batch(*(torch.stack(parts) for parts in zip(*(b for b, _ in self.rows), strict=True))), torch.stack(
            [e for _, e in self.rows]
        )

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [[*batch, ended] for batch, ended in self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require(len(state["rows"]) < self.steps, "The checkpoint's rollout is longer than an iteration.", key="memory/rows")
        moved = ([part.to(self.device) for part in row] for row in state["rows"])
        self.rows = [(Batch(*parts), ended) for *parts, ended in moved]


# -- losses --------------------------------------------------------------------------------------------------------------------
class Rows(NamedTuple):
    """Decisions of the denoising layer, (B, ·)."""

    features: Tensor
    x: Tensor
    following: Tensor
    step: Tensor
    """k of K, 0 is the first of the trained steps."""
    log_probability: Tensor
    """Of the network that played."""
    advantage: Tensor
    """Of the environment step."""
    target: Tensor
    """Of V(s): advantage + V."""


def clip_range(step: Tensor, trained: int, config: DPPOConfig) -> Tensor:
    """ε of PPO's clip at the denoising steps (B,): exponentially from `clip_first` at the first to `clip` at the last."""
    if trained == 1:
        return torch.full_like(step, config.clip, dtype=torch.float32)
    rate = torch.as_tensor(config.clip_rate)
    share = (torch.exp(rate * step / (trained - 1)) - 1) / (torch.exp(rate) - 1)
    return config.clip_first + (config.clip - config.clip_first) * share


def actor_loss(new: Tensor, rows: Rows, trained: int, config: DPPOConfig) -> tuple[Tensor, Info]:
    """PPO's clipped surrogate on log-probabilities (B,), the advantages normalised, then discounted towards early steps."""
    log_ratio = new - rows.log_probability
    ratio = log_ratio.exp()
    advantage = (rows.advantage - rows.advantage.mean()) / (rows.advantage.std() + 1e-8)
    advantage = advantage * config.denoising_discount ** (trained - 1 - rows.step).float()
    clip = clip_range(rows.step, trained, config)
    loss = torch.maximum(-advantage * ratio, -advantage * torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)).mean()
    with torch.no_grad():
        kl, clipped = ratio - 1 - log_ratio, ((ratio - 1).abs() > clip).float()
    return loss, {"actor/loss": loss.detach(), "actor/ratio": ratio.detach(), "actor/kl": kl, "actor/clipped": clipped}


def critic_loss(value: Tensor, target: Tensor) -> tuple[Tensor, Info]:
    """½·mean (V(s) − target)²."""
    loss = 0.5 * (value - target).square().mean()
    return loss, {"critic/loss": loss.detach(), "critic/value": value.detach()}


# -- update --------------------------------------------------------------------------------------------------------------------
class DPPO(Optimized):
    """The learner: networks, optimisers and the frozen policy.

    Args:
        config: the algorithm's numbers.
        policy: with a `network` and a `chain` (:class:`postbc.policies.chains.Chained`).
        generator: for initialisation; its device is the networks'.
        compute: precision, and whether the update is compiled.
    """

    networks: Networks
    name, on_policy = "dppo", True
    causes: Mapping[str, tuple[str, ...]] = {
        "too large steps or too many of them": (
            "dppo.actor_lr",
            "dppo.clip",
            "dppo.clip_first",
            "dppo.epochs",
            "dppo.target_kl",
        ),
        "noise that drowns the policy": ("dppo.min_sampling_std",),
        "a critic that knows too little": ("dppo.critic_warmup_iterations",),
    }

    def __init__(self, config: DPPOConfig, policy: Any, generator: torch.Generator, compute: Compute | None = None) -> None:
        self.config, self.policy, self.discount = config, policy, config.discount
        self.compute = (compute or Compute(device=generator.device.type)).resolved()  # type: ignore[arg-type]
        self.denoising = Denoising(config, policy, generator.device)
        self.chain, self.trained = self.denoising.chain, self.denoising.trained
        self.action_dim = policy.chunk * policy.action_dim
        networks = self.networks = Networks(config, policy, generator).to(generator.device)
        self.optimizers = {
            "actor": adam(
                [p for name, p in networks.named_parameters() if not name.startswith("critic")],
                config.actor_lr,
                self.compute.captures,
            ),
            "critic": adam(networks.critic.parameters(), config.critic_lr, self.compute.captures),
        }
        self.iterations = 0
        self.scale: RewardScale | None = None
        self._actor_update = self.compute.compiled(self._actor_step)
        self._critic_update = self.compute.compiled(self._critic_step)

    def log_probabilities(self, features: Tensor, x: Tensor, following: Tensor, step: Tensor) -> Tensor:
        """Of the trained steps k (B,) under the actor: (B,)."""
        mean, std = self.chain.distribution(self.networks.actor, features, x, step + (len(self.chain) - self.trained))
        noise = self.networks.noise
        std = std.clamp(min=self.config.min_logprob_std) if noise is None else noise(features, step)
        return log_probability(mean, std, following)

    def _actor_step(self, *tensors: Tensor) -> Info:
        rows = Rows(*tensors)
        with self.compute.autocast():
            new = self.log_probabilities(rows.features, rows.x, rows.following, rows.step)
        loss, info = actor_loss(new, rows, self.trained, self.config)
        descend(self.optimizers["actor"], loss)
        return info

    def _critic_step(self, features: Tensor, target: Tensor) -> Info:
        with self.compute.autocast():
            value = self.networks.critic(features)
        loss, info = critic_loss(value, target)
        descend(self.optimizers["critic"], self.config.vf_coef * loss)
        return info

    def update(self, rows: Rows, actor: bool = True) -> Info:
        """A step of the critic and, where `actor`, one of the actor: their loss is a sum of parts that share no parameter."""
        self.gradient_steps += 1
        info = self._critic_update(rows.features, rows.target)
        return info | self._actor_update(*rows) if actor else info

    @torch.no_grad()
    def rows(self, memory: Rollout) -> Rows:
        """An iteration's decisions, (n·N·K, ·): chains, log-probabilities, advantages and targets of the network that played."""
        config, (batch, ended) = self.config, memory.stacked()
        if config.reward_scaling:
            self.scale = self.scale or RewardScale(ended.shape[1], ended.device)
            reward = self.scale(batch.reward, ended)
        else:
            reward = batch.reward
        value = self.networks.critic(batch.features.flatten(0, 1)).view(ended.shape)
        following, stops, discount = batch.next_features, ended, batch.discount
        if (
            config.time_limit == "reset"
        ):  # as published: the value after a time limit is that of the next episode's first observation
            following = torch.cat((batch.features[1:], following[-1:]))
            stops = ended & (discount == 0)
        next_value = self.networks.critic(following.flatten(0, 1)).view(ended.shape)
        advantage = advantages(reward, value, next_value, discount, stops, config.discount * config.gae_lambda)
        chains = batch.action.view(-1, self.trained + 1, self.action_dim)
        step = torch.arange(self.trained, device=chains.device).repeat(len(chains))
        wide = [t.flatten(0, 1).repeat_interleave(self.trained, 0) for t in (batch.features, advantage, advantage + value)]
        x, after = chains[:, :-1].reshape(-1, self.action_dim), chains[:, 1:].reshape(-1, self.action_dim)
        parts = zip(*(t.split(config.batch_size) for t in (wide[0], x, after, step)), strict=True)
        with (
            self.compute.autocast(),
            torch.enable_grad(),
        ):  # by the very operations of the update: the ratio begins at exactly 1
            old = torch.cat([self.log_probabilities(*part).detach() for part in parts])
        return Rows(wide[0], x, after, step, old, wide[1], wide[2])

    def minibatches(self, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Indices of an epoch's batches, in random order, all of one size: what is left over sits out (as published)."""
        size = min(self.config.batch_size, count)
        order = torch.randperm(count, generator=generator, device=generator.device)
        yield from order[: count // size * size].split(size)

    # -- in the loop (:class:`postbc.training.online.Learner`) -----------------------------------------------------------------
    def memory(self, rows: int, num_envs: int) -> Rollout:
        """An iteration's rollout."""
        return Rollout(self.config.n_steps, self.compute.device)

    def state(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """The features themselves."""
        return features

    def learn(self, memory: Rollout, sampling: torch.Generator, noise: torch.Generator) -> Info:
        """Nothing until the iteration is complete; then its epochs, ended early where the policy has moved by `target_kl`."""
        config, info = self.config, Info()
        if len(memory) < config.n_steps:
            return info
        rows, moves = self.rows(memory), self.iterations >= config.critic_warmup_iterations
        memory.rows.clear()
        self.iterations += 1
        for _ in range(config.epochs):
            for index in self.minibatches(len(rows.step), sampling):
                info = self.update(Rows(*(part[index] for part in rows)), moves)
                if moves and float(info["actor/kl"].mean()) > config.target_kl:
                    return info
        return info

    # -- act -------------------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def act(self, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(N, F) -> the chunk to play (N, T, A), normalised, and what the rollout keeps: the chain's trained end, flattened."""
        return self._play(self.networks.actor, state, generator)

    @torch.no_grad()
    def act_base(self, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As :meth:`act`, from the base policy."""
        return self._play(self.policy.network, state, generator)

    def _play(self, actor: Any, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chunk, chains = self.denoising.sample(actor, state, generator, True, self.networks.noise)
        return chunk, chains.flatten(1)

    def agent(self, deterministic: bool = False) -> DPPOAgent:
        """What has been learnt, in raw units; it shares this learner's network."""
        return DPPOAgent(self.policy, self.networks.actor, self.config)

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimiser moments, iterations, the reward's scale."""
        scale = None if self.scale is None else self.scale.state_dict()
        return {**super().state_dict(), "iterations": self.iterations, "scale": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        super().load_state_dict(state)
        self.iterations, self.scale = int(state["iterations"]), None
        if state["scale"] is not None:
            self.scale = RewardScale(len(state["scale"]["returns"]), self.chain.time.device)
            self.scale.load_state_dict(state["scale"])


# -- act -----------------------------------------------------------------------------------------------------------------------
class DPPOAgent(PolicyAgent):
    """The policy with its finetuned last steps (:class:`postbc.agents.base.Agent`), without noise at the very last.

    Args:
        policy: the frozen policy.
        actor: the finetuned copy of its network.
        config: the numbers it was trained with.
    """

    finetuner = "dppo"

    def __init__(self, policy: Any, actor: nn.Module, config: DPPOConfig) -> None:
        super().__init__(policy)
        self.actor, self.config = actor, config
        self.denoising = Denoising(config, policy, self.device)

    @torch.no_grad()
    def act(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """Raw named observations of B states -> raw chunks (B, T, A)."""
        chunk, _ = self.denoising.sample(self.actor, self.policy.encode(observation), generator, False)
        return self.policy.normalization.unnormalize_action(chunk)

    def save(self, directory: str | Path) -> None:
        """Write agent.safetensors and, for a policy of the registry, base_policy.safetensors: all that playing needs."""
        save_agent(directory, "dppo", self.policy, {"config": self.config}, self.actor)

    @classmethod
    def load(cls, directory: str | Path, policy: Policy | None = None, device: str | torch.device = "cpu") -> DPPOAgent:
        """Read :meth:`save`'s files; `policy` replaces the saved one (for classes of your own).

        Raises:
            InputError: there is no agent, it is of another kind, or it belongs to another base policy.
        """
        file, base = read_agent(directory, _Saved, policy, device)
        network: Any = base
        actor = load_parameters(lambda generator: copy.deepcopy(network.network), file, device)
        return cls(base, actor, file.header.config)


# -- configuration -------------------------------------------------------------------------------------------------------------
@schema
class DPPOConfig:
    """The algorithm's numbers; defaults are DPPO's published ones for robomimic's Lift and Can (Square: n_steps 400, batch 10000)."""

    ft_denoising_steps: Count = 10
    """K: the last steps of the chain, which a trainable copy takes (all of them where the chain is shorter)."""
    sampling_steps: Count | None = None
    """Steps of the chain: DDIM with η = 1 in fewer than the policy was trained with. Default all of them: DDPM. Flow: its own."""
    n_steps: Count = 300
    """Vector steps of an iteration."""
    batch_size: Annotated[int, Field(ge=2, le=MANY)] = 7500
    """Decisions (environment step × denoising step) of a gradient step, all of an iteration where it has fewer; at least two, as their
    advantages are normalised."""
    epochs: Count = 10
    """Passes over an iteration's decisions."""
    discount: Share = 0.999
    """γ of a chunk."""
    gae_lambda: Share = 0.95
    """λ of the advantages."""
    denoising_discount: Share = 0.99
    """γ of a denoising step: earlier ones have smaller advantages."""
    actor_lr: Positive = 1e-4
    """Adam's step size."""
    critic_lr: Positive = 1e-3
    """Adam's step size."""
    critic_warmup_iterations: CountOrZero = 2
    """Iterations in which the critic alone learns."""
    critic_hidden: Width = 256
    """Width of the critic (three layers, residual)."""
    vf_coef: Positive = 0.5
    """Weight of the critic's loss."""
    clip: Positive = 0.01
    """PPO's ε at the last denoising step."""
    clip_first: Positive = 0.001
    """ε at the first of the trained steps."""
    clip_rate: Positive = 3.0
    """How exponentially it grows between them."""
    target_kl: Positive = 1.0
    """An iteration's learning ends when the policy has moved by this."""
    min_sampling_std: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Floor of a step's standard deviation while collecting: what explores."""
    min_logprob_std: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Floor of it in log-probabilities."""
    max_noise_std: Annotated[float, Field(gt=0, le=10)] | None = None
    """Flow policies: the injected noise is a network's, between `min_sampling_std` and this (ReinFlow). Default: constant."""
    noise_hidden: Width = 64
    """Width of that network."""
    eval_min_std: NonNegative = 1e-3
    """Floor of it while playing (no noise at the very last step)."""
    noise_clip: Positive = 3.0
    """Clamp of a step's standard normal noise while collecting."""
    reward_scaling: bool = True
    """Divide rewards by the running standard deviation of their discounted sums (γ 0.99, clipped to 10)."""
    time_limit: Literal["final_obs", "reset"] = "final_obs"
    """After a time limit, bootstrap from the episode's own last observation, or (as published) from the next one's first."""


@schema
class _Saved:
    """What an agent's file says besides its parameters."""

    kind: Literal["agent"]
    agent: Literal["dppo"]
    policy: str
    """Fingerprint of the base policy."""
    config: DPPOConfig
