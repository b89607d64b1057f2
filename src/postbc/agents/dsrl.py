"""DSRL (Wagenmaker et al. 2025, arXiv 2506.15799): SAC over the latent noise of a frozen, deterministic generative policy.

Two variants. Both learn an actor u = π(s) ∈ (−1, 1)^W whose output, times `action_magnitude`, is the noise w that the policy turns
into an action chunk a = DP(s, w). W is D = T·A, or, where the noise is tied, A: one vector for all actions of a chunk, as DSRL steers
π0's chunks of 50. Of a policy that was pretrained with `coherent`, the actor can choose the posterior's coordinates g as well, or them
alone.

- **sac**: plain SAC whose action is u; critics Q(s, u).
- **na** ("noise aliased"): critics Q(s, a) of the real chunk learn by temporal differences, a noise critic Q^W(s, u) is distilled from
  them at w ~ N(0, I), and the actor climbs Q^W. Data of any source can enter the critics, as they see real chunks.

Everything is in normalised units; s are the policy's features (of which actor and critics see what
:func:`postbc.policies.base.seen_dim` says).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from postbc.agents.base import Batch, PolicyAgent, load_parameters, read_agent, save_agent
from postbc.agents.networks import (
    Actor,
    Critics,
    Info,
    Optimized,
    adam,
    copy_into,
    descend,
)
from postbc.agents.replay import Replay
from postbc.data.episodes import COORDINATES
from postbc.devices import Compute
from postbc.errors import require
from postbc.nn import Activation, polyak
from postbc.policies.base import Observation, Policy, seen_dim
from postbc.schemas import Count, CountOrZero, Layers, Positive, Share, StepShare, Width, later, schema


# -- networks ------------------------------------------------------------------------------------------------------------------
class Networks(nn.Module):
    """All that learns: actor, critics and their targets, the noise critics (na), the log temperature."""

    def __init__(self, config: DSRLConfig, policy: Policy, generator: torch.Generator) -> None:
        super().__init__()
        hidden, kind = (config.hidden,) * config.layers, (config.activation, config.layer_norm)
        latent, na = latent_dim(config, policy), config.variant == "na"

        def critics(action_dim: int) -> Critics:
            return Critics(visible_dim(config, policy), action_dim, hidden, generator, *kind, critics=config.critics)

        self.actor = make_actor(config, policy, generator)
        self.critics, self.target_critics = (critics(policy.chunk * policy.action_dim if na else latent) for _ in range(2))
        copy_into(self.target_critics, self.critics)
        self.noise_critics = critics(latent) if na else None
        self.log_temperature = nn.Parameter(torch.tensor(config.init_temperature).log())

    @property
    def climbed(self) -> Critics:
        """The critics over the noise, which the actor climbs: Q^W (na), or the critics themselves (sac)."""
        return self.critics if self.noise_critics is None else self.noise_critics


def make_actor(config: DSRLConfig, policy: Policy, generator: torch.Generator) -> Actor:
    """The actor alone, which is all that acting needs."""
    dims = visible_dim(config, policy), latent_dim(config, policy)
    return Actor(*dims, (config.hidden,) * config.layers, generator, config.activation, config.layer_norm)


def coordinates_dim(config: DSRLConfig, policy: Policy) -> int:
    """R: how many of the chosen numbers, the first of them, are a coherent policy's coordinates; 0 where they are not chosen.

    Raises:
        InputError: they are to be chosen, and the policy reads none, or reads something after them.
    """
    if not config.latent.startswith("posterior"):
        return 0
    *_, last = policy.shapes
    require(last == COORDINATES, "Only a coherent policy has coordinates to choose.", key="dsrl.latent", found=config.latent,
            expected="full or tied", remedy="pretrain with --pretraining.coherent R")  # fmt: skip
    return policy.shapes[last][0]


def latent_dim(config: DSRLConfig, policy: Policy) -> int:
    """W: how many numbers are chosen for a chunk."""
    rows = {"full": policy.chunk, "tied": 1, "posterior": 0, "posterior+full": policy.chunk}[config.latent]
    return coordinates_dim(config, policy) + rows * policy.action_dim


def visible_dim(config: DSRLConfig, policy: Policy) -> int:
    """How many of the features, from the first on, actor and critics see: coordinates that are chosen are none of them."""
    return seen_dim(policy) - policy.observation_steps * coordinates_dim(config, policy)


def sample_latent(config: DSRLConfig, policy: Policy, features: Tensor, latent: Tensor) -> Tensor:
    """(B, F), chosen numbers (B, W) -> normalised chunks (B, T, A): tied noise is every action's, noise that is not chosen is 0."""
    size, width = coordinates_dim(config, policy), policy.action_dim
    g, noise = latent[:, :size], latent[:, size:]
    if size:  # they are the last of the features
        features = torch.cat((features[:, : visible_dim(config, policy)], g.repeat(1, policy.observation_steps)), 1)
    rows = noise.view(len(noise), noise.shape[1] // width, width) if noise.shape[1] else noise.new_zeros(len(noise), 1, width)
    return policy.sample(features, noise=rows.expand(-1, policy.chunk, -1).contiguous())


# -- losses --------------------------------------------------------------------------------------------------------------------
def temperature_loss(networks: Networks, log_prob: Tensor, target_entropy: float) -> tuple[Tensor, Info]:
    """−log α·(log π(u|s) + target entropy); `log_prob` (B,) counts as a constant here."""
    log_prob = log_prob.detach()
    loss = -(networks.log_temperature * (log_prob + target_entropy)).mean()
    return loss, {"temperature/loss": loss.detach(), "actor/entropy": -log_prob}


def critic_loss(networks: Networks, batch: Batch, next_action: Tensor, next_soft: Tensor, backup: str) -> tuple[Tensor, Info]:
    """½·Σ_i mean (Q_i(s, a) − y)², y = r + γ(1−d)·[agg_i Q̄_i(s', a') − α·log π(w'|s')].

    Args:
        next_action: a' (B, D): the next chunk (na) or the next u (sac).
        next_soft: α·log π (B,) of it.
        backup: agg, "min" or "mean".
    """
    with torch.no_grad():
        next_q = networks.target_critics(batch.next_features, next_action)
        next_q = next_q.amin(0) if backup == "min" else next_q.mean(0)
        target = torch.addcmul(batch.reward, batch.discount, next_q - next_soft)
    q = networks.critics(batch.features, batch.action)
    loss = 0.5 * (q - target).square().mean(-1).sum()
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach(), "critic/target": target}


def actor_loss(networks: Networks, features: Tensor, u: Tensor, soft: Tensor) -> tuple[Tensor, Info]:
    """mean [α·log π(u|s) − min_i Q_i(s, u)], with the critics over the noise (na: Q^W); `soft` is α·log π (B,)."""
    loss = (soft - networks.climbed(features, u).amin(0)).mean()
    return loss, {"actor/loss": loss.detach(), "actor/magnitude": u.detach().abs()}


def distillation_loss(networks: Networks, features: Tensor, u: Tensor, target: Tensor) -> tuple[Tensor, Info]:
    """½·Σ_i mean (Q^W_i(s, u) − Q_i(s, DP(s, w)))²; `target` (C, B) from the online critics, critic to critic."""
    loss = 0.5 * (networks.climbed(features, u) - target).square().mean(-1).sum()
    return loss, {"noise_critic/loss": loss.detach()}


# -- update --------------------------------------------------------------------------------------------------------------------
class DSRL(Optimized):
    """The learner: networks, optimisers and the frozen policy.

    Args:
        config: the algorithm's numbers.
        policy: frozen; `sample(features, noise)` must be deterministic.
        generator: for initialisation; its device is the networks'.
        compute: precision, and whether the update is compiled.
    """

    networks: Networks
    causes: Mapping[str, tuple[str, ...]] = {
        "learning from too few initial rollouts": ("training.initial_steps",),
        "exploration that drowns the policy": ("dsrl.init_temperature", "dsrl.action_magnitude"),
        "too large steps or too many of them": ("dsrl.lr", "dsrl.utd"),
    }

    def __init__(self, config: DSRLConfig, policy: Policy, generator: torch.Generator, compute: Compute | None = None) -> None:
        self.config, self.policy = config, policy
        self.compute = (compute or Compute(device=generator.device.type)).resolved()  # type: ignore[arg-type]
        self.name, self.discount = f"dsrl-{config.variant}", config.discount
        self.latent_dim, self.seen_dim = latent_dim(config, policy), visible_dim(config, policy)
        self.target_entropy = -float(self.latent_dim) if config.target_entropy == "auto" else float(config.target_entropy)
        networks = self.networks = Networks(config, policy, generator).to(generator.device)
        self.optimizers = {
            "actor": adam(networks.actor.parameters(), config.lr, self.compute.captures),
            "critic": adam(networks.critics.parameters(), config.lr, self.compute.captures),
            "temperature": adam([networks.log_temperature], config.lr, self.compute.captures),
        }
        if networks.noise_critics is not None:
            self.optimizers["noise_critic"] = adam(networks.noise_critics.parameters(), config.lr, self.compute.captures)
        self._update = self.compute.compiled(self._step)
        self._distill = self.compute.compiled(self._distillation_step)

    def _step(self, noise: Tensor, next_noise: Tensor, *tensors: Tensor) -> Info:
        """One gradient step of critics and actor, then the targets, then the temperature: the numbers of stable-baselines3's update."""
        config, networks, batch = self.config, self.networks, Batch(*tensors)
        temperature = networks.log_temperature.detach().exp()  # before its own step, as in stable-baselines3
        with torch.no_grad(), self.compute.autocast():
            next_u, next_log_prob = networks.actor.sample(batch.next_features, next_noise)
        next_action = next_u if config.variant == "sac" else self.denoise(batch.next_features, next_u)
        with self.compute.autocast():
            loss, info = critic_loss(networks, batch, next_action, temperature * next_log_prob, config.backup)
        descend(self.optimizers["critic"], loss)
        with self.compute.autocast():
            u, log_prob = networks.actor.sample(batch.features, noise)
            loss, of_loss = actor_loss(networks, batch.features, u, temperature * log_prob)
        descend(self.optimizers["actor"], loss)
        polyak(networks.target_critics, networks.critics, config.tau)
        info |= of_loss | {"temperature/value": temperature}
        if config.learn_temperature:
            loss, of_loss = temperature_loss(networks, log_prob, self.target_entropy)
            descend(self.optimizers["temperature"], loss)
            info |= of_loss
        return info

    def update(self, batch: Batch, noise: Tensor, next_noise: Tensor) -> Info:
        """One update on `batch`; (B, W) standard normal `noise` and `next_noise` are the actor's randomness at s and at s'."""
        self.gradient_steps += 1
        return self._update(noise, next_noise, *batch)

    def _distillation_step(self, features: Tensor, u: Tensor, target: Tensor) -> Info:
        with self.compute.autocast():
            loss, info = distillation_loss(self.networks, features, u, target)
        descend(self.optimizers["noise_critic"], loss)
        return info

    def distill(self, features: Tensor, noise: Tensor, steps: int = 1) -> Info:
        """`steps` steps of Q^W towards Q(s, DP(s, w)), w = `noise` ~ N(0, I), unclipped; (steps·B, F), (steps·B, W).

        The denoiser and the critics do not change meanwhile, so all targets are made in one pass.
        """
        size, u = len(features) // steps, noise / self.config.action_magnitude
        chunks = self.denoise(features, u)  # in float32, as what is played
        with torch.no_grad(), self.compute.autocast():
            target = self.networks.critics(features, chunks)
        info: Info = {}
        for batch in zip(features.split(size), u.split(size), target.split(size, 1), strict=True):
            info = self._distill(*batch)
            self.gradient_steps += 1
        return info

    # -- in the loop (:class:`postbc.training.online.Learner`) -----------------------------------------------------------------
    def memory(self, rows: int, num_envs: int) -> Replay:
        """A replay buffer of what actor and critics see, and of u (sac) or chunks (na)."""
        stored = self.latent_dim if self.config.variant == "sac" else self.policy.chunk * self.policy.action_dim
        return SeenReplay(rows, self.seen_dim, stored, self.compute.device)

    def state(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """The features themselves."""
        return features

    def learn(self, memory: Replay, sampling: torch.Generator, noise: torch.Generator) -> Info:
        """The gradient steps of one vector step: `utd` updates, then (na) `noise_critic_grad_steps` distillations. Info of the last.

        All transitions of a vector step are drawn at once, by `sampling`; `noise` is the updates' noise.
        """
        config, size, info = self.config, self.config.batch_size, {}
        total = config.utd * size
        fresh = torch.randn(2, total, self.latent_dim, generator=noise, device=noise.device)
        for batch, first, second in zip(
            memory.sample(sampling, total).split(size), *(f.split(size) for f in fresh), strict=True
        ):
            info = self.update(batch, first, second)
        if config.variant == "na":
            total = config.noise_critic_grad_steps * size
            w = torch.randn(total, self.latent_dim, generator=noise, device=noise.device)
            info = info | self.distill(memory.sample(sampling, total).features, w, config.noise_critic_grad_steps)
        return info

    # -- act -------------------------------------------------------------------------------------------------------------------
    def denoise(self, features: Tensor, u: Tensor) -> Tensor:
        """DP(s, magnitude·u): (B, F), (B, W) -> flattened chunk (B, D), no gradient."""
        with torch.no_grad():
            return sample_latent(self.config, self.policy, features, u.detach() * self.config.action_magnitude).flatten(1)

    @torch.no_grad()
    def act(self, features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, F) -> the chunk to play (B, T, A), normalised, and what the replay stores as action: u (B, W), or the chunk (B, D)."""
        noise = torch.randn(len(features), self.latent_dim, generator=generator, device=generator.device)
        return self._play(features, self.networks.actor.sample(features[:, : self.seen_dim], noise)[0])

    @torch.no_grad()
    def act_base(self, features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As :meth:`act`, from the base policy: w ~ N(0, I), tied where the actor's is; sac clips it to ± magnitude, for its replay."""
        w = torch.randn(len(features), self.latent_dim, generator=generator, device=generator.device)
        u = w / self.config.action_magnitude
        return self._play(features, u.clamp(-1, 1) if self.config.variant == "sac" else u)

    def _play(self, features: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        flat = self.denoise(features, u)  # the only denoising of an action
        return flat.view(len(u), self.policy.chunk, self.policy.action_dim), u if self.config.variant == "sac" else flat

    def agent(self, deterministic: bool = False) -> DSRLAgent:
        """What has been learnt, in raw units; it shares this learner's actor."""
        return DSRLAgent(self.policy, self.networks.actor, self.config, deterministic)


class SeenReplay(Replay):
    """A replay buffer that keeps of features what learners see."""

    def add(self, batch: Batch) -> None:
        """Append n transitions; see :meth:`Replay.add`."""
        seen = self.widths[0]
        super().add(batch._replace(features=batch.features[:, :seen], next_features=batch.next_features[:, :seen]))


class DSRLAgent(PolicyAgent):
    """A finetuned agent in raw units (:class:`postbc.agents.base.Agent`): observation -> actor -> noise -> frozen policy -> chunk.

    Args:
        policy: the frozen policy.
        actor: the noise policy.
        config: its numbers.
        deterministic: play tanh(mean) instead of a sample (DSRL evaluates stochastically by default).
    """

    finetuner = "dsrl"

    def __init__(self, policy: Policy, actor: Actor, config: DSRLConfig, deterministic: bool = False) -> None:
        super().__init__(policy)
        self.actor, self.config, self.deterministic = actor, config, deterministic

    @torch.no_grad()
    def act(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """Raw named observations of B states -> raw chunks (B, T, A)."""
        features = self.policy.encode(observation)
        seen = features[:, : visible_dim(self.config, self.policy)]
        if self.deterministic:
            u = self.actor.mode(seen)
        else:
            shape = len(features), latent_dim(self.config, self.policy)
            u, _ = self.actor.sample(seen, torch.randn(shape, generator=generator, device=generator.device))
        chunk = sample_latent(self.config, self.policy, features, u * self.config.action_magnitude)
        return self.policy.normalization.unnormalize_action(chunk)

    def save(self, directory: str | Path) -> None:
        """Write agent.safetensors and, for a policy of the registry, base_policy.safetensors: all that playing needs."""
        header = {"config": self.config, "deterministic": self.deterministic}
        save_agent(directory, "dsrl", self.policy, header, self.actor)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        policy: Policy | None = None,
        deterministic: bool | None = None,
        device: str | torch.device = "cpu",
    ) -> DSRLAgent:
        """Read :meth:`save`'s files; `policy` replaces the saved one (for classes of your own), `deterministic` the saved choice.

        Raises:
            InputError: there is no agent, it is not DSRL's, or it belongs to another base policy.
        """
        file, policy = read_agent(directory, _Saved, policy, device)
        config = file.header.config
        actor = load_parameters(lambda generator: make_actor(config, policy, generator), file, device)
        return cls(policy, actor, config, file.header.deterministic if deterministic is None else deterministic)


# -- configuration -------------------------------------------------------------------------------------------------------------
@schema
class DSRLConfig:
    """The algorithm's numbers; defaults are the paper's for DSRL on Robomimic Lift unless said otherwise."""

    variant: Literal["na", "sac"] = "na"
    """na: critic on real chunks, noise critic by distillation (sample-efficient). sac: SAC in noise space (cheap)."""
    hidden: Width = 2048
    """Width of actor and critics (2048 Robomimic, 1024 LIBERO; 128 to 256 do on a laptop)."""
    latent: Literal["full", "tied", "posterior", "posterior+full"] = later("full")
    """What the actor chooses. full: the latent noise of every action of a chunk. tied: one for all of them, as DSRL does with π0: few
    numbers where chunks are long. posterior: a coherent policy's coordinates g, anew for each chunk, the noise being 0.
    posterior+full: both."""
    layers: Layers = 3
    """Hidden layers of actor and critics."""
    layer_norm: bool = True
    """LayerNorm before each activation (DSRL's use_layer_norm)."""
    activation: Activation = "tanh"
    """Activation of actor and critics."""
    critics: Layers = 2
    """Critics."""
    lr: Positive = 3e-4
    """Adam's step size, for all networks and the temperature."""
    batch_size: Count = 256
    """Transitions a gradient step."""
    discount: Share = 0.99
    """γ (0.999 on Square)."""
    tau: StepShare = 0.005
    """Target networks move by this share at every gradient step."""
    utd: Count = 20
    """Gradient steps a vector step, that is, per `num_envs` chunks (paper: 20 PostBC and BC, 10 σ-BC)."""
    noise_critic_grad_steps: CountOrZero = 20
    """na: distillation steps a vector step (paper: 20 Lift, 10 Can and Square)."""
    action_magnitude: Positive = 1.5
    """Bound of each latent noise component; the actor's ±1 becomes ± this. (Upstream's NA code ignored it: 1.0 there.)"""
    target_entropy: float | Literal["auto"] = 0.0
    """Entropy that the temperature aims at; auto: −D."""
    init_temperature: Positive = 1.0
    """Entropy coefficient at the start (SB3: 1). In short runs about 0.2 keeps the actor near the policy while the critics learn."""
    learn_temperature: bool = True
    """Adjust the entropy coefficient (SB3's "auto"); off: it stays at init_temperature."""
    backup: Literal["min", "mean"] = "min"
    """How the target critics are combined in the backup."""

    def __post_init__(self) -> None:
        require(
            self.variant == "sac" or self.noise_critic_grad_steps > 0,
            "Without distillation the actor of na climbs a critic that never learns.", key="noise_critic_grad_steps", found=0,
            expected=">= 1", remedy="or take --dsrl.variant sac",
        )  # fmt: skip


@schema
class _Saved:
    """What an agent's file says besides its parameters."""

    kind: Literal["agent"]
    agent: Literal["dsrl"]
    policy: str
    """Fingerprint of the base policy."""
    config: DSRLConfig
    deterministic: bool
