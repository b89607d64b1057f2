"""diffusion_policy's zarr files: folders and zips, every compression, Push-T as gym-pusht has it; damaged ones are refused."""

from __future__ import annotations

import bz2
import json
import lzma
import random
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postbc import cli
from postbc.data import Facts, TrainingSetConfig, Windows, load_training_set, pusht, read_dataset
from postbc.data.zarr import ZarrGroup, is_zarr, read_zarr
from postbc.errors import InputError

PACK: dict[str, Callable[[bytes], bytes]] = {"zlib": zlib.compress, "bz2": bz2.compress, "lzma": lzma.compress}


def put(folder: Path, key: str, values: np.ndarray, codec: str | None = None, rows: int = 7, between: str = ".") -> None:
    """Write one array of zarr's format 2: pieces of `rows` rows (and, where it has more axes, of 2 along the second)."""
    values = np.asarray(values)
    chunks = (rows, *((2,) if values.ndim > 1 else ()), *values.shape[2:])
    meta = {"zarr_format": 2, "shape": values.shape, "chunks": chunks, "dtype": values.dtype.str, "order": "C", "filters": None,
            "fill_value": 0, "compressor": {"id": codec} if codec else None, "dimension_separator": between}  # fmt: skip
    (folder / key).mkdir(parents=True)
    (folder / key / ".zarray").write_text(json.dumps(meta))
    counts = [-(-n // c) for n, c in zip(values.shape, chunks)]
    for place in np.ndindex(*counts):
        piece = np.zeros(chunks, values.dtype)
        part = values[tuple(slice(k * c, (k + 1) * c) for k, c in zip(place, chunks))]
        piece[tuple(slice(0, n) for n in part.shape)] = part
        content = piece.tobytes()
        if codec in PACK:
            content = PACK[codec](content)
        elif codec:
            content = pytest.importorskip("numcodecs").get_codec({"id": codec}).encode(content)
        file = folder / key / between.join(map(str, place))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def store(folder: Path, lengths: tuple[int, ...] = (9, 12, 10), codec: str | None = "zlib", **options: Any) -> Path:
    """A small Push-T: the block wanders slowly within an episode, and jumps between two."""
    rng, n = np.random.default_rng(0), sum(lengths)
    parts = []
    for length in lengths:
        start = np.array([*rng.uniform(50, 450, 4), rng.uniform(0, 6)])
        parts.append(start + np.cumsum(rng.normal(size=(length, 5)) * [2, 2, 1, 1, 0.01], 0))
    state = np.concatenate(parts).astype(np.float32)
    frames = rng.integers(0, 256, (n, 6, 5, 3)).astype(np.float32)
    frames[0] = 255
    arrays = {"data/state": state, "data/action": rng.uniform(0, 512, (n, 2)).astype(np.float32),
              "data/keypoint": rng.uniform(0, 512, (n, 9, 2)).astype(np.float32), "data/img": frames,
              "meta/episode_ends": np.cumsum(lengths)}  # fmt: skip
    for key, values in arrays.items():
        put(folder, key, values, codec, **options)
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    return folder


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zarr.zip")
    with zipfile.ZipFile(path, "w") as file:
        for entry in sorted(p for p in folder.rglob("*") if p.is_file()):
            file.write(entry, entry.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize(
    ("codec", "between"), [(None, "."), ("zlib", "/"), ("bz2", "."), ("lzma", "."), ("blosc", "."), ("zstd", ".")]
)
def test_read(tmp_path: Path, codec: str | None, between: str) -> None:
    folder = store(tmp_path / "store", codec=codec, between=between)
    plain = read_zarr(store(tmp_path / "plain", codec=None), image_keys=["img"], observation_keys=["state", "keypoint"])
    for path in (folder, zipped(folder)):
        assert is_zarr(path)
        dataset = read_dataset(path, image_keys=["image.top"], observation_keys=["state", "keypoint"], parts=("dones",))
        assert dataset.shapes == {"state": (23,), "image.top": (3, 6, 5)}
        assert dataset.lengths.tolist() == [9, 12, 10]
        assert [e.rewards for e in dataset] == [None] * 3
        assert [np.flatnonzero(e.dones).tolist() for e in dataset] == [[8], [11], [9]]
        for a, b in zip(dataset, plain):
            np.testing.assert_array_equal(a.state, b.state)
            np.testing.assert_array_equal(a.actions, b.actions)
            np.testing.assert_array_equal(a.observations["image.top"][2:7], b.observations["image.top"][2:7])
    assert read_dataset(folder, names=["demo_1"]).lengths.tolist() == [12]


PACKINGS: dict[str, dict[str, Any]] = {
    "default": {}, "plain": {"compressors": None}, "big endian": {"serializer": {"name": "bytes", "configuration": {"endian": "big"}}},
    "blosc": {"compressors": {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}}},
    "gzip, points": {"compressors": {"name": "gzip", "configuration": {"level": 1}},
                     "chunk_key_encoding": {"name": "v2", "separator": "."}},
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
def test_format_3_as_zarr_writes_it(tmp_path: Path, packing: str) -> None:
    zarr = pytest.importorskip("zarr", minversion="3")
    plain = read_zarr(store(tmp_path / "plain"), image_keys=["img"], observation_keys=["state", "keypoint"])
    root = zarr.open_group(tmp_path / "three.zarr", mode="w", zarr_format=3)
    old = {key: read_whole(tmp_path / "plain", key) for key in
           ("data/state", "data/action", "data/keypoint", "data/img", "meta/episode_ends")}  # fmt: skip
    for key, values in old.items():
        options = {} if values.ndim == 1 else PACKINGS[packing]
        array = root.create_array(key, shape=values.shape, dtype=values.dtype, chunks=(7, *values.shape[1:]), **options)
        array[:] = values
    for path in (tmp_path / "three.zarr", zipped(tmp_path / "three.zarr")):
        assert is_zarr(path)
        dataset = read_dataset(path, image_keys=["img"], observation_keys=["state", "keypoint"])
        for a, b in zip(dataset, plain, strict=True):
            np.testing.assert_array_equal(a.state, b.state)
            np.testing.assert_array_equal(a.actions, b.actions)
            np.testing.assert_array_equal(a.observations["image.top"][2:7], b.observations["image.top"][2:7])


def read_whole(path: Path, key: str) -> np.ndarray:
    return ZarrGroup(path)[key][:]


def test_format_3_refused(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", minversion="3")
    root = zarr.open_group(tmp_path / "z", mode="w", zarr_format=3)
    root.create_array("data/action", shape=(8, 2), chunks=(4, 2), shards=(8, 2), dtype="f4")[:] = 1
    root.create_array("data/state", shape=(8, 2), chunks=(4, 2), dtype="f4")[:4] = 1  # the second half is all 0: left out
    root.create_array("meta/episode_ends", shape=(1,), dtype="i8")[:] = 8
    with pytest.raises(InputError, match="kind that is not read"):
        ZarrGroup(tmp_path / "z")["data/action"]
    with pytest.raises(InputError, match=r"(?s)would read as 0.*write_empty_chunks"):
        ZarrGroup(tmp_path / "z")["data/state"][:]
    (tmp_path / "z/data/state/zarr.json").write_text('{"zarr_format": 3}')
    with pytest.raises(InputError, match="description"):
        ZarrGroup(tmp_path / "z")["data/state"]


def test_pusht_is_recognised(tmp_path: Path) -> None:
    folder = store(tmp_path / "store")
    dataset = read_dataset(folder)
    assert (dataset.state_keys, dataset.state_dims) == (("agent_pos", "keypoints"), (2, 16))
    assert Facts.of_dataset(dataset).environment == "PushT"
    raw = read_dataset(folder, observation_keys=["state"])
    np.testing.assert_allclose(dataset[1].state[:, :2], raw[1].state[:, :2])
    np.testing.assert_allclose(dataset[1].state, pusht.observation(raw[1].state), atol=1e-3)
    pixels = read_dataset(folder, observation_keys=["agent_pos"], image_keys=["img"])
    assert pixels.shapes == {"state": (2,), "image.top": (3, 6, 5)}


def test_keypoints_are_gym_pushts() -> None:
    gym_pusht = pytest.importorskip("gym_pusht.envs.pusht")
    env = gym_pusht.PushTEnv(obs_type="environment_state_agent_pos")
    for seed in range(5):
        seen, info = env.reset(seed=seed)
        state = np.concatenate([info["pos_agent"], info["block_pose"]])
        np.testing.assert_allclose(pusht.keypoints(state), seen["environment_state"], atol=1e-9)
        np.testing.assert_allclose(pusht.observation(state), [*seen["agent_pos"], *seen["environment_state"]], rtol=1e-6)


def test_trained_on_without_a_frame_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postbc.data.windows.CACHE", 0)
    config = TrainingSetConfig(
        demonstrations=zipped(store(tmp_path / "store")), num_trajectories=2, chunk=3, image_keys=("img",), statistics="subset"
    )
    data = load_training_set(config, 0)
    assert len(data.dataset) == 2
    seen = data.windows.observation(torch.tensor([0, len(data.windows) - 1]))
    assert (seen["image.top"].shape, seen["state"].shape) == ((2, 3, 6, 5), (2, 18))
    assert len({data.fingerprint, load_training_set(config, 1).fingerprint}) == 2


def test_without_ends_it_is_cut_where_it_is_told_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = store(tmp_path / "store")
    (folder / "meta/episode_ends/.zarray").unlink()
    with pytest.raises(InputError, match=r"(?s)where its episodes end.*convert FILE --episodes N"):
        read_dataset(folder)
    path, output = zipped(folder), tmp_path / "pusht.hdf5"
    assert cli.main(["demos", "convert", str(path), "--output", str(output), "--episodes", "3", "--image-keys", "img"]) == 0
    assert "3 episodes, 31 steps, 9 to 12 an episode" in capsys.readouterr().out
    with h5py.File(output) as file:
        assert file["data/demo_1/obs/top_image"].shape == (12, 6, 5, 3)
    converted, reference = read_dataset(output, image_keys=["image.top"]), read_zarr(folder, episodes=3, image_keys=["img"])
    assert converted.state_keys == ("agent_pos", "keypoints")
    assert converted.environment == pusht.ENVIRONMENT
    assert Windows(converted, 2).fingerprint == Windows(reference, 2).fingerprint
    for wrong in ("5", "32"):  # it cannot be told
        assert cli.main(["demos", "convert", str(path), "--output", str(output), "--episodes", wrong, "--overwrite"]) == 2
    assert "episodes" in capsys.readouterr().err


def spoil_meta(folder: Path, **changes: Any) -> None:
    file = folder / "data/state/.zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


SPOILS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing piece": (lambda f: (f / "data/state/1.0").unlink(), "would read as 0"),
    "short piece": (lambda f: (f / "data/state/1.0").write_bytes(zlib.compress(b"1234")), "damaged"),
    "bomb": (lambda f: (f / "data/state/1.0").write_bytes(zlib.compress(bytes(10**7))), "damaged"),
    "rubbish piece": (lambda f: (f / "data/state/1.0").write_bytes(b"rubbish"), "cannot be unpacked"),
    "no action": (lambda f: (f / "data/action/.zarray").unlink(), "lacks an array"),
    "not JSON": (lambda f: (f / "data/state/.zarray").write_text("{"), "description"),
    "list": (lambda f: (f / "data/state/.zarray").write_text("[]"), "description"),
    "pickles": (lambda f: spoil_meta(f, dtype="|O", filters=[{"id": "pickle"}]), "kind that is not read"),
    "complex": (lambda f: spoil_meta(f, dtype="<c8"), "kind that is not read"),
    "unknown codec": (lambda f: spoil_meta(f, compressor={"id": "evil"}), "kind that is not read"),
    "huge pieces": (lambda f: spoil_meta(f, chunks=[2**40, 5]), "kind that is not read"),
    "huge": (lambda f: spoil_meta(f, shape=[2**60, 5]), "one row a step"),
    "negative": (lambda f: spoil_meta(f, shape=[-3, 5]), "kind that is not read"),
    "other length": (lambda f: spoil_meta(f, shape=[30, 5]), "one row a step"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_refused(tmp_path: Path, name: str) -> None:
    folder = store(tmp_path / "store")
    spoil, words = SPOILS[name]
    spoil(folder)
    for path in (folder, zipped(folder)):
        with pytest.raises(InputError, match=words):
            read_zarr(path)


@pytest.mark.parametrize("ends", [[9, 21, 30], [9, 9, 31], [21, 9, 31], [0, 31], [[31]], [9.0, 31.0], [9, 21, 40], [-3, 31]])
def test_ends_that_do_not_fit(tmp_path: Path, ends: Any) -> None:
    folder = store(tmp_path / "store")
    (folder / "meta/episode_ends").rename(folder / "old")
    put(folder, "meta/episode_ends", np.array(ends))
    with pytest.raises(InputError, match="ends do not fit"):
        read_zarr(folder)


def test_requests_that_do_not_fit(tmp_path: Path) -> None:
    folder = store(tmp_path / "store")
    for options, words in (
        ({"observation_keys": ["nose"]}, "other names"), ({"image_keys": ["nose"]}, "lacks an array"),
        ({"image_keys": ["keypoint"]}, "one frame a step"), ({"names": ["demo_3"]}, "no such episode"),
        ({"filter_key": "train"}, "no such filter"), ({"observation_keys": []}, "nothing to observe"), ({"episodes": 0}, "Cannot cut"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            read_zarr(folder, **options)  # type: ignore[arg-type]
    assert not is_zarr(tmp_path)
    assert not is_zarr(tmp_path / "nowhere.zip")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["flip", "cut", "fill"]))
def test_changed_bytes(small: bytes, tmp_path: Path, seed: int, kind: str) -> None:
    """A zip keeps a checksum of every entry: refused, or the undisturbed data."""
    rng, changed = random.Random(seed), bytearray(small)
    at = rng.randrange(len(changed))
    if kind == "flip":
        for _ in range(rng.choice((1, 9))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at:]
    else:
        changed[at : at + 50] = b"\xff" * 50
    path = tmp_path / "changed.zarr.zip"
    path.write_bytes(changed)
    try:
        dataset = read_zarr(path, observation_keys=["state"])  # a lost name in the zip's directory is another file
    except InputError:
        return
    reference = tmp_path / "reference.zarr.zip"
    reference.write_bytes(small)
    for a, b in zip(dataset, read_zarr(reference, observation_keys=["state"]), strict=True):
        np.testing.assert_array_equal(a.state, b.state)
        np.testing.assert_array_equal(a.actions, b.actions)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return zipped(store(tmp_path_factory.mktemp("small") / "store", (3, 4))).read_bytes()


REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "pusht_cchi_v7_replay.zarr.zip"


@pytest.mark.skipif(not REAL.exists(), reason="the human demonstrations are not on this machine")
def test_real_file() -> None:
    pytest.importorskip("numcodecs")
    dataset = read_zarr(REAL, episodes=206)
    assert (len(dataset), dataset.num_steps, dataset.lengths.min(), dataset.lengths.max()) == (206, 25_650, 49, 246)
    assert dataset.shapes == {"state": (18,)}
