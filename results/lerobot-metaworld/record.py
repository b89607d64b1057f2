"""Demonstrations of a MetaWorld task by its own scripted expert, with noise, as a LeRobotDataset.

    python results/lerobot-metaworld/record.py push-v3 --episodes 20 --output data/push

Successes only, each cut a few steps after it; commands are the expert's plus N(0, noise²), clipped, as they were executed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from postbc.data.episodes import Dataset
from postbc.data.lerobot_write import LeRobotWriter
from postbc.environments.metaworld import HORIZON, STATE_DIMS, STATE_KEYS, MetaWorldTask, facts, import_metaworld
from postbc.errors import require
from postbc.progress import progress, say
from postbc.seeding import episode_seed

AFTER = 5
"""Steps kept after the first successful one."""


def episode(env: MetaWorldTask, expert: object, seed: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """States (N, 39), actions (N, 4) and successes (N,) of one try; None where it failed."""
    rng = np.random.default_rng(seed)
    state, _ = env.reset(seed=seed)
    states, actions, successes = [], [], []
    while len(states) < HORIZON and sum(successes) <= AFTER:
        command = np.asarray(expert.get_action(state)) + noise * rng.standard_normal(4)  # type: ignore[attr-defined]
        action = np.clip(command, -1, 1).astype(np.float32)
        states.append(state.astype(np.float32))
        state, _, _, _, info = env.step(action)
        actions.append(action)
        successes.append(float(info["success"]))
    return (np.stack(states), np.stack(actions), np.array(successes)) if any(successes) else None


def record(task: str, episodes: int, noise: float, seed: int, output: Path) -> Path:
    """Record until there are `episodes`; the same arguments give the same data."""
    require(not output.exists(), "There is something already.", file=output, remedy="choose another --output")
    env, expert = MetaWorldTask(task), import_metaworld("metaworld.policies").ENV_POLICY_MAP[task]()
    kept, tries = [], 0
    with progress("record", episodes) as bar:
        while len(kept) < episodes:
            require(
                tries < 10 * episodes + 10, "The expert hardly ever succeeds.", key="noise", found=noise, remedy="less of it"
            )
            made = episode(env, expert, episode_seed(seed, tries), noise)
            tries += 1
            if made is not None:
                kept.append(made)
                bar.advance(1, tries=tries)
    states, actions, successes = zip(*kept)
    data = Dataset.from_arrays(
        states, actions, rewards=successes, state_keys=STATE_KEYS, state_dims=STATE_DIMS, environment=facts(task)
    )
    say(f"{episodes} demonstrations of {tries} tries, {sum(map(len, actions)) / episodes:.0f} steps each")
    return LeRobotWriter(output, data, f"{task} {noise} {seed} {tries}").write()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    record(**vars(parser.parse_args()))
