"""`postbc posterior fit` and `postbc pretrain`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from postbc.demonstrations.training_set import TrainingSet, TrainingSetConfig, describe, load_training_sets
from postbc.errors import InputError
from postbc.nn import make_generators
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.posterior import Ensemble, EnsembleConfig, Factor, Posterior, fit_ensemble
from postbc.posterior.diagnostics import plot, summarise
from postbc.pretraining import PretrainingConfig, pretrain
from postbc.runs import Run, versions, write_json

POLICY_FILE = "policy.safetensors"


def epochs_to_steps(epochs: int, sets: Sequence[TrainingSet], batch_size: int) -> int:
    """Gradient steps of so many epochs: epochs · ⌈windows / batch⌉, for the largest of the sets."""
    return epochs * math.ceil(max(len(s.windows) for s in sets) / batch_size)


@dataclass(frozen=True)
class PosteriorFit:
    """Fit the posterior of the demonstrations (Algorithm 1): a bootstrapped ensemble a seed.

    Writes posterior_seed_<seed>.safetensors, diagnostics.json and a picture a seed into the output directory.
    """

    data: TrainingSetConfig
    output: Path
    """Directory of the run."""
    seeds: tuple[int, ...] = (0,)
    """One posterior a seed; give those that you will pretrain."""
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    epochs: int | None = None
    """Epochs instead of ensemble.steps (paper: 10000 Lift, 6000 Can, 3000 Square)."""
    resume: bool = False
    """Go on with the run in the output directory."""

    def run(self) -> None:
        """Fit, save, draw."""
        fit_posterior(self)
        Console().print(f"posterior of {len(self.seeds)} seed(s): {self.output}")


def fit_posterior(config: PosteriorFit) -> Posterior:
    """Algorithm 1 for every seed of `config`, one after another, resumable; returns the posterior that was saved.

    Raises:
        InputError: the demonstrations cannot be used, or the output directory holds another run.
    """
    sets = load_training_sets(config.data, config.seeds)
    Run(config.output, config, resume=config.resume)
    diagnostics = {}
    for seed, data in zip(config.seeds, sets):
        ensemble = fit_seed(config, seed, data)
        diagnostics[str(seed)] = summarise(ensemble, data)
        title = f"Posterior of {len(data.demonstrations)} demonstrations, seed {seed}, {ensemble.config.ensemble_size} members"
        plot(ensemble, data, config.output / f"posterior_seed_{seed}.png", title)
    write_json(config.output / "diagnostics.json", diagnostics)
    return Posterior.load(config.output)


def fit_seed(config: PosteriorFit, seed: int, data: TrainingSet) -> Ensemble:
    """One seed's share of :func:`fit_posterior`; the seeds may be fitted in processes of their own. Returns what was saved."""
    ensemble_config = config.ensemble
    if config.epochs is not None:
        ensemble_config = replace(ensemble_config, steps=epochs_to_steps(config.epochs, [data], ensemble_config.batch_size))
    if not (config.output / f"posterior_seed_{seed}.safetensors").exists():
        stage = Run(config.output / f"seed_{seed}", ensemble_config, resume=True, keep=1)
        ensemble = fit_ensemble(data.windows, ensemble_config, seed, stage)
        stage.close()
        Posterior([seed], [ensemble], [data.normalization], [data.fingerprint]).save(config.output)
        stage.drop_checkpoints()
    return Posterior.load(config.output).of(seed)


@dataclass(frozen=True)
class Pretrain:
    """Pretrain a diffusion policy by BC, σ-BC or PostBC (Algorithm 2), several seeds side by side.

    Writes policy.safetensors (averaged weights, everything inference needs) and policy.json into the output directory.
    """

    data: TrainingSetConfig
    output: Path
    """Directory of the run."""
    posterior: Path | None = None
    """Directory that `postbc posterior fit` wrote (postbc only)."""
    seeds: tuple[int, ...] = (0,)
    """Trained side by side, as members of one policy file."""
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    policy: DiffusionConfig = field(default_factory=DiffusionConfig)
    epochs: int | None = None
    """Epochs instead of pretraining.steps (paper: 3000)."""
    resume: bool = False
    """Go on with the run in the output directory."""

    def run(self) -> None:
        """Train and save."""
        pretrain_policy(self)
        Console().print(f"{self.pretraining.method} policy of {len(self.seeds)} seed(s): {self.output / POLICY_FILE}")


def posterior_factor(posterior: Posterior, sets: Sequence[TrainingSet], seeds: Sequence[int]) -> Factor:
    """The posterior covariance at every window of `sets`, in their order.

    Raises:
        InputError: the posterior was fitted on other demonstrations, subset, normalisation or chunk.
    """
    rows = []
    for seed, data in zip(seeds, sets):
        member = posterior.index(seed)
        if posterior.fingerprints[member] != data.fingerprint:
            raise InputError(
                "The posterior was fitted on other windows than these.", key=f"seed {seed}",
                found=f"fingerprint {posterior.fingerprints[member]}", expected=data.fingerprint,
                remedy="use the same demonstrations, subset, chunk, tail and statistics for `posterior fit` and `pretrain`",
            )  # fmt: skip
        rows.append(posterior.ensembles[member].factor(torch.as_tensor(data.windows.observations)).compact().rows)
    return Factor(torch.cat(rows))


def pretrain_policy(config: Pretrain) -> DiffusionPolicy:
    """Algorithm 2 as configured, resumable; returns the policy that was saved.

    Raises:
        InputError: data, posterior or output directory cannot be used.
    """
    if config.policy.chunk != config.data.chunk:
        raise InputError(
            "The policy's chunk is not the data's.", key="policy.chunk", found=config.policy.chunk, expected=config.data.chunk,
            remedy="give both: --data.chunk T --policy.chunk T",
        )  # fmt: skip
    sets = load_training_sets(config.data, config.seeds)
    pretraining, factor = config.pretraining, None
    if config.epochs is not None:
        pretraining = replace(pretraining, steps=epochs_to_steps(config.epochs, sets, pretraining.batch_size))
    if pretraining.method == "postbc":
        if config.posterior is None:
            raise InputError(
                "PostBC needs a posterior.", key="posterior", found="none given", expected="a directory",
                remedy="run `postbc posterior fit` first and give --posterior DIR",
            )  # fmt: skip
        factor = posterior_factor(Posterior.load(config.posterior), sets, config.seeds)
    run = Run(config.output, config, resume=config.resume)
    if (config.output / POLICY_FILE).exists():
        return DiffusionPolicy.load(config.output / POLICY_FILE)
    method = pretraining.method
    about = {
        "method": method,
        "posterior_weight": pretraining.posterior_weight if method == "postbc" else None,
        "sigma": pretraining.sigma if method == "sigma-bc" else None,
        **describe(config.data, sets),
        "steps": pretraining.steps,
        "versions": versions(),
    }
    first = sets[0]
    policy = DiffusionPolicy(
        config.policy, first.demonstrations.observation_dim, first.demonstrations.action_dim, config.seeds,
        make_generators(config.seeds, stream=3), [s.normalization for s in sets], about,
    )  # fmt: skip
    pretrain(policy, [s.windows for s in sets], pretraining, config.seeds, factor, run)
    policy.save(config.output / POLICY_FILE)
    run.drop_checkpoints()
    run.close()
    return policy
