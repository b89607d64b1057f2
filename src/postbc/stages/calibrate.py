"""`postbc posterior calibrate`: α from the demonstrations, and how well the posterior explains those that it was fitted without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from postbc.data.training_set import TrainingSetConfig, load_training_set
from postbc.devices import Compute
from postbc.files import write_json
from postbc.posterior import Calibration
from postbc.posterior.diagnostics import plot_calibration
from postbc.progress import say
from postbc.runs import Run
from postbc.schemas import Count, OpenShare, Seed, plain, read_json, schema
from postbc.stages.posterior import posterior_at
from postbc.stages.seeds import of_one_seed

CALIBRATION_FILE = "calibration.json"


@schema
class PosteriorCalibrate:
    """Find the posterior weight α by trajectories that the posterior was fitted without, as --pretraining.posterior-weight auto does.

    Writes seed_<seed>/calibration.json and calibration.png into the output directory.
    """

    data: TrainingSetConfig
    """As `postbc posterior fit` had it."""
    posterior: Path
    """Directory that `postbc posterior fit` wrote."""
    output: Path
    """Directory of the stage; each seed's run is seed_<seed> in it."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of the posterior."""
    level: OpenShare = 0.05
    """Of the one-sided test that left-out trajectories are explained no worse than by BC."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    jobs: Count = 1
    """Seeds at a time, each a process of its own."""
    resume: bool = False
    """Go on with the runs in the output directory."""


def calibrate_posterior(config: PosteriorCalibrate, seed: int) -> Calibration:
    """Calibrate one seed's posterior.

    Raises:
        InputError: data or posterior cannot be used or do not belong together, or no trajectory can be left out.
    """
    config = dataclasses.replace(config, compute=config.compute.resolved())
    device = config.compute.start()
    data = load_training_set(config.data, seed, device)
    at = posterior_at(config.posterior, data, seed, device)
    calibration = at.calibrate(data, config.level)
    inputs = {"demonstrations": data.fingerprint, "posterior": at.digest}
    moved = ("compute", "data.demonstrations", "posterior")
    with Run(
        config.output / f"seed_{seed}", of_one_seed(config, seed), resume=config.resume, inputs=inputs, revisable=moved
    ) as run:
        write_json(run.directory / CALIBRATION_FILE, plain(calibration))
        plot_calibration(calibration, run.directory / "calibration.png", f"Calibration, seed {seed}")
        run.finish()
    warn(calibration, seed)
    return calibration


def warn(calibration: Calibration, seed: int) -> None:
    """Say it where α could not be told from the demonstrations."""
    if calibration.source == "fallback":
        say(f"warning: α = {calibration.posterior_weight:g} of seed {seed} is a fallback, {calibration.reason}")


def summary(output: Path, seed: int) -> str:
    """What came out of one seed, in a line."""
    c = read_json(output / f"seed_{seed}" / CALIBRATION_FILE, Calibration)
    safe = "none is shown to be better than BC" if c.safe is None else f"better than BC up to {c.safe:.2f}"
    interval = f"[{c.chunk.low:.2f}, {c.chunk.high:.2f}]"
    return (
        f"seed {seed}: α = {c.posterior_weight:.2f} ({c.source}); likelihood {c.chunk.alpha:.2f} {interval}, "
        f"moments {c.chunk.moments:.2f}; {safe} (level {c.level:g}); {c.trajectories} trajectories left out"
    )
