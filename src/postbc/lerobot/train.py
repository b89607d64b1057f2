"""`postbc lerobot train`: LeRobot's own training, policy and checkpoint, on PostBC's targets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from postbc.devices import Compute
from postbc.disk import write_json
from postbc.errors import require
from postbc.lerobot.columns import hold_numbers
from postbc.lerobot.encoders import make_encoder
from postbc.lerobot.factors import Factors
from postbc.lerobot.fit import Frames, fit_factors, read_frames
from postbc.lerobot.hook import lerobot_train
from postbc.lerobot.view import PosteriorDataset
from postbc.posterior.ensemble import EnsembleConfig
from postbc.progress import say
from postbc.schemas import NonNegative, Seed, plain, read_json, schema

#: Beside LeRobot's checkpoints: what a resumed run goes on with.
RECORD = "postbc.json"
PREFIX = "--postbc."


@schema
class PostBC:
    """What `lerobot-train` has no argument for."""

    weight: NonNegative = 1.0
    """α, multiplies the posterior's standard deviation; 0 is plain training, to the bit."""
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


def train(command: Asked) -> None:
    """Train; the posterior is fitted first where there is none.

    Raises:
        InputError: no LeRobot, or one that is not known; a streaming dataset; factors of other data, chunks or settings.
    """
    command.options()  # a slip of the keyboard is said before LeRobot is imported
    lerobot_train(command.theirs, lambda cfg, dataset: wrap(command, cfg, dataset))


def wrap(command: Asked, cfg: Any, dataset: Any) -> PosteriorDataset:
    """The dataset that lerobot-train made, with PostBC's targets."""
    require(not cfg.dataset.streaming, "PostBC looks every frame's posterior up, which a streaming dataset does not allow.",
            key="dataset.streaming", found=True, remedy="--dataset.streaming=false")  # fmt: skip
    policy = cfg.trainable_config
    delta = policy.action_delta_indices
    require(delta is not None and not cfg.is_reward_model_training, "This policy is not trained on chunks of actions.",
            key="policy.type", found=getattr(policy, "type", None))  # fmt: skip
    record = Path(cfg.output_dir) / RECORD
    resumed = read_json(record, PostBC) if cfg.resume and record.is_file() else None
    options = command.options(resumed)
    seed = options.seed if options.seed is not None else cfg.seed or 0
    options = replace(options, seed=seed, factors=options.factors.absolute())
    if getattr(policy, "type", None) == "act":
        warnings.warn("ACT sets its latent to zero when it acts: it is deterministic, so PostBC has nothing to widen, and DSRL and "
                      "Best-of-N nothing to steer.", UserWarning, stacklevel=2)  # fmt: skip
    cameras = bool(dataset.meta.camera_keys)
    made_of = plain({"ensemble": options.ensemble, "encoder": options.encoder if cameras else None, "seed": options.seed})
    frames = read_frames(dataset.root, dataset.episodes)
    if not options.factors.exists():
        _fit(options, dataset.root, frames, [int(d) for d in delta], cameras, made_of, str(policy.device))
    factors = Factors(options.factors)
    require(factors.about.fingerprint == frames.fingerprint, "The posterior is of other frames than those that are trained on.",
            file=options.factors, remedy="give another --postbc.factors: it is fitted first")  # fmt: skip
    for key, value in made_of.items():
        require(factors.about.fit.get(key) == value, "The posterior was fitted with other settings.", file=options.factors,
                key=f"postbc.{key}", found=factors.about.fit.get(key), expected=value,
                remedy="give these settings, or another --postbc.factors")  # fmt: skip
    hold_numbers(dataset)
    view = PosteriorDataset(dataset, factors, options.weight, int(options.seed or 0))
    if int(os.environ.get("RANK", 0)) == 0:
        write_json(record, plain(options, whole=True))
    return view


def _fit(
    options: PostBC, root: Path, frames: Frames, delta: list[int], cameras: bool, made_of: dict[str, Any], device: str
) -> None:
    """Fit the factors, and leave torch's threads and random numbers as they were: LeRobot's training must not notice."""
    threads, kind = torch.get_num_threads(), device.split(":")[0]
    try:
        with torch.random.fork_rng():
            compute = Compute(device=kind if kind in ("cpu", "cuda", "mps") else "auto", threads=threads)  # type: ignore[arg-type]
            encode = make_encoder(options.encoder) if cameras else None
            std = fit_factors(
                options.factors, root, frames, delta, options.ensemble, int(options.seed or 0), encode=encode, described=made_of,
                compute=compute,
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    size, n = options.factors.stat().st_size, len(frames.actions)
    say(f"Posterior of {n} frames: {options.factors}, {size / 2**20:.1f} MB ({size / n:.0f} bytes a frame), mean standard deviation "
        f"{std:.3f} (the actions' range is 2)")  # fmt: skip
