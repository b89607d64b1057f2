"""`postbc posterior fit`: the posterior of each seed's demonstrations, and its use at the windows of a policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro

from postbc.data.episodes import is_image
from postbc.data.training_set import TrainingSet, TrainingSetConfig, load_training_set
from postbc.devices import Compute
from postbc.errors import require
from postbc.files import write_json
from postbc.policies.base import POLICY_FILE, load_policy, policy_fingerprint, save_policy
from postbc.posterior import (
    Calibration,
    ClosedForm,
    ClosedFormConfig,
    EnsembleConfig,
    Factor,
    Posterior,
    SeeingEnsemble,
    calibrate,
    fit_closed_form,
    fit_ensemble,
    fit_seeing_ensemble,
    state_features,
    window_features,
)
from postbc.posterior.closed_form import check_closed_form
from postbc.posterior.diagnostics import plot, plot_frames, spreads, summarise
from postbc.posterior.features import Encode
from postbc.posterior.saved import POSTERIOR_FILE, At, Model
from postbc.runs import Run, digest
from postbc.schemas import Count, Seed, later, schema
from postbc.stages.seeds import file_of_seed, in_epochs, of_one_seed

ENCODER_FILE = "encoder.safetensors"


@schema
class PosteriorFit:
    """Fit the posterior of the demonstrations (Algorithm 1): a bootstrapped ensemble a seed, or the closed form.

    Writes seed_<seed>/posterior.safetensors, diagnostics.json and posterior.png (of images posterior_frames.png too) into the output
    directory.
    """

    data: TrainingSetConfig
    output: Path
    """Directory of the stage; each seed's run is seed_<seed> in it."""
    encoder: Path | None = None
    """Directory of a pretrained policy: regress from its encoder's features; default: the normalised state. Images need this, or
    --ensemble.encoder own."""
    seeds: tuple[Seed, ...] = (0,)
    """One posterior a seed; give those that you will pretrain."""
    kind: Literal["ensemble", "closed-form"] = later("ensemble")
    """ensemble (Algorithm 1), or closed-form: ridge regression on a regressor's features, each trajectory left out: three
    networks are trained in place of K."""
    ensemble: EnsembleConfig = EnsembleConfig()
    closed_form: ClosedFormConfig = later(ClosedFormConfig())
    epochs: Count | None = None
    """Epochs instead of ensemble.steps (paper: 10000 Lift, 6000 Can, 3000 Square)."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    jobs: Count = 1
    """Seeds at a time, each a process of its own."""
    resume: bool = False
    """Go on with the runs in the output directory."""

    def __post_init__(self) -> None:
        require(self.kind == "ensemble" or self.ensemble.encoder == "features",
                "A closed form regresses from features; it has no encoders of its own.", key="kind",
                found=f"{self.kind}, and ensemble.encoder own", expected="ensemble",
                remedy="or, with images, give --encoder DIR of a policy instead of --ensemble.encoder own")  # fmt: skip
        require(self.kind == "closed-form" or self.closed_form == ClosedFormConfig(), "These are options of the closed form.",
                key="closed_form", found=f"kind {self.kind}", expected="kind closed-form")  # fmt: skip


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


def fit_posterior(config: PosteriorFit, seed: int) -> Posterior:
    """Algorithm 1 for one seed, resumable; the posterior that was saved.

    Raises:
        InputError: demonstrations or encoder cannot be used, or the output directory holds another run.
    """
    config = dataclasses.replace(config, compute=config.compute.resolved())
    device = config.compute.start()
    data = load_training_set(config.data, seed, device)
    windows = data.windows
    ensemble_config = in_epochs(config.ensemble, config.epochs, len(windows))
    if config.kind == "closed-form":
        check_closed_form(len(data.dataset), ensemble_config.layers, config.closed_form)
    encode: Encode | None = None
    encoder, policy = None, None
    if ensemble_config.encoder == "own":
        require(config.encoder is None, "Members have encoders of their own, or share a policy's.", key="encoder",
                found=f"{config.encoder}, and ensemble.encoder own", remedy="leave one of them out")  # fmt: skip
        with torch.device("meta"):  # costs nothing, and says what does not fit before anything is written
            sizes = (windows.observation_steps, windows.chunk_size, windows.action_dim)
            SeeingEnsemble(ensemble_config, data.shapes, *sizes, torch.Generator())
    else:
        encode, encoder, policy = encoder_of(config.encoder, seed, data, device)
    inputs = {"demonstrations": data.fingerprint, **({"encoder": encoder} if encoder else {})}
    if encode is None and data.vectors is not None:
        inputs["language"] = digest(str(config.data.language))
    elsewhere = ("encoder",) if encoder else ("data.language",) if "language" in inputs else ()
    with Run(
        config.output / f"seed_{seed}", of_one_seed(config, seed), resume=config.resume, inputs=inputs, keep=1,
        revisable=("compute", "data.demonstrations", *elsewhere),
    ) as run:  # fmt: skip
        if not (run.directory / POSTERIOR_FILE).exists():
            model: Model
            if encode is None:
                model = fit_seeing_ensemble(
                    windows, data.normalization, ensemble_config, seed, config.compute, run, vectors=data.vectors
                )
            else:
                chunks = data.normalization.normalize_action(windows.chunk(torch.arange(len(windows))))
                what = (window_features(windows, encode), chunks, windows.episode, ensemble_config)
                if config.kind == "ensemble":
                    model = fit_ensemble(*what, seed, config.compute, run)
                else:
                    model = fit_closed_form(*what, config.closed_form, seed, config.compute, run)
            if policy is not None:
                save_policy(run.directory / ENCODER_FILE, policy)
            Posterior(model, data.normalization, data.fingerprint, seed, encoder).save(run.directory)
        with run.reading():
            posterior = Posterior.load(run.directory, device)
        picture_posterior(posterior, data, encode, run.directory)
        run.finish()
    return posterior


def picture_posterior(posterior: Posterior, data: TrainingSet, encode: Encode | None, directory: Path) -> None:
    """Write what is missing of diagnostics.json, posterior.png and, of images, posterior_frames.png."""
    pictures = ["posterior.png", *(["posterior_frames.png"] if any(map(is_image, data.shapes)) else [])]
    missing = [name for name in ("diagnostics.json", *pictures) if not (directory / name).exists()]
    if not missing:
        return
    found = spreads(posterior, data, encode)
    model = posterior.model
    size = "closed form" if isinstance(model, ClosedForm) else f"{model.config.ensemble_size} members"
    title = f"Posterior of {len(data.dataset)} demonstrations, seed {posterior.seed}, {size}"
    if "diagnostics.json" in missing:
        write_json(directory / "diagnostics.json", summarise(found))
    if "posterior.png" in missing:
        plot(found, data, directory / "posterior.png", title)
    if "posterior_frames.png" in missing:
        plot_frames(found["on"], data, directory / "posterior_frames.png", f"{title}: least and most uncertain frames")


class AtWindows(NamedTuple):
    """A posterior, and what it is asked about."""

    posterior: Posterior
    at: At
    """Features (N, F) of every window, or the windows, if its members see."""
    digest: str
    """Of its file."""

    def factor(self) -> Factor:
        """The posterior covariance at every window."""
        return self.posterior.factor(self.at)

    def calibrate(self, data: TrainingSet, level: float = 0.05) -> Calibration:
        """α by the trajectories of `data` left out. InputError where none can be."""
        chunks = data.normalization.normalize_action(data.windows.chunk(torch.arange(len(data.windows))))
        oob = self.posterior.out_of_bag(self.at, chunks, torch.as_tensor(data.windows.episode))
        return calibrate(oob, level, seed=self.posterior.seed)


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
        remedy="use the same demonstrations, subset, chunk, tail, statistics and rotations for `posterior fit` and `pretrain`",
    )  # fmt: skip
    model, encode = posterior.model, None
    found, expected = (model.chunk, model.action_dim), (data.windows.chunk_size, data.windows.action_dim)
    require(found == expected, "The posterior has other widths than the data.", file=file, key="chunk, action_dim", found=found,
            expected=expected)  # fmt: skip
    if posterior.encoder is not None:
        policy = load_policy(file.parent / ENCODER_FILE, device)
        require(policy_fingerprint(policy) == posterior.encoder, "This is not the encoder that the posterior was fitted with.",
                file=file.parent / ENCODER_FILE, remedy="run `postbc posterior fit` again")  # fmt: skip
        check_observations(policy, data, file.parent / ENCODER_FILE)
        encode = policy.encode
    elif model.config.encoder == "features":
        encode = state_features(data.shapes, data.normalization)
    return AtWindows(posterior, posterior.at(data.windows, encode), digest(file))
