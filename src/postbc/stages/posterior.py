"""`postbc posterior fit`: the posterior of each seed's demonstrations, and its use at the windows of a policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from postbc.data.training_set import TrainingSet, TrainingSetConfig, load_training_set
from postbc.devices import Compute
from postbc.errors import require
from postbc.files import write_json
from postbc.policies.base import POLICY_FILE, load_policy, policy_fingerprint, save_policy
from postbc.posterior import (
    Calibration,
    ClosedForm,
    ClosedFormConfig,
    Ensemble,
    EnsembleConfig,
    Factor,
    Posterior,
    calibrate,
    fit_closed_form,
    fit_ensemble,
    state_features,
    window_features,
)
from postbc.posterior.closed_form import check_closed_form
from postbc.posterior.diagnostics import plot, summarise
from postbc.posterior.features import Encode
from postbc.posterior.saved import POSTERIOR_FILE
from postbc.runs import Run, digest
from postbc.schemas import Count, Seed, later, schema
from postbc.stages.seeds import epochs_to_steps, file_of_seed, of_one_seed

ENCODER_FILE = "encoder.safetensors"


@schema
class PosteriorFit:
    """Fit the posterior of the demonstrations (Algorithm 1): a bootstrapped ensemble a seed, or the closed form.

    Writes seed_<seed>/posterior.safetensors, diagnostics.json and posterior.png into the output directory.
    """

    data: TrainingSetConfig
    output: Path
    """Directory of the stage; each seed's run is seed_<seed> in it."""
    encoder: Path | None = None
    """Directory of a pretrained policy: regress from its encoder's features (needed for images); default: the normalised state."""
    seeds: tuple[Seed, ...] = (0,)
    """One posterior a seed; give those that you will pretrain."""
    kind: Literal["ensemble", "closed-form"] = later("ensemble")
    """ensemble (Algorithm 1), or closed-form: ridge regression on a regressor's features, each trajectory left out; a thirtieth of
    the time."""
    ensemble: EnsembleConfig = EnsembleConfig()
    closed_form: ClosedFormConfig = later(ClosedFormConfig())
    epochs: Count | None = None
    """Epochs instead of ensemble.steps (paper: 10000 Lift, 6000 Can, 3000 Square)."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    jobs: Count = 1
    """Seeds at a time, each a process of its own."""
    resume: bool = False
    """Go on with the runs in the output directory."""


def encoder_of(
    path: Path | None, seed: int, data: TrainingSet, device: torch.device
) -> tuple[Encode, str | None, object | None]:
    """What makes the features of `data`: (encode, fingerprint of its policy or None, that policy or None).

    Raises:
        InputError: images without an encoder, or an encoder of other observations.
    """
    if path is None:
        return state_features(data.shapes, data.normalization), None, None
    file = file_of_seed(path, seed, POLICY_FILE, "postbc pretrain")
    policy = load_policy(file, device)
    check_observations(policy, data, file)
    return policy.encode, policy_fingerprint(policy), policy


def check_observations(policy: object, data: TrainingSet, file: Path) -> None:
    """Raise :class:`InputError` unless the policy reads what the data observes."""
    wanted = (dict(policy.shapes), policy.observation_steps)  # type: ignore[attr-defined]
    found = (dict(data.shapes), data.windows.observation_steps)
    require(wanted == found, "The encoder was made for other observations than the data's.", file=file, key="shapes, observation_steps",
            found=wanted, expected=found, remedy="use the same observation and image keys for both")  # fmt: skip


def fit_posterior(config: PosteriorFit, seed: int) -> Ensemble | ClosedForm:
    """Algorithm 1 for one seed, resumable; what was saved.

    Raises:
        InputError: demonstrations or encoder cannot be used, or the output directory holds another run.
    """
    config = dataclasses.replace(config, compute=config.compute.resolved())
    device = config.compute.start()
    data = load_training_set(config.data, seed, device)
    encode, encoder, policy = encoder_of(config.encoder, seed, data, device)
    ensemble_config = config.ensemble
    if config.epochs is not None:
        steps = epochs_to_steps(config.epochs, len(data.windows), ensemble_config.batch_size)
        ensemble_config = dataclasses.replace(ensemble_config, steps=steps)
    if config.kind == "closed-form":
        check_closed_form(len(data.dataset), ensemble_config.layers, config.closed_form)
    inputs = {"demonstrations": data.fingerprint, **({"encoder": encoder} if encoder else {})}
    moved = ("compute", "data.demonstrations", *(("encoder",) if encoder else ()))
    with Run(
        config.output / f"seed_{seed}", of_one_seed(config, seed), resume=config.resume, inputs=inputs, revisable=moved, keep=1
    ) as run:
        features = window_features(data.windows, encode)
        if not (run.directory / POSTERIOR_FILE).exists():
            every = torch.arange(len(data.windows), device=device)
            chunks = data.normalization.normalize_action(data.windows.chunk(every))
            model: Ensemble | ClosedForm
            if config.kind == "ensemble":
                model = fit_ensemble(features, chunks, data.windows.episode, ensemble_config, seed, config.compute, run)
            else:
                model = fit_closed_form(
                    features, chunks, data.windows.episode, ensemble_config, config.closed_form, seed, config.compute, run
                )
            if policy is not None:
                save_policy(run.directory / ENCODER_FILE, policy)
            Posterior(model, data.normalization, data.fingerprint, seed, encoder).save(run.directory)
        with run.reading():
            model = Posterior.load(run.directory, device).model
        if not (run.directory / "diagnostics.json").exists():
            write_json(run.directory / "diagnostics.json", summarise(model, features, data.windows.episode))
        if not (run.directory / "posterior.png").exists():
            count = len(data.dataset)
            size = f"{ensemble_config.ensemble_size} members" if config.kind == "ensemble" else "closed form"
            title = f"Posterior of {count} demonstrations, seed {seed}, {size}"
            plot(model, features, data, run.directory / "posterior.png", title)
        run.finish()
    return model


class AtWindows(NamedTuple):
    """A posterior, and what it is asked about."""

    posterior: Posterior
    features: Tensor
    """(N, F) of every window."""
    digest: str
    """Of its file."""

    def factor(self) -> Factor:
        """The posterior covariance at every window."""
        return self.posterior.factor(self.features)

    def calibrate(self, data: TrainingSet, level: float = 0.05) -> Calibration:
        """α by the trajectories of `data` left out. InputError where none can be."""
        chunks = data.normalization.normalize_action(data.windows.chunk(torch.arange(len(data.windows))))
        episode, seed = torch.as_tensor(data.windows.episode), self.posterior.seed
        return calibrate(self.posterior.model.out_of_bag(self.features, chunks, episode, seed), level, seed=seed)


def posterior_at(path: str | Path, data: TrainingSet, seed: int, device: str | torch.device = "cpu") -> AtWindows:
    """The posterior of a seed at every window of `data`.

    Args:
        path: what `postbc posterior fit` wrote: its directory, a seed's, or a file.

    Raises:
        InputError: none there, or one that was fitted on other demonstrations, subset, normalisation or chunk.
    """
    file = file_of_seed(path, seed, POSTERIOR_FILE, "postbc posterior fit")
    posterior = Posterior.load(file, device)
    require(
        posterior.fingerprint == data.fingerprint, "The posterior was fitted on other windows than these.", file=file,
        found=f"fingerprint {posterior.fingerprint}", expected=data.fingerprint,
        remedy="use the same demonstrations, subset, chunk, tail and statistics for `posterior fit` and `pretrain`",
    )  # fmt: skip
    if posterior.encoder is None:
        encode = state_features(data.shapes, data.normalization)
    else:
        policy = load_policy(file.parent / ENCODER_FILE, device)
        require(policy_fingerprint(policy) == posterior.encoder, "This is not the encoder that the posterior was fitted with.",
                file=file.parent / ENCODER_FILE, remedy="run `postbc posterior fit` again")  # fmt: skip
        check_observations(policy, data, file.parent / ENCODER_FILE)
        encode = policy.encode
    features = window_features(data.windows, encode)
    require(
        (features.shape[1], data.windows.chunk_size, data.windows.action_dim)
        == (posterior.model.feature_dim, posterior.model.chunk, posterior.model.action_dim),
        "The posterior has other widths than the data.", file=file, key="feature_dim, chunk, action_dim",
        found=(posterior.model.feature_dim, posterior.model.chunk, posterior.model.action_dim),
        expected=(features.shape[1], data.windows.chunk_size, data.windows.action_dim),
    )  # fmt: skip
    return AtWindows(posterior, features, digest(file))
