"""DSRL (Wagenmaker et al. 2025, arXiv 2506.15799): SAC over the latent noise of a frozen, deterministic generative policy.

Two variants. Both learn an actor u = π(s) ∈ (−1, 1)^D whose output, times `action_magnitude`, is the noise w that the policy turns
into an action chunk a = DP(s, w).

- **sac**: plain SAC whose action is u; critics Q(s, u).
- **na** ("noise aliased"): critics Q(s, a) of the real chunk learn by temporal differences, a noise critic Q^W(s, u) is distilled from
  them at w ~ N(0, I), and the actor climbs Q^W. Data of any source can enter the critics, as they see real chunks.

Everything is in normalised units and has a leading members axis M: one member a seed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from postbc.errors import InputError
from postbc.finetuning.networks import Activation, Critics, Info, TanhGaussianActor, averages, copy_into, play, q_values
from postbc.finetuning.replay import Batch, Replay
from postbc.members import Adam, AdamState, descend, each, number_of_parts, scripted, split
from postbc.nn import Generators, Layers, frozen, polyak, randn
from postbc.policies.base import NormalizationTensors, Policy
from postbc.policies.diffusion import DiffusionPolicy
from postbc.runs import load_tree, save_tree

AGENT_FILE, BASE_POLICY_FILE = "agent.safetensors", "base_policy.safetensors"
STRIDE = 2  # updates in a row of one member


@dataclass(frozen=True)
class DSRLConfig:
    """The algorithm's numbers; defaults are the paper's for DSRL on Robomimic Lift (paper.md section 6) unless said otherwise."""

    variant: Literal["na", "sac"] = "na"
    """na: critic on real chunks, noise critic by distillation (sample-efficient). sac: SAC in noise space (cheap)."""
    hidden: int = 2048
    """Width of actor and critics (2048 Robomimic, 1024 LIBERO; 128 to 256 do on a laptop)."""
    layers: int = 3
    """Hidden layers of actor and critics."""
    layer_norm: bool = True
    """LayerNorm before each activation (DSRL's use_layer_norm)."""
    activation: Activation = "tanh"
    """Activation of actor and critics."""
    critics: int = 2
    """Critics a seed."""
    lr: float = 3e-4
    """Adam's step size, for all networks and the temperature."""
    batch_size: int = 256
    """Transitions a gradient step."""
    discount: float = 0.99
    """γ (0.999 on Square)."""
    tau: float = 0.005
    """Target networks move by this share at every gradient step."""
    utd: int = 20
    """Gradient steps a vector step, that is, per `num_envs` chunks (paper: 20 PostBC, 10 BC and σ-BC)."""
    noise_critic_steps: int = 20
    """na: distillation steps a vector step (paper: 20 Lift, 10 Can and Square)."""
    action_magnitude: float = 1.5
    """Bound of each latent noise component; the actor's ±1 becomes ± this. (Upstream's NA code ignored it: 1.0 there.)"""
    target_entropy: float | Literal["auto"] = 0.0
    """Entropy that the temperature aims at; auto: −D."""
    first_temperature: float = 1.0
    """Entropy coefficient at the start (SB3: 1). In short runs about 0.2 keeps the actor near the policy while the critics learn."""
    learn_temperature: bool = True
    """Adjust the entropy coefficient (SB3's "auto"); off: it stays at first_temperature."""
    backup: Literal["min", "mean"] = "min"
    """How the target critics are combined in the backup."""

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "critics", "lr", "batch_size", "action_magnitude", "first_temperature"):
            if not getattr(self, name) > 0:
                raise InputError("A number must be positive.", key=name, found=getattr(self, name))
        if not 0 <= self.discount <= 1 or not 0 < self.tau <= 1:
            raise InputError(
                "γ or τ is out of range.", key="discount, tau", found=(self.discount, self.tau), expected="[0, 1], (0, 1]"
            )
        if min(self.utd, self.noise_critic_steps) < 0:
            raise InputError("Numbers of steps start at 0.", key="utd, noise_critic_steps")


# -- nets ----------------------------------------------------------------------------------------------------------------------
class Networks(nn.Module):
    """All that learns: actor, critics and their targets, the noise critics (na), the log temperature (M,)."""

    def __init__(self, config: DSRLConfig, observation_dim: int, action_dim: int, generators: Generators) -> None:
        super().__init__()
        members, hidden = len(generators), (config.hidden,) * config.layers
        nets = (config.activation, config.layer_norm)

        def critics() -> Critics:
            return Critics(members, observation_dim, action_dim, hidden, generators, *nets, critics=config.critics)

        self.actor = TanhGaussianActor(members, observation_dim, action_dim, hidden, generators, *nets)
        self.critics = critics()
        self.target_critics = critics()
        copy_into(self.target_critics, self.critics)
        self.noise_critics = critics() if config.variant == "na" else None
        self.log_temperature = nn.Parameter(torch.full((members,), config.first_temperature).log())

    @property
    def layers(self) -> "NetworkLayers":
        """The same for the functions below, in the same memory."""
        critics = self.critics.net.layers
        climbed = critics if self.noise_critics is None else self.noise_critics.net.layers
        return NetworkLayers(self.actor.net.layers, critics, self.target_critics.net.layers, climbed, self.log_temperature)


class NetworkLayers(NamedTuple):
    """:class:`Networks` as TorchScript takes them."""

    actor: Layers
    critics: Layers
    target_critics: Layers
    climbed: Layers
    """The critics over the noise, which the actor climbs: Q^W (na), or the critics themselves (sac)."""
    log_temperature: Tensor


# -- losses --------------------------------------------------------------------------------------------------------------------
@scripted
def temperature_loss(networks: NetworkLayers, log_prob: Tensor, target_entropy: float) -> tuple[Tensor, Info]:
    """−log α·(log π(u|s) + target entropy), (M,). `log_prob` (M, B) carries no gradient here."""
    loss = -(networks.log_temperature.unsqueeze(-1) * (log_prob.detach() + target_entropy)).mean(-1)
    return loss, {"temperature/loss": loss.detach(), "actor/entropy": -log_prob.detach()}


@scripted
def critic_loss(networks: NetworkLayers, batch: Batch, next_action: Tensor, soft: Tensor, backup: str) -> tuple[Tensor, Info]:
    """½·Σ_i mean (Q_i(s, a) − y)², y = r + γ(1−d)·[agg_i Q̄_i(s', a') − α·log π(w'|s')], (M,).

    Args:
        next_action: a' (M, B, D): the next chunk (na) or the next u (sac).
        soft: α·log π (M, B) of it.
        backup: agg, "min" or "mean".
    """
    with torch.no_grad():
        next_q = q_values(batch.next_observation, next_action, networks.target_critics)
        next_q = next_q.amin(1) if backup == "min" else next_q.mean(1)
        target = torch.addcmul(batch.reward, batch.discount, next_q - soft)
    q = q_values(batch.observation, batch.action, networks.critics)
    loss = 0.5 * (q - target.unsqueeze(1)).square().mean(-1).sum(-1)
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach(), "critic/target": target}


@scripted
def actor_loss(critics: Layers, observation: Tensor, u: Tensor, soft: Tensor) -> tuple[Tensor, Info]:
    """mean [α·log π(u|s) − min_i Q_i(s, u)], (M,); `critics` are those over the noise (na: Q^W)."""
    loss = (soft - q_values(observation, u, frozen(critics)).amin(1)).mean(-1)
    return loss, {"actor/loss": loss.detach(), "actor/magnitude": u.detach().abs()}


@scripted
def distillation_loss(critics: Layers, observation: Tensor, u: Tensor, target: Tensor) -> tuple[Tensor, Info]:
    """½·Σ_i mean (Q^W_i(s, u) − Q_i(s, DP(s, w)))², (M,); `target` (M, C, B) from the online critics, member to member."""
    loss = 0.5 * (q_values(observation, u, critics) - target).square().mean(-1).sum(-1)
    return loss, {"noise_critic/loss": loss.detach()}


# -- update --------------------------------------------------------------------------------------------------------------------
class Optimizers(NamedTuple):
    """Of a part of the members."""

    actor: AdamState
    critics: AdamState
    temperature: AdamState


class Constants(NamedTuple):
    """What the update takes from :class:`DSRLConfig`, under its names."""

    target_entropy: float
    learn_temperature: bool
    backup: str
    tau: float


class Played(NamedTuple):
    """What the actor gives to an update: u and α·log π(u|s), with gradients; both at s' without."""

    u: Tensor
    soft: Tensor
    next_u: Tensor
    next_soft: Tensor
    info: Info


@scripted
def play_actor(
    networks: NetworkLayers,
    optimizers: Optimizers,
    batch: Batch,
    noise: Tensor,
    next_noise: Tensor,
    constants: Constants,
) -> Played:
    """The actor at s and at s', and the temperature's step."""
    u, log_prob = play(batch.observation, noise, networks.actor)
    temperature = networks.log_temperature.detach().exp().unsqueeze(-1)  # before its own step, as in SB3
    info = {"temperature/value": temperature}
    if constants.learn_temperature:
        loss, of_loss = temperature_loss(networks, log_prob, constants.target_entropy)
        descend(optimizers.temperature, [networks.log_temperature], loss)
        info.update(of_loss)
    with torch.no_grad():
        next_u, next_log_prob = play(batch.next_observation, next_noise, networks.actor)
    return Played(u, temperature * log_prob, next_u, temperature * next_log_prob, info)


@scripted
def learn(
    networks: NetworkLayers,
    optimizers: Optimizers,
    batch: Batch,
    played: Played,
    next_action: Tensor,
    constants: Constants,
) -> Info:
    """Critics, actor, targets."""
    loss, info = critic_loss(networks, batch, next_action, played.next_soft, constants.backup)
    descend(optimizers.critics, networks.critics.parameters, loss)
    loss, of_loss = actor_loss(networks.climbed, batch.observation, played.u, played.soft)
    descend(optimizers.actor, networks.actor.parameters, loss)
    polyak(networks.target_critics.parameters, optimizers.critics.values, constants.tau)
    info.update(of_loss)
    info.update(played.info)
    return info


@scripted
def learn_sac(
    networks: NetworkLayers,
    optimizers: Optimizers,
    steps: list[tuple[Batch, Tensor, Tensor]],
    constants: Constants,
) -> Info:
    """The sac variant: nothing but a member's own networks takes part. Info of the last step."""
    info: Info = {}
    for batch, noise, next_noise in steps:
        played = play_actor(networks, optimizers, batch, noise, next_noise, constants)
        info = learn(networks, optimizers, batch, played, played.next_u, constants)
    return info


@scripted
def distill(critics: Layers, optimizer: AdamState, steps: list[tuple[Tensor, Tensor, Tensor]]) -> Info:
    """A step of the noise critics for each (observation, u, target). Info of the last."""
    info: Info = {}
    for observation, u, target in steps:
        loss, info = distillation_loss(critics, observation, u, target)
        descend(optimizer, critics.parameters, loss)
    return info


class DSRL:
    """The learner: networks, optimisers and the frozen policy.

    Args:
        config: the algorithm's numbers.
        policy: frozen; `sample(s, w)` must be deterministic.
        generators: one a member, for initialisation.
    """

    def __init__(self, config: DSRLConfig, policy: Policy, generators: Generators) -> None:
        self.config, self.policy, self.members = config, policy, policy.members
        self.action_dim = policy.chunk * policy.action_dim
        target_entropy = -float(self.action_dim) if config.target_entropy == "auto" else float(config.target_entropy)
        self.constants = Constants(target_entropy, config.learn_temperature, config.backup, config.tau)
        self.networks = Networks(config, policy.observation_dim, self.action_dim, generators)
        self.parts = split(self.networks, number_of_parts(self.members, config.batch_size, config.hidden))
        self.optimizers = {
            "actor": Adam([list(part.actor.parameters()) for part in self.parts], config.lr),
            "critic": Adam([list(part.critics.parameters()) for part in self.parts], config.lr),
            "temperature": Adam([[part.log_temperature] for part in self.parts], config.lr),
        }
        if config.variant == "na":
            noise_critics = [list(part.noise_critics.parameters()) for part in self.parts if part.noise_critics is not None]
            self.optimizers["noise_critic"] = Adam(noise_critics, config.lr)

    def _of(self, part: int) -> tuple[NetworkLayers, Optimizers]:
        """A part's networks and optimisers as the functions above take them."""
        actor, critics, temperature = (self.optimizers[name].states[part] for name in ("actor", "critic", "temperature"))
        return self.parts[part].layers, Optimizers(actor, critics, temperature)

    def denoise(self, observation: Tensor, u: Tensor) -> Tensor:
        """DP(s, magnitude·u): (M, B, S), (M, B, D) -> flattened chunk (M, B, D), no gradient."""
        shape = (*u.shape[:2], self.policy.chunk, self.policy.action_dim)
        with torch.no_grad():
            return self.policy.sample(observation, noise=(u.detach() * self.config.action_magnitude).view(shape)).flatten(2)

    def update(self, batch: Batch, noise: Tensor, next_noise: Tensor) -> Info:
        """Gradient steps of temperature, critics and actor, then the targets, in stable-baselines3's order. Info of the last.

        Args:
            batch: `batch_size` transitions a member for each step.
            noise, next_noise: (M, B, D) standard normal, the actor's randomness at s and at s'.
        """
        parts, size = len(self.parts), self.config.batch_size
        steps = [  # of a part
            list(zip(b.split(size), first.split(size, 1), second.split(size, 1), strict=True))
            for b, first, second in zip(batch.divide(parts), noise.chunk(parts), next_noise.chunk(parts), strict=True)
        ]
        if self.config.variant == "na":
            for step in zip(*steps, strict=True):
                infos = self._update_na(step)
            return averages(infos)

        def work(part: int, rows: slice) -> Info:
            return learn_sac(*self._of(part), steps[part][rows], self.constants)

        return averages(each(work, parts, len(steps[0]), STRIDE))

    def _update_na(self, step: Sequence[tuple[Batch, Tensor, Tensor]]) -> list[Info]:
        """One step of all parts: they meet in the middle, for the policy denoises for all members at once."""
        parts = len(step)
        played = each(lambda part, _: play_actor(*self._of(part), *step[part], self.constants), parts)
        states = torch.cat([batch.next_observation for batch, _, _ in step])
        chunks = self.denoise(states, torch.cat([p.next_u for p in played])).chunk(parts)
        return each(lambda part, _: learn(*self._of(part), step[part][0], played[part], chunks[part], self.constants), parts)

    def distill(self, observation: Tensor, noise: Tensor, steps: int = 1) -> Info:
        """`steps` steps of Q^W towards Q(s, DP(s, w)), w = `noise` ~ N(0, I), unclipped; (M, steps·B, S), (M, steps·B, D).

        The denoiser and the critics do not change meanwhile, so all targets are made in one pass.
        """
        assert self.config.variant == "na", "the sac variant has no noise critic"
        parts, size = len(self.parts), observation.shape[1] // steps
        u = noise / self.config.action_magnitude
        with torch.no_grad():
            target = self.networks.critics(observation, self.denoise(observation, u))
        batches = [  # of a part
            list(zip(s.split(size, 1), w.split(size, 1), q.split(size, -1), strict=True))
            for s, w, q in zip(observation.chunk(parts), u.chunk(parts), target.chunk(parts), strict=True)
        ]

        def work(part: int, rows: slice) -> Info:
            optimizer = self.optimizers["noise_critic"].states[part]
            return distill(self.parts[part].layers.climbed, optimizer, batches[part][rows])

        return averages(each(work, parts, steps, STRIDE))

    def train(self, replay: Replay, sampling: Generators, noise: Generators) -> Info:
        """The gradient steps of one vector step: `utd` updates, then (na) `noise_critic_steps` distillations. Info of the last ones."""
        config, info = self.config, {}
        if config.utd:
            total = config.utd * config.batch_size  # drawn at once: one gather, one draw of noise a vector step
            fresh = randn(noise, 2, total, self.action_dim)
            info = self.update(replay.sample(sampling, total), fresh[:, 0], fresh[:, 1])
        if config.variant == "na" and config.noise_critic_steps:
            total = config.noise_critic_steps * config.batch_size
            states = replay.sample(sampling, total).observation
            info |= self.distill(states, randn(noise, total, self.action_dim), config.noise_critic_steps)
        return info

    # -- act -------------------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def act(self, observation: Tensor, generators: Generators, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """(M, n, S) -> the chunk to play (M, n, T, A), normalised, and what the replay stores as action (M, n, D)."""
        if deterministic:
            u = self.networks.actor.mode(observation)
        else:
            u, _ = self.networks.actor.sample(observation, randn(generators, observation.shape[1], self.action_dim))
        return self._play(observation, u)

    @torch.no_grad()
    def act_pretrained(self, observation: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """As :meth:`act`, from the base policy: w ~ N(0, I), which sac clips to ± magnitude so that its replay can hold it."""
        u = randn(generators, observation.shape[1], self.action_dim) / self.config.action_magnitude
        return self._play(observation, u.clamp(-1, 1) if self.config.variant == "sac" else u)

    def _play(self, observation: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        flat = self.denoise(observation, u)  # the only denoising of an action
        return flat.view(*u.shape[:2], self.policy.chunk, self.policy.action_dim), u if self.config.variant == "sac" else flat

    # -- state -----------------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Parameters and optimiser moments."""
        return {
            "networks": self.networks.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.networks.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


def make_actor(config: DSRLConfig, policy: Policy) -> TanhGaussianActor:
    """An actor for `policy`, to load parameters into."""
    hidden, generators = (config.hidden,) * config.layers, [torch.Generator() for _ in range(policy.members)]
    dims = (policy.members, policy.observation_dim, policy.chunk * policy.action_dim)
    return TanhGaussianActor(*dims, hidden, generators, config.activation, config.layer_norm).requires_grad_(False)


class DSRLActor:
    """A finetuned agent in raw units (:class:`postbc.evaluation.Actor`): observation -> actor -> noise -> frozen policy -> chunk.

    Args:
        policy: the frozen policy, M members; carries `normalization`.
        actor: the noise policy.
        action_magnitude: of its output.
        deterministic: play tanh(mean) instead of a sample (DSRL evaluates stochastically by default).
    """

    def __init__(self, policy: Policy, actor: TanhGaussianActor, action_magnitude: float, deterministic: bool = False) -> None:
        self.policy, self.actor, self.action_magnitude, self.deterministic = policy, actor, action_magnitude, deterministic
        self.members, self.observation_dim = policy.members, policy.observation_dim
        self.chunk, self.action_dim = policy.chunk, policy.action_dim
        self.seeds, self.about = getattr(policy, "seeds", range(policy.members)), getattr(policy, "about", {})
        self.normalization: NormalizationTensors = policy.normalization  # type: ignore[attr-defined]

    @torch.no_grad()
    def act(self, observation: Tensor, generators: Generators) -> Tensor:
        """Raw (M, n, S) -> raw chunks (M, n, T, A)."""
        observation = self.normalization.normalize_observation(observation)
        if self.deterministic:
            u = self.actor.mode(observation)
        else:
            noise = randn(generators, observation.shape[1], self.chunk * self.action_dim)
            u, _ = self.actor.sample(observation, noise)
        noise = (u * self.action_magnitude).view(*u.shape[:2], self.chunk, self.action_dim)
        return self.normalization.unnormalize_chunk(self.policy.sample(observation, noise=noise))

    def save(self, directory: str | Path, config: DSRLConfig) -> None:
        """Write agent.safetensors and, for a policy with `save`, base_policy.safetensors: all that inference needs."""
        directory = Path(directory)
        if hasattr(self.policy, "save"):
            self.policy.save(directory / BASE_POLICY_FILE)
        tree = {"kind": "dsrl", "config": asdict(config), "deterministic": self.deterministic, "seeds": list(self.seeds)}
        save_tree(directory / AGENT_FILE, {**tree, "actor": self.actor.state_dict()})

    @classmethod
    def load(cls, directory: str | Path, policy: Policy | None = None, deterministic: bool | None = None) -> "DSRLActor":
        """Read :meth:`save`'s files; `policy` replaces the saved one (for policy classes of your own).

        Raises:
            InputError: there is no agent, or it is not DSRL's.
        """
        path = Path(directory) / AGENT_FILE
        tree = load_tree(path)
        if not isinstance(tree, dict) or tree.get("kind") != "dsrl":
            raise InputError(
                "This is not an agent of DSRL.", file=path, key="kind", expected="the directory of `finetune dsrl`"
            )
        policy = policy or DiffusionPolicy.load(Path(directory) / BASE_POLICY_FILE)
        config = DSRLConfig(**tree["config"])
        actor = make_actor(config, policy)
        actor.load_state_dict(tree["actor"])
        chosen = tree["deterministic"] if deterministic is None else deterministic
        return cls(policy, actor, config.action_magnitude, chosen)
