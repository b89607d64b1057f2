"""HDF5 from strangers: what lies about its contents is refused; whatever is changed gives InputError or the right numbers."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from made import write_demonstrations
from postbc.data import Dataset, read_robomimic
from postbc.data.belonging import Facts
from postbc.data.recordings import open_recording
from postbc.errors import InputError

SECRET = b"root:x:0:0:" * 100


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_demonstrations(tmp_path / "d.hdf5", 3)


def instead(path: Path, key: str, make: Callable[[h5py.Group, str], Any]) -> None:
    """Replace a dataset."""
    with h5py.File(path, "r+") as file:
        parent, _, name = key.rpartition("/")
        del file[key]
        make(file[parent], name)


def test_bytes_of_another_file_are_not_read(path: Path) -> None:
    """External storage would read any file as observations."""
    (path.parent / "secret").write_bytes(SECRET)
    for where in ("obs/object", "actions", "rewards"):
        copy = path.with_name(f"{where.replace('/', '-')}.hdf5")
        copy.write_bytes(path.read_bytes())
        shape = {"obs/object": (12, 10), "actions": (12, 7), "rewards": (12,)}[where]
        external = [(str(path.parent / "secret"), 0, int(np.prod(shape)))]
        instead(copy, f"data/demo_1/{where}", lambda g, n, s=shape, e=external: g.create_dataset(n, s, np.uint8, external=e))
        with pytest.raises(InputError, match=rf"(?s)in another file.*data/demo_1/{where}"):
            read_robomimic(copy)


@pytest.mark.parametrize("lost", ["file", "dataset", "shape", "part", None])
def test_virtual_datasets(path: Path, lost: str | None) -> None:
    """Where a source is missing every action would read as 0; a whole one is read."""
    with h5py.File(path, "r") as file:
        actions = file["data/demo_1/actions"][()]
    with h5py.File(path.with_name("source.hdf5"), "w") as file:
        file["a"] = actions
    layout = h5py.VirtualLayout((12, 7), np.float64)
    layout[:] = h5py.VirtualSource("source.hdf5", "a", (12, 7))
    if lost == "part":
        layout = h5py.VirtualLayout((12, 7), np.float64)
        layout[:11] = h5py.VirtualSource("source.hdf5", "a", (12, 7))[:11]
    instead(path, "data/demo_1/actions", lambda g, n: g.create_virtual_dataset(n, layout))
    if lost == "file":
        path.with_name("source.hdf5").unlink()
    elif lost in ("dataset", "shape"):
        with h5py.File(path.with_name("source.hdf5"), "r+") as file:
            del file["a"]
            if lost == "shape":
                file["a"] = actions[:5]
    if lost is None:
        np.testing.assert_array_equal(read_robomimic(path)[1].actions, actions.astype(np.float32))
        return
    with pytest.raises(InputError, match=r"(?s)would read as 0.*data/demo_1/actions"):
        read_robomimic(path)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("obs/object", np.ones((12, 10), complex)), ("actions", np.ones((12, 7), np.complex64)),
        ("rewards", np.array([b"yes"] * 12)), ("actions", np.zeros((12, 7), [("x", float), ("y", float)])),
        ("actions", np.zeros((12, 7), bool)), ("obs/object", h5py.Empty("f")),
    ],
)  # fmt: skip
def test_only_real_numbers(path: Path, key: str, values: Any) -> None:
    """Complex numbers lost their imaginary part."""
    instead(path, f"data/demo_1/{key}", lambda g, n: g.create_dataset(n, data=values))
    if isinstance(values, np.ndarray) and values.dtype.kind == "b":
        assert read_robomimic(path)[1].actions.max() == 0
        return
    with pytest.raises(InputError, match=rf"data/demo_1/{key}"):
        read_robomimic(path)


@pytest.mark.parametrize(("key", "shape"), [("obs/object", (12, 2**27)), ("obs/object", (2**30, 10)), ("actions", (2**30, 7))])
def test_bombs_are_not_unpacked(path: Path, key: str, shape: tuple[int, ...]) -> None:
    """Gigabytes of zeros in a few kilobytes: refused by shape or by what the file holds, before memory is taken."""
    instead(path, f"data/demo_1/{key}", lambda g, n: g.create_dataset(n, shape, np.float64, chunks=(6, 7), compression="gzip"))
    if key == "actions":
        with h5py.File(path, "r+") as file:
            file["data/demo_1"].attrs["num_samples"] = shape[0]
    with pytest.raises(InputError, match=rf"data/demo_1/{key}"):
        read_robomimic(path)


@pytest.mark.parametrize("link", ["soft", "external file", "external dataset", "circle"])
@pytest.mark.parametrize(
    "key", ["data/demo_1/obs/object", "data/demo_1/actions", "data/demo_1", "data/demo_1/obs", "mask/half"]
)
def test_broken_links(path: Path, link: str, key: str) -> None:
    kinds: dict[str, Any] = {
        "soft": h5py.SoftLink("/nowhere"), "external file": h5py.ExternalLink("gone.hdf5", "/a"),
        "external dataset": h5py.ExternalLink(path.name, "/nowhere"), "circle": h5py.SoftLink(f"/{key}"),
    }  # fmt: skip
    instead(path, key, lambda g, n: g.__setitem__(n, kinds[link]))
    with pytest.raises(InputError, match=key):
        read_robomimic(path)


def test_links_that_lead_somewhere(path: Path) -> None:
    full = read_robomimic(path)
    other = path.with_name("other.hdf5")
    other.write_bytes(path.read_bytes())
    with h5py.File(path, "r+") as file:
        del file["data/demo_1"], file["data/demo_2/actions"]
        file["data/demo_1"] = h5py.ExternalLink("other.hdf5", "/data/demo_1")
        file["data/demo_2/actions"] = h5py.SoftLink("/data/demo_0/actions")
    linked = read_robomimic(path)
    np.testing.assert_array_equal(linked[1].state, full[1].state)
    np.testing.assert_array_equal(linked[2].actions, full[0].actions)


# -- mutations -------------------------------------------------------------------------------------------------------------------
def same(one: Dataset, other: Dataset) -> bool:
    return one.names == other.names and all(
        np.array_equal(a.state, b.state) and np.array_equal(a.actions, b.actions) for a, b in zip(one, other)
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Dataset]:
    """A file with every kind of storage: in one piece, in compressed pieces with a checksum."""
    path = write_demonstrations(tmp_path_factory.mktemp("pristine") / "d.hdf5", 2, 8)
    with h5py.File(path, "r+") as file:
        values = file["data/demo_1/actions"][()]
        del file["data/demo_1/actions"]
        file["data/demo_1"].create_dataset("actions", data=values, chunks=(4, 7), compression="gzip", fletcher32=True)
        file["mask"].create_dataset("texts", data=["demo_0"], dtype=h5py.string_dtype())
    return path.read_bytes(), read_robomimic(path, parts=())


def try_to_use(path: Path) -> Dataset | None:
    """What the house does with a file; anything but InputError is a failure of the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = read_robomimic(path, check_actions=False)
            Facts.of_dataset(dataset)
            return dataset
        except InputError:
            return None


SLOW = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@SLOW
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["flip", "cut", "zero", "fill", "swap"]))
def test_changed_bytes(pristine: tuple[bytes, Dataset], tmp_path: Path, seed: int, kind: str) -> None:
    """Bytes of the file's structure, anywhere: never a traceback. (HDF5 keeps no checksum of plain numbers, so those may change.)"""
    content, _ = pristine
    rng, changed = random.Random(seed), bytearray(content)
    at, n = rng.randrange(len(content)), rng.choice((1, 4, 64, 2000))
    if kind == "flip":
        for _ in range(rng.choice((1, 5, 40))):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "swap":
        other = rng.randrange(len(content))
        changed[at : at + n], changed[other : other + n] = changed[other : other + n], changed[at : at + n]
    else:
        changed[at : at + n] = (b"\0" if kind == "zero" else b"\xff") * n
    path = tmp_path / "changed.hdf5"
    path.write_bytes(changed)
    dataset = try_to_use(path)
    assert dataset is None or all(np.isfinite(e.state).all() and np.isfinite(e.actions).all() for e in dataset)


def endless_heap(content: bytearray, fill: bytes) -> None:
    at = content.index(b"GCOL") + 40
    content[at : at + 800] = fill * 800


def endless_heap_of_names(content: bytearray, fill: bytes) -> None:
    at = content.index(b"demo_0", content.rindex(b"GCOL")) + 8
    content[at : at + 800] = fill * 800


def short_chunk(content: bytearray, fill: bytes) -> None:
    at = content.index(b"TREE\x01") + 24
    content[at : at + 4] = fill * 4


@pytest.mark.parametrize(
    ("change", "fill"), itertools.product((endless_heap, endless_heap_of_names, short_chunk), (b"\0", b"\xff"))
)
def test_bytes_that_libhdf5_does_not_survive(
    pristine: tuple[bytes, Dataset], tmp_path: Path, change: Callable[[bytearray, bytes], None], fill: bytes
) -> None:
    """libhdf5 walks a heap with an object of no size for ever, deaf to signals, and crashes on a chunk shorter than its checksum."""
    content = bytearray(pristine[0])
    change(content, fill)
    path = tmp_path / "changed.hdf5"
    path.write_bytes(content)
    command = [sys.executable, "-m", "postbc", "demos", "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done
    assert str(path) in done.stderr


OBJECTS = ["data", "data/demo_0", "data/demo_0/actions", "data/demo_0/obs", "data/demo_0/obs/object", "data/demo_1/actions",
           "data/demo_1/rewards", "mask", "mask/half"]  # fmt: skip
VALUES: dict[str, Any] = {
    "nothing": None, "group": "group", "text": "text", "a number": 3.5, "flat": np.zeros(8), "empty": np.zeros((0, 7)),
    "cube": np.zeros((8, 7, 2)), "wide": np.zeros((8, 9)), "short": np.zeros((3, 7)), "NaN": np.full((8, 7), np.nan),
    "huge": np.full((8, 7), 1e300), "complex": np.zeros((8, 7), complex), "names": np.array([b"demo_0"]),
    "unicode": np.array([b"\xff\xfe"]), "references": "references", "opaque": np.zeros(8, "V4"), "times": np.zeros((8, 7), np.int64),
    "named type": "named type", "numbers that are halves": np.zeros((8, 7), np.float16), "long": np.zeros((8, 7), np.longdouble),
}  # fmt: skip


@SLOW
@given(key=st.sampled_from(OBJECTS), value=st.sampled_from(sorted(VALUES)))
def test_changed_objects(pristine: tuple[bytes, Dataset], tmp_path: Path, key: str, value: str) -> None:
    """Anything in the place of anything: refused, or (where it was not asked for, or is of the right kind) the rest is as it was."""
    content, reference = pristine
    path = tmp_path / "changed.hdf5"
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        del file[key]
        made = VALUES[value]
        if isinstance(made, str) and made == "group":
            file.create_group(key)
        elif isinstance(made, str) and made == "references":
            file.create_dataset(key, data=[file.ref], dtype=h5py.ref_dtype)
        elif isinstance(made, str) and made == "named type":
            file[key] = np.dtype("f8")
        elif made is not None:
            file[key] = made
    dataset = try_to_use(path)
    if dataset is None:
        return
    if key.startswith("mask") or key.endswith("rewards"):
        assert same(dataset, reference)
    elif key == "data/demo_0":
        assert dataset.names == ("demo_1",)
    else:
        assert dataset[0].actions.shape in ((8, 7), (8, 9))


@SLOW
@given(
    where=st.sampled_from(["data", "data/demo_0"]),
    name=st.sampled_from(["env_args", "num_samples", "operator", "episode_seed", "state_keys", "total"]),
    value=st.one_of(
        st.sampled_from(["", "{", "[]", "{}", '{"env_kwargs": 3}', '{"env_kwargs": {"robots": {}}}', '{"env_version": 1.4}',
                         '{"env_kwargs": {"controller_configs": "x"}}', '{"env_kwargs": {"control_freq": 1e999}}', '["object"]',
                         '[["object"]]', '{"env_name": {"a": "b"}}', "[" * 5000, '{"type": 1, "env_kwargs": []}']),
        st.integers(-(2**62), 2**62), st.floats(), st.binary(max_size=20).filter(lambda b: b"\0" not in b), st.lists(st.integers(0, 9)),
    ),
)  # fmt: skip
def test_changed_attributes(pristine: tuple[bytes, Dataset], tmp_path: Path, where: str, name: str, value: Any) -> None:
    content, reference = pristine
    path = tmp_path / "changed.hdf5"
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        file[where].attrs[name] = value
    dataset = try_to_use(path)
    if dataset is not None and name != "state_keys":
        assert same(dataset, reference)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["env_info", "env", "repository_version", "env_args"]),
    value=st.one_of(st.text(max_size=8), st.floats()),
)
def test_changed_recordings(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "recording.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update({"env": "Lift", "env_info": '{"env_name": "Lift", "robots": "Panda"}', "repository_version": "1.4.0"})
        data["demo_1/states"], data["demo_1/actions"] = np.zeros((3, 32)), np.zeros((3, 7))
        data.attrs[name] = value.replace("\0", "") if isinstance(value, str) else value
    try:
        recording = open_recording(path)
        Facts.of_env_args(recording.environment)
    except InputError:
        return
    assert [(n, s.shape, a.shape) for n, s, a, _ in recording.read()] == [("demo_1", (3, 32), (3, 7))]
