"""Reference values of rliable (Agarwal et al. 2021), for tests/test_statistics.py.

rliable's intervals need `arch`, which does not import beside pandas 3 (this project's constraints): made in an environment of its own.

    python -m venv rliable-env && rliable-env/bin/pip install 'rliable==1.2.0' 'pandas<3'
    rliable-env/bin/python tests/rliable_reference.py > tests/rliable_reference.json
"""

import json

import numpy as np
from rliable import library, metrics

REPS = 10_000


def case(runs_x: int, runs_y: int, tasks: int, seed: int) -> dict[str, object]:
    """Success rates of 20 episodes (which tie), of two methods."""
    rng = np.random.default_rng(seed)
    rates = rng.uniform(0.3, 0.8, tasks)
    x = rng.binomial(20, np.clip(rates + 0.08, 0, 1), (runs_x, tasks)) / 20
    y = rng.binomial(20, rates, (runs_y, tasks)) / 20
    np.random.seed(seed)  # noqa: NPY002  rliable draws from the global generator
    iqm, iqm_interval = library.get_interval_estimates({"x": x}, lambda s: np.array([metrics.aggregate_iqm(s)]), reps=REPS)
    better, better_interval = library.get_interval_estimates(
        {"x": (x, y)}, lambda a, b: np.array([metrics.probability_of_improvement(a, b)]), reps=REPS
    )
    return {
        "x": x.tolist(), "y": y.tolist(), "iqm": float(iqm["x"][0]), "iqm_interval": iqm_interval["x"][:, 0].tolist(),
        "improvement": float(better["x"][0]), "improvement_interval": better_interval["x"][:, 0].tolist(),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps([case(5, 5, 1, 0), case(5, 5, 3, 1), case(10, 7, 4, 2), case(3, 3, 2, 3)], indent=1))
