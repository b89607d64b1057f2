"""What PostBC costs a LeRobot training: the view of the dataset as a share of a step, the fit as a share of a whole training.

Processor seconds of one thread (`time.process_time`, so a busy machine does not count), a state-only dataset of Push-T's sizes,
LeRobot's diffusion policy at two sizes. Goals: the view under 5 % of a step, the fit under 10 % of a training at LeRobot's defaults.

    .venv-lerobot/bin/python -m benchmarks.bench_lerobot [small] [defaults]          # an environment of `make test-lerobot`
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from postbc.data import pusht
from postbc.data.episodes import Dataset
from postbc.data.lerobot_write import LeRobotWriter
from postbc.devices import Compute
from postbc.disk import write_json
from postbc.lerobot.factors import Factors
from postbc.lerobot.fit import fit_factors, read_frames
from postbc.lerobot.hook import hold_numbers
from postbc.lerobot.train import PostBC
from postbc.lerobot.view import PosteriorDataset

EPISODES, LENGTH, ITEMS, STEPS, FIT_STEPS = 10, 125, 64, 3, 6
HUMAN_FRAMES = 25_650
"""Of Push-T's 206 human demonstrations, which the fit's cost is stated for."""
#: name -> (fields of the policy, batch size, gradient steps of a training)
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "small": ({"down_dims": (64, 128, 256), "n_obs_steps": 1}, 64, 30_000),
    "defaults": ({}, 8, 100_000),
}


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Processor seconds, the median of a few."""
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return statistics.median(found)


def write(path: Path) -> Path:
    """Random walks of Push-T's sizes."""
    rng = np.random.default_rng(0)
    walks = [np.clip(256 + np.cumsum(rng.normal(size=(LENGTH, 18)) * 5, 0), 0, 512) for _ in range(EPISODES)]
    actions = [walk[:, :2] + rng.normal(size=(LENGTH, 2)) * 5 for walk in walks]
    dataset = Dataset.from_arrays(
        walks, actions, state_keys=pusht.STATE_KEYS, state_dims=pusht.STATE_DIMS, environment=pusht.ENVIRONMENT
    )
    return LeRobotWriter(path, dataset, "bench").write()


def measure(root: Path, name: str) -> dict[str, float]:
    """Of one size of policy."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    fields, batch_size, steps = SIZES[name]
    state, environment = (PolicyFeature(kind, (n,)) for kind, n in ((FeatureType.STATE, 2), (FeatureType.ENV, 16)))
    config = DiffusionConfig(
        input_features={"observation.state": state, "observation.environment_state": environment},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))}, device="cpu", push_to_hub=False, **fields,
    )  # fmt: skip
    delta = list(config.action_delta_indices)
    of_time = {"action": [d / 10 for d in delta]}
    of_time |= {key: [d / 10 for d in config.observation_delta_indices] for key in config.input_features}
    base, held = (LeRobotDataset("postbc/bench", root=root, delta_timestamps=of_time) for _ in range(2))
    hold_numbers(held)

    frames, file, ensemble = read_frames(root), root / f"{name}.factors", PostBC().ensemble

    def fit(steps: int) -> float:
        file.unlink(missing_ok=True)
        begin = time.process_time()
        fit_factors(file, root, frames, delta, replace(ensemble, steps=steps), 0, compute=Compute(device="cpu", threads=1))
        return time.process_time() - begin

    few, one = fit(FIT_STEPS), fit(1)  # of one step: features and factors of every frame
    whole_fit = one * HUMAN_FRAMES / len(frames.actions) + (few - one) / (FIT_STEPS - 1) * ensemble.steps

    view = PosteriorDataset(held, Factors(file), 1.0, 0)
    places = np.random.default_rng(0).integers(len(base), size=ITEMS).tolist()
    turns = [[seconds(lambda d=d: [d[place] for place in places], 1) / ITEMS for d in (base, view)] for _ in range(9)]
    plain, ours = (statistics.median(times) for times in zip(*turns, strict=True))

    policy = DiffusionPolicy(config).train()
    optimizer = torch.optim.Adam(policy.parameters(), 1e-4)
    batch = default_collate([base[place] for place in places[:batch_size]])
    batch = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}

    def step() -> None:
        loss, _ = policy.forward(dict(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    of_step = seconds(step, STEPS)
    per_step = of_step + batch_size * plain
    return {
        "step_ms": 1e3 * of_step, "item_ms": 1e3 * plain, "item_of_the_view_ms": 1e3 * ours, "batch_size": batch_size,
        "view_share": batch_size * (ours - plain) / per_step, "fit_seconds": whole_fit, "training_steps": steps,
        "fit_share": whole_fit / (steps * per_step), "bytes_a_frame": file.stat().st_size / len(frames.actions),
    }  # fmt: skip


def main(asked: list[str]) -> None:
    """Measure, print, and write into benchmarks/lerobot.json, size by size."""
    torch.set_num_threads(1)
    path = Path(__file__).parent / "lerobot.json"
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder) / "set")
        for name in asked or SIZES:
            found = {key: float(f"{value:.3g}") for key, value in measure(root, name).items()}
            print(name, found, flush=True)
            before = json.loads(path.read_text()) if path.is_file() else {}
            write_json(path, {**before, name: found})


if __name__ == "__main__":
    main(sys.argv[1:])
