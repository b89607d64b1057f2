"""Arrays that stay in their file: frames are read when a batch asks for them, so that a file of 50 GB never has to fit."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from postbc.errors import InputError

#: Open files of this process, newest last: (process, path) -> file. A child process opens its own.
_OPEN: OrderedDict[tuple[int, str], Any] = OrderedDict()
_AT_MOST = 16


def _file(path: str) -> Any:
    key = (os.getpid(), path)
    if key not in _OPEN:
        if os.path.exists(os.path.join(path, "meta/info.json")):
            from postbc.data.lerobot_files import LeRobotFolder

            _OPEN[key] = LeRobotFolder(path)
        elif path.endswith(".zip") or os.path.isdir(path):
            from postbc.data.zarr import ZarrGroup

            _OPEN[key] = ZarrGroup(path)
        else:
            import h5py

            try:
                _OPEN[key] = h5py.File(path, "r", locking="best-effort")
            except OSError as error:
                raise InputError("A data file can no longer be read.", file=path, found=str(error)) from None
        while len(_OPEN) > _AT_MOST:
            (pid, _), oldest = _OPEN.popitem(last=False)
            if pid == os.getpid():
                oldest.close()
    _OPEN.move_to_end(key)
    return _OPEN[key]


class LazyArray:
    """Frames (N, C, H, W) uint8 in an HDF5 or zarr file or a LeRobot dataset. Reading needs the file to be where it was.

    Args:
        path: the file.
        key: of its array, (rows, H, W, C) or (rows, C, H, W).
        rows: the part of the array's first axis that this is; default all.
        shape: of the file's array where it is known already.
        channels_last: whether the file has (H, W, C), as robomimic's and diffusion_policy's do.
        upside_down: whether the file's lowest row is the first, as in LIBERO's; here the highest is.
    """

    def __init__(self, path: str | Path, key: str, *, rows: tuple[int, int] | None = None, channels_last: bool = True,
                 shape: Sequence[int] | None = None, upside_down: bool = False) -> None:  # fmt: skip
        self.path, self.key, self.channels_last, self.upside_down = str(path), key, channels_last, upside_down
        shape = _file(self.path)[key].shape if shape is None else shape
        self.start, self.stop = rows or (0, int(shape[0]))
        rest = tuple(int(n) for n in shape[1:])
        self.shape = (self.stop - self.start, *(rest[-1:] + rest[:-1] if channels_last else rest))
        self.dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that all of it would take in memory."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, index: Any) -> np.ndarray:
        """A frame for an int; frames for a slice, or an array of indices (fastest when they are sorted)."""
        if isinstance(index, (int, np.integer)):
            i = int(index) + (len(self) if index < 0 else 0)
            if not 0 <= i < len(self):
                raise IndexError(f"step {index} of {len(self)}")
            return self._read(i, i + 1)[0]
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._read(start, max(start, stop))
            index = np.arange(start, stop, step)
        wanted, back = np.unique(np.asarray(index, dtype=np.int64), return_inverse=True)
        if not len(wanted):
            return np.zeros((0, *self.shape[1:]), np.uint8)
        if wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(f"steps {wanted[0]} to {wanted[-1]} of {len(self)}")
        # neighbours are read together
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        return np.concatenate([self._read(int(run[0]), int(run[-1]) + 1) for run in runs])[back.reshape(-1)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def _read(self, start: int, stop: int) -> np.ndarray:
        try:
            frames = np.asarray(_file(self.path)[self.key][self.start + start : self.start + stop])
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise InputError("A data file can no longer be read.", file=self.path, key=self.key, found=str(error)) from None
        if len(frames) != stop - start:
            raise InputError("A data file has changed.", file=self.path, key=self.key, found=f"{len(frames)} frames")
        if frames.dtype != np.uint8:  # diffusion_policy stores 0 to 255 as float32
            frames = (np.clip(frames, 0, 255) + 0.5).astype(np.uint8)
        frames = np.moveaxis(frames, -1, 1) if self.channels_last else frames
        return np.ascontiguousarray(frames[:, :, ::-1] if self.upside_down else frames)
