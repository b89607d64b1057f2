"""Algorithm 1: the demonstrator's posterior from an ensemble of regressors, K of them trained as one stacked network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postbc.demonstrations.chunks import Windows
from postbc.demonstrations.normalization import Normalization
from postbc.errors import InputError
from postbc.members import Adam, AdamState, each, number_of_parts
from postbc.nn import StackedMLP, generator_states, make_generators, set_generator_states
from postbc.posterior.bootstrap import BootstrapSampler, bootstrap_counts
from postbc.posterior.factor import Factor
from postbc.posterior.member import train_member
from postbc.progress import progress
from postbc.runs import Run, load_tree, save_tree

FORMAT = 1
BLOCK = 20  # steps of one member in a row
MINIMUM_LOG_STD, MAXIMUM_LOG_STD = -5.0, 2.0


@dataclass(frozen=True)
class EnsembleConfig:
    """Algorithm 1 (paper, Table of pretraining)."""

    ensemble_size: int = 100
    """K, members."""
    hidden: int = 512
    """Width of each member (that of the diffusion MLP)."""
    layers: int = 3
    """Hidden layers of each member."""
    steps: int = 6000
    """Gradient steps of each member. The paper counts epochs: steps = epochs · ⌈windows / batch⌉."""
    batch_size: int = 256
    """Windows a member and step."""
    learning_rate: float = 1e-4
    """Adam's; the paper gives none for the ensemble, this is the policy's."""
    bootstrap: Literal["trajectory", "pair", "none"] = "trajectory"
    """Resample whole trajectories (Robomimic), state-action pairs (LIBERO), or nothing (then set target_noise)."""
    target_noise: float = 0.0
    """Standard deviation of fixed Gaussian noise on each member's targets (Gaussian lemma, w_t ~ N(0, Σ)); normalised units."""
    prior_weight: float = 0.0
    """Pull of each member towards its own initialisation, the lemma's ‖μ − μ̃‖² in units of one observation's Σ⁻¹."""
    likelihood: Literal["mse", "gaussian"] = "mse"
    """Mean-squared error, or a Gaussian head with its own variance (the covariance is still that of the members' means)."""
    bound: Literal["clamp", "none"] = "clamp"
    """Keep predictions inside the normalised action range [−1, 1]: members extrapolate far outside it where they have no data."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products in training (weights, Adam and predictions stay float32); auto: bfloat16 where the processor has it."""

    def __post_init__(self) -> None:
        if self.ensemble_size < 2:
            raise InputError(
                "A covariance needs at least two members.", key="ensemble_size", found=self.ensemble_size, expected=">= 2"
            )


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AMX, AVX512_BF16); elsewhere it would be emulated, slowly."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))


class Ensemble(nn.Module):
    """K regressors (B, S) -> (K, B, D), in normalised units.

    Args:
        config: architecture and training.
        observation_dim: S.
        chunk: T.
        action_dim: A.
        generator: source of the members' initialisation.
    """

    def __init__(
        self, config: EnsembleConfig, observation_dim: int, chunk: int, action_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.config, self.observation_dim, self.chunk, self.action_dim = config, observation_dim, chunk, action_dim
        self.dim = chunk * action_dim
        outputs = self.dim * (2 if config.likelihood == "gaussian" else 1)
        hidden = (config.hidden,) * config.layers
        self.network = StackedMLP(config.ensemble_size, observation_dim, hidden, outputs, [generator])

    def loss(self, observation: Tensor, target: Tensor) -> Tensor:
        """(K, B, S), (K, B, D) -> (K,): squared error, or negative log-likelihood, averaged over batch and dimensions."""
        return self.loss_of(self.network(observation), target)

    def loss_of(self, output: Tensor, target: Tensor) -> Tensor:
        """:meth:`loss` of the network's output, of any number of members."""
        if self.config.likelihood == "mse":
            return (output - target).square().mean((1, 2))
        mean, log_std = output.split(self.dim, -1)
        log_std = log_std.clamp(MINIMUM_LOG_STD, MAXIMUM_LOG_STD)
        return (0.5 * ((target - mean) * torch.exp(-log_std)).square() + log_std).mean((1, 2))

    @torch.no_grad()
    def predict(self, observation: Tensor, batch: int = 1024) -> Tensor:
        """(N, S) -> (K, N, D): every member's predicted chunk, inside the action range under `bound="clamp"`."""
        parts = [
            self.network(part.expand(self.config.ensemble_size, -1, -1))[..., : self.dim] for part in observation.split(batch)
        ]
        prediction = torch.cat(parts, 1)
        return prediction.clamp_(-1, 1) if self.config.bound == "clamp" else prediction

    def factor(self, observation: Tensor) -> Factor:
        """(N, S) -> the posterior covariance of the chunk at each state (Algorithm 1, last line)."""
        return Factor.from_predictions(self.predict(observation))


class EnsembleTraining:
    """Trains an ensemble; `state`/`load_state` make it resumable bit for bit.

    Wide members are trained one by one (:mod:`postbc.posterior.member`), narrow ones as one stack.

    Args:
        ensemble: its parameters are trained in place.
        windows: the demonstrations' chunk windows, normalised.
        seed: decides bootstrap, target noise and data order.
    """

    def __init__(self, ensemble: Ensemble, windows: Windows, seed: int) -> None:
        config = ensemble.config
        self.ensemble, self.config = ensemble, config
        self.observations = torch.as_tensor(windows.observations)
        self.targets = torch.as_tensor(windows.chunks).flatten(1)
        (resample,) = make_generators([seed], stream=1)
        counts = bootstrap_counts(torch.as_tensor(windows.trajectory), config.ensemble_size, config.bootstrap, resample)
        self.sampler = BootstrapSampler(counts)
        self.noise = None
        if config.target_noise > 0:  # drawn once: each member regresses on its own noised copy of the data set
            shape = (config.ensemble_size, *self.targets.shape)
            self.noise = torch.randn(shape, generator=resample) * config.target_noise
        parts = number_of_parts(config.ensemble_size, config.batch_size, config.hidden)
        self.alone = parts > 1
        shares = zip(*(p.data.chunk(parts) for p in ensemble.parameters()))
        self.parts = [list(share) for share in shares] if self.alone else [list(ensemble.parameters())]
        self.anchors = [[p.detach().clone() for p in part] for part in self.parts] if config.prior_weight > 0 else []
        # Σ_t‖·‖² + λ‖θ − θ₀‖² over N windows of D numbers, as the loss is their mean
        self.pull = config.prior_weight / self.targets.numel()
        self.optimiser = Adam(self.parts, config.learning_rate)
        self.data = make_generators([seed], stream=2)
        self.reduced = config.precision == "bfloat16" or (config.precision == "auto" and has_fast_bfloat16())

    def train(self, steps: int) -> Tensor:
        """`steps` gradient steps of every member; returns their losses at the last one (K,)."""
        losses = torch.zeros(self.config.ensemble_size)
        for done in range(0, steps, BLOCK):
            block = min(BLOCK, steps - done)
            index = torch.stack([self.sampler.draw(self.config.batch_size, self.data[0]) for _ in range(block)])
            if self.alone:
                losses = torch.cat(each(lambda member, _: self._train_member(member, index[:, member]), len(self.parts)))  # noqa: B023
            else:
                for rows in index:
                    losses = self._step(rows)
        return losses

    def _train_member(self, member: int, rows: Tensor) -> Tensor:
        """A step of one member for each of `rows` (n, B)."""
        targets = self.targets[rows]
        if self.noise is not None:
            targets = targets + self.noise[member, rows]
        config, (values, first, second, steps, lr) = self.config, self.optimiser.states[member]
        state = AdamState([v[0] for v in values], [v[0] for v in first], [v[0] for v in second], steps, lr)
        return train_member(
            state, self.observations[rows], targets, config.likelihood == "gaussian", [MINIMUM_LOG_STD, MAXIMUM_LOG_STD],
            self.reduced, [a[0] for a in self.anchors[member]] if self.anchors else [], self.pull,
        ).unsqueeze(0)  # fmt: skip

    def _step(self, rows: Tensor) -> Tensor:
        """A step of all members as one stack, on `rows` (K, B)."""
        target = self.targets[rows]
        if self.noise is not None:
            target = target + self.noise.gather(1, rows.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.reduced):
            losses = self.ensemble.loss(self.observations[rows], target)
        total = losses
        if self.anchors:
            pairs = zip(self.parts[0], self.anchors[0])
            total = losses + self.pull * sum(((p - a).square().flatten(1).sum(1) for p, a in pairs), torch.zeros(len(rows)))
        self.optimiser.step(total)
        return losses.detach()

    def state(self) -> dict[str, Any]:
        """Everything that decides the remaining steps (bootstrap, noise and anchors follow from the seed)."""
        return {
            "parameters": dict(self.ensemble.named_parameters()),
            "optimiser": {"state": self.optimiser.state_dict()},
            "data": generator_states(self.data),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.ensemble.load_state_dict(state["parameters"])
        self.optimiser.load_state_dict(state["optimiser"]["state"])
        set_generator_states(self.data, state["data"])


class Posterior:
    """Fitted ensembles, one a seed, with what is needed to use them: saved once, reused by any policy of the same chunk.

    Attributes:
        seeds: one an ensemble.
        ensembles: fitted, frozen.
        normalizations: of the demonstrations each was fitted on.
        fingerprints: of those demonstrations' windows, so that a posterior is not used with other data by mistake.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        ensembles: Sequence[Ensemble],
        normalizations: Sequence[Normalization],
        fingerprints: Sequence[str],
    ) -> None:
        self.seeds, self.ensembles = tuple(seeds), list(ensembles)
        self.normalizations, self.fingerprints = list(normalizations), list(fingerprints)

    def of(self, seed: int) -> Ensemble:
        """The ensemble of `seed`."""
        return self.ensembles[self.index(seed)]

    def index(self, seed: int) -> int:
        """Index of the ensemble of `seed`.

        Raises:
            InputError: none was fitted for it.
        """
        if seed not in self.seeds:
            raise InputError(
                "No posterior was fitted for this seed.", key="seed", found=seed, expected=f"one of {list(self.seeds)}",
                remedy="run `postbc posterior fit` with the seeds that you pretrain",
            )  # fmt: skip
        return self.seeds.index(seed)

    def save(self, directory: str | Path) -> None:
        """Write `directory`/posterior_seed_<seed>.safetensors, one a seed."""
        for seed, ensemble, normalization, fingerprint in zip(
            self.seeds, self.ensembles, self.normalizations, self.fingerprints, strict=True
        ):
            tree = {
                "format": FORMAT, "kind": "posterior", "seed": seed, "config": asdict(ensemble.config), "chunk": ensemble.chunk,
                "observation_dim": ensemble.observation_dim, "action_dim": ensemble.action_dim, "fingerprint": fingerprint,
                "normalization": normalization.to_dict(), "parameters": dict(ensemble.named_parameters()),
            }  # fmt: skip
            save_tree(Path(directory) / f"posterior_seed_{seed}.safetensors", tree)

    @classmethod
    def load(cls, directory: str | Path) -> Posterior:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: no posterior there, or not one of this format.
        """
        paths = sorted(Path(directory).glob("posterior_seed_*.safetensors"), key=lambda p: int(p.stem.rsplit("_", 1)[1]))
        if not paths:
            raise InputError(
                "There is no posterior here.", file=directory, expected="posterior_seed_<seed>.safetensors",
                remedy="run `postbc posterior fit`, or wait until it has finished",
            )  # fmt: skip
        known = {f.name for f in fields(EnsembleConfig)}
        seeds, ensembles, normalizations, fingerprints = [], [], [], []
        for path in paths:
            tree = load_tree(path)
            if not isinstance(tree, dict) or tree.get("kind") != "posterior" or tree.get("format") != FORMAT:
                raise InputError(
                    "This is not a posterior file.", file=path, key="kind", expected=f"'posterior', format {FORMAT}",
                    found=tree.get("kind") if isinstance(tree, dict) else type(tree).__name__,
                    remedy="give the directory that `postbc posterior fit` wrote",
                )  # fmt: skip
            config = EnsembleConfig(**{k: v for k, v in tree["config"].items() if k in known})
            ensemble = Ensemble(config, tree["observation_dim"], tree["chunk"], tree["action_dim"], torch.Generator())
            ensemble.load_state_dict(tree["parameters"])
            seeds.append(tree["seed"])
            ensembles.append(ensemble.eval().requires_grad_(False))
            normalizations.append(Normalization.from_dict(tree["normalization"]))
            fingerprints.append(tree["fingerprint"])
        return cls(seeds, ensembles, normalizations, fingerprints)


def fit_ensemble(
    windows: Windows, config: EnsembleConfig, seed: int, run: Run | None = None, checkpoint_every: int = 500
) -> Ensemble:
    """Fit one ensemble (Algorithm 1) on normalised windows; resumable when a `run` is given.

    Returns:
        The fitted ensemble, frozen.
    """
    (initialise,) = make_generators([seed], stream=0)
    chunk, action_dim = windows.chunks.shape[1:]
    ensemble = Ensemble(config, windows.observations.shape[1], chunk, action_dim, initialise)
    training = EnsembleTraining(ensemble, windows, seed)
    start, found = 0, run.load() if run else None
    if found:
        start = found[0]
        training.load_state(found[1])
    with progress(f"posterior, seed {seed}: {config.ensemble_size} members", config.steps, start) as bar:
        step = start
        while step < config.steps:
            block = min(BLOCK, config.steps - step, checkpoint_every - step % checkpoint_every)
            losses, step = training.train(block), step + block
            if run and (step % checkpoint_every == 0 or step == config.steps):
                run.log(step, {"ensemble/loss": losses.mean().item(), "ensemble/loss_max": losses.max().item()})
                run.save(step, training.state())
            bar.advance(block, loss=losses)
    return ensemble.eval().requires_grad_(False)
