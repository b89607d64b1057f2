"""Record MetaWorld's own scripted experts, with noise on their commands: successes only."""

from __future__ import annotations

import numpy as np

from postbc.data.episodes import Dataset, Episode
from postbc.environments.metaworld import HORIZON, STATE_DIMS, STATE_KEYS, MetaWorldTask, facts, import_metaworld, task_class
from postbc.environments.robosuite.collect import Collection, Progress, is_over
from postbc.errors import require
from postbc.seeding import episode_seed

EXPERT = "expert"
NOISE = 0.3


def collect(
    task: str,
    num: int,
    seed: int = 0,
    *,
    noise: float = NOISE,
    horizon: int = HORIZON,
    tail: int = 5,
    progress: Progress | None = None,
) -> Collection:
    """Let a task's expert demonstrate until `num` episodes have succeeded, one after another; the same arguments give the same data.

    Args:
        task: MetaWorld's name (push-v3).
        num: successes wanted.
        seed: decides objects, goals and noise.
        noise: standard deviation of what is added to the expert's commands, which are then clipped to [-1, 1].
        horizon: steps after which an unsolved episode is given up.
        tail: steps that it has to stay solved for; they are kept.
        progress: called after each episode.

    Raises:
        InputError: no MetaWorld, no such task, or an expert that hardly ever succeeds.
    """
    task_class(task)
    env, expert = MetaWorldTask(task), import_metaworld("metaworld.policies").ENV_POLICY_MAP[task]()
    kept: list[Episode] = []
    tries = 0
    try:
        while len(kept) < num:
            require(tries < 20 * num + 20, "An operator hardly ever succeeds at this task.", key=EXPERT,
                    found=f"{len(kept)} successes in {tries} episodes", remedy="less --noise, or a longer --horizon")  # fmt: skip
            episode = _episode(env, expert, episode_seed(seed, tries), noise, horizon, tail, f"demo_{len(kept)}")
            tries += 1
            solved = bool(episode.rewards is not None and episode.rewards[-1])
            if solved:
                kept.append(episode)
            if progress is not None:
                progress(EXPERT, solved, len(episode))
    finally:
        env.close()
    names = tuple(episode.name for episode in kept)
    dataset = Dataset(tuple(kept), STATE_KEYS, STATE_DIMS, facts(task), {EXPERT: names}, "scripted experts")
    return Collection(dataset, {EXPERT: (num, tries)}, model_xml={})


def _episode(
    env: MetaWorldTask, expert: object, seed: int, noise: float, horizon: int, tail: int, name: str
) -> Episode:  # fmt: skip
    """One try, until it has stayed solved for `tail` steps or to the horizon; rewards are successes."""
    rng = np.random.default_rng(seed)
    state, _ = env.reset(seed=seed)
    states, actions, successes = [], [], []  # type: list[np.ndarray], list[np.ndarray], list[bool]
    while not is_over(successes, horizon, tail):
        command = np.asarray(expert.get_action(state)) + noise * rng.standard_normal(4)  # type: ignore[attr-defined]
        actions.append(np.clip(command, -1, 1).astype(np.float32))
        states.append(state.astype(np.float32))
        state, _, _, _, info = env.step(actions[-1])
        successes.append(bool(info["success"]))
    n = len(actions)
    return Episode(
        {"state": np.stack(states)}, np.stack(actions), rewards=np.array(successes, np.float32), dones=np.arange(n) == n - 1,
        name=name, operator=EXPERT, episode_seed=seed,
    )  # fmt: skip
