"""A session's recorded episodes, to be looked at: which there are, how long, and a film of each."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from postbc.data.belonging import Facts
from postbc.data.hdf5 import get, get_group, json_attribute, open_hdf5
from postbc.data.robomimic import find_names, read_robomimic, robomimic_cameras
from postbc.disk import os_errors
from postbc.errors import InputError, require
from postbc.robot.recorded import episode_file, recorded
from postbc.videos import write_video

#: Films of episodes whose rate is unknown run at this one (Hz).
RATE = 20.0


@dataclass(frozen=True)
class Entry:
    """One episode's file, as it was found."""

    episode: int
    file: Path
    steps: int = 0
    rate: float | None = None
    """Control steps a second; None: the file does not say."""
    cameras: tuple[str, ...] = ()
    error: str = ""
    """Why it cannot be used; empty if it can."""


def session_folder(path: str | Path) -> Path:
    """The folder of one session: `path`, or the only `seed_*` in it.

    Raises:
        InputError: no session is there, or several are.
    """
    path = Path(path)
    with os_errors(path, "read"):
        require(path.is_dir(), "There is no such folder.", file=path, expected="a session's", remedy="check the path")
        if (path / "episodes").is_dir():
            return path
        below = sorted(p.parent for p in path.glob("*/episodes") if p.is_dir())
    require(below, "This folder is no session: it has no episodes.", file=path, expected="episodes/episode_00000.hdf5, …",
            remedy="give the --output of `postbc robot rollout`")  # fmt: skip
    require(len(below) == 1, "Several sessions are in this folder.", file=path, found=", ".join(p.name for p in below[:20]),
            remedy="give one of them")  # fmt: skip
    return below[0]


class Catalogue:
    """The episodes of a session folder, new ones as they come; safe for several threads. Films are kept until :meth:`close`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._found: dict[int, Entry] = {}
        self._closed = False
        self._looking, self._filming = threading.Lock(), threading.Lock()
        self._films = tempfile.TemporaryDirectory(prefix="postbc-films-", ignore_cleanup_errors=True)

    def all(self) -> dict[int, Entry]:
        """Number -> what is there, in order. A file that cannot be used has an `error`."""
        with self._looking, os_errors(self.folder / "episodes", "read"):
            numbers = recorded(self.folder)
            for number in numbers:
                if number not in self._found:  # a file that is there is whole, and never written again
                    self._found[number] = _look(number, episode_file(self.folder, number))
            return {number: self._found[number] for number in numbers}

    def film(self, episode: int) -> Path:
        """An MP4 of the episode in real time, its cameras side by side.

        Raises:
            InputError: there is no such episode, it has no camera, its file is broken, or imageio-ffmpeg is not installed.
        """
        found = self.all().get(episode)
        require(found is not None, "There is no such episode.", file=self.folder / "episodes", key="episode", found=episode)
        assert found is not None
        require(not found.error, found.error)
        require(found.cameras, "This episode has no camera.", file=found.file)
        film = Path(self._films.name) / f"{episode}.mp4"
        with self._filming:
            require(not self._closed, "The page is closed.")
            if not film.exists():
                write_video(film, frames(found.file, found.cameras), max(1, round(found.rate or RATE)))
        return film

    def close(self) -> None:
        """Remove the films; one that is being made is waited for."""
        self._closed = True
        with self._filming:
            self._films.cleanup()


def _look(episode: int, file: Path) -> Entry:
    try:
        with open_hdf5(file) as opened:
            data = get(opened, "data", h5py.Group, file)
            steps = get(get_group(data, find_names(data, file)[0], file), "actions", h5py.Dataset, file).shape
            environment = json_attribute(data, "env_args", file)
        rate = Facts.of_env_args(environment or {}, str(file)).control_freq
        return Entry(episode, file, steps[0] if steps else 0, rate, robomimic_cameras(file))
    except InputError as error:
        return Entry(episode, file, error=str(error))


def frames(file: Path, cameras: Sequence[str], width: int = 0) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 a step of an episode's file: its `cameras` side by side, black below the lower ones.

    Enlarged by a whole factor to about `width` pixels where they are narrower.
    """
    episode = read_robomimic(file, observation_keys=(), image_keys=cameras, parts=(), check_actions=False)[0]
    images = list(episode.observations.values())
    height = max(image.shape[2] for image in images)
    for start in range(0, len(episode), 32):
        blocks = [np.moveaxis(np.asarray(image[start : start + 32]), 1, -1) for image in images]
        blocks = [np.repeat(b, 3, axis=-1) if b.shape[-1] == 1 else b[..., :3] for b in blocks]
        blocks = [np.pad(b, ((0, 0), (0, height - b.shape[1]), (0, 0), (0, 0))) for b in blocks]
        block = np.concatenate(blocks, axis=2)
        scale = max(1, round(width / block.shape[2]))
        yield from block.repeat(scale, 1).repeat(scale, 2)
