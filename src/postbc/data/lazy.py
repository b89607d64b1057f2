"""Arrays that stay in their file: frames are read when a batch asks for them, so that a file of 50 GB never has to fit."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from postbc.errors import InputError, require

#: Open files of this process, newest last: (process, path) -> file. A child process opens its own.
_OPEN: OrderedDict[tuple[int, str], _File] = OrderedDict()
_AT_MOST = 128
_LOCK = threading.Lock()
#: Frames, and bytes, that one call of the system reads at most.
_FRAMES, _BYTES = 512, 2**30


class _File:
    """An open data file; and where in it frames stand as they are, which need none of HDF5's locks to be read."""

    def __init__(self, path: str) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...]] | None] = {}
        self.descriptor = -1
        self.alone: AbstractContextManager[object] = nullcontext()  # what only one thread at a time may read
        from postbc.data.lerobot_files import LeRobotFolder, is_lerobot

        if is_lerobot(path):
            self.arrays: Any = LeRobotFolder(path)
            self.alone = threading.Lock()
            return
        if path.endswith(".zip") or os.path.isdir(path):
            from postbc.data.zarr import ZarrGroup

            self.arrays = ZarrGroup(path)
            return
        import h5py

        try:
            self.arrays = h5py.File(path, "r", locking="best-effort")
            if hasattr(os, "preadv") and self.arrays.userblock_size == 0:
                self.descriptor = os.open(path, os.O_RDONLY)
                weakref.finalize(self, os.close, self.descriptor)  # when nobody reads any more
        except OSError as error:
            raise InputError("A data file can no longer be read.", file=path, found=str(error)) from None

    def place(self, key: str) -> tuple[int, tuple[int, ...]] | None:
        """Bytes from the file's begin to an array that stands there whole and as it is, and its shape; None for others."""
        if self.descriptor < 0:
            return None
        if key not in self._places:
            array = self.arrays[key]
            plain = array.dtype == np.uint8 and array.chunks is None and not array.external and not array.is_virtual
            inside = plain and array.file.filename == self.arrays.filename
            offset = array.id.get_offset() if inside else None
            self._places[key] = None if offset is None else (offset, array.shape)
        return self._places[key]


def _file(path: str) -> _File:
    key = (os.getpid(), path)
    with _LOCK:
        if key not in _OPEN:
            _OPEN[key] = _File(path)
            while len(_OPEN) > _AT_MOST:
                _OPEN.popitem(last=False)
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
        shape = _file(self.path).arrays[key].shape if shape is None else shape
        self.start, self.stop = rows or (0, int(shape[0]))
        self._stored = tuple(int(n) for n in shape[1:])
        rest = self._stored
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
            frame: np.ndarray = self[i : i + 1][0]
            return frame
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        wanted = np.asarray(index, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"steps {wanted.min()} to {wanted.max()} of {len(self)}")
        frames, order = np.empty((len(wanted), *self._stored), np.uint8), np.argsort(wanted, kind="stable")
        self.read_into(frames, order, wanted[order])
        return np.ascontiguousarray(np.moveaxis(frames, -1, 1) if self.channels_last else frames)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def read_into(self, out: np.ndarray, places: np.ndarray, steps: np.ndarray) -> None:
        """Put the frames of `steps` (n,), which rise, at out[places], upright, in the file's order of axes; by any thread.

        Raises:
            InputError: the file can no longer be read, or has changed.
        """
        if not len(steps):
            return
        try:
            file = _file(self.path)
            place = file.place(self.key)
            if place is None:
                with file.alone:
                    self._read_decoded(file.arrays[self.key], out, places, steps)
            else:
                offset, shape = place
                self._check(shape[1:] == self._stored and self.stop <= shape[0], f"an array {shape}")
                self._read_bytes(file.descriptor, offset, out, places, steps)
            if self.upside_down:
                out[places] = np.flip(out[places], 1 if self.channels_last else 2)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError("A data file can no longer be read.", file=self.path, key=self.key, found=str(error)) from None

    def _read_bytes(self, descriptor: int, place: int, out: np.ndarray, places: np.ndarray, steps: np.ndarray) -> None:
        """Frames that stand in the file as they are: neighbours by one call."""
        size = math.prod(self._stored)
        most = max(1, min(_FRAMES, _BYTES // max(size, 1)))
        wanted, at, begin = steps.tolist(), places.tolist(), 0
        while begin < len(wanted):
            end = begin + 1
            while end < len(wanted) and end - begin < most and wanted[end] == wanted[end - 1] + 1:
                end += 1
            offset = place + (self.start + wanted[begin]) * size
            found = os.preadv(descriptor, [out[p] for p in at[begin:end]], offset)
            self._check(found == (end - begin) * size, f"{found} of {(end - begin) * size} bytes")
            begin = end

    def _read_decoded(self, array: Any, out: np.ndarray, places: np.ndarray, steps: np.ndarray) -> None:
        """Frames in compressed pieces of some rows each: a piece is decoded once for all that is wanted of it."""
        piece = (getattr(array, "chunks", None) or (1,))[0]
        pieces = (self.start + steps) // piece
        for run in np.split(np.arange(len(steps)), np.flatnonzero(np.diff(pieces) > 1) + 1):
            first, last = int(steps[run[0]]), int(steps[run[-1]])
            frames = np.asarray(array[self.start + first : self.start + last + 1])
            self._check(len(frames) == last + 1 - first, f"{len(frames)} frames")
            if frames.dtype != np.uint8:  # diffusion_policy stores 0 to 255 as float32
                frames = (np.clip(frames, 0, 255) + 0.5).astype(np.uint8)
            out[places[run]] = frames[steps[run] - first]

    def _check(self, whole: bool, found: str) -> None:
        if not whole:
            raise InputError("A data file has changed.", file=self.path, key=self.key, found=found)


class SparseFrames:
    """Frames (N, C, H, W) uint8 of which only every `every`-th was drawn, the first included; another is refused, never guessed.

    Args:
        drawn: (⌈N / every⌉, C, H, W), in memory or in a file.
        steps: N.
        every: steps from one to the next.

    Raises:
        InputError: there are more or fewer frames than that.
    """

    def __init__(self, drawn: np.ndarray | LazyArray, steps: int, every: int) -> None:
        require(len(drawn) == -(-steps // every), "There is not one frame for each of the steps that were drawn.", key=self._key(drawn),
                file=getattr(drawn, "path", None), found=len(drawn), expected=f"one for every {every} of {steps} steps")  # fmt: skip
        self.drawn, self.every = drawn, every
        self.shape, self.dtype, self.nbytes = (steps, *drawn.shape[1:]), drawn.dtype, drawn.nbytes

    @staticmethod
    def _key(drawn: np.ndarray | LazyArray) -> str:
        return str(getattr(drawn, "key", "frames"))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """As a :class:`LazyArray`. InputError where a step's frame was not drawn."""
        steps = np.arange(len(self))[index]
        missing = np.atleast_1d(steps)[np.atleast_1d(steps % self.every) != 0]
        require(not len(missing), "The frame of this step was not drawn.", file=getattr(self.drawn, "path", None),
                key=self._key(self.drawn), found=f"step {missing[0] if len(missing) else ''}",
                expected=f"0, {self.every}, {2 * self.every}, …",
                remedy=f"rollouts from cameras are drawn where chunks begin: learn from chunks that begin there (chunk and "
                f"transitions.stride multiples of {self.every}); a kitchen's can be drawn whole from their states "
                "(postbc demos convert FILE --image-size SIDE --output NEW.hdf5)")  # fmt: skip
        frames: np.ndarray = self.drawn[steps // self.every]
        return frames
