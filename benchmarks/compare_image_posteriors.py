"""The posterior from images in both ways, against each other: K members with encoders of their own, and K heads on BC's features.

Scripted demonstrations of Lift, drawn by one camera from their recorded states; the same windows, bootstrap, heads and steps.

    python -m benchmarks.compare_image_posteriors DIRECTORY [--demonstrations 10] [--steps 1000] [--size 64]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from postbc.data.episodes import Dataset
from postbc.data.normalization import fit_normalization
from postbc.data.robomimic import read_robomimic, write_robomimic
from postbc.data.windows import Windows
from postbc.devices import Compute
from postbc.environments.robosuite import make
from postbc.environments.robosuite.collect import collect
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.policies.networks.encoders import EncoderConfig
from postbc.posterior import EnsembleConfig, fit_ensemble, fit_seeing_ensemble, window_features
from postbc.pretraining import PretrainingConfig, pretrain
from postbc.seeding import make_generator

CAMERA, CHUNK = "image.agentview", 4


def demonstrations(path: Path, count: int, size: int) -> Dataset:
    """Lift's scripted demonstrations with frames instead of the object's pose; recorded once."""
    if not path.exists():
        recorded = collect("Lift", count, num_envs=8).dataset
        env = make("Lift", 1, chunk=1, horizon=2, terminate_on="never")
        episodes = []
        for episode in recorded:
            env.reset([episode.episode_seed or 0])
            frames = []
            for state in np.asarray(episode.states):
                env.set_sim_states(state[None], [0])
                frames.append(np.moveaxis(env.render_frame(0, size, size, CAMERA.removeprefix("image.")), -1, 0))
            seen = {CAMERA: np.stack(frames), "state": episode.state[:, :9]}
            episodes.append(dataclasses.replace(episode, observations=seen))
        env.close()
        kept = dataclasses.replace(
            recorded, episodes=tuple(episodes), state_keys=recorded.state_keys[:3], state_dims=recorded.state_dims[:3]
        )
        write_robomimic(path, kept)
    return read_robomimic(
        path, observation_keys=("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"), image_keys=[CAMERA]
    )


def compare(data: Dataset, steps: int, members: int, seed: int, bootstrap: Any) -> dict[str, Any]:
    """Rank correlations of the std, window by window, its scale and the CPU seconds, of both ways; and of 40 heads."""
    windows, normalization = Windows(data, CHUNK), fit_normalization(data, data)
    chunks = normalization.normalize_action(windows.chunk(torch.arange(len(windows))))
    vision, compute = EncoderConfig(), Compute(device="cpu")
    seconds: dict[str, float] = {}
    heads = EnsembleConfig(
        ensemble_size=members, hidden=256, layers=3, steps=steps, batch_size=64, learning_rate=3e-4, bootstrap=bootstrap
    )

    def of_bc(seed: int) -> tuple[torch.Tensor, float]:
        begin = time.process_time()
        policy = DiffusionPolicy(
            DiffusionConfig(hidden=256, encoder=vision), data.shapes, data.action_dim, CHUNK, normalization,
            make_generator(seed, "policy/initialisation"),
        )  # fmt: skip
        pretrain(
            policy, windows, PretrainingConfig("bc", steps=steps, batch_size=64, learning_rate=3e-4), seed, compute=compute
        )
        return window_features(windows, policy.encode), time.process_time() - begin

    def of_heads(features: torch.Tensor, seed: int, members: int = members) -> tuple[np.ndarray, float]:
        begin = time.process_time()
        config = dataclasses.replace(heads, ensemble_size=members)
        std = fit_ensemble(features, chunks, windows.episode, config, seed, compute).factor(features).std().mean(1)
        return std.numpy(), time.process_time() - begin

    def of_own(seed: int) -> tuple[np.ndarray, float]:
        begin = time.process_time()
        own = dataclasses.replace(heads, encoder="own", vision=vision)
        ensemble = fit_seeing_ensemble(windows, normalization, own, seed, compute)
        return ensemble.factor(windows, normalization).std().mean(1).numpy(), time.process_time() - begin

    features, seconds["bc"] = of_bc(seed)
    shared, seconds["heads"] = of_heads(features, seed)
    own, seconds["own"] = of_own(seed)
    shared_again, own_again = of_heads(of_bc(seed + 1)[0], seed + 1)[0], of_own(seed + 1)[0]
    many = of_heads(features, seed + 2, 40)[0]

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return round(float(spearmanr(a, b)[0]), 3)

    return {
        "windows": len(windows), "steps": steps, "members": members, "bootstrap": bootstrap, "CPU seconds": seconds,
        "cost, own / heads": seconds["own"] / seconds["heads"],
        "cost, own / (bc + heads)": seconds["own"] / (seconds["bc"] + seconds["heads"]),
        "rank correlation of the std, window by window": {
            "own and heads, the same bootstrap samples": correlation(own, shared),
            "own and heads, other samples": correlation(own, shared_again), "own and own, other samples": correlation(own, own_again),
            "heads and heads, other samples": correlation(shared, shared_again), "own and 40 heads": correlation(own, many),
            "heads and 40 heads": correlation(shared, many),
        },
        "mean std, own": float(own.mean()), "mean std, heads": float(shared.mean()), "mean std, 40 heads": float(many.mean()),
    }  # fmt: skip


def main() -> None:
    """Record, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for name, default in (("demonstrations", 10), ("steps", 1000), ("members", 5), ("size", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bootstrap", choices=("trajectory", "pair"), default="trajectory")
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = given.directory / f"lift_{given.size}_{given.demonstrations}.hdf5"
    given.directory.mkdir(parents=True, exist_ok=True)
    found = compare(
        demonstrations(file, given.demonstrations, given.size), given.steps, given.members, given.seed, given.bootstrap
    )
    print(json.dumps(found, indent=1))
    (given.directory / f"comparison_{given.bootstrap}_{given.seed}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
