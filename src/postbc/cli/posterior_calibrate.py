"""`postbc posterior calibrate`."""

from __future__ import annotations

from postbc.cli import options
from postbc.jobs import run_seeds
from postbc.progress import console
from postbc.stages.calibrate import PosteriorCalibrate, calibrate_posterior, summary


def parse(args: list[str]) -> PosteriorCalibrate:
    chosen: PosteriorCalibrate = options(PosteriorCalibrate, "posterior calibrate", args)
    return chosen


def run(config: PosteriorCalibrate) -> None:
    run_seeds(calibrate_posterior, config, config.seeds, config.jobs, config.output)
    for seed in config.seeds:
        console().print(summary(config.output, seed), markup=False, soft_wrap=True)
    console().print(f"pictures: {config.output}/seed_*/calibration.png", markup=False)
