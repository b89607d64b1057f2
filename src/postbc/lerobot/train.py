"""`postbc lerobot train`: LeRobot's own training, policy and checkpoint, on PostBC's targets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from postbc.devices import Compute
from postbc.disk import write_json
from postbc.errors import require
from postbc.lerobot.encoders import make_encoder
from postbc.lerobot.factors import Factors
from postbc.lerobot.fit import Frames, fit_factors, inputs, read_frames
from postbc.lerobot.hook import hold_numbers, lerobot_train
from postbc.lerobot.view import PosteriorDataset
from postbc.posterior.ensemble import EnsembleConfig
from postbc.progress import say
from postbc.schemas import NonNegative, Seed, plain, read_json, schema

#: In each of LeRobot's checkpoints, beside `pretrained_model` and `training_state`: what a resumed run goes on with.
RECORD = "postbc.json"
PREFIX, WEIGHT = "--postbc.", "--postbc.weight"


@schema
class PostBC:
    """What `lerobot-train` has no argument for."""

    weight: NonNegative | Literal["auto"] = 1.0
    """α, multiplies the posterior's standard deviation; 0 is plain training, to the bit. auto: by trajectories left out of the fit,
    1 at most."""
    factors: Path = Path("factors.safetensors")
    """The posterior of every frame; fitted first where there is no such file."""
    encoder: str = "ResNet18_Weights.IMAGENET1K_V1"
    """What the posterior sees of cameras: the pretrained_model folder of a checkpoint (plain BC), weights of torchvision's ResNet-18,
    or random."""
    ensemble: EnsembleConfig = EnsembleConfig(ensemble_size=20, steps=2000, learning_rate=1e-3)
    """Algorithm 1."""
    seed: Seed | None = None
    """Of the posterior and of the draws; by default LeRobot's --seed."""


@dataclass(frozen=True)
class Training:
    """`lerobot-train` on PostBC's targets: any argument of lerobot-train, and these. Its checkpoints are LeRobot's own."""

    postbc: PostBC = field(default_factory=PostBC)


@dataclass(frozen=True)
class Asked:
    """What was asked for: our options, as they were given, and lerobot-train's."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]

    def options(self, default: PostBC | None = None) -> PostBC:
        """Ours; what is not given is of `default`."""
        chosen: Training = tyro.cli(
            Training, prog="postbc lerobot train", args=list(self.ours), default=Training(default or PostBC())
        )
        return chosen.postbc


def split(arguments: Sequence[str]) -> Asked:
    """`--postbc.…` (with `=`, or the value as the next word) and -h are ours, the rest is lerobot-train's."""
    ours: list[str] = []
    theirs: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        mine = word.startswith(PREFIX) or word in ("-h", "--help")
        (ours if mine else theirs).append(word)
        if mine and "=" not in word and words and not words[0].startswith("-"):
            ours.append(words.pop(0))
    return Asked(tuple(ours), tuple(theirs))


@schema
class Record:
    """postbc.json: what the run that a checkpoint is of was asked for, and the α that it came to."""

    options: PostBC
    """Paths absolute, the seed said."""
    posterior_weight: NonNegative
    """α."""
    posterior_weight_source: str | None
    """Where `auto` had it from."""


def train(command: Asked) -> None:
    """Train; the posterior is fitted first where there is none.

    Raises:
        InputError: no LeRobot, or one that is not known; a job for another machine; a streaming dataset; factors of other data, chunks
            or settings; a resumed run that does not say its options.
    """
    command.options()  # a slip of the keyboard is said before LeRobot is imported
    lerobot_train(command.theirs, PostBCTraining(command))


class PostBCTraining:
    """What LeRobot's training asks of us (:class:`postbc.lerobot.hook.Trains`)."""

    def __init__(self, command: Asked) -> None:
        self.command = command
        self.record: Record | None = None

    def saved(self, checkpoint: Path) -> None:
        """Put our options into a checkpoint."""
        write_json(checkpoint / RECORD, plain(self.record, whole=True))

    def view(self, cfg: Any, dataset: Any) -> Any:
        """The dataset that lerobot-train made, with PostBC's targets; with α = 0 as it is."""
        require(not cfg.dataset.streaming, "PostBC looks every frame's posterior up, which a streaming dataset does not allow.",
                key="dataset.streaming", found=True, remedy="--dataset.streaming=false")  # fmt: skip
        policy = cfg.trainable_config
        delta = policy.action_delta_indices
        require(delta is not None and not cfg.is_reward_model_training, "This policy is not trained on chunks of actions.",
                key="policy.type", found=getattr(policy, "type", None))  # fmt: skip
        options = self._options(cfg)
        hold_numbers(dataset)
        if options.weight == 0:
            self.record = Record(options, 0.0, None)
            return dataset
        if getattr(policy, "type", None) == "act":
            warnings.warn("ACT sets its latent to zero when it acts: it is deterministic, so PostBC has nothing to widen, and DSRL and "
                          "Best-of-N nothing to steer.", UserWarning, stacklevel=2)  # fmt: skip
        factors = _factors(options, cfg, dataset, [int(d) for d in delta])
        alpha, source = options.weight, None
        if alpha == "auto":
            found = factors.about.calibration
            assert found is not None
            alpha, source = found.posterior_weight, f"{found.source}: {found.reason}"
            if int(os.environ.get("RANK", 0)) == 0:
                say(f"{'warning: ' if found.source == 'fallback' else ''}α = {alpha:.2f} ({source})")
        self.record = Record(options, alpha, source)
        return PosteriorDataset(dataset, factors, alpha, int(options.seed or 0))

    def _options(self, cfg: Any) -> PostBC:
        """What was asked for now, and otherwise, of a resumed run, before."""
        record = Path(cfg.checkpoint_path) / RECORD if cfg.resume else None
        before = read_json(record, Record).options if record is not None and record.is_file() else None
        said = any(word.partition("=")[0] == WEIGHT for word in self.command.ours)
        require(record is None or before is not None or said, "It is not known what PostBC was asked for when this run began.",
                file=record, found="no such file: plain lerobot-train wrote the checkpoint, or an older postbc",
                remedy=f"say it again ({WEIGHT}=1 and whatever else it was), or resume with lerobot-train")  # fmt: skip
        options = self.command.options(before)
        seed = options.seed if options.seed is not None else cfg.seed or 0
        return replace(options, seed=seed, factors=options.factors.absolute())


def _factors(options: PostBC, cfg: Any, dataset: Any, delta: list[int]) -> Factors:
    """The posterior of the frames that are trained on, fitted if there is none. InputError: of other frames or settings."""
    seen = inputs(cfg.trainable_config, dataset.meta, cfg.rename_map)
    cameras = [key for key in seen if key in dataset.meta.camera_keys]
    encoder = options.encoder if cameras else None
    made_of = plain({"ensemble": options.ensemble, "encoder": encoder, "seed": options.seed, "inputs": seen})
    frames = read_frames(dataset.root, dataset.episodes, seen)
    if not options.factors.exists():
        _fit(options, dataset.root, frames, delta, cameras, made_of, torch.device(cfg.trainable_config.device))
    factors = Factors(options.factors)
    remedy = "give another --postbc.factors: it is fitted first"
    require(factors.about.fingerprint == frames.fingerprint, "The posterior is of other frames than those that are trained on.",
            file=options.factors, remedy=remedy)  # fmt: skip
    for key, value in made_of.items():
        require(factors.about.fit.get(key) == value, "The posterior was fitted with other settings.", file=options.factors,
                key=f"postbc.{key}", found=factors.about.fit.get(key), expected=value, remedy=f"give these settings, or {remedy}",
                )  # fmt: skip
    require(options.weight != "auto" or factors.about.calibration is not None, "The posterior was fitted without finding α.",
            file=options.factors, key="postbc.weight", found="auto", remedy=f"give a number, or {remedy}, and α found")  # fmt: skip
    return factors


def _fit(
    options: PostBC,
    root: Path,
    frames: Frames,
    delta: list[int],
    cameras: list[str],
    made_of: dict[str, Any],
    device: torch.device,
) -> None:
    """Fit the factors, and leave torch's threads and random numbers as they were: LeRobot's training must not notice."""
    threads = torch.get_num_threads()
    known = device.type in ("cpu", "cuda", "mps")
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
            compute = Compute(device=device.type if known else "auto", threads=threads)  # type: ignore[arg-type]
            encoder = make_encoder(options.encoder, device if known else "cpu") if cameras else None
            std = fit_factors(
                options.factors, root, frames, delta, options.ensemble, int(options.seed or 0), encode=encoder,
                cameras=encoder.among(cameras) if encoder else (), described=made_of, compute=compute,
                calibrated=options.weight == "auto",
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    size, n = options.factors.stat().st_size, len(frames.actions)
    say(f"Posterior of {n} frames: {options.factors}, {size / 2**20:.1f} MB ({size / n:.0f} bytes a frame), mean standard deviation "
        f"{std:.3f} (the actions' range is 2)")  # fmt: skip
