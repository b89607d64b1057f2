"""Algorithm 1: the demonstrator's posterior from an ensemble of regressors, K of them trained side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from postbc.devices import Compute
from postbc.errors import NotFiniteError, require
from postbc.nn import StackedMLP, check_finite, check_memory, generator_state, set_generator_state
from postbc.policies.networks.encoders import EncoderConfig
from postbc.posterior.bootstrap import BootstrapSampler, bootstrap_counts
from postbc.posterior.calibration import OutOfBag
from postbc.posterior.factor import Factor
from postbc.posterior.member import WIDE, AdamState, adam, train_member
from postbc.progress import progress
from postbc.runs import Checkpoints, Run
from postbc.schemas import Count, NonNegative, Positive, Width, later, schema
from postbc.seeding import make_generator

BLOCK = 20
"""Steps of one member in a row."""
MINIMUM_LOG_STD, MAXIMUM_LOG_STD = -5.0, 2.0


@schema
class EnsembleConfig:
    """Algorithm 1 (paper, Table of pretraining)."""

    ensemble_size: Annotated[int, Field(ge=2, le=100_000)] = 100
    """K, members."""
    hidden: Width = 512
    """Width of each member (that of the diffusion MLP)."""
    layers: Annotated[int, Field(ge=0, le=99)] = 3
    """Hidden layers of each member."""
    steps: Count = 6000
    """Gradient steps of each member. The paper counts epochs: steps = epochs · ⌈windows / batch⌉."""
    batch_size: Width = 256
    """Windows a member and step."""
    learning_rate: Positive = 1e-4
    """Adam's; the paper gives none for the ensemble, this is the policy's."""
    bootstrap: Literal["trajectory", "pair", "none"] = "trajectory"
    """Resample whole trajectories (Robomimic), state-action pairs (LIBERO), or nothing (then set target_noise)."""
    target_noise: NonNegative = 0.0
    """Standard deviation of fixed Gaussian noise on each member's targets (Gaussian lemma, w_t ~ N(0, Σ)); normalised units."""
    prior_weight: NonNegative = 0.0
    """Pull of each member towards its own initialisation, the lemma's ‖μ − μ̃‖² in units of one observation's Σ⁻¹."""
    likelihood: Literal["mse", "gaussian"] = "mse"
    """Mean-squared error, or a Gaussian head with its own variance (the covariance is still that of the members' means)."""
    bound: Literal["clamp", "none"] = "clamp"
    """Keep predictions inside the normalised action range [−1, 1]: members extrapolate far outside it where they have no data."""
    encoder: Literal["features", "own"] = later("features")
    """Where members look: at features (the normalised state, or a policy's encoder's), or each through an image encoder of its own,
    trained end to end (the paper's way from images; see postbc.posterior.seeing)."""
    vision: EncoderConfig = later(EncoderConfig())
    """Of members' own encoders."""

    def __post_init__(self) -> None:
        require(self.encoder == "own" or self.vision == EncoderConfig(), "These are options of members' own encoders.",
                key="ensemble.vision", found=f"encoder {self.encoder}", expected="ensemble.encoder own")  # fmt: skip


class Regressors(nn.Module):
    """What members regress to: a chunk of T·A = D numbers, or with a Gaussian head its mean and log standard deviation."""

    def __init__(self, config: EnsembleConfig, chunk: int, action_dim: int) -> None:
        super().__init__()
        self.config, self.chunk, self.action_dim, self.dim = config, chunk, action_dim, chunk * action_dim
        self.outputs = self.dim * (2 if config.likelihood == "gaussian" else 1)

    def loss_of(self, output: Tensor, target: Tensor) -> Tensor:
        """Outputs of some members (M, B, ...), (M, B, D) -> (M,): squared error, or negative log-likelihood, averaged."""
        if self.config.likelihood == "mse":
            return (output - target).square().mean((1, 2))
        mean, log_std = output.split(self.dim, -1)
        log_std = log_std.clamp(MINIMUM_LOG_STD, MAXIMUM_LOG_STD)
        return (0.5 * ((target - mean) * torch.exp(-log_std)).square() + log_std).mean((1, 2))

    def predicted(self, output: Tensor) -> Tensor:
        """Outputs (K, N, ...) -> predicted chunks (K, N, D), inside the action range under `bound="clamp"`."""
        prediction = output[..., : self.dim]
        return prediction.clamp(-1, 1) if self.config.bound == "clamp" else prediction

    def left_out(self, predictions: Iterable[Tensor], chunks: Tensor, episode: Tensor, seed: int) -> OutOfBag:
        """The trajectories that three members or more were fitted without, as those members predict them.

        Args:
            predictions: (K, n, D) of all windows in their order, part by part; asked for only if trajectories are left out.
            chunks, episode, seed: those that it was fitted with.

        Raises:
            InputError: members whose samples leave no trajectory out, or too few members.
        """
        config = self.config
        require(config.bootstrap == "trajectory", "Only members that leave whole trajectories out can be held against them.",
                key="ensemble.bootstrap", found=config.bootstrap, expected="trajectory")  # fmt: skip
        episode = torch.as_tensor(episode).cpu()
        resample = make_generator(seed, "ensemble/bootstrap")
        without = bootstrap_counts(episode, config.ensemble_size, config.bootstrap, resample) == 0  # (K, N)
        trajectories = [torch.nonzero(episode == name)[:, 0] for name in episode.unique()]
        kept = [(rows, without[:, rows[0]]) for rows in trajectories if without[:, rows[0]].sum() >= 3]
        require(kept, "No trajectory is left out by three members or more.", key="ensemble_size", found=config.ensemble_size,
                remedy="fit more members (each leaves out a third of the trajectories), or --kind closed-form")  # fmt: skip
        predicted, targets = torch.cat([part.cpu().double() for part in predictions], 1), chunks.flatten(1).cpu().double()
        most = int(max(which.sum() for _, which in kept))
        residuals, spreads, freedom = [], [], []
        for rows, which in kept:
            members = predicted[which][:, rows]
            residuals.append(targets[rows] - members.mean(0))
            spreads.append(nn.functional.pad(Factor.from_predictions(members).rows, (0, 0, 0, most - len(members))))
            freedom.append(torch.full((len(rows),), len(members) - 1.0))
        windows, nu = episode[torch.cat([rows for rows, _ in kept])], torch.cat(freedom)
        spread = Factor(torch.cat(spreads))
        return OutOfBag(torch.cat(residuals), spread, nu, 1 / (nu + 1), windows, self.action_dim, len(trajectories))


class Ensemble(Regressors):
    """K regressors (B, F) -> (K, B, D), in normalised units.

    Args:
        config: architecture and training.
        feature_dim: F.
        chunk: T.
        action_dim: A.
        generator: source of the members' initialisation.
    """

    def __init__(
        self, config: EnsembleConfig, feature_dim: int, chunk: int, action_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__(config, chunk, action_dim)
        self.feature_dim = feature_dim
        self.network = StackedMLP(config.ensemble_size, feature_dim, (config.hidden,) * config.layers, self.outputs, generator)

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """(K, B, F), (K, B, D) -> (K,): squared error, or negative log-likelihood, averaged over batch and dimensions."""
        return self.loss_of(self.network(features).float(), target)

    @torch.no_grad()
    def predict(self, features: Tensor, batch: int = 1024) -> Tensor:
        """(N, F) -> (K, N, D): every member's predicted chunk."""
        size = self.config.ensemble_size
        return self.predicted(torch.cat([self.network(part.expand(size, -1, -1)) for part in features.split(batch)], 1))

    def factor(self, features: Tensor) -> Factor:
        """(N, F) -> the posterior covariance of the chunk at each state (Algorithm 1, last line)."""
        return Factor.from_predictions(self.predict(features))

    def out_of_bag(self, features: Tensor, chunks: Tensor, episode: Tensor, seed: int) -> OutOfBag:
        """As :meth:`left_out`, of the features (N, F) that it was fitted with."""
        return self.left_out(map(self.predict, features.split(1024)), chunks, episode, seed)


class Bootstrapped:
    """What training K members needs, whatever they see: bootstrap samples, targets, and a state that resumes bit for bit.

    Args:
        ensemble: its parameters are trained in place, where they are.
        chunks: (N, T, A) normalised.
        episode: (N,) int64, the trajectory that each window comes from.
        seed: decides bootstrap, target noise and data order.
        compute: precision and compilation.
        counts: (K, N) how often each window stands in each member's sample, instead of a bootstrap.
    """

    block = BLOCK
    """Steps between two looks at the clock."""

    def __init__(
        self,
        ensemble: Regressors,
        chunks: Tensor,
        episode: Tensor,
        seed: int,
        compute: Compute | None = None,
        counts: Tensor | None = None,
    ) -> None:
        config = ensemble.config
        self.compute = (compute or Compute()).resolved()
        self.device = next(ensemble.parameters()).device
        self.ensemble: Any = ensemble
        self.config, self.lr = config, config.learning_rate
        self.targets = chunks.flatten(1).to(self.device)
        resample = make_generator(seed, "ensemble/bootstrap")
        if counts is None:
            counts = bootstrap_counts(episode.cpu(), config.ensemble_size, config.bootstrap, resample)
        self.sampler = BootstrapSampler(counts)
        self.noise = None
        if config.target_noise > 0:  # drawn once: each member regresses on its own noised copy of the data set
            drawn = torch.randn((config.ensemble_size, *self.targets.shape), generator=resample)
            self.noise = (drawn * config.target_noise).to(self.device)
        self.parameters = list(ensemble.parameters())
        self.adam = AdamState.of(self.parameters)
        self.members: list[AdamState] = []
        """Of those that are trained one by one, in the memory of `adam`."""
        self.anchors = [p.detach().clone() for p in self.parameters] if config.prior_weight > 0 else []
        # Σ_t‖·‖² + λ‖θ − θ₀‖² over N windows of D numbers, as the loss is their mean
        self.pull = config.prior_weight / self.targets.numel()
        self.data = make_generator(seed, "ensemble/data")

    def targets_of(self, k: int, rows: Tensor) -> Tensor:
        """Of member k at the windows `rows`: (..., D)."""
        targets = self.targets[rows]
        return targets if self.noise is None else targets + self.noise[k, rows]

    def train(self, steps: int) -> Tensor:
        """`steps` gradient steps of every member; returns their losses at the last one (K,)."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Everything that decides the remaining steps (bootstrap, noise and anchors follow from the seed)."""
        steps = self.members[0].steps if self.members else self.adam.steps
        return {
            "parameters": self.ensemble.state_dict(),
            "optimiser": {"first": self.adam.first, "second": self.adam.second, "steps": steps},
            "data": generator_state(self.data),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.ensemble.load_state_dict(state["parameters"])
        for mine, saved in ((self.adam.first, "first"), (self.adam.second, "second")):
            for tensor, value in zip(mine, state["optimiser"][saved], strict=True):
                tensor.copy_(value)
        for part in (self.adam, *self.members):
            part.steps.copy_(state["optimiser"]["steps"])
        set_generator_state(self.data, state["data"])


class EnsembleTraining(Bootstrapped):
    """Trains an ensemble from features; `state`/`load_state` make it resumable bit for bit.

    Wide members are trained one by one on a CPU (:mod:`postbc.posterior.member`), narrow ones, and all on other devices, as one stack.

    Args:
        features: (N, F) of the demonstrations' windows; the others as :class:`Bootstrapped` takes them.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        features: Tensor,
        chunks: Tensor,
        episode: Tensor,
        seed: int,
        compute: Compute | None = None,
        counts: Tensor | None = None,
    ) -> None:
        super().__init__(ensemble, chunks, episode, seed, compute, counts)
        self.features = features.to(self.device)
        if self.config.batch_size * self.config.hidden >= WIDE and self.device.type == "cpu":
            self.members = [self.adam.of_member(k) for k in range(self.config.ensemble_size)]
        self.step_stack = self.compute.compiled(self._step_stack)

    def train(self, steps: int) -> Tensor:
        """`steps` gradient steps of every member; returns their losses at the last one (K,)."""
        losses = torch.zeros(self.config.ensemble_size)
        for done in range(0, steps, BLOCK):
            block = min(BLOCK, steps - done)
            index = torch.stack([self.sampler.draw(self.config.batch_size, self.data) for _ in range(block)])
            if self.members:
                losses = torch.stack([self._train_member(k, index[:, k]) for k in range(len(self.members))])
            else:
                for rows in index.to(self.features.device):
                    losses = self.step_stack(rows)
        return losses

    def _train_member(self, k: int, rows: Tensor) -> Tensor:
        """A step of member k for each of `rows` (n, B)."""
        return train_member(
            self.members[k], self.lr, self.features[rows], self.targets_of(k, rows), reduced=self.compute.precision == "bfloat16",
            log_std_range=(MINIMUM_LOG_STD, MAXIMUM_LOG_STD) if self.config.likelihood == "gaussian" else None,
            anchors=[anchor[k] for anchor in self.anchors], pull=self.pull,
        )  # fmt: skip

    def _step_stack(self, rows: Tensor) -> Tensor:
        """A step of all members as one stack, on `rows` (K, B)."""
        target = self.targets[rows]
        if self.noise is not None:
            target = target + self.noise.gather(1, rows.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
        with self.compute.autocast():
            losses = self.ensemble.loss(self.features[rows], target)
        total = losses.sum()
        for p, anchor in zip(self.parameters, self.anchors):
            total = total + self.pull * (p - anchor).square().sum()
        adam(self.adam, torch.autograd.grad(total, self.parameters), self.lr)
        return losses.detach()


def fit_ensemble(
    features: Tensor,
    chunks: Tensor,
    episode: Any,
    config: EnsembleConfig,
    seed: int,
    compute: Compute | None = None,
    run: Run | None = None,
    log_every: int = 500,
    checkpoint_seconds: float = 60.0,
    counts: Tensor | None = None,
) -> Ensemble:
    """Fit one ensemble (Algorithm 1); resumable when a `run` is given.

    Args:
        features: (N, F) of the demonstrations' windows (for states: the normalised vector).
        chunks: (N, T, A) normalised.
        episode: (N,) integers, the trajectory that each window comes from.
        config: architecture and training.
        seed: of initialisation, bootstrap and data order.
        compute: where; default: what is there.
        run: directory that checkpoints and metrics go to.
        log_every: steps between two rows of metrics.
        checkpoint_seconds: time between two checkpoints.
        counts: (K, N) how often each window stands in each member's sample, instead of a bootstrap.

    Returns:
        The fitted ensemble, frozen.

    Raises:
        InputError: features or chunks are not numbers, or their counts differ.
        NotFiniteError: a member's loss is not finite.
    """
    compute = (compute or Compute()).resolved()
    device = compute.start()
    episode = torch.as_tensor(episode)
    require(len(features) == len(chunks) == len(episode) > 0, "Features, chunks and episodes are of different windows.",
            found=(len(features), len(chunks), len(episode)))  # fmt: skip
    for name, values in (("features", features), ("chunks", chunks)):
        require(bool(torch.isfinite(values).all()), "An ensemble needs finite numbers.", key=name, found="NaN or infinite")
    generator = make_generator(seed, "ensemble/initialisation")
    sizes = (features.shape[1], chunks.shape[1], chunks.shape[2])
    with torch.device("meta"):
        check_memory(Ensemble(config, *sizes, generator), 4, device, "ensemble")
    ensemble = Ensemble(config, *sizes, generator).to(device)
    training = EnsembleTraining(ensemble, features, chunks, episode, seed, compute, counts)
    fitted: Ensemble = train_ensemble(training, seed, run, log_every, checkpoint_seconds)
    return fitted


def train_ensemble(
    training: Bootstrapped, seed: int, run: Run | None, log_every: int = 500, checkpoint_seconds: float = 60.0
) -> Any:
    """All steps of a training, resumable when a `run` is given; its ensemble, frozen. NotFiniteError as in :func:`fit_ensemble`."""
    ensemble, config = training.ensemble, training.config
    step, found = 0, run.load() if run else None
    if run and found:
        step = found[0]
        with run.restoring():
            training.load_state(found[1])
    checkpoints = Checkpoints(run, checkpoint_seconds)
    with progress(f"posterior, seed {seed}: {config.ensemble_size} members", config.steps, step) as bar:
        while step < config.steps:
            block = min(training.block, config.steps - step, log_every - step % log_every)
            losses, step = training.train(block), step + block
            if step % log_every == 0 or step == config.steps:
                _check_finite(losses, step)
                if run:
                    run.log(step, {"ensemble/loss": losses.mean().item(), "ensemble/loss_max": losses.max().item()})
            if checkpoints.due:
                checkpoints.save(step, training.state())
            bar.advance(block, loss=losses)
    check_finite(ensemble.state_dict(), "The ensemble's weights are not finite; the posterior is not saved.")
    return ensemble.eval().requires_grad_(False)


def _check_finite(losses: Tensor, step: int) -> None:
    if not bool(torch.isfinite(losses).all()):
        raise NotFiniteError(
            "The loss of a member is not finite; the posterior is not saved.", key=f"step {step}",
            found=f"{int((~torch.isfinite(losses)).sum())} of {len(losses)} members",
            remedy="lower ensemble.learning_rate, or look at the demonstrations with `postbc demos inspect`",
        )  # fmt: skip
