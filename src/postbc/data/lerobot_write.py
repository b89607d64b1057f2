"""Writer of LeRobotDataset v3 (see :mod:`postbc.data.lerobot_files` for the layout), with pyarrow, Pillow and PyAV: no LeRobot needed.

A piece of consecutive episodes is a video a camera, a data file and, written last, a table of its episodes: what is there need not be
made again, so a writer that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from postbc.data.episodes import Dataset, Episode, is_image, pieces_of
from postbc.data.lerobot import ACTION, DONE, OURS, REWARD, SIMULATOR, feature_name, state_parts
from postbc.data.lerobot_files import INFO, VERSION, library
from postbc.disk import atomic_path, os_errors, remove_leftovers, write_json, write_text
from postbc.errors import InputError, require
from postbc.schemas import plain

#: Bytes of a piece, frames unpacked: what is lost at most when the writer is stopped, and what is in memory of an episode at least.
PIECE = 2**28
#: In a folder that is not finished: of what source it is made.
MARK = "identity"
FILES = 1000
"""Files a folder (LeRobot's chunks_size)."""
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
QUANTILES = {"q01": 1, "q10": 10, "q50": 50, "q90": 90, "q99": 99}


class LeRobotWriter:
    """Writes a dataset piece by piece.

    Args:
        path: folder to write, whole or not at all: it grows beside its place, in `.NAME.parts`.
        dataset: what to write; frames are read an episode at a time.
        identity: of the source and whatever else decides the result; pieces of another identity are made again.
        fps: frames a second; by default the control frequency that the data says.
        video: encode cameras as H.264 (small, not exact) instead of PNG (exact).

    Raises:
        InputError: the rate is unknown, episodes of which only some have rewards, ends or states, or a camera that a video cannot hold.
    """

    def __init__(
        self, path: str | Path, dataset: Dataset, identity: str, *, fps: int | None = None, video: bool = False
    ) -> None:
        self.path, self.dataset, self.video = Path(path), dataset, video
        kwargs = dataset.environment.get("env_kwargs")
        known = kwargs.get("control_freq") if isinstance(kwargs, Mapping) else None
        rate = fps if fps is not None else known
        require(fps is None or known is None or fps == known, "The data say another rate.", key="fps", file=dataset.source, found=fps,
                expected=f"{known} steps a second", remedy="leave out --fps")  # fmt: skip
        require(isinstance(rate, (int, float)) and rate == int(rate) > 0, "It is not known how many steps are a second.", key="fps",
                found=repr(rate), expected="a whole number", remedy="say it: --fps 20")  # fmt: skip
        self.fps = int(rate)  # type: ignore[arg-type]
        self.state = state_parts(dataset.state_keys, dataset.state_dims)
        self.features = self._features()
        self.parts = self.path.with_name(f".{self.path.name}.parts")
        settings = json.dumps([identity, self.fps, video, PIECE, VERSION])
        self.identity = hashlib.sha256(settings.encode()).hexdigest()
        names = dict.fromkeys(episode.task or "" for episode in dataset)
        self.tasks = {task: i for i, task in enumerate(names)}
        self.pieces = pieces_of(dataset, PIECE)

    # -- what is written ---------------------------------------------------------------------------------------------------------
    def _features(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for feature in dict.fromkeys(part.feature for part in self.state):
            names = [f"{p.key}_{i}" for p in self.state if p.feature == feature for i in range(p.width)]
            found[feature] = {"dtype": "float32", "shape": [len(names)], "names": names}
        for key, (c, h, w) in ((k, s) for k, s in self.dataset.shapes.items() if is_image(k)):
            require(not self.video or (c == 3 and h % 2 == w % 2 == 0), "A video cannot hold frames of this size.", key=key,
                    found=f"{c} × {h} × {w}", expected="3 colours, even height and width", remedy="leave out --video")  # fmt: skip
            require(c in (1, 3), "Frames of this kind cannot be written.", key=key, found=f"{c} channels", expected="1 or 3")
            names = ["height", "width", "channels"]
            found[feature_name(key)] = {"dtype": "video" if self.video else "image", "shape": [h, w, c], "names": names}
        found[ACTION] = {"dtype": "float32", "shape": [self.dataset.action_dim], "names": None}
        for part, name, dtype in (("rewards", REWARD, "float32"), ("dones", DONE, "bool"), ("states", SIMULATOR, "float64")):
            has = [getattr(e, part) is not None for e in self.dataset]
            require(all(has) or not any(has), "Some episodes have what others lack.", file=self.dataset.source, key=part,
                    found=f"{sum(has)} of {len(has)}", remedy="add it, or remove it everywhere")  # fmt: skip
            if has[0]:
                widths = {getattr(e, part).shape[1:] or (1,) for e in self.dataset}
                require(len(widths) == 1 or name == SIMULATOR, "Episodes differ in width.", file=self.dataset.source, key=part,
                        found=sorted(widths))  # fmt: skip
                found[name] = {"dtype": dtype, "shape": [*max(widths)], "names": None}
        for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
            found[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
        return found

    def _columns(self, episode: Episode, number: int, first: int) -> dict[str, np.ndarray]:
        """(N, width) of every feature that is numbers."""
        n, found = len(episode), {}
        ends = np.cumsum(self.dataset.state_dims)
        split = {
            k: episode.state[:, end - w : end] for k, end, w in zip(self.dataset.state_keys, ends, self.dataset.state_dims)
        }
        for feature in dict.fromkeys(part.feature for part in self.state):
            found[feature] = np.concatenate([split[p.key] for p in self.state if p.feature == feature], 1)
        found[ACTION] = episode.actions
        for name, values in ((REWARD, episode.rewards), (DONE, episode.dones), (SIMULATOR, episode.states)):
            if name in self.features and values is not None:
                flat = values.reshape(n, -1)  # simulators of several tasks differ in width
                found[name] = np.pad(flat, ((0, 0), (0, self.features[name]["shape"][0] - flat.shape[1])))
        step, task = np.arange(n), self.tasks[episode.task or ""]
        numbering: dict[str, np.ndarray] = {
            "timestamp": (step / self.fps).astype(np.float32), "frame_index": step, "episode_index": np.full(n, number),
            "index": step + first, "task_index": np.full(n, task),
        }  # fmt: skip
        return found | {name: values[:, None] for name, values in numbering.items()}

    # -- writing -----------------------------------------------------------------------------------------------------------------
    def write(self, progress: Callable[[int], None] | None = None) -> Path:
        """Write what is not there yet, and put the whole in its place; returns the path. `progress` is told episodes done."""
        with os_errors(self.parts):
            mark = self.parts / MARK
            if self.parts.is_dir() and not (mark.is_file() and mark.read_text(encoding="utf-8") == self.identity):
                shutil.rmtree(self.parts)
            self.parts.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.parts)
        write_text(mark, self.identity)
        firsts = np.cumsum(self.dataset.lengths) - self.dataset.lengths
        for number, piece in enumerate(self.pieces):
            place = {"chunk_index": number // FILES, "file_index": number % FILES}
            table = self.parts / EPISODES.format(**place)
            if not table.exists():
                self._piece(piece, place, firsts, table)
            if progress is not None:
                progress(piece.stop)
        self._close()
        return self.path

    def _piece(self, piece: range, place: dict[str, int], firsts: np.ndarray, table: Path) -> None:
        pa, pq = library("pyarrow"), library("pyarrow.parquet")
        cameras = {feature_name(key): key for key in self.dataset.shapes if is_image(key)}
        schema, rows = self._schema(pa, cameras), []
        data = self.parts / DATA.format(**place)
        videos = {f: self.parts / VIDEO.format(video_key=f, **place) for f in cameras} if self.video else {}
        with _Videos(videos, self.fps) as encode, atomic_path(data) as partial, pq.ParquetWriter(partial, schema) as writer:
            for i in piece:
                episode, n = self.dataset[i], len(self.dataset[i])
                columns, stats = self._columns(episode, i, int(firsts[i])), {}
                cells = {name: _cells(pa, values, schema.field(name).type) for name, values in columns.items()}
                for name, values in columns.items():
                    stats[name] = _stats(values.astype(np.float64), (0,), n)
                for feature, key in cameras.items():
                    frames = np.moveaxis(np.asarray(episode.observations[key][:]), 1, -1)
                    if self.video:
                        encode(feature, frames)
                    else:
                        cells[feature] = pa.array(
                            [{"bytes": _png(frame), "path": None} for frame in frames], schema.field(feature).type
                        )
                    some = np.unique(np.linspace(0, n - 1, min(n, 100)).round().astype(int))
                    made = _stats(frames[some].astype(np.float64) / 255, (0, 1, 2), len(some))
                    stats[feature] = {k: v if k == "count" else v[:, None, None] for k, v in made.items()}
                writer.write_table(pa.table([cells[name] for name in schema.names], schema=schema))
                rows.append(self._row(i, n, int(firsts[i]), int(firsts[piece.start]), place, videos) | _flat(stats))
        with atomic_path(table) as partial:
            pq.write_table(pa.Table.from_pylist(rows), partial)

    def _row(self, i: int, n: int, first: int, start: int, place: dict[str, int], videos: Mapping[str, Path]) -> dict[str, Any]:
        row = {"episode_index": i, "tasks": [self.dataset[i].task or ""], "length": n}
        row |= {f"data/{k}": v for k, v in place.items()} | {"dataset_from_index": first, "dataset_to_index": first + n}
        for feature in videos:
            row |= {f"videos/{feature}/{k}": v for k, v in place.items()}
            row |= {f"videos/{feature}/from_timestamp": (first - start) / self.fps,
                    f"videos/{feature}/to_timestamp": (first - start + n) / self.fps}  # fmt: skip
        return row | {f"meta/episodes/{k}": v for k, v in place.items()}

    def _schema(self, pa: Any, cameras: Mapping[str, str]) -> Any:
        kinds = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}
        fields = []
        for name, feature in self.features.items():
            if name in cameras:
                if not self.video:
                    fields.append(pa.field(name, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            else:
                width, kind = feature["shape"][0], kinds[feature["dtype"]]
                fields.append(pa.field(name, kind if width == 1 else pa.list_(kind, width)))
        return pa.schema(fields)

    def _close(self) -> None:
        """Statistics of all, tasks, what is ours; info.json last; then the folder takes its name."""
        pa, pq = library("pyarrow"), library("pyarrow.parquet")
        files = sorted((self.parts / "meta/episodes").glob("*/*.parquet"))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        write_json(self.parts / "meta/stats.json", _together(rows, list(self.features)))
        tasks = pa.table({"task_index": np.arange(len(self.tasks)), "task": list(self.tasks)})
        index = {"index_columns": ["task"], "column_indexes": [], "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64", "metadata": None},
            {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
        ]}  # fmt: skip
        with atomic_path(self.parts / "meta/tasks.parquet") as partial:
            pq.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(index)}), partial)
        facts = [
            {"name": e.name, "operator": e.operator, "episode_seed": e.episode_seed,
             "simulator_width": None if e.states is None else e.states.shape[1]}
            for e in self.dataset
        ]  # fmt: skip
        write_json(self.parts / OURS, {
            "kind": "lerobot", "environment": plain(dict(self.dataset.environment)), "state": [plain(part) for part in self.state],
            "filters": {key: list(names) for key, names in self.dataset.filters.items()}, "episodes": facts,
            "tasks": list(self.dataset.tasks),
        })  # fmt: skip
        write_json(self.parts / INFO, {
            "codebase_version": VERSION, "fps": self.fps, "features": self.features, "total_episodes": len(self.dataset),
            "total_frames": self.dataset.num_steps, "total_tasks": len(self.tasks), "chunks_size": FILES,
            "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "data_path": DATA, "video_path": VIDEO if self.video else None,
            "robot_type": None, "splits": {"train": f"0:{len(self.dataset)}"},
        })  # fmt: skip
        old = self.path.with_name(f".{self.path.name}.old")
        with os_errors(self.path):
            if self.path.is_dir():  # asked for (--overwrite), and known to be a dataset
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.path, old)
            os.replace(self.parts, self.path)
            shutil.rmtree(old, ignore_errors=True)
        finish_lerobot(self.path)


def _cells(pa: Any, values: np.ndarray, kind: Any) -> Any:
    flat = np.ascontiguousarray(values).reshape(-1)
    if values.shape[1] == 1:
        return pa.array(flat, kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind)


def _png(frame: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame if frame.shape[2] == 3 else frame[..., 0]).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


class _Videos:
    """Encoders of one piece's videos: H.264, a key frame every second frame, so that any frame is near (LeRobot's choice)."""

    def __init__(self, paths: Mapping[str, Path], fps: int) -> None:
        self.paths, self.fps, self.open = paths, fps, {}  # type: tuple[Mapping[str, Path], int, dict[str, Any]]

    def __enter__(self) -> Callable[[str, np.ndarray], None]:
        return self.encode

    def encode(self, feature: str, frames: np.ndarray) -> None:
        av = library("av")
        if feature not in self.open:
            whole = atomic_path(self.paths[feature])
            container = av.open(str(whole.__enter__()), "w", format="mp4")
            stream = container.add_stream("libx264", rate=Fraction(self.fps), options={"crf": "18", "g": "2", "bf": "0"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            self.open[feature] = (whole, container, stream)
        _, container, stream = self.open[feature]
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for whole, container, stream in self.open.values():
            if kind is None:
                for packet in stream.encode():
                    container.mux(packet)
            container.close()
            whole.__exit__(kind, error, trace)


def _stats(values: np.ndarray, axes: tuple[int, ...], count: int) -> dict[str, Any]:
    """LeRobot's statistics over `axes` in the raw units (frames: of 0 to 1)."""
    found = {
        "min": values.min(axes),
        "max": values.max(axes),
        "mean": values.mean(axes),
        "std": values.std(axes),
        "count": np.array([count]),
    }
    quantiles = np.percentile(values, list(QUANTILES.values()), axis=axes)
    return found | dict(zip(QUANTILES, quantiles))


def _flat(stats: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    return {f"stats/{feature}/{name}": values.tolist() for feature, found in stats.items() for name, values in found.items()}


def _together(rows: list[dict[str, Any]], features: list[str]) -> dict[str, Any]:
    """Statistics of all episodes from those of each: exact, but for quantiles, which are averaged as LeRobot does."""
    found = {}
    for feature in features:

        def of(name: str, feature: str = feature) -> np.ndarray:
            return np.array([row[f"stats/{feature}/{name}"] for row in rows], np.float64)

        count, mean = of("count"), of("mean")
        share = (count / count.sum()).reshape(len(rows), *[1] * (mean.ndim - 1))
        middle = (share * mean).sum(0)
        variance = (share * (of("std") ** 2 + (mean - middle) ** 2)).sum(0)
        found[feature] = {
            "min": of("min").min(0).tolist(), "max": of("max").max(0).tolist(), "mean": middle.tolist(),
            "std": np.sqrt(variance).tolist(), "count": [int(count.sum())],
            **{name: (share * of(name)).sum(0).tolist() for name in QUANTILES},
        }  # fmt: skip
    return found


def finish_lerobot(path: str | Path) -> bool:
    """Whether a writer of `path` had come to its end when it was stopped; what it left in the folder is removed then."""
    mark = Path(path) / MARK
    if not (mark.is_file() and (Path(path) / INFO).is_file()):
        return False
    mark.unlink()
    return True


def check_replaceable(path: Path) -> None:
    """InputError if `path` is something else than a free name or a LeRobot dataset (which --overwrite may replace)."""
    if os.path.lexists(path) and not ((path / INFO).is_file() and not path.is_symlink()):
        raise InputError("The output is no LeRobot dataset, and is not replaced.", file=path, expected="a free name",
                         remedy="choose another name")  # fmt: skip
