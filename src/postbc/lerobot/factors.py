"""The posterior of every frame of a LeRobotDataset in one file, keyed by the dataset's own frame index and read a row at a time.

safetensors: `rows` (N, R, T·A) float16, normalised units; `scale` (T·A,) float32, raw units in one of them; `index` (N,) int64,
ascending; and a description, :class:`About`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from postbc.disk import atomic_path
from postbc.errors import InputError, require
from postbc.posterior.calibration import Calibration
from postbc.schemas import Count, Width, later, parse, plain, schema


@schema
class About:
    """What a file of factors was made of."""

    kind: Literal["lerobot-factors"]
    fingerprint: str
    """Of the frames: actions, episodes (:func:`postbc.lerobot.fit.fingerprint`)."""
    delta_indices: tuple[int, ...]
    """Which actions the chunk of a frame holds, relative to it: the policy's `action_delta_indices`."""
    action_dim: Width
    frames: Count
    fit: dict[str, Any]
    """Ensemble, encoder, seed, what is seen."""
    calibration: Calibration | None = later(None)
    """α by trajectories left out, where it was asked for."""


def write_factors(path: str | Path, about: About, index: Tensor, scale: Tensor, rank: int, blocks: Iterable[Tensor]) -> None:
    """Write a file, whole or not at all, from `blocks` (n, rank, T·A) that come one after another."""
    n, d = about.frames, len(about.delta_indices) * about.action_dim
    parts = {"index": ("I64", [n], 8 * n), "scale": ("F32", [d], 4 * d), "rows": ("F16", [n, rank, d], 2 * n * rank * d)}
    header: dict[str, Any] = {"__metadata__": {"postbc": json.dumps(plain(about))}}
    end = 0
    for name, (dtype, shape, size) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(np.ascontiguousarray(index.numpy(), "<i8").tobytes() + np.ascontiguousarray(scale.numpy(), "<f4").tobytes())
        for block in blocks:
            file.write(np.ascontiguousarray(block.cpu().half().numpy(), "<f2").tobytes())


class Factors:
    """An open file. Pickles as its path, so that every worker of a DataLoader maps the same pages.

    Raises:
        InputError: not a file of factors.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            file = safe_open(self.path, framework="pt")
            head = json.loads((file.metadata() or {})["postbc"])
            self.rows, index, self.scale = (file.get_tensor(name) for name in ("rows", "index", "scale"))  # mapped, not read
            shape = tuple(self.rows.shape)
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise InputError("This is no file of factors.", file=self.path, found=f"{type(error).__name__}: {error}"[:200],
                             remedy="remove it: it is fitted again") from None  # fmt: skip
        self.about = parse(About, head, self.path)
        d = len(self.about.delta_indices) * self.about.action_dim
        good = (
            len(shape) == 3 and shape[::2] == (self.about.frames, d) and index.shape == shape[:1] and self.scale.shape == (d,)
        )
        good = good and index.dtype == torch.int64 and bool((index.diff() > 0).all()) and int(index[0]) >= 0
        require(good, "The parts of a file of factors do not fit together.", file=self.path, found=f"rows {shape}, {d} numbers a chunk",
                remedy="remove it: it is fitted again")  # fmt: skip
        self._index = index.numpy()

    def __reduce__(self) -> Any:
        return Factors, (self.path,)

    def sample(self, index: int, seed: int, visit: int) -> Tensor:
        """w ~ N(0, cov) of the frame `index`, (T, A), raw units; the same for the same seed and visit, whoever asks and when.

        Raises:
            InputError: a frame that the posterior was not fitted on.
        """
        row = int(np.searchsorted(self._index, index))
        known = row < len(self._index) and int(self._index[row]) == index
        require(known, "A frame has no posterior.", file=self.path, key="index", found=index,
                remedy="fit it on the episodes that are trained on")  # fmt: skip
        rows = self.rows[row].float()
        stream = np.random.Generator(np.random.Philox(key=[seed, visit], counter=[0, 0, 0, index]))
        g = torch.from_numpy(stream.standard_normal(len(rows), np.float32))
        return (g @ rows * self.scale).view(len(self.about.delta_indices), self.about.action_dim)
