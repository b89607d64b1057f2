"""LeRobotDataset v3: read as LeRobot writes it (by a writer of the tests' own), written, converted both ways, resumed, refused."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kills import in_a_process, kill_at_every_operation
from made import write_demonstrations
from postbc import cli
from postbc.data import Dataset, Facts, TrainingSetConfig, Windows, load_training_set, pusht, read_dataset, write_robomimic
from postbc.data.batches import read_ahead
from postbc.data.lerobot import describe_lerobot
from postbc.data.lerobot_files import LeRobotFolder
from postbc.errors import InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
av = pytest.importorskip("av")
from PIL import Image  # noqa: E402

from postbc.data import convert, lerobot_files, lerobot_write  # noqa: E402

LENGTHS = (5, 9, 7, 6)
FPS = 10


def grey(episode: int, step: int) -> int:
    return 30 + 40 * episode + 4 * step


def store(root: Path, *, files: int = 2, groups: str = "episode", success: bool = False, state: int = 3) -> Path:
    """A dataset with two cameras, episodes of LENGTHS split over `files` data files, a row group an episode or a file."""
    rng, cut = np.random.default_rng(0), np.array_split(np.arange(len(LENGTHS)), files)
    names = {"observation.state": state, "action": 2, "observation.effort": 4}
    features: dict[str, Any] = {k: {"dtype": "float32", "shape": [n], "names": None} for k, n in names.items()}
    features["observation.grid"] = {"dtype": "float64", "shape": [2, 2], "names": None}
    features["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    features["next.done"] = {"dtype": "bool", "shape": [1], "names": None}
    if success:
        features["next.success"] = {"dtype": "bool", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    numbers = [k for k in features]
    features["observation.images.wrist"] = {"dtype": "image", "shape": [4, 5, 3], "names": ["height", "width", "channels"]}
    features["observation.image"] = {"dtype": "video", "shape": [16, 24, 3], "names": ["height", "width", "channels"]}
    rows, first = [], 0
    for f, episodes in enumerate(cut):
        path = root / f"data/chunk-000/file-{f:03d}.parquet"
        video = root / f"videos/observation.image/chunk-000/file-{f:03d}.mp4"
        for file in (path, video):
            file.parent.mkdir(parents=True, exist_ok=True)
        tables, seconds = [], 0.0
        with av.open(str(video), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "10", "g": "3"})
            stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
            for e in episodes.tolist():
                n = LENGTHS[e]
                columns = {
                    "observation.state": list(rng.normal(size=(n, state)).astype(np.float32)),
                    "action": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=2 * n).astype(np.float32)), 2),
                    "observation.effort": list(rng.normal(size=(n, 4)).astype(np.float32)),
                    "observation.grid": [[[e, t], [t, 1.0]] for t in range(n)],
                    "next.reward": np.linspace(0, 0.9, n, dtype=np.float32), "next.done": np.arange(n) == n - 1,
                    "frame_index": np.arange(n), "episode_index": np.full(n, e), "index": np.arange(first, first + n),
                    "task_index": np.full(n, e % 2),
                }  # fmt: skip
                if success:
                    columns["next.success"] = np.arange(n) == n - 1
                wrist = rng.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)
                columns["observation.images.wrist"] = [{"bytes": png(frame), "path": None} for frame in wrist]
                tables.append(pa.table({key: columns[key] for key in (*numbers, "observation.images.wrist")}))
                for t in range(n):
                    frame = av.VideoFrame.from_ndarray(np.full((16, 24, 3), grey(e, t), np.uint8), format="rgb24")
                    container.mux(stream.encode(frame))
                rows.append({
                    "episode_index": e, "length": n, "dataset_from_index": first, "dataset_to_index": first + n,
                    "data/chunk_index": 0, "data/file_index": f, "videos/observation.image/chunk_index": 0,
                    "videos/observation.image/file_index": f, "videos/observation.image/from_timestamp": seconds,
                    "tasks": [f"task {e % 2}"], "stats/action/min": [0.0, 0.0],
                })  # fmt: skip
                first, seconds = first + n, seconds + n / FPS
            container.mux(stream.encode())
        if groups == "episode":
            with pq.ParquetWriter(path, tables[0].schema) as writer:
                for table in tables:
                    writer.write_table(table)
        else:
            pq.write_table(pa.concat_tables(tables), path)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    info = {
        "codebase_version": "v3.0", "fps": FPS, "features": features, "splits": {"train": "0:3", "test": "3:4", "all": "0:4"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_row_group_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames asked for in any order, of two files of one row group each; in a bound memory."""
    folder = LeRobotFolder(store(tmp_path / "set", groups="file"))
    read: list[Path] = []
    opened = folder._open

    class Watched:
        def __init__(self, path: Path) -> None:
            self.path, self.table = path, opened(path)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.table, name)

        def read_row_group(self, group: int, columns: list[str]) -> Any:
            read.append(self.path)
            return self.table.read_row_group(group, columns=columns)

    monkeypatch.setattr(folder, "_open", Watched)
    camera, order = folder["observation.images.wrist"], [0, 20, 3, 26, 13, 14]
    frames = [camera[row : row + 1] for row in order]
    assert len(read) == 2
    monkeypatch.setattr(lerobot_files, "PACKED", 1)
    bound = LeRobotFolder(tmp_path / "set")
    np.testing.assert_array_equal([bound["observation.images.wrist"][row : row + 1] for row in order], frames)
    assert len(bound._packed) == 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("lerobot") / "set")


@pytest.mark.parametrize(("files", "groups"), [(1, "file"), (2, "episode"), (3, "file")])
def test_read(tmp_path: Path, files: int, groups: str) -> None:
    path = store(tmp_path / "set", files=files, groups=groups)
    dataset = read_dataset(path, image_keys=["wrist", "observation.image"], parts=("rewards", "dones"))
    assert dataset.shapes == {"state": (3,), "image.wrist": (3, 4, 5), "image.top": (3, 16, 24)}
    assert (dataset.names, dataset.lengths.tolist()) == (("demo_0", "demo_1", "demo_2", "demo_3"), list(LENGTHS))
    assert dataset.state_keys == ("observation.state",)
    assert [e.task for e in dataset] == ["task 0", "task 1", "task 0", "task 1"]
    assert dataset.filters == {"train": ("demo_0", "demo_1", "demo_2"), "test": ("demo_3",)}
    assert Facts.of_dataset(dataset).control_freq == FPS
    rng = np.random.default_rng(0)
    for episode, n in zip(dataset, LENGTHS):
        np.testing.assert_array_equal(episode.state, rng.normal(size=(n, 3)).astype(np.float32))
        np.testing.assert_array_equal(episode.actions, rng.normal(size=2 * n).astype(np.float32).reshape(n, 2))
        rng.normal(size=(n, 4))
        frames = rng.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(episode.observations["image.wrist"][:], frames)
        np.testing.assert_array_equal(episode.observations["image.wrist"][np.array([n - 1, 0, 2])], frames[[n - 1, 0, 2]])
        np.testing.assert_array_equal(episode.rewards, np.linspace(0, 0.9, n, dtype=np.float32))
        assert np.flatnonzero(episode.dones).tolist() == [n - 1]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_frame_of_a_video(root: Path, data: st.DataObject) -> None:
    """Whatever was read before, and across the border of a file: the frame of that very step."""
    dataset = read_dataset(root, image_keys=["image.top"])
    for _ in range(3):
        e = data.draw(st.integers(0, 3))
        steps = np.array(data.draw(st.lists(st.integers(0, LENGTHS[e] - 1), min_size=1, max_size=6)))
        found = dataset[e].observations["image.top"][steps]
        assert found.shape == (len(steps), 3, 16, 24)
        np.testing.assert_allclose(found.mean((1, 2, 3)), [grey(e, t) for t in steps], atol=1.5)


def test_frames_are_read_ahead_by_threads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are decoded by one of them at a time: the frames are those of one after another."""
    monkeypatch.setattr("postbc.data.windows.CACHE", 0)
    windows = Windows(read_dataset(root, image_keys=["wrist", "observation.image"]), 2)
    batches = torch.randint(len(windows), (12, 8), generator=torch.Generator().manual_seed(0))
    for rows, observation in zip(batches, read_ahead(windows, batches, "cpu")):
        for name, value in windows.observation(rows).items():
            assert torch.equal(observation[name], value)


def test_some_episodes_and_other_observations(root: Path) -> None:
    whole = read_dataset(root, observation_keys=["observation.effort", "observation.grid"])
    assert whole.state_dims == (4, 4)
    np.testing.assert_array_equal(whole[2].state[3, 4:], [2, 3, 3, 1])
    some = read_dataset(root, names=["demo_3", "demo_1"], observation_keys=["observation.effort", "observation.grid"])
    assert some.names == ("demo_1", "demo_3")
    for episode in some:
        np.testing.assert_array_equal(episode.state, whole.keep([episode.name])[0].state)
    assert read_dataset(root, filter_key="test").lengths.tolist() == [LENGTHS[3]]
    assert list(read_dataset(root, observation_keys=[], image_keys=["image.wrist"]).shapes) == ["image.wrist"]


def test_success_is_what_rewards_are_where_it_is_there(tmp_path: Path) -> None:
    dataset = read_dataset(store(tmp_path / "set", success=True), parts=("rewards",))
    assert [e.rewards.tolist() for e in dataset if e.rewards is not None] == [[0.0] * (n - 1) + [1.0] for n in LENGTHS]
    assert "success is: next.success" in describe_lerobot(tmp_path / "set")


def test_pusht_is_recognised(tmp_path: Path) -> None:
    path = store(tmp_path / "set", state=2)
    info = json.loads((path / "meta/info.json").read_text())
    assert read_dataset(path).state_keys == ("observation.state",)
    info["features"]["observation.environment_state"] = info["features"].pop("observation.effort") | {"shape": [16]}
    (path / "meta/info.json").write_text(json.dumps(info))
    for file in (path / "data").glob("*/*.parquet"):
        table = pq.read_table(file).drop_columns(["observation.effort"])
        keypoints = pa.array(list(np.ones((len(table), 16), np.float32)))
        pq.write_table(table.append_column("observation.environment_state", keypoints), file)
    dataset = read_dataset(path)
    assert (dataset.state_keys, dataset.environment) == (pusht.STATE_KEYS, pusht.ENVIRONMENT)


def test_trained_on_without_a_frame_in_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postbc.data.windows.CACHE", 0)
    config = TrainingSetConfig(
        demonstrations=root, num_trajectories=2, chunk=3, image_keys=("observation.image",), statistics="subset"
    )
    data = load_training_set(config, 0)
    seen = data.windows.observation(torch.tensor([0, len(data.windows) - 1]))
    assert (seen["image.top"].shape, seen["state"].shape) == ((2, 3, 16, 24), (2, 3))


def change_info(root: Path, **changes: Any) -> None:
    file = root / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_feature(root: Path, name: str, **changes: Any) -> None:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    change_info(root, features=features | {name: features[name] | changes})


def change_table(root: Path, change: Callable[[Any], Any], file: str = "data/chunk-000/file-001.parquet") -> None:
    pq.write_table(change(pq.read_table(root / file)), root / file)


def replaced(name: str, values: Any) -> Callable[[Any], Any]:
    return lambda t: t.set_column(t.column_names.index(name), name, values(t.column(name)))


EPISODES = "meta/episodes/chunk-000/file-000.parquet"
SPOILS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not JSON": (lambda f: (f / "meta/info.json").write_text("{"), "description cannot be read"),
    "a list": (lambda f: (f / "meta/info.json").write_text("[]"), "description cannot be read"),
    "format 2.1": (lambda f: change_info(f, codebase_version="v2.1"), r"(?s)another LeRobot format.*convert_dataset_v21_to_v30"),
    "no rate": (lambda f: change_info(f, fps="fast"), "rate is not a number"),
    "bad shape": (lambda f: change_feature(f, "action", shape="x"), "not described"),
    "text actions": (lambda f: change_table(f, replaced("action", lambda c: pa.array(["x"] * len(c)))), "does not hold the numbers"),
    "missing numbers": (
        lambda f: change_table(f, replaced("action", lambda c: pa.array([None] * len(c), pa.list_(pa.float32(), 2)))),
        "does not hold the numbers",
    ),
    "ragged": (lambda f: change_table(f, replaced("observation.state", lambda c: pa.array([[1.0]] * len(c)))), "does not hold"),
    "NaN": (
        lambda f: change_table(f, replaced("action", lambda c: pa.array([[np.nan, 0.0]] * len(c)))), r"(?s)NaN.*demo_2/actions",
    ),
    "no actions": (lambda f: change_info(f, features={}), "no actions|nothing to observe"),
    "column gone": (lambda f: change_table(f, lambda t: t.drop_columns(["action"])), "lacks a column"),
    "file gone": (lambda f: (f / "data/chunk-000/file-001.parquet").unlink(), "lacks a file"),
    "rubbish": (lambda f: (f / "data/chunk-000/file-001.parquet").write_bytes(b"PAR1rubbish"), "cannot be read"),
    "rows gone": (lambda f: change_table(f, lambda t: t.slice(0, 8)), "fewer rows"),
    "rows swapped": (lambda f: change_table(f, lambda t: t.take(pa.array(range(len(t) - 1, -1, -1)))), "do not follow one another"),
    "episodes gone": (lambda f: (f / EPISODES).unlink(), "table of its episodes"),
    "episode gone": (lambda f: change_table(f, lambda t: t.slice(1), EPISODES), "do not follow one another"),
    "no lengths": (lambda f: change_table(f, lambda t: t.drop_columns(["length"]), EPISODES), "cannot be read|lacks a column"),
    "elsewhere": (lambda f: change_info(f, data_path="../{chunk_index}/{file_index}.parquet"), "template cannot be used"),
    "template": (lambda f: change_info(f, data_path="{other}.parquet"), "template cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILS)
def test_refused(root: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "set"
    shutil.copytree(root, copy)
    spoil, words = SPOILS[name]
    spoil(copy)
    with pytest.raises(InputError, match=words):
        read_dataset(copy)


FRAMES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "video gone": (lambda f: (f / "videos/observation.image/chunk-000/file-000.mp4").unlink(), "lacks a video"),
    "video rubbish": (
        lambda f: (f / "videos/observation.image/chunk-000/file-000.mp4").write_bytes(b"x" * 99),
        "cannot be read",
    ),
    "video short": (lambda f: change_info(f, fps=1), "lacks a frame"),
    "other size": (lambda f: change_feature(f, "observation.image", shape=[16, 16, 3]), "another size"),
    "depth": (lambda f: change_feature(f, "observation.image", info={"is_depth_map": True}), "kind that is not read"),
    "no such": (lambda f: change_feature(f, "observation.image", dtype="float32"), "no such camera"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_refused(root: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "set"
    shutil.copytree(root, copy)
    spoil, words = FRAMES[name]
    spoil(copy)
    with pytest.raises(InputError, match=words):
        read_dataset(copy, image_keys=["image.top"])[0].observations["image.top"][:]


def test_an_image_that_is_none_is_refused(root: Path, tmp_path: Path) -> None:
    for packed, words in ((b"x", "cannot be read"), (None, "not in the data file")):
        copy = tmp_path / words
        shutil.copytree(root, copy)
        cells = [{"bytes": packed, "path": "wrist.png"}] * 13
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        change_table(copy, replaced("observation.images.wrist", lambda c, x=cells, k=kind: pa.array(x, k)))
        with pytest.raises(InputError, match=words):
            read_dataset(copy, image_keys=["wrist"])[2].observations["image.wrist"][0]


def test_requests_that_do_not_fit(root: Path) -> None:
    for options, words in (
        ({"observation_keys": ["nose"]}, "other names"), ({"image_keys": ["nose"]}, "no such camera"),
        ({"names": ["demo_4"]}, "no such episode"), ({"filter_key": "nose"}, "no such filter"),
        ({"observation_keys": []}, "nothing to observe"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            read_dataset(root, **options)  # type: ignore[arg-type]


def test_without_the_packages_it_says_which_extra(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"postbc\[lerobot-data\]"):
        LeRobotFolder(root)


# -- writing and converting ------------------------------------------------------------------------------------------------------
def assert_equal(a: Dataset, b: Dataset) -> None:
    for name in ("names", "state_keys", "state_dims", "environment", "filters"):
        assert getattr(a, name) == getattr(b, name), name
    for x, y in zip(a, b, strict=True):
        for name in ("operator", "episode_seed", "task"):
            assert getattr(x, name) == getattr(y, name)
        for name in ("actions", "rewards", "dones", "states"):
            one, other = getattr(x, name), getattr(y, name)
            assert (one is None) == (other is None), name
            if one is not None:
                np.testing.assert_array_equal(one, other)
        assert set(x.observations) == set(y.observations)
        for key in x.observations:
            np.testing.assert_array_equal(x.observations[key][:], y.observations[key][:])


PARTS = ("rewards", "dones", "states")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_there_and_back_again(tmp_path: Path, data: st.DataObject) -> None:
    """robomimic → LeRobot → robomimic, whatever there is, in pieces of any size: nothing is lost."""
    draw = data.draw
    rng, n = np.random.default_rng(draw(st.integers(0, 99))), draw(st.integers(1, 4))
    lengths = [draw(st.integers(1, 6)) for _ in range(n)]
    keys = draw(st.permutations(["robot0_eef_pos", "object", "robot0_gripper_qpos"]))[: draw(st.integers(1, 3))]
    dims = [draw(st.integers(1, 3)) for _ in keys]
    cameras = draw(st.sampled_from([{}, {"image.wrist": (3, 4, 6)}, {"image.top": (1, 2, 3), "image.wrist": (3, 2, 2)}]))
    has = {part: draw(st.booleans()) for part in PARTS}
    dataset = Dataset.from_arrays(
        [{"state": rng.normal(size=(m, sum(dims))), **{k: rng.integers(0, 256, (m, *s), dtype=np.uint8) for k, s in cameras.items()}}
         for m in lengths],
        [rng.normal(size=(m, 2)) for m in lengths],
        rewards=[rng.normal(size=m) for m in lengths] if has["rewards"] else None,
        dones=[np.arange(m) == m - 1 for m in lengths] if has["dones"] else None,
        states=[rng.normal(size=(m, 5)) for m in lengths] if has["states"] else None,
        operators=[draw(st.sampled_from([None, "operator_a"])) for _ in lengths], state_keys=keys, state_dims=dims,
        environment=draw(st.sampled_from([{}, {"env_name": "Lift", "env_kwargs": {"control_freq": 20}}])),
        filters=draw(st.sampled_from([{}, {"some": ["demo_0"]}])),
    )  # fmt: skip
    tmp_path = tmp_path / str(len(list(tmp_path.iterdir())))
    tmp_path.mkdir()
    piece = draw(st.sampled_from([1, 200, 2**28]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lerobot_write, "PIECE", piece)
        writer = lerobot_write.LeRobotWriter(tmp_path / "set", dataset, "x", fps=7 if not dataset.environment else None)
        writer.write()
    assert piece == 2**28 or len(writer.pieces) > 1 or n == 1 or piece == 200
    back = read_dataset(tmp_path / "set", image_keys=list(cameras), parts=PARTS)
    assert_equal(back, dataset)
    write_robomimic(tmp_path / "back.hdf5", back)
    again = read_dataset(tmp_path / "back.hdf5", observation_keys=keys, image_keys=list(cameras), parts=PARTS)
    assert_equal(again, dataset)
    (tmp_path / "set/meta/postbc.json").unlink()  # as somebody else's
    alone = read_dataset(tmp_path / "set")
    assert sum(alone.state_dims) == sum(dims)


def test_convert_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_demonstrations(tmp_path / "a.hdf5", images={"agentview_image": (6, 8, 3)})
    with h5py.File(source, "a") as file:
        file["data/demo_1"].attrs["task"] = "lift the cube"
    folder, back = tmp_path / "set", tmp_path / "b.hdf5"
    assert cli.main(["demos", "convert", str(source), "--output", str(folder), "--to", "lerobot"]) == 0
    assert "6 episodes, 72 steps" in capsys.readouterr().out
    assert cli.main(["demos", "convert", str(folder), "--output", str(back)]) == 0
    a, b = (read_dataset(path, image_keys=["agentview_image"], parts=PARTS) for path in (source, back))
    assert_equal(a, b)
    assert a[1].task == "lift the cube"
    assert Windows(a, 4).fingerprint == Windows(read_dataset(folder, image_keys=["image.agentview"]), 4).fingerprint
    info = json.loads((folder / "meta/info.json").read_text())
    assert {k: f["shape"] for k, f in info["features"].items() if k.startswith("observation")} == {
        "observation.state": [9], "observation.environment_state": [10], "observation.images.agentview": [6, 8, 3],
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.hdf5", "b.hdf5", "set"]
    assert cli.main(["demos", "convert", str(source), "--output", str(folder), "--to", "lerobot"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (
        cli.main(["demos", "convert", str(source), "--output", str(folder), "--to", "lerobot", "--video", "--overwrite"]) == 0
    )
    frames = read_dataset(folder, image_keys=["agentview"])[2].observations["image.agentview"]
    assert frames.shape == (12, 3, 6, 8)
    assert (folder / "videos/observation.images.agentview/chunk-000/file-000.mp4").stat().st_size > 0
    assert (
        np.abs(frames[:].astype(int) - np.asarray(a[2].observations["image.agentview"][:])).mean() < 60
    )  # noise does not compress
    assert cli.main(["demos", "inspect", str(folder), "--output", str(tmp_path / "a.png")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "LeRobotDataset v3, 20 frames a second" in said
    assert "observation.images.agentview (image.agentview, video)" in said
    assert "robot0_eef_pos (3), robot0_eef_quat (4), robot0_gripper_qpos (2), object (10)" in said


def test_statistics_are_those_of_all_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot_write, "PIECE", 500)
    dataset = read_dataset(write_demonstrations(tmp_path / "a.hdf5", images={"top_image": (4, 4, 3)}), image_keys=["top_image"])
    lerobot_write.LeRobotWriter(tmp_path / "set", dataset, "x").write()
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    frames = np.concatenate([e.observations["image.top"][:] for e in dataset]) / 255
    for key, values, axes in (
        ("action", dataset.actions, 0), ("observation.environment_state", dataset.states[:, 9:], 0),
        ("observation.images.top", frames, (0, 2, 3)),
    ):  # fmt: skip
        for name in ("min", "max", "mean", "std"):
            expected = getattr(values, name)(axes)
            np.testing.assert_allclose(np.ravel(stats[key][name]), expected, rtol=1e-5, atol=1e-6)
    assert np.shape(stats["observation.images.top"]["mean"]) == (3, 1, 1)
    assert stats["index"]["count"] == [72]


def test_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_demonstrations(tmp_path / "a.hdf5", images={"agentview_image": (5, 8, 3)}, environment={})
    with h5py.File(source, "a") as file:
        del file["data"].attrs["env_args"]
    before, lerobot = sorted(tmp_path.iterdir()), ["--to", "lerobot"]
    (tmp_path / "folder").mkdir()
    convert = ["demos", "convert", str(source), "--output"]
    for arguments, words in (
        ([*convert, str(tmp_path / "set"), *lerobot], "steps are a second"),
        ([*convert, str(tmp_path / "set"), *lerobot, "--fps", "20", "--video"], "cannot hold frames of this size"),
        ([*convert, str(tmp_path / "folder"), *lerobot, "--overwrite", "--fps", "20"], "is not replaced"),
        ([*convert, str(tmp_path / "b.hdf5"), "--fps", "20"], "option of LeRobot"),
        ([*convert, str(tmp_path / "set"), *lerobot, "--episodes", "3"], "Only zarr"),
    ):
        assert cli.main(arguments) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "folder").rmdir()
    with h5py.File(source, "a") as file:
        del file["data/demo_2/rewards"]
    assert cli.main([*convert, str(tmp_path / "set"), *lerobot, "--fps", "20"]) == 2
    assert "what others lack" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_another_source_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was made of the same source is taken over, and it is not made again."""
    monkeypatch.setattr(lerobot_write, "PIECE", 500)
    made: list[int] = []
    sources = [read_dataset(write_demonstrations(tmp_path / f"{i}.hdf5", seed=i)) for i in range(2)]
    plain, stop = lerobot_write.LeRobotWriter._piece, 4

    def counted(self: Any, piece: range, *rest: Any) -> None:
        if len(made) == stop:
            raise KeyboardInterrupt
        plain(self, piece, *rest)
        made.append(piece.start)

    monkeypatch.setattr(lerobot_write.LeRobotWriter, "_piece", counted)
    for name, second in (("same", 0), ("other", 1)):
        made, stop = [], 4
        with pytest.raises(KeyboardInterrupt):
            lerobot_write.LeRobotWriter(tmp_path / name, sources[0], "first").write()
        assert not (tmp_path / name).exists()
        stop = -1
        lerobot_write.LeRobotWriter(tmp_path / name, sources[second], ("first", "second")[second]).write()
        assert made == [0, 1, 2, 3, *((4, 5) if second == 0 else range(6))]
        np.testing.assert_array_equal(read_dataset(tmp_path / name).actions, sources[second].actions)


def test_a_large_copy_in_hdf5_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece, to the bytes that are written at once; only what was made of the same source is taken over."""
    source = write_demonstrations(tmp_path / "a.hdf5", images={"agentview_image": (6, 8, 3)}, tasks=("lift", "drop"))
    folder, arguments = tmp_path / "set", ["--overwrite", "--output"]
    assert cli.main(["demos", "convert", str(source), "--output", str(folder), "--to", "lerobot"]) == 0
    assert cli.main(["demos", "convert", str(folder), *arguments, str(tmp_path / "whole.hdf5")]) == 0
    made, stop = list[str](), 3

    def stopping(path: Path, dataset: Any, **options: Any) -> Path:
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(" ".join(dataset.names))
        return write_robomimic(path, dataset, **options)

    monkeypatch.setattr(convert, "write_robomimic", stopping)
    monkeypatch.setattr(convert, "LARGE", 6000)  # two episodes: 12 steps of 4 * (19 + 7) + 6 * 8 * 3 bytes each
    with pytest.raises(KeyboardInterrupt):
        convert.copy_dataset(
            read_dataset(folder, image_keys=["agentview"], parts=PARTS), lambda: "another", tmp_path / "b.hdf5"
        )
    assert made == ["demo_0 demo_1", "demo_2 demo_3", "demo_4 demo_5"]
    made, stop = [], 2
    convert_it = ["demos", "convert", str(folder), *arguments, str(tmp_path / "b.hdf5")]
    with pytest.raises(KeyboardInterrupt):
        cli.main(convert_it)
    assert not (tmp_path / "b.hdf5").exists()
    made, stop = [], -1
    assert cli.main(convert_it) == 0
    assert made == ["demo_4 demo_5", "demo_0 demo_1 demo_2 demo_3 demo_4 demo_5"]
    assert (tmp_path / "b.hdf5").read_bytes() == (tmp_path / "whole.hdf5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.hdf5", "b.hdf5", "set", "whole.hdf5"]


def test_killed_at_every_operation_it_ends_with_the_same_files(tmp_path: Path) -> None:
    in_a_process(__file__, tmp_path)


def _stage(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    source = directory.parent / "a.hdf5"
    folder, back = directory / "set", directory / "back.hdf5"
    if not lerobot_write.finish_lerobot(folder) and not folder.exists():
        assert cli.main(["demos", "convert", str(source), "--output", str(folder), "--to", "lerobot"]) == 0
    if not convert.finish(back) and not back.exists():
        assert cli.main(["demos", "convert", str(folder), "--output", str(back)]) == 0


if __name__ == "__main__":
    lerobot_write.PIECE, convert.LARGE = 1500, 100
    write_demonstrations(Path(sys.argv[1]) / "a.hdf5", 2)
    _stage(Path(sys.argv[1]) / "warm")  # everything is imported before the forks
    kill_at_every_operation(_stage, Path(sys.argv[1]), stride=7)
