"""HDF5 from strangers: open it, look before reading, and say in one sentence what cannot be used."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from postbc.errors import InputError, require

#: Data that unpack to more than this many bytes and to more than RATIO times their place in the file are not unpacked.
LARGE, RATIO = 2**26, 200
TEXT = 2**24
"""Longest attribute text that is parsed."""


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The file, open for reading. InputError names the file for whatever h5py says, here and in the block."""
    expected = "a robomimic HDF5 file"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError("There is no such demonstration file.", file=path, expected=expected,
                         remedy="`postbc demos collect` or `demos download` makes one") from None  # fmt: skip
    except OSError as error:
        raise InputError("The demonstration file cannot be reached.", file=path, found=error.strerror or str(error)) from None
    require(not stat.S_ISDIR(mode), "The demonstrations are a directory, not a file.", file=path, expected=expected,
            remedy="name a file, a folder that holds .hdf5 files, or a LeRobotDataset (with meta/info.json)")  # fmt: skip
    require(
        stat.S_ISREG(mode), "The demonstrations are not a file.", file=path, found="a pipe, socket or device", expected=expected
    )
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise _cannot_open(path, error) from None
    try:
        yield file
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:  # h5py's words for what cannot be read
        raise InputError(
            "The demonstration file is damaged.", file=path, found=str(error)[:300], remedy="copy or download it again"
        ) from None
    finally:
        with contextlib.suppress(Exception):
            file.close()


def _cannot_open(path: Path, error: OSError) -> InputError:
    said = str(error)
    if "unable to lock" in said or (error.errno in (errno.EAGAIN, errno.EACCES) and "lock" in said):
        return InputError(
            "The demonstration file is in use: another program has it open for writing.", file=path, found=said,
            remedy="close the recorder, viewer or notebook that holds it, then try again",
        )  # fmt: skip
    if "already open for write" in said or "already open for" in said:
        return InputError(
            "The demonstration file is marked as open: another program writes it, or was stopped while writing.", file=path,
            found=said, remedy="close that program; if there is none, `h5clear -s FILE` removes the mark",
        )  # fmt: skip
    if error.errno in (errno.EACCES, errno.EPERM) or isinstance(error, PermissionError):
        return InputError("The demonstration file may not be read.", file=path, found=error.strerror or said)
    try:
        with path.open("rb") as raw:
            head = raw.read(8)
    except OSError as unreadable:
        return InputError("The demonstration file cannot be read.", file=path, found=unreadable.strerror or str(unreadable))
    signed = head == b"\x89HDF\r\n\x1a\n"
    return InputError(
        "The demonstration file is truncated or damaged." if signed else "The demonstration file is not HDF5.",
        file=path,
        found=said if signed else f"{path.stat().st_size} bytes that begin with {head!r}",
        expected="a robomimic HDF5 file",
        remedy="copy or download it again" if signed else "name a robomimic .hdf5 file",
    )


def _name(group: h5py.Group, key: str) -> str:
    return f"{group.name}/{key}".replace("//", "/").lstrip("/")


def members(group: h5py.Group) -> list[str]:
    """Names in a group, sorted; one that is not text is shown with substitutes."""
    return sorted(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in group)


def get(group: h5py.Group, key: str, kind: type, path: Path, remedy: str | None = None) -> Any:
    """`group[key]` of the given kind (group or dataset), or an InputError that lists what is there."""
    word = "group" if kind is h5py.Group else "dataset"
    try:
        item = group.get(key)
        broken = item is None and group.get(key, getlink=True) is not None
    except KeyError:
        item, broken = None, True
    except (OSError, RuntimeError) as error:
        raise InputError("A part of the file cannot be read.", file=path, key=_name(group, key), found=str(error)[:300],
                         remedy="copy or download the file again") from None  # fmt: skip
    if broken:
        link = group.get(key, getlink=True)
        target = f"{getattr(link, 'filename', '')} {getattr(link, 'path', '')}".strip()
        raise InputError("The file holds a broken link.", file=path, key=_name(group, key), found=f"a link to {target}",
                         expected=f"a {word}", remedy="restore what it points to, or copy the data into one file")  # fmt: skip
    if not isinstance(item, kind):
        raise InputError(
            f"The file lacks a {word}." if item is None else f"The file has something else in place of a {word}.",
            file=path, key=_name(group, key), found=f"{group.name} holds {members(group)[:12]}",
            expected="robomimic's layout: data/demo_i/{obs/<key>, actions, rewards, dones, states}, mask/<filter>", remedy=remedy,
        )  # fmt: skip
    return item


def check_dataset(
    dataset: h5py.Dataset, path: Path, *, rows: int | None = None, ndim: int | None = None, frames: bool = False
) -> None:
    """InputError for a dataset that is not plain numbers of this file, of the right shape, before a byte of it is read.

    `frames` are read a few at a time: their size is no matter.
    """
    key = dataset.name.lstrip("/")
    kind, shape = dataset.dtype, dataset.shape
    require(kind.kind in "biuf" and kind.names is None, "The dataset does not hold numbers.", file=path, key=key, found=str(kind),
            expected="real numbers")  # fmt: skip
    require(shape is not None, "The dataset is empty.", file=path, key=key, found="no shape")
    require(ndim is None or len(shape) == ndim, "The dataset has the wrong number of axes.", file=path, key=key,
            found=f"shape {shape}", expected=f"{ndim} axes, one row a step")  # fmt: skip
    require(rows is None or shape[:1] == (rows,), "The arrays of an episode disagree about its length.", file=path, key=key,
            found=f"shape {shape}", expected=f"{rows} rows",
            remedy="drop the episode, or cut the arrays to the steps that all of them have")  # fmt: skip
    plist = dataset.id.get_create_plist()
    require(plist.get_external_count() == 0, "The dataset's bytes are in another file.", file=path, key=key,
            found="HDF5 external storage", remedy="copy the data into the file itself (h5repack)")  # fmt: skip
    if plist.get_layout() == h5py.h5d.VIRTUAL:
        _check_virtual(dataset, path, key)
        return
    size = int(np.prod(shape, dtype=np.float64)) * kind.itemsize
    stored = dataset.id.get_storage_size()
    require(frames or size <= LARGE or size <= RATIO * stored, "The dataset unpacks to far more than it holds.", file=path, key=key,
            found=f"shape {shape}: {size:,} bytes from {stored:,}", expected=f"at most {RATIO} times as many")  # fmt: skip
    if plist.get_filter_by_id(h5py.h5z.FILTER_FLETCHER32) is not None:
        # libhdf5 takes the 4 bytes of the sum off the chunk's size unseen, and reads beyond its memory
        short: list[Any] = []
        dataset.id.chunk_iter(lambda chunk: short.append(chunk) if chunk.size <= 4 else None)
        require(not short, "A chunk of the dataset is shorter than its checksum.", file=path, key=key, found=str(short[:1]),
                remedy="copy or download the file again")  # fmt: skip


def _check_virtual(dataset: h5py.Dataset, path: Path, key: str) -> None:
    """A virtual dataset reads as zeros wherever its sources are missing."""
    covered = 0
    for source in dataset.virtual_sources():
        place = path if source.file_name == "." else path.parent / source.file_name
        found = "nothing there"
        with contextlib.suppress(OSError, KeyError, RuntimeError, ValueError):
            if place.is_file():
                same = place.resolve() == path.resolve()
                with contextlib.nullcontext(dataset.file) if same else h5py.File(place, "r") as file:
                    item = file.get(source.dset_name)
                    if isinstance(item, h5py.Dataset) and not item.is_virtual and not item.external:
                        found = f"shape {item.shape}"
                        if _fits(source, item) and item.dtype.kind in "biuf":
                            covered += source.vspace.get_select_npoints()
                            continue
        raise InputError("The source of a virtual dataset is missing: its numbers would read as 0.", file=path, key=key,
                         found=f"{source.file_name}: {source.dset_name}: {found}",
                         remedy="put the source file beside it, or copy the data into one file")  # fmt: skip
    require(covered >= int(np.prod(dataset.shape)), "Parts of a virtual dataset have no source: they would read as 0.", file=path,
            key=key, found=f"{covered} of {int(np.prod(dataset.shape))} values")  # fmt: skip


def _fits(source: Any, item: h5py.Dataset) -> bool:
    """Whether a virtual dataset's source is as large as the part of it that is asked for."""
    if source.src_space.get_select_type() == h5py.h5s.SEL_ALL:
        return bool(item.size == source.vspace.get_select_npoints())
    _, high = source.src_space.get_select_bounds()
    return len(high) == item.ndim and all(last < n for last, n in zip(high, item.shape))


def get_group(group: h5py.Group, key: str, path: Path) -> h5py.Group:
    """`get` of a group, five times as fast where all is well: files hold tens of thousands of them."""
    try:
        return h5py.Group(h5py.h5g.open(group.id, key.encode()))
    except (KeyError, OSError, RuntimeError, ValueError):
        return get(group, key, h5py.Group, path)


def _read_plain(group: h5py.Group, key: str, rows: int | None, ndim: int | None) -> np.ndarray | None:
    """Integers or floats that lie in one piece in this very file, of the right shape; None for whatever must be looked at."""
    try:
        dataset = h5py.h5d.open(group.id, key.encode())
        shape = dataset.shape
        if dataset.get_type().get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) or dataset.get_offset() is None:
            return None
        if (rows is not None and shape[:1] != (rows,)) or (ndim is not None and len(shape) != ndim):
            return None
        if math.prod(shape) * 8 > LARGE:
            return None
        values = np.empty(shape)
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
        return values
    except (KeyError, OSError, RuntimeError, TypeError, ValueError):
        return None


def read(group: h5py.Group, key: str, path: Path, *, rows: int | None = None, ndim: int | None = None) -> np.ndarray:
    """The numbers of `group[key]`, checked first."""
    plain = _read_plain(group, key, rows, ndim)
    if plain is not None:
        return plain
    dataset = get(group, key, h5py.Dataset, path)
    check_dataset(dataset, path, rows=rows, ndim=ndim)
    try:
        return np.asarray(dataset[()])
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError("A dataset cannot be read.", file=path, key=_name(group, key), found=str(error)[:300],
                         remedy="copy or download the file again") from None  # fmt: skip


class _HeapChecked(io.FileIO):
    """A file for h5py that looks at each global heap (where texts of any length lie) before libhdf5 does.

    libhdf5 walks a heap from object to object and stops at its end; where an object's size is 0, it never stops (HDF5 2.0), and no
    signal ends it.
    """

    #: bytes of a length in this file
    width = 8

    def readinto(self, buffer: Any) -> int:
        n = super().readinto(buffer) or 0
        if bytes(buffer[:4]) == b"GCOL":
            self._check(self.tell() - n)
        return n

    def _check(self, start: int) -> None:
        """OSError unless the heap's objects fill it: 16 bytes of header each, with a number (0: free space, headers included)."""
        size = int.from_bytes(os.pread(self.fileno(), self.width, start + 8), "little")
        heap = os.pread(self.fileno(), min(size, 2 * TEXT), start)
        at = 16
        while at + 16 <= len(heap):
            length = int.from_bytes(heap[at + 8 : at + 8 + self.width], "little")
            step = 16 + -(-length // 8) * 8 if heap[at : at + 2] != b"\0\0" else length
            if step < 16 or at + step > size:
                raise OSError(f"the heap of {size} bytes at byte {start} holds an object of {step} bytes")
            at += step


@contextlib.contextmanager
def heap_checked(item: h5py.Group | h5py.Dataset) -> Iterator[Any]:
    """The same group or dataset, in a file opened by way of _HeapChecked: to read texts from. OSError where a heap is damaged."""
    try:
        with _HeapChecked(item.file.filename) as raw, h5py.File(raw, "r") as file:
            raw.width = file.id.get_create_plist().get_sizes()[1]
            yield file[item.name]
    except (OverflowError, MemoryError) as error:
        raise OSError(f"an address or a length that is too large: {error}") from None


def attribute(item: h5py.Group | h5py.Dataset, name: str, path: Path) -> Any:
    """An attribute as text, number or None where it is not there. InputError if it cannot be read."""
    try:
        if not h5py.h5a.exists(item.id, name.encode()):
            return None
        if h5py.h5a.open(item.id, name.encode()).get_type().get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT):
            value = item.attrs[name]
        else:
            with heap_checked(item) as checked:
                value = checked.attrs[name]
    except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise InputError("An attribute cannot be read.", file=path, key=f"{item.name.lstrip('/')} attribute {name}",
                         found=str(error)[:300]) from None  # fmt: skip
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value


def json_attribute(item: h5py.Group, name: str, path: Path) -> dict[str, Any] | None:
    """An attribute that holds a JSON object, None where it is not there."""
    value = attribute(item, name, path)
    if value is None:
        return None
    key = f"{item.name.lstrip('/')} attribute {name}"
    try:
        if not isinstance(value, str) or len(value) > TEXT:
            raise TypeError(f"{type(value).__name__}")
        parsed = json.loads(value)
        if not isinstance(parsed, dict):
            raise TypeError(f"a JSON {type(parsed).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            "The environment's description is not a JSON object.", file=path, key=key, found=str(error)[:200]
        ) from None
    return parsed
