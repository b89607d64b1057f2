"""The episodes of a session on disk: one robomimic file and one table of timing each, written whole or not at all; read with labels.

episodes/episode_00000.hdf5   data/demo_0: obs, actions, rewards (1 where the robot itself said success), dones (1 at an end for good)
timing/episode_00000.csv      a row a control step: when it was sent, how late, how old what it was decided on
labels.jsonl                  what people say (labels.py)
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from postbc.data.episodes import Dataset, Episode
from postbc.data.readers import read_dataset
from postbc.data.robomimic_write import write_robomimic
from postbc.environments.robot.reading import RobotReader
from postbc.errors import InputError, require
from postbc.files import digest, write_text
from postbc.robot.labels import Label, Labels
from postbc.robot.playing import Recording, Timing

_EPISODE = re.compile(r"episode_(\d{5,})\.hdf5")


def episode_file(folder: Path, number: int) -> Path:
    return folder / "episodes" / f"episode_{number:05}.hdf5"


def timing_file(folder: Path, number: int) -> Path:
    return folder / "timing" / f"episode_{number:05}.csv"


def is_session(path: str | Path) -> bool:
    """Whether a path is a session's folder."""
    return (Path(path) / "episodes").is_dir() and bool(recorded(Path(path)))


def recorded(folder: Path) -> list[int]:
    """Numbers of the episodes that are on the disk, in order."""
    episodes = folder / "episodes"
    found = (_EPISODE.fullmatch(path.name) for path in episodes.iterdir()) if episodes.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


# -- writing -------------------------------------------------------------------------------------------------------------------
def write_episode(
    folder: Path, number: int, recording: Recording, reader: RobotReader, facts: Mapping[str, Any], scene_seed: int
) -> None:  # fmt: skip
    """An episode and its timing, durably; the episode's file comes last: where it is, the episode is whole."""
    rows = io.StringIO(newline="")
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Timing))
    for timing in recording.timings:
        writer.writerow(f"{v:.6f}" if isinstance(v, float) else int(v) for v in dataclasses.astuple(timing))
    write_text(timing_file(folder, number), rows.getvalue())
    dones = np.zeros(len(recording), bool)
    dones[-1] = recording.ended in ("success", "terminated", "stop")
    episode = Episode(
        {name: np.stack(values) for name, values in recording.observations.items()}, np.stack(recording.actions),
        np.array(recording.successes, np.float32), dones, name="demo_0", episode_seed=scene_seed,
    )  # fmt: skip
    path = episode_file(folder, number)
    write_robomimic(path, Dataset((episode,), reader.state_keys, reader.state_dims, dict(facts), source=str(path)))


def said_success(folder: Path, number: int) -> bool:
    """Whether the robot itself said in an episode that the task was solved."""
    from postbc.data.hdf5 import open_hdf5, read

    path = episode_file(folder, number)
    with open_hdf5(path) as file:
        return bool((read(file["data/demo_0"], "rewards", path) > 0).any())


# -- reading -------------------------------------------------------------------------------------------------------------------
def usable(folder: str | Path) -> dict[int, Label]:
    """Episodes to learn from, success or failure; discarded ones are left out.

    Raises:
        InputError: an episode has no label, or a label no episode; or none is left.
    """
    folder = Path(folder)
    labels, numbers = Labels(folder).current(), recorded(folder)
    missing = [number for number in numbers if number not in labels]
    require(not missing, "Episodes of this session have no label.", file=folder,
            key=", ".join(map(str, missing[:20])) + (" …" if len(missing) > 20 else ""), found=f"{len(missing)} of {len(numbers)}",
            expected="success, failure or discard for each", remedy=f"label them: postbc robot label {folder}")  # fmt: skip
    lost = sorted({number for number, label in labels.items() if label != "discard"}.difference(numbers))
    if lost:
        line = f'{{"episode": {lost[0]}, "label": "discard"}}'
        raise InputError(
            "Episodes that were labelled are not there.", file=folder / "episodes", key=", ".join(map(str, lost[:20])),
            found=f"no {episode_file(folder, lost[0]).name}",
            remedy=f"put them back; or discard them: echo '{line}' >> {folder / 'labels.jsonl'}",
        )  # fmt: skip
    used = {number: labels[number] for number in numbers if labels[number] != "discard"}
    require(used, "All episodes of this session are discarded.", file=folder, found=f"{len(numbers)} episodes")
    return used


def read_session(path: str | Path, **options: Any) -> Dataset:
    """A session's episodes as people labelled them: a success earns 1 at its last step, whatever the robot itself said.

    The last step of an episode is done where it was a success, or ended for good (by its own end, or by a stop).

    Args:
        options: of :func:`postbc.data.readers.read_dataset`.

    Raises:
        InputError: as :func:`usable`, or an episode that cannot be read.
    """
    folder = Path(path)
    used = usable(folder)
    names = {f"{episode_file(folder, number).stem}_demo_0": label for number, label in used.items()}
    asked = options.get("names")
    chosen = [name for name in names if asked is None or name in set(asked)]
    dataset = read_dataset(folder / "episodes", **{**options, "names": chosen, "parts": ("rewards", "dones")})
    episodes = tuple(_labelled(episode, names[episode.name]) for episode in dataset)
    return replace(dataset, episodes=episodes, source=str(folder))


def _labelled(episode: Episode, label: Label) -> Episode:
    rewards, dones = np.zeros(len(episode), np.float32), np.zeros(len(episode), bool)
    rewards[-1] = label == "success"
    dones[-1] = label == "success" or bool(episode.dones is not None and episode.dones[-1])
    return replace(episode, rewards=rewards, dones=dones)


def session_digest(path: str | Path) -> str:
    """Of what is learnt from: the episodes that are used, and their labels as they stand."""
    folder, found = Path(path), hashlib.sha256()
    for number, label in usable(folder).items():
        found.update(f"{number} {label} {digest(episode_file(folder, number))}\n".encode())
    return found.hexdigest()


def read_timings(folder: Path, numbers: Iterable[int]) -> dict[int, list[Timing]]:
    """Number -> timing of its steps; episodes without a table are left out. InputError for a table that is none."""
    found: dict[int, list[Timing]] = {}
    names = [field.name for field in dataclasses.fields(Timing)]
    for number in numbers:
        path = timing_file(folder, number)
        if not path.is_file():
            continue
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, strict=True))
            found[number] = [
                Timing(int(r["step"]), float(r["time"]), float(r["late"]), r["missed"] == "1", float(r["observation_age"]),
                       int(r["plan_age"]), float(r["inference"]), int(r["limited"]))
                for r in rows
            ]  # fmt: skip
        except (KeyError, TypeError, ValueError, csv.Error, UnicodeDecodeError) as error:
            raise InputError("A table of timing cannot be read.", file=path, found=str(error)[:200], expected=", ".join(names),
                             remedy="remove it; the episode stays") from None  # fmt: skip
    return found
