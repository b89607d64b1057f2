"""Frames a second from a file to the training's batches: ours against a plain torch DataLoader with as many workers over the same file.

Random batches of 256 windows of two 84² cameras, uncompressed in robomimic's layout, more than is kept in memory. The DataLoader's
workers are processes that each keep the file open, read a window's frames and its chunk with h5py, and collate. Measurements alternate.

    python -m benchmarks image_loading
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import postbc.data.windows
from postbc.data.batches import READERS, Batches
from postbc.data.robomimic import read_robomimic
from postbc.data.windows import Windows
from postbc.seeding import make_generator

EPISODES, STEPS, SIZE, CHUNK, BATCH = 60, 100, 84, 4, 256
CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")


def write(path: Path) -> None:
    """Random frames and actions in robomimic's layout."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for i in range(EPISODES):
            demo = file.create_group(f"data/demo_{i}")
            demo["actions"] = rng.uniform(-1, 1, (STEPS, 7))
            demo["obs/robot0_eef_pos"] = rng.uniform(-1, 1, (STEPS, 3))
            for camera in CAMERAS:
                demo[f"obs/{camera}"] = rng.integers(0, 256, (STEPS, SIZE, SIZE, 3), dtype=np.uint8)


class Plain(Dataset[dict[str, Tensor]]):
    """A window an item, read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None
        self.index = [(i, step) for i in range(EPISODES) for step in range(STEPS - CHUNK + 1)]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        episode, step = self.index[item]
        demo = self.file[f"data/demo_{episode}"]
        frames = {camera: torch.from_numpy(demo[f"obs/{camera}"][step].transpose(2, 0, 1).copy()) for camera in CAMERAS}
        return {**frames, "state": torch.from_numpy(demo["obs/robot0_eef_pos"][step]),
                "actions": torch.from_numpy(demo["actions"][step : step + CHUNK])}  # fmt: skip


def image_loading(batches: int = 20, repeats: int = 5) -> dict[str, object]:
    """Frames a second of both."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.hdf5"
        write(path)
        cache, postbc.data.windows.CACHE = postbc.data.windows.CACHE, 0  # as if it were 50 GB
        data = read_robomimic(path, observation_keys=("robot0_eef_pos",), image_keys=CAMERAS)
        windows = Windows(data, CHUNK)
        postbc.data.windows.CACHE = cache

        def draw(generator: torch.Generator) -> Tensor:
            return torch.randint(len(windows), (BATCH,), generator=generator)

        ours = Batches(windows, draw, make_generator(0, "pretraining/data"), torch.device("cpu"))
        sampler = torch.utils.data.RandomSampler(Plain(path), replacement=True, num_samples=10**9)
        loader = DataLoader(Plain(path), BATCH, sampler=sampler, num_workers=READERS, prefetch_factor=2)

        def of_ours() -> Iterator[int]:
            while True:
                rows, observation = ours.next()
                windows.chunk(rows)
                yield sum(len(value) for name, value in observation.items() if name.startswith("image."))

        def of_theirs() -> Iterator[int]:
            for batch in loader:
                yield sum(len(batch[camera]) for camera in CAMERAS)

        sides, rates = (of_ours(), of_theirs()), ([], [])  # type: tuple[Any, Any], tuple[list[float], list[float]]
        for side in sides:
            for _ in range(8):  # whatever was read ahead
                next(side)
        for _ in range(repeats):
            for side, found in zip(sides, rates):
                begin = time.perf_counter()
                frames = sum(next(side) for _ in range(batches))
                found.append(frames / (time.perf_counter() - begin))
        ours.restart()
        sides[1].close()
    a, b = (statistics.median(found) for found in rates)
    return {
        "ours": a, "theirs": b, "unit": "frames/s", "ratio": a / b,
        "what": f"two {SIZE}² cameras, batches of {BATCH} windows at random of an uncompressed robomimic file in the page cache: "
        f"{READERS} threads that read ahead / a torch DataLoader with {READERS} workers and h5py",
    }  # fmt: skip


def run() -> dict[str, dict[str, object]]:
    """This file's figure."""
    return {"image_loading": image_loading()}


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
