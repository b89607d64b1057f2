"""`postbc posterior fit`."""

from __future__ import annotations

from postbc.cli import options
from postbc.jobs import run_seeds
from postbc.progress import console
from postbc.stages.posterior import PosteriorFit, fit_posterior


def parse(args: list[str]) -> PosteriorFit:
    chosen: PosteriorFit = options(PosteriorFit, "posterior fit", args)
    return chosen


def run(config: PosteriorFit) -> None:
    run_seeds(fit_posterior, config, config.seeds, config.jobs, config.output)
    console().print(f"posterior of {len(config.seeds)} seed(s): {config.output}", markup=False)
