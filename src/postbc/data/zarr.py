"""Reader of diffusion_policy's zarr layout (formats 2 and 3; a folder or a .zarr.zip), with numcodecs alone: zarr itself is not needed.

::

    data/action (N, A)   data/state (N, S)   data/img (N, H, W, C) uint8, or float 0 to 255   data/keypoint (N, 9, 2) …
    meta/episode_ends    number of rows after each episode
"""

from __future__ import annotations

import bz2
import itertools
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import postbc.data.pusht as pusht
from postbc.data.episodes import Dataset, Episode, choose
from postbc.data.lazy import LazyArray
from postbc.data.lerobot_files import is_lerobot
from postbc.data.robomimic import KEYS, Listing
from postbc.errors import InputError, require

#: Largest chunk that is unpacked, and largest array that is read whole (bytes).
CHUNK, WHOLE = 2**30, 2**33
_BROKEN = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    OverflowError,
)
CODECS = ("blosc", "zstd", "lz4", "zlib", "gzip", "bz2", "lzma")
#: What describes an array, in formats 2 and 3.
DESCRIPTIONS = (".zarray", "zarr.json")
#: What frames are called in a file -> in the house.
CAMERAS = {"img": "image.top"}


def is_zarr(path: Path) -> bool:
    """Whether the path looks like a zarr store: a folder that holds one, or a zip file."""
    try:
        if path.is_dir():
            kinds = any((path / name).exists() for name in (".zgroup", "zarr.json", "data"))
            return kinds and not is_lerobot(path)
        if not path.is_file():  # a pipe would wait for ever
            return False
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError:
        return False


class ZarrGroup:
    """An open store. `group["data/state"]` is an array. InputError names file and key."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        if not self.path.is_dir():
            try:
                self._zip = zipfile.ZipFile(self.path)
            except _BROKEN as error:
                raise InputError("The zip file cannot be read.", file=path, found=str(error),
                                 remedy="copy or download it again") from None  # fmt: skip

    def get(self, name: str, limit: int = CHUNK) -> bytes | None:
        """The bytes of one entry, None where it is not there."""
        try:
            if self._zip is None:
                file = self.path / name
                if not file.is_file():
                    return None
                require(file.stat().st_size <= limit, "An entry is too large.", file=self.path, key=name)
                return file.read_bytes()
            info = self._zip.getinfo(name)
            require(
                info.file_size <= limit, "An entry is too large.", file=self.path, key=name, found=f"{info.file_size:,} bytes"
            )
            return self._zip.read(info)
        except KeyError:
            return None
        except InputError:
            raise
        except _BROKEN as error:
            raise InputError("An entry cannot be read.", file=self.path, key=name, found=str(error),
                             remedy="copy it again") from None  # fmt: skip

    def describe(self, key: str) -> tuple[int, bytes | None]:
        """The format (2 or 3) and the description of an array; None where there is none."""
        old = self.get(f"{key}/.zarray", 2**20)
        return (3, self.get(f"{key}/zarr.json", 2**20)) if old is None else (2, old)

    def arrays(self) -> list[str]:
        """Names of the arrays under data."""
        if self._zip is None:
            return sorted({p.parent.name for end in DESCRIPTIONS for p in (self.path / "data").glob(f"*/{end}")})
        parts = (name.split("/") for name in self._zip.namelist())
        return sorted({p[1] for p in parts if len(p) == 3 and p[0] == "data" and p[2] in DESCRIPTIONS})

    def __getitem__(self, key: str) -> ZarrArray:
        return ZarrArray(self, key.strip("/"))

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()


class ZarrArray:
    """One array, read by rows."""

    def __init__(self, group: ZarrGroup, key: str) -> None:
        self.group, self.key = group, key
        version, text = group.describe(self.key)
        require(text is not None, "The file lacks an array.", file=group.path, key=key, found=f"data holds {group.arrays()[:12]}",
                expected="diffusion_policy's layout: data/{action, state, img, …}, meta/episode_ends")  # fmt: skip
        try:
            meta = json.loads(text or b"")
            plain, self._key = meta["zarr_format"] == version, _chunk_key(meta)
            self.shape = tuple(map(int, meta["shape"]))
            if version == 2:
                self.chunks, self.dtype = tuple(map(int, meta["chunks"])), np.dtype(meta["dtype"])
                plain, packing = plain and meta["order"] == "C" and not meta.get("filters"), [meta["compressor"]]
            else:
                self.chunks = tuple(map(int, meta["chunk_grid"]["configuration"]["chunk_shape"]))
                first, *packing = meta["codecs"]
                big = first.get("configuration", {}).get("endian") == "big"
                self.dtype = np.dtype(meta["data_type"]).newbyteorder(">" if big else "<")
                plain = plain and (meta["node_type"], meta["chunk_grid"]["name"], first["name"]) == (
                    "array",
                    "regular",
                    "bytes",
                )
                packing = [{"id": c["name"]} for c in packing]  # how it was packed does not matter to unpack it
            plain = plain and len(packing) <= 1
            self._codec = dict(packing[0]) if packing and packing[0] is not None else None
            valid = min(self.shape, default=-1) >= 0 and min(self.chunks, default=-1) >= 1
            valid = valid and len(self.shape) == len(self.chunks) <= 8
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                "An array's description cannot be read.", file=group.path, key=key, found=repr(error)[:200]
            ) from None
        known = self._codec is None or self._codec.get("id") in CODECS
        size = int(np.prod(self.chunks, dtype=np.float64)) * self.dtype.itemsize
        require(plain and valid and known and self.dtype.kind in "biuf" and self.dtype.names is None and size <= CHUNK,
                "The array is of a kind that is not read.", file=group.path, key=key,
                found=f"{self.dtype}, shape {self.shape}, chunks {self.chunks}, {meta.get('codecs') or packing}, filters "
                f"{meta.get('filters')}"[:300],
                expected="real numbers in C order without filters or shards, compressed by one of "
                f"{', '.join(CODECS)} or not at all",
                )  # fmt: skip
        self._size = size
        self._last: tuple[tuple[int, ...], np.ndarray] | None = None

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray:
        if self._last is not None and self._last[0] == place:
            return self._last[1]
        name = f"{self.key}/{self._key(place)}"
        packed = self.group.get(name)
        require(packed is not None, "A piece of an array is missing: its numbers would read as 0.", file=self.group.path, key=name,
                remedy="copy or download the file again; if it was left out because it is all 0, write the store with "
                "write_empty_chunks")  # fmt: skip
        content = self._unpack(packed or b"", name)
        require(len(content) == self._size, "A piece of an array is damaged.", file=self.group.path, key=name,
                found=f"{len(content):,} bytes", expected=f"{self._size:,}", remedy="copy or download the file again")  # fmt: skip
        values = np.frombuffer(content, self.dtype).reshape(self.chunks)
        self._last = (place, values)
        return values

    def _unpack(self, packed: bytes, name: str) -> bytes | memoryview:
        codec, most = self._codec, self._size + 1
        try:
            if codec is None:
                return packed
            if codec["id"] in ("zlib", "gzip"):
                return zlib.decompressobj(15 + 32).decompress(packed, most)
            if codec["id"] == "bz2":
                return bz2.BZ2Decompressor().decompress(packed, most)
            if codec["id"] == "lzma":
                return lzma.LZMADecompressor().decompress(packed, most)
            try:
                import numcodecs
            except ImportError:
                raise InputError("The file is compressed in a way that needs numcodecs.", file=self.group.path, key=name,
                                 found=codec["id"], remedy="pip install 'postbc[zarr]'") from None  # fmt: skip
            if codec["id"] == "blosc" and int.from_bytes(packed[4:8], "little") != self._size:
                return b""  # it would unpack to another size
            out = np.empty(self._size, np.uint8)
            got = np.frombuffer(numcodecs.get_codec(codec).decode(packed, out=out), np.uint8)
            return memoryview(got)  # type: ignore[arg-type]
        except InputError:
            raise
        except Exception as error:  # every codec has errors of its own
            raise InputError("A piece of an array cannot be unpacked.", file=self.group.path, key=name, found=str(error)[:200],
                             remedy="copy or download the file again") from None  # fmt: skip

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows start:stop."""
        start, stop, _ = rows.indices(self.shape[0])
        n = max(stop - start, 0)
        size = n * int(np.prod(self.shape[1:], dtype=np.float64)) * self.dtype.itemsize
        require(size <= WHOLE, "The array is too large to be read at once.", file=self.group.path, key=self.key,
                found=f"{size:,} bytes")  # fmt: skip
        out = np.empty((n, *self.shape[1:]), self.dtype)
        first = self.chunks[0]
        grid = [range(-(-s // c)) for s, c in zip(self.shape[1:], self.chunks[1:])]
        for i in range(start // first, -(-stop // first) if n else 0):
            low, high = max(i * first, start), min((i + 1) * first, stop)
            for rest in itertools.product(*grid):
                values = self._chunk((i, *rest))
                place = tuple(slice(k * c, min((k + 1) * c, s)) for k, c, s in zip(rest, self.chunks[1:], self.shape[1:]))
                inner = tuple(slice(0, p.stop - p.start) for p in place)
                here, there = slice(low - start, high - start), slice(low - i * first, high - i * first)
                out[tuple([here, *place])] = values[tuple([there, *inner])]
        return out


def _chunk_key(meta: dict[str, Any]) -> Callable[[tuple[int, ...]], str]:
    """What names the piece of an array at a place of the grid."""
    if meta["zarr_format"] == 2:
        separator, prefix = str(meta.get("dimension_separator", ".")), []
    else:
        encoding = meta["chunk_key_encoding"]
        separator = str(encoding.get("configuration", {}).get("separator", "/" if encoding["name"] == "default" else "."))
        prefix = ["c"] if encoding["name"] == "default" else []
    return lambda place: separator.join([*prefix, *map(str, place)])


def episode_ends(group: ZarrGroup, split: int | None = None) -> np.ndarray:
    """(E,) rows after each episode; `split`: E, for a file without `meta/episode_ends`, which is cut where the scene jumps most.

    Raises:
        InputError: they are not increasing, or do not end with the data.
    """
    rows = group["data/action"].shape[0]
    if split is not None:
        return _split(group, rows, split)
    require(group.describe("meta/episode_ends")[1] is not None, "The file does not say where its episodes end.", file=group.path,
            key="meta/episode_ends", found="not there",
            remedy="copy or download it again; if it is known how many episodes there are, `postbc demos convert FILE "
            "--episodes N` cuts the data where the scene jumps")  # fmt: skip
    ends = group["meta/episode_ends"][:]
    good = ends.ndim == 1 and ends.dtype.kind in "iu" and len(ends) > 0 and int(ends[-1]) == rows
    require(good and int(ends[0]) > 0 and bool(np.all(np.diff(ends.astype(np.int64)) > 0)), "The episodes' ends do not fit the data.",
            file=group.path, key="meta/episode_ends", found=f"{ends.shape} {ends.dtype}, {ends.ravel()[:3]} … {ends.ravel()[-1:]}",
            expected=f"increasing, the last one {rows}")  # fmt: skip
    return ends.astype(np.int64)


def _split(group: ZarrGroup, rows: int, episodes: int) -> np.ndarray:
    require(1 <= episodes <= rows, "Cannot cut that many episodes.", key="episodes", found=episodes, expected=f"1 to {rows}")
    state = group["data/state"][:].astype(np.float64).reshape(rows, -1)
    scene = pusht.observation(state).astype(np.float64) if _is_pusht(group) else state / np.maximum(state.std(0), 1e-9)
    jump = np.linalg.norm(np.diff(scene, axis=0).reshape(rows - 1, -1, 2 if _is_pusht(group) else 1), axis=-1).mean(1)
    order = np.argsort(-jump, kind="stable")
    if episodes < rows and episodes > 1:
        kept, left = jump[order[episodes - 2]], jump[order[episodes - 1]]
        require(kept > 1.2 * left, "It cannot be told where the episodes end.", file=group.path, key="episodes", found=episodes,
                expected=f"a scene that jumps much more between episodes than within (least jump {kept:.3g}, next {left:.3g})",
                remedy="check the number of episodes")  # fmt: skip
    return np.append(np.sort(order[: episodes - 1]) + 1, rows)


def _is_pusht(group: ZarrGroup) -> bool:
    if not {"state", "keypoint", "action"} <= set(group.arrays()):
        return False
    return group["data/state"].shape[1:] == (5,) and group["data/action"].shape[1:] == (2,)


def list_zarr(path: str | Path) -> Listing:
    """Names of the episodes; a zarr file has no filters."""
    return Listing(tuple(f"demo_{i}" for i in range(len(episode_ends(ZarrGroup(path))))), {})


def zarr_cameras(path: str | Path) -> tuple[str, ...]:
    """Arrays that are frames."""
    group = ZarrGroup(path)
    return tuple(key for key in group.arrays() if len(group[f"data/{key}"].shape) == 4)


def describe_zarr(path: str | Path) -> str:
    """What of the file is there to be used for what."""
    group, cameras = ZarrGroup(path), zarr_cameras(path)
    kind = f"diffusion_policy's zarr, format {group.describe('data/action')[0]}" + (
        ", Push-T's layout" if _is_pusht(group) else ""
    )
    numbers = [key for key in group.arrays() if key not in (*cameras, "action")]
    return (
        f"{kind}; observations: {', '.join(numbers)}; cameras: {', '.join(cameras) or 'none'}; no rewards: success is unknown"
    )


def read_zarr(
    path: str | Path,
    *,
    filter_key: str | None = None,
    names: Iterable[str] | None = None,
    observation_keys: Sequence[str] | None = None,
    image_keys: Sequence[str] = (),
    parts: Iterable[str] = (),
    environment: Mapping[str, Any] | None = None,
    episodes: int | None = None,
) -> Dataset:
    """Read a diffusion_policy file. Frames stay in it.

    Args:
        path: folder or .zarr.zip.
        names: read only these episodes (demo_0, demo_1, …).
        observation_keys: arrays under data that make "state" (further axes flattened); default "state", for Push-T
            `pusht.STATE_KEYS`: agent position and the block's 8 corners, as gym-pusht reports them. ("state",): its raw 5 numbers.
        image_keys: arrays of frames; "img" is called "image.top".
        environment: stands in for what the file does not say; Push-T is recognised.
        episodes: their number, for a file without `meta/episode_ends`.

    Rewards are unknown (in Push-T's demonstrations no state shows success: the recording ends before it); the last step is done.
    """
    group = ZarrGroup(path)
    ends = episode_ends(group, episodes)
    rows, known = int(ends[-1]), [f"demo_{i}" for i in range(len(ends))]
    if filter_key is not None:
        choose(known, {}, filter_key, str(path))
    wanted = set(known) if names is None else set(names)
    require(wanted <= set(known), "There is no such episode.", file=path, key="names", found=sorted(wanted - set(known))[:5])
    block = _is_pusht(group)
    keys = tuple(observation_keys) if observation_keys is not None else pusht.STATE_KEYS if block else ("state",)
    require(keys or image_keys, "There is nothing to observe.", file=path, key="observation_keys", remedy=KEYS)
    columns = [_column(group, key, rows, block) for key in keys]
    state = np.concatenate(columns, 1) if columns else None
    frames = dict(_camera(group, key, rows) for key in image_keys)
    actions = _flat(group, "action", rows)
    starts = np.concatenate([[0], ends[:-1]])
    made = []
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
        if known[i] not in wanted:
            continue
        observations: dict[str, Any] = {} if state is None else {"state": state[start:end]}
        observations |= {
            name: LazyArray(path, f"data/{key}", rows=(start, end), shape=group[f"data/{key}"].shape)
            for name, key in frames.items()
        }
        dones = np.arange(start, end) == end - 1
        try:
            made.append(
                Episode(observations, actions[start:end], dones=dones if "dones" in set(parts) else None, name=known[i])
            )
        except InputError as error:
            raise InputError(f"{error}\n  file: {path}") from None
    facts = pusht.ENVIRONMENT if block and environment is None else dict(environment or {})
    return Dataset(tuple(made), keys, tuple(c.shape[1] for c in columns), facts, {}, str(path))


def _flat(group: ZarrGroup, key: str, rows: int) -> np.ndarray:
    array = group[f"data/{key}"]
    require(array.shape[:1] == (rows,) and len(array.shape) >= 2, "An array does not have one row a step.", file=group.path,
            key=f"data/{key}", found=f"shape {array.shape}", expected=f"({rows}, …)")  # fmt: skip
    return array[:].reshape(rows, -1)


def _column(group: ZarrGroup, key: str, rows: int, block: bool) -> np.ndarray:
    if block and key in pusht.STATE_KEYS:
        both = pusht.observation(_flat(group, "state", rows))
        return both[:, :2] if key == "agent_pos" else both[:, 2:]
    there = group.arrays()
    require(key in there, "The observations have other names.", file=group.path, key="observation_keys", found=key,
            expected=f"some of {', '.join(there)}" + (f", {', '.join(pusht.STATE_KEYS)}" if block else ""), remedy=KEYS)  # fmt: skip
    return _flat(group, key, rows)


def _camera(group: ZarrGroup, key: str, rows: int) -> tuple[str, str]:
    inside = next((own for own, ours in CAMERAS.items() if ours == key), key.removeprefix("image."))
    array = group[f"data/{inside}"]
    require(len(array.shape) == 4 and array.shape[0] == rows and array.shape[3] in (1, 3, 4),
            "An image observation has one frame a step.", file=group.path, key=f"data/{inside}",
            found=f"{array.dtype} of shape {array.shape}", expected=f"({rows}, H, W, C)")  # fmt: skip
    first = array[0:1]
    require(array.dtype == np.uint8 or (np.isfinite(first).all() and first.max() > 1), "The frames are not of 0 to 255.",
            file=group.path, key=f"data/{inside}", found=f"{array.dtype} up to {first.max():g}")  # fmt: skip
    return CAMERAS.get(inside, f"image.{inside}"), inside
