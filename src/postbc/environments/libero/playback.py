"""Recorded episodes of LIBERO in the simulator again: open-loop, to see whether the data belongs to it; or drawn, state by state."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from postbc.data.belonging import Facts
from postbc.data.convert import complete, parts_of
from postbc.data.episodes import Dataset, Episode
from postbc.data.folder import place_of
from postbc.data.libero import HAND, model_xml
from postbc.data.readers import read_dataset
from postbc.data.robomimic_write import check_writable, write_robomimic
from postbc.environments.libero import make
from postbc.environments.libero.rendering import CAMERAS
from postbc.environments.libero.simulation import LiberoSimulation
from postbc.environments.libero.vector import LiberoChunkEnv
from postbc.environments.robosuite.operational_space import Floats
from postbc.environments.robosuite.playback import Playback, belongs, play
from postbc.errors import require
from postbc.files import digest
from postbc.jobs import Job, run_jobs
from postbc.progress import progress as progress_bar


def environment_of(dataset: Dataset, num_envs: int, horizon: int) -> LiberoChunkEnv:
    """Environments of the data's tasks. InputError where the data is of none of LIBERO's."""
    name = str(dataset.environment.get("env_name"))
    require(name.startswith("libero/"), "The demonstrations are of none of LIBERO's tasks.", file=dataset.source,
            key="env_args: env_name", found=name, expected="libero/kitchen, or one of LIBERO's tasks")  # fmt: skip
    return make(name.removeprefix("libero/"), num_envs, chunk=1, horizon=horizon, terminate_on="never")


def _task(env: LiberoChunkEnv, episode: Episode, source: str) -> int:
    """The place of an episode's task among the environment's."""
    names = [task.name for task in env.tasks]
    name = names[0] if episode.task is None and len(names) == 1 else episode.task
    require(name in names, "The demonstration is of a task that its environment does not have.", file=source,
            key=f"data/{episode.name} attribute task", found=name, expected=", ".join(names)[:300])  # fmt: skip
    return names.index(str(name))


def _states(episode: Episode, simulation: LiberoSimulation, source: str) -> Floats:
    width = 1 + simulation.model.nq + simulation.model.nv
    found = None if episode.states is None else episode.states.shape[1]
    what = "The simulator states are not this simulator's." if found else "The demonstrations hold no simulator states."
    require(found == width, what, file=source, key=f"data/{episode.name}/states", found=found,
            expected=f"(N, {width}) [time, qpos, qvel]")  # fmt: skip
    return np.asarray(episode.states)


def _place(simulation: LiberoSimulation, episode: Episode, source: str) -> None:
    """The fixtures as they stood in an episode: its seed says it, or else its model."""
    if episode.episode_seed is None:
        file, name = place_of(source, episode.name)
        simulation.scene.place_fixtures_as(simulation.data, model_xml(file, name), f"{file}: data/{name}")
    else:
        simulation.scene.place_fixtures(simulation.data, episode.episode_seed)


def replay(
    dataset: Dataset,
    *,
    num_envs: int = 8,
    allow_version_mismatch: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Playback:
    """As :func:`postbc.environments.robosuite.playback.replay`, of LIBERO's tasks.

    What was recorded here begins as it did, from its episode's seed. LIBERO's own demonstrations begin from their first state, where
    the arm's controller was not at rest, as it is here: paths part by some millimetres, contacts by more.
    """
    require(num_envs >= 1, "At least one environment is needed.", key="num_envs", found=num_envs, expected=">= 1")
    env = environment_of(dataset, min(num_envs, len(dataset)), int(dataset.lengths.max()) + 1)
    source = dataset.source

    def begin(played: Sequence[Episode]) -> None:
        seeds = [_task(env, e, source) if e.episode_seed is None else e.episode_seed for e in played]
        env.reset(seeds + [0] * (env.num_envs - len(played)))
        for episode, simulation in zip(played, env.playing):
            require(simulation.task == _task(env, episode, source), "An episode's seed is of another task.", file=source,
                    key=f"data/{episode.name} attribute episode_seed", found=episode.episode_seed)  # fmt: skip
            first = _states(episode, simulation, source)[0]
            data = simulation.data
            if not np.array_equal(np.concatenate([[data.time], data.qpos, data.qvel]), first):
                _place(simulation, episode, source)
                simulation.set_sim_state(first)

    try:
        warnings = belongs(Facts.of_dataset(dataset), env, source, allow_version_mismatch)
        return play(env, dataset, begin, warnings, progress)
    finally:
        env.close()


# -- drawing ---------------------------------------------------------------------------------------------------------------------
def draw(source: Path, output: Path, size: int, jobs: int = 1) -> Path:
    """Write the demonstrations of `source` to `output` with what the two cameras saw in their states, `jobs` processes at a time.

    "state" becomes what `libero/…-pixels` observes. An episode that is drawn waits in a file of its own beside the output, in
    `.NAME.parts`, so that the same call goes on where it was stopped.

    Raises:
        InputError: demonstrations without simulator states, or of none of LIBERO's tasks; nothing can be drawn here.
    """
    check_writable(output)
    dataset = read_dataset(source, observation_keys=HAND)
    env = environment_of(dataset, 1, 1)  # said here, not by each process
    env.close()
    parts, identity = parts_of(output), hashlib.sha256(f"{digest(source)} {size}".encode()).hexdigest()[:16]
    files = {episode.name: parts / f"{identity}.{k}.hdf5" for k, episode in enumerate(dataset)}
    missing = sorted((e for e in dataset if not files[e.name].exists()), key=lambda e: (e.task or "", e.name))
    shares = [[e.name for e in missing[k * len(missing) // jobs : (k + 1) * len(missing) // jobs]] for k in range(jobs)]
    work = {f"draw_{k}": Job(draw_episodes, (source, names, files, size)) for k, names in enumerate(shares) if names}
    if work:
        run_jobs(work, jobs, output.with_name(f".{output.name}.logs"))
    drawn = [read_dataset(files[name], image_keys=list(CAMERAS)) for name in dataset.names]
    whole = replace(
        dataset, source=str(output), episodes=tuple(replace(found[0], name=name) for found, name in zip(drawn, dataset.names))
    )
    return complete(output, whole)


def draw_episodes(source: Path, names: Sequence[str], files: dict[str, Path], size: int) -> None:
    """Draw some episodes, each into its file."""
    dataset = read_dataset(source, names=names, observation_keys=HAND)
    env = environment_of(dataset, 1, 1)
    (simulation,) = env.playing
    try:
        with progress_bar(f"drawing, process {os.getpid()}", dataset.num_steps) as bar:
            for episode in sorted(dataset, key=lambda e: (e.task or "", e.name)):
                simulation.task = _task(env, episode, dataset.source)
                states = _states(episode, simulation, dataset.source)
                _place(simulation, episode, dataset.source)
                frames = {name: np.zeros((len(episode), 3, size, size), np.uint8) for name in CAMERAS}
                for t, state in enumerate(states):
                    simulation.pose(state)
                    for name, camera in CAMERAS.items():
                        frames[name][t] = np.moveaxis(env.draw(0, size, size, camera, lagging=True), -1, 0)
                    bar.advance()
                seen = replace(episode, observations={**episode.observations, **frames})
                write_robomimic(files[episode.name], replace(dataset, episodes=(seen,), filters={}))
    finally:
        env.close()
