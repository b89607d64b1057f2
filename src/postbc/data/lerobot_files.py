"""The files of a LeRobotDataset (format v3) in a local folder: parquet by pyarrow, frames by PyAV or Pillow; LeRobot is not needed.

::

    meta/info.json                                    codebase_version, fps, features {name: dtype, shape, names}, path templates
    meta/episodes/chunk-000/file-000.parquet          a row an episode: length, dataset_from_index, which files, tasks, stats
    data/chunk-000/file-000.parquet                   a row a frame: numbers, and PNGs of features of dtype "image"
    videos/<feature>/chunk-000/file-000.mp4           frames of features of dtype "video", episodes one after another
"""

from __future__ import annotations

import bisect
import importlib
import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from postbc.errors import InputError, require

INFO = "meta/info.json"
VERSION = "v3.0"
#: Bytes of PNGs that are kept of row groups that have been read; of one at least.
PACKED = 2**28
#: Features that number the frames, in every dataset.
NUMBERING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_TEMPLATE = re.compile(r"[\w{}:/.-]+")
_EPISODE = ("episode_index", "length", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index")


def library(name: str) -> Any:
    """A module of the extra `lerobot-data`."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError("Reading and writing LeRobot datasets needs a package that is not installed.", found=name.split(".")[0],
                         remedy="pip install 'postbc[lerobot-data]'") from None  # fmt: skip


def is_lerobot(path: str | Path) -> bool:
    """Whether a folder looks like a LeRobotDataset of any version."""
    return os.path.exists(os.path.join(path, INFO))


def is_number(feature: Mapping[str, Any]) -> bool:
    """Whether a feature (of info.json) is numbers or truth values: no frames, no text."""
    return re.fullmatch(r"(float|u?int)\d+|bool", feature["dtype"]) is not None


class LeRobotFolder:
    """An open dataset. `folder["observation.image"][3:7]` are frames (4, H, W, C) uint8 of the dataset's rows 3 to 6."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        info_file = self.path / INFO
        try:
            info = json.loads(info_file.read_bytes())
            version, features = str(info["codebase_version"]), dict(info["features"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError("The dataset's description cannot be read.", file=info_file, found=repr(error)[:200],
                             expected="a LeRobotDataset v3", remedy="copy or download it again") from None  # fmt: skip
        require(version.startswith("v3."), "The dataset is of another LeRobot format.", file=info_file, key="codebase_version",
                found=version, expected=VERSION, remedy="LeRobot converts it: python -m "
                "lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=NAME --root=FOLDER --push-to-hub=false"
                if version.startswith("v2") else None)  # fmt: skip
        self.features: dict[str, dict[str, Any]] = features
        for name, feature in features.items():
            good = isinstance(feature, dict) and isinstance(feature.get("dtype"), str)
            shape = feature.get("shape") if good else None
            good = good and isinstance(shape, list) and all(type(n) is int and 0 < n < 2**20 for n in shape or [])
            require(good and re.fullmatch(r"[\w.-]+", name), "A feature is not described as LeRobot does.", file=info_file,
                    key=f"features: {name[:100]}", found=repr(feature)[:200],
                    expected='{"dtype": "float32", "shape": [7], …}')  # fmt: skip
        fps = info.get("fps")
        require(isinstance(fps, (int, float)) and not isinstance(fps, bool) and 0 < fps < 1e6, "The rate is not a number.",
                file=info_file, key="fps", found=repr(fps)[:100])  # fmt: skip
        self.fps, self.splits = float(fps), info.get("splits") if isinstance(info.get("splits"), dict) else {}
        self._templates = {key: info.get(key) for key in ("data_path", "video_path")}
        self._episodes()
        self._tables: dict[str, Any] = {}
        self._videos: dict[str, Video] = {}
        self._packed: OrderedDict[tuple[str, int, str], Any] = OrderedDict()

    # -- what there is -----------------------------------------------------------------------------------------------------------
    def _episodes(self) -> None:
        pq = library("pyarrow.parquet")
        files = sorted((self.path / "meta/episodes").glob("*/*.parquet"))
        require(files, "The dataset lacks the table of its episodes.", file=self.path / "meta/episodes", expected="*/*.parquet",
                remedy="copy or download it again")  # fmt: skip
        self.cameras = tuple(name for name, feature in self.features.items() if feature["dtype"] in ("video", "image"))
        places = ("chunk_index", "file_index", "from_timestamp")
        wanted = [*_EPISODE, *(f"videos/{k}/{p}" for k in self.cameras if self.features[k]["dtype"] == "video" for p in places)]
        columns: dict[str, list[np.ndarray]] = {key: [] for key in wanted}
        self.tasks: list[tuple[str, ...]] = []
        for file in files:
            with _reading(file):
                table = pq.read_table(file, columns=[*wanted, "tasks"])
                missing = sorted({*wanted, "tasks"} - set(table.column_names))
                require(
                    not missing, "The table of the episodes lacks a column.", file=file, key=missing[0] if missing else None
                )
                for key in wanted:
                    columns[key].append(table.column(key).to_numpy())
                self.tasks += [tuple(map(str, tasks or ())) for tasks in table.column("tasks").to_pylist()]
        self.episodes = {key: np.concatenate(values) for key, values in columns.items()}
        number, start, end = (self.episodes[key] for key in ("episode_index", "dataset_from_index", "dataset_to_index"))
        n = len(number)
        good = n > 0 and np.array_equal(number, np.arange(n)) and np.array_equal(end - start, self.episodes["length"])
        good = good and bool((end > start).all()) and start[0] == 0 and np.array_equal(start[1:], end[:-1])
        require(good, "The episodes do not follow one another.", file=files[0], key="dataset_from_index, dataset_to_index, length",
                found=f"{n} episodes", remedy="copy or download the dataset again")  # fmt: skip
        self.starts: list[int] = start.tolist()

    def __len__(self) -> int:
        """Number of frames."""
        return int(self.episodes["dataset_to_index"][-1])

    def _file(self, kind: str, chunk: int, file: int, **more: str) -> Path:
        template = self._templates[kind]
        good = isinstance(template, str) and _TEMPLATE.fullmatch(template) and ".." not in template and template[0] != "/"
        try:
            name = str(template).format(chunk_index=int(chunk), file_index=int(file), **more) if good else None
        except (KeyError, IndexError, ValueError, AttributeError):
            name = None
        require(
            name is not None, "A path template cannot be used.", file=self.path / INFO, key=kind, found=repr(template)[:100]
        )
        return self.path / str(name)

    # -- numbers -----------------------------------------------------------------------------------------------------------------
    def numbers(self, keys: Sequence[str], episodes: Sequence[int]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Number and arrays (N, width) of each of `episodes` (ascending), file after file; only these features are read."""
        wanted, at = np.asarray(episodes, np.int64), 0
        files = np.stack([self.episodes["data/chunk_index"], self.episodes["data/file_index"]], 1)
        while at < len(wanted):
            here = files[wanted[at]]
            together = 1
            while at + together < len(wanted) and np.array_equal(files[wanted[at + together]], here):
                together += 1
            inside = np.flatnonzero((files == here).all(1))
            first = self.starts[int(inside[0])]
            yield from self._file_numbers(self._file("data_path", *here), first, keys, wanted[at : at + together])
            at += together

    def _file_numbers(self, path: Path, first: int, keys: Sequence[str], episodes: np.ndarray) -> Any:
        table = self._open(path)
        low = self.episodes["dataset_from_index"][episodes] - first
        high = self.episodes["dataset_to_index"][episodes] - first
        edges = self._edges(table)
        require(high[-1] <= edges[-1], "A data file has fewer rows than its episodes.", file=path, found=f"{edges[-1]} rows",
                expected=f"at least {high[-1]}", remedy="copy or download it again")  # fmt: skip
        groups = [g for g in range(len(edges) - 1) if _overlap(low, high, edges[g], edges[g + 1])]
        offsets = np.cumsum([0] + [edges[g + 1] - edges[g] for g in groups])
        with _reading(path):
            there = set(table.schema_arrow.names)
            missing = [key for key in (*keys, "index") if key not in there]
            require(not missing, "A data file lacks a column.", file=path, key=missing[0] if missing else None,
                    found=sorted(there)[:20])  # fmt: skip
            read = table.read_row_groups(groups, columns=[*keys, "index"])
            index = matrix(read.column("index"), path, "index", 1)[:, 0]
            rows = np.concatenate([np.arange(edges[g], edges[g + 1]) for g in groups])
            require(np.array_equal(index, rows + first), "The frames of a data file do not follow one another.", file=path,
                    key="index", expected=f"{first}, {first + 1}, …", remedy="copy or download the dataset again")  # fmt: skip
            columns = {key: matrix(read.column(key), path, key, int(np.prod(self.features[key]["shape"]))) for key in keys}
        starts = np.asarray([edges[g] for g in groups])
        for episode, a, b in zip(episodes.tolist(), low.tolist(), high.tolist()):
            group = int(np.searchsorted(starts, a, side="right")) - 1
            begin = int(offsets[group]) + a - int(starts[group])
            yield episode, {key: values[begin : begin + b - a] for key, values in columns.items()}

    def _open(self, path: Path) -> Any:
        """An open parquet file; at most two stay open."""
        if (found := self._tables.get(str(path))) is None:
            require(path.is_file(), "The dataset lacks a file.", file=path, remedy="copy or download it again")
            with _reading(path):
                found = self._tables[str(path)] = library("pyarrow.parquet").ParquetFile(path, memory_map=True)
            while len(self._tables) > 2:
                self._tables.pop(next(iter(self._tables))).close()
        return found

    @staticmethod
    def _edges(table: Any) -> list[int]:
        meta = table.metadata
        return [0, *np.cumsum([meta.row_group(g).num_rows for g in range(meta.num_row_groups)]).tolist()]

    # -- frames ------------------------------------------------------------------------------------------------------------------
    def __getitem__(self, camera: str) -> Frames:
        return Frames(self, camera)

    def frames(self, camera: str, start: int, stop: int) -> np.ndarray:
        """Frames (n, H, W, C), or as the feature's shape has it, of rows start:stop."""
        made, row = [], start
        while row < stop:
            episode = bisect.bisect_right(self.starts, row) - 1
            end = min(stop, int(self.episodes["dataset_to_index"][episode]))
            read = self._from_video if self.features[camera]["dtype"] == "video" else self._from_table
            made.append(read(camera, episode, row, end))
            row = end
        frames = np.concatenate(made)
        expected = tuple(self.features[camera]["shape"])
        if frames.shape[1:] != expected and (*frames.shape[3:], *frames.shape[1:3]) == expected:
            frames = np.moveaxis(frames, -1, 1)
        require(frames.shape[1:] == expected, "The frames have another size than the dataset says.", file=self.path / INFO,
                key=f"features: {camera}: shape", found=list(expected), expected=list(frames.shape[1:]))  # fmt: skip
        return frames

    def _from_video(self, camera: str, episode: int, start: int, stop: int) -> np.ndarray:
        values = {p: self.episodes[f"videos/{camera}/{p}"][episode] for p in ("chunk_index", "file_index", "from_timestamp")}
        path = self._file("video_path", values["chunk_index"], values["file_index"], video_key=camera)
        if str(path) not in self._videos:
            while len(self._videos) >= 8:
                self._videos.pop(next(iter(self._videos))).close()
            self._videos[str(path)] = Video(path)
        times = float(values["from_timestamp"]) + (np.arange(start, stop) - self.starts[episode]) / self.fps
        return self._videos[str(path)].at(times, 0.5 / self.fps)

    def _from_table(self, camera: str, episode: int, start: int, stop: int) -> np.ndarray:
        chunk, file = (int(self.episodes[f"data/{p}_index"][episode]) for p in ("chunk", "file"))
        path = self._file("data_path", chunk, file)
        same = (self.episodes["data/chunk_index"] == chunk) & (self.episodes["data/file_index"] == file)
        first = self.starts[int(np.flatnonzero(same)[0])]
        table = self._open(path)
        edges = self._edges(table)
        decoded = []
        for row in range(start - first, stop - first):
            group = bisect.bisect_right(edges, row) - 1
            require(group < len(edges) - 1, "A data file has fewer rows than its episodes.", file=path, found=edges[-1])
            cell = self._unpacked(path, table, group, camera)[row - edges[group]].as_py()
            decoded.append(_decode(cell, path, camera))
        return np.stack(decoded)

    def _unpacked(self, path: Path, table: Any, group: int, camera: str) -> Any:
        """A row group's frames as PNGs: read once, not once a frame, and kept until newer ones take the memory."""
        key = (str(path), group, camera)
        if key not in self._packed:
            with _reading(path):
                self._packed[key] = table.read_row_group(group, columns=[camera]).column(0)
            while len(self._packed) > 1 and sum(column.nbytes for column in self._packed.values()) > PACKED:
                self._packed.popitem(last=False)
        self._packed.move_to_end(key)
        return self._packed[key]

    def close(self) -> None:
        for opened in (*self._tables.values(), *self._videos.values()):
            opened.close()


class Frames:
    """One camera of a folder, sliced by the dataset's rows."""

    def __init__(self, folder: LeRobotFolder, camera: str) -> None:
        self.folder, self.camera = folder, camera
        self.shape = (len(folder), *folder.features[camera]["shape"])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.folder.frames(self.camera, rows.start, rows.stop)


class Video:
    """A video file, read by time; frames that follow the last one read are decoded without going back to a key frame."""

    def __init__(self, path: Path) -> None:
        require(path.is_file(), "The dataset lacks a video.", file=path, remedy="copy or download it again")
        self.path = path
        with _reading(path):
            self.container = library("av").open(str(path))
            self.stream = self.container.streams.video[0]
        self.coming: Any = None
        self.last = float("inf")

    def at(self, times: np.ndarray, tolerance: float) -> np.ndarray:
        """(n, H, W, 3) uint8 at ascending times (s): of each the frame within `tolerance`."""
        found: list[np.ndarray] = []
        with _reading(self.path):
            if self.coming is None or not 0 < times[0] - self.last < 8 * tolerance:
                self.container.seek(max(int(times[0] / self.stream.time_base) - 1, 0), stream=self.stream)
                self.coming = self.container.decode(self.stream)
            for frame in self.coming:
                self.last = float(frame.pts * self.stream.time_base)
                if self.last < times[len(found)] - tolerance:
                    continue
                if self.last > times[len(found)] + tolerance:
                    break
                found.append(frame.to_ndarray(format="rgb24"))
                if len(found) == len(times):
                    return np.stack(found)
        self.coming = None
        raise InputError("A video lacks a frame.", file=self.path, found=f"none at {times[len(found)]:.3f} s",
                         expected="a frame for every row of the data", remedy="copy or download the dataset again")  # fmt: skip

    def close(self) -> None:
        self.container.close()


class _reading:
    """InputError with the file's name for whatever pyarrow, PyAV and Pillow say of a file that they cannot read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            raise InputError("A file of the dataset cannot be read.", file=self.path, found=f"{type(error).__name__}: {error}"[:300],
                             remedy="copy or download it again") from None  # fmt: skip


def _overlap(low: np.ndarray, high: np.ndarray, start: int, stop: int) -> bool:
    i = int(np.searchsorted(high, start, side="right"))
    return i < len(low) and bool(low[i] < stop)


def matrix(column: Any, path: str | Path, key: str, width: int) -> np.ndarray:
    """An arrow column of numbers, or of lists of `width` numbers, as (rows, width). InputError: it is not."""
    values = column.combine_chunks()
    values, rows = getattr(values, "storage", values), len(values)
    while hasattr(values, "flatten") and str(values.type).startswith(("list", "fixed_size_list", "large_list")):
        values = values.flatten()
    kind = str(values.type)
    numeric = any(kind.startswith(word) for word in ("float", "double", "halffloat", "int", "uint", "bool"))
    require(numeric and values.null_count == 0 and len(values) == rows * width, "A column does not hold the numbers that it should.",
            file=path, key=key, found=f"{len(values)} values of {kind} in {rows} rows, {values.null_count} missing",
            expected=f"{width} numbers a row")  # fmt: skip
    numbers: np.ndarray = values.to_numpy(zero_copy_only=False).reshape(rows, width)
    return numbers


def _decode(cell: Any, path: Path, camera: str) -> np.ndarray:
    from PIL import Image

    packed = cell.get("bytes") if isinstance(cell, dict) else None
    require(isinstance(packed, bytes), "A frame is not in the data file.", file=path, key=camera, found=repr(cell)[:100],
            expected="PNG or JPEG bytes")  # fmt: skip
    with _reading(path), Image.open(io.BytesIO(bytes(packed or b"")), formats=("PNG", "JPEG")) as image:
        require(image.mode in ("RGB", "L"), "A frame is of a kind that is not read.", file=path, key=camera, found=image.mode,
                expected="8 bit colours or grey")  # fmt: skip
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
