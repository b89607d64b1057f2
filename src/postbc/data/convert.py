"""Conversion to robomimic's layout: raw recordings by playing their states back, others by copying. Both go on where they stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from postbc.data.episodes import LOW_DIM_KEYS, Dataset, Episode, is_image, pieces_of
from postbc.data.recordings import Recording
from postbc.data.robomimic import PARTS, read_robomimic
from postbc.data.robomimic_write import LARGE, check_writable, write_robomimic
from postbc.files import digest, load_tree, os_errors, save_tree, write_text


class Observes(Protocol):
    """See :class:`postbc.environments.robosuite.playback.Observer`."""

    def observe(self, name: str, states: np.ndarray, actions: np.ndarray, operator: str | None = None) -> Episode: ...

    def env_args(self) -> dict[str, Any]: ...


def parts_of(output: Path) -> Path:
    """Where what is done of an output waits for the rest."""
    return output.with_name(f".{output.name}.parts")


def finish(output: str | Path) -> bool:
    """Whether a conversion to `output` had come to its end when it was stopped; what it left beside the output is removed then."""
    output = Path(output)
    parts, done = parts_of(output), parts_of(output) / "done"
    if not parts.is_dir() or not output.is_file():
        return False
    if any(parts.iterdir()) and not (done.is_file() and done.read_text(encoding="utf-8") == digest(output)):
        return False
    for file in sorted(parts.iterdir(), key=lambda file: file.name == "done"):  # that one last
        file.unlink()
    parts.rmdir()
    return True


def convert_recording(
    recording: Recording, observer: Observes, output: str | Path, progress: Callable[[int], None] | None = None
) -> Path:
    """Write a recording with observations and rewards to `output`, which is replaced; returns its path.

    What is observed waits beside the output in `.NAME.parts`, an episode a file, so that a second call with the same recording goes on
    from there; the folder goes when the output is whole (:func:`finish`).

    Args:
        progress: called with the number of episodes that are done.

    Raises:
        InputError: the output cannot be written, or an episode cannot be played.
    """
    output = Path(output)
    check_writable(output)
    identity = hashlib.sha256(f"{digest(recording.path)} {observer.env_args()}".encode()).hexdigest()[:16]
    parts = parts_of(output)
    files = {name: parts / f"{identity}.{i}.safetensors" for i, name in enumerate(recording.names)}
    done = frozenset(name for name, file in files.items() if file.exists())
    for count, (name, states, actions, operator) in enumerate(recording.read(done), len(done) + 1):
        episode = observer.observe(name, states, actions, operator)
        values = {"state": episode.state, "actions": episode.actions, "rewards": episode.rewards, "states": episode.states}
        save_tree(files[name], {"kind": "episode", "name": name, "operator": operator, **values})
        if progress is not None:
            progress(count)
    episodes = tuple(_load(files[name]) for name in recording.names)
    dims = (3, 4, 2, episodes[0].state.shape[1] - 9)
    dataset = Dataset(episodes, LOW_DIM_KEYS, dims, observer.env_args(), recording.filters, str(output))
    return complete(output, dataset)


def copy_dataset(
    dataset: Dataset, chosen: Callable[[], str], output: str | Path, progress: Callable[[int], None] | None = None
) -> Path:
    """Write a dataset of any format to `output`, which is replaced; returns its path.

    One of more than `LARGE` bytes is written in pieces, which wait as those of :func:`convert_recording` do.

    Args:
        chosen: says which dataset this is, and is asked if there are pieces: another call goes on from the same dataset's.
        progress: called with the number of episodes that are done.

    Raises:
        InputError: the output cannot be written, or an episode cannot be read.
    """
    output = Path(output)
    check_writable(output)
    pieces = pieces_of(dataset, LARGE)
    if len(pieces) == 1:
        return write_robomimic(output, dataset, progress=progress)
    cameras = [key for key in dataset[0].observations if is_image(key)]
    identity, episodes = hashlib.sha256(chosen().encode()).hexdigest()[:16], list[Episode]()
    for i, piece in enumerate(pieces):
        file, part = parts_of(output) / f"{identity}.{i}.hdf5", dataset.episodes[piece.start : piece.stop]
        if not file.exists():
            count = None if progress is None else lambda n, before=piece.start: progress(before + n)
            write_robomimic(file, replace(dataset, episodes=part, filters={}), progress=count)
        written = {e.name: e for e in read_robomimic(file, image_keys=cameras, parts=PARTS, check_actions=False)}
        episodes += [written[episode.name] for episode in part]
    return complete(output, replace(dataset, episodes=tuple(episodes)))


def complete(output: Path, dataset: Dataset) -> Path:
    """Write what all parts are there of, and remove them."""
    parts = parts_of(output)
    whole = write_robomimic(parts / "whole.hdf5", dataset)
    write_text(parts / "done", digest(whole))
    with os_errors(output):
        os.replace(whole, output)
        finish(output)
    return output


def _load(file: Path) -> Episode:
    tree: Any = load_tree(file, kind="episode")
    state, actions, rewards, states = (np.asarray(tree[key]) for key in ("state", "actions", "rewards", "states"))
    dones = np.arange(len(actions)) == len(actions) - 1
    return Episode({"state": state}, actions, rewards, dones, states, tree["name"], tree["operator"])
