"""Frames read ahead by threads: the very numbers and order of those that are not, from every kind of file, and errors that arrive."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import postbc.data.lazy as lazy_module
from postbc.data.batches import AHEAD, Batches, read_ahead
from postbc.data.episodes import Dataset
from postbc.data.lazy import LazyArray
from postbc.data.normalization import fit_normalization
from postbc.data.robomimic import read_robomimic
from postbc.data.windows import Windows
from postbc.devices import Compute
from postbc.errors import InputError
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.policies.networks.encoders import EncoderConfig
from postbc.posterior import Factor
from postbc.pretraining import Pretraining, PretrainingConfig
from postbc.seeding import make_generator

LENGTHS, SHAPE = (13, 7, 21), (6, 5, 3)
KINDS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "compressed": {"chunks": (4, 6, 5, 3), "compression": "gzip"},
    "in pieces of many": {"chunks": (5, 3, 5, 2)},
}


def write(path: Path, kind: str = "as they are", lengths: Any = LENGTHS, shape: Any = SHAPE) -> tuple[Path, list[np.ndarray]]:
    """A file of frames, and these (H, W, C)."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (n, *shape), dtype=np.uint8) for n in lengths]
    with h5py.File(path, "w") as file:
        for i, values in enumerate(frames):
            demo = file.create_group(f"data/demo_{i}")
            demo["actions"] = rng.uniform(-1, 1, (len(values), 2))
            demo.create_dataset("obs/top_image", data=values, **KINDS[kind])
    return path, frames


def dataset(path: Path) -> Dataset:
    return read_robomimic(path, observation_keys=(), image_keys=["top_image"])


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postbc.data.windows.CACHE", 0)


# -- files -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(picks=st.lists(st.integers(0, 20), max_size=40), start=st.integers(0, 3))
def test_frames_are_those_in_the_file(
    tmp_path_factory: pytest.TempPathFactory, kind: str, picks: list[int], start: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{kind}.hdf5"
    if not path.exists():
        write(path, kind)
    with h5py.File(path) as file:
        whole = np.moveaxis(file["data/demo_2/obs/top_image"][:], -1, 1)[start:]
    array = LazyArray(path, "data/demo_2/obs/top_image", rows=(start, 21))
    steps = [i for i in picks if i < len(array)]
    np.testing.assert_array_equal(array[steps], whole[steps])


@pytest.mark.parametrize("kind", KINDS)
def test_frames_that_stand_upside_down(tmp_path: Path, kind: str) -> None:
    path, frames = write(tmp_path / "d.hdf5", kind)
    array = LazyArray(path, "data/demo_0/obs/top_image", upside_down=True)
    np.testing.assert_array_equal(array[[3, 0, 4, 3]], np.moveaxis(frames[0][[3, 0, 4, 3], ::-1], -1, 1))


def test_frames_as_they_are_need_no_hdf5_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its lock, that is: neighbours come by one call of the system."""
    plain, compressed = (LazyArray(write(tmp_path / f"{k}.hdf5", k)[0], "data/demo_0/obs/top_image") for k in list(KINDS)[:2])
    calls, preadv = [], lazy_module.os.preadv
    monkeypatch.setattr(lazy_module.os, "preadv", lambda *a: calls.append(len(a[1])) or preadv(*a))
    np.testing.assert_array_equal(plain[[3, 9, 4, 5, 0]], compressed[[3, 9, 4, 5, 0]])
    assert calls == [1, 3, 1]


def test_a_file_that_is_another_or_shorter_is_refused(tmp_path: Path) -> None:
    path, _ = write(tmp_path / "d.hdf5")
    array = LazyArray(path, "data/demo_0/obs/top_image")
    lazy_module._OPEN.clear()
    write(path, lengths=(5, 3))
    with pytest.raises(InputError, match=r"has changed[\s\S]*d.hdf5"):
        array[[0]]
    lazy_module._OPEN.clear()
    path.unlink()
    with pytest.raises(InputError, match="can no longer be read"):
        array[[0]]
    path, _ = write(tmp_path / "e.hdf5")
    array = LazyArray(path, "data/demo_2/obs/top_image")
    array[[20]]
    with path.open("r+b") as file:  # cut off while it is open
        file.truncate(2000)
    with pytest.raises(InputError, match="has changed"):
        array[[20]]


def test_arrays_of_other_files_are_read_from_those(tmp_path: Path) -> None:
    path, frames = write(tmp_path / "d.hdf5")
    with h5py.File(tmp_path / "outer.hdf5", "w") as file:
        file["padding"] = np.zeros(1000)
        file["linked"] = h5py.ExternalLink(path.name, "data/demo_1/obs/top_image")
    np.testing.assert_array_equal(LazyArray(tmp_path / "outer.hdf5", "linked")[[2]], np.moveaxis(frames[1], -1, 1)[[2]])


def test_threads_read_more_files_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_module, "_AT_MOST", 2)
    files = [write(tmp_path / f"{i}.hdf5", kind, (6 + i,)) for i, kind in enumerate([*KINDS, *KINDS])]
    arrays = [(LazyArray(path, "data/demo_0/obs/top_image"), np.moveaxis(f[0], -1, 1)) for path, f in files]
    wrong: list[object] = []

    def read() -> None:
        try:
            for array, frames in arrays * 20:
                if not np.array_equal(array[[4, 0, 1]], frames[[4, 0, 1]]):
                    wrong.append(array.path)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(lazy_module._OPEN) <= 2


# -- batches -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_read_ahead_is_what_windows_observe(
    tmp_path: Path, kind: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(write(tmp_path / "d.hdf5", kind)[0])
    windows = Windows(data, 2, observation_steps=steps)
    assert windows.reads_files
    batches = torch.randint(len(windows), (9, 16), generator=torch.Generator().manual_seed(0))
    found = list(read_ahead(windows, batches, "cpu"))
    monkeypatch.setattr("postbc.data.windows.CACHE", 2**30)
    cached = Windows(data, 2, observation_steps=steps)
    assert not cached.reads_files
    assert len(found) == 9
    for rows, observation in zip(batches, found):
        assert observation["image.top"].is_contiguous()
        assert torch.equal(observation["image.top"], cached.observation(rows)["image.top"])
        assert torch.equal(observation["image.top"], windows.observation(rows)["image.top"])


@pytest.mark.usefixtures("uncached")
def test_no_more_is_read_than_a_few_batches_ahead_and_nothing_after_the_end(tmp_path: Path) -> None:
    windows, drawn = Windows(dataset(write(tmp_path / "d.hdf5")[0]), 2), itertools.count()
    before = threading.active_count()
    reader = read_ahead(windows, (torch.tensor([next(drawn) % len(windows)]) for _ in itertools.count()), "cpu")
    for _ in range(10):
        next(reader)
    assert next(drawn) == 10 + AHEAD - 1  # the last one's place was taken only when it was given
    assert threading.active_count() > before
    reader.close()
    assert threading.active_count() == before


@pytest.mark.usefixtures("uncached")
def test_an_error_of_a_thread_arrives(tmp_path: Path) -> None:
    path, _ = write(tmp_path / "d.hdf5")
    windows = Windows(dataset(path), 2)
    reader = read_ahead(windows, (torch.tensor([0]) for _ in itertools.count()), "cpu")
    next(reader)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match="has changed"):
        list(itertools.islice(reader, 20))


@pytest.mark.parametrize("several", [False, True])
def test_the_generator_is_no_further_than_what_was_asked_for(
    tmp_path: Path, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postbc.data.windows.CACHE", 0)
    windows, shape = Windows(dataset(write(tmp_path / "d.hdf5")[0]), 2), (3, 4) if several else (4,)

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(len(windows), shape, generator=generator)

    ours, theirs = make_generator(0, "pretraining/data"), make_generator(0, "pretraining/data")
    batches = Batches(windows, draw, ours, torch.device("cpu"))
    for _ in range(5):
        for rows in torch.atleast_2d(draw(theirs)):
            found, observation = batches.next()
            assert torch.equal(found, rows)
            assert torch.equal(observation["image.top"], windows.observation(rows)["image.top"])
        assert torch.equal(ours.get_state(), theirs.get_state())
    theirs.manual_seed(7)
    ours.set_state(theirs.get_state())
    batches.restart()
    assert torch.equal(batches.next()[0], torch.atleast_2d(draw(theirs))[0])
    batches.restart()


@pytest.mark.parametrize(
    ("kind", "compute"),
    [
        ("small", Compute(device="cpu")), ("small", Compute(device="cpu", precision="bfloat16")),
        ("resnet18", Compute(device="cpu", precision="bfloat16")),
        pytest.param("small", Compute(device="cpu", compile=True), marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_a_training_that_reads_ahead_is_the_same_to_the_bit_and_resumes(
    tmp_path: Path, kind: Any, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, half = dataset(write(tmp_path / "d.hdf5", shape=(20, 20, 3))[0]), 3 if kind == "small" else 1  # it is slow

    def training(cache: int) -> Pretraining:
        monkeypatch.setattr("postbc.data.windows.CACHE", cache)
        encoder = EncoderConfig(4, (4,), kind=kind, crop=18)
        policy = DiffusionPolicy(
            DiffusionConfig(hidden=16, denoising_steps=10, encoder=encoder), data.shapes, 2, 2, fit_normalization(data, data),
            make_generator(0, "policy/initialisation"),
        )  # fmt: skip
        return Pretraining(policy, Windows(data, 2), PretrainingConfig("bc", steps=2 * half, batch_size=8), 0, compute=compute)

    whole, ahead, cut, resumed = training(2**30), *(training(0) for _ in range(3))
    for trained, steps in ((whole, 2 * half), (ahead, 2 * half), (cut, half)):
        for _ in range(steps):
            assert trained.step().isfinite()
    resumed.load_state(cut.state())
    for _ in range(half):
        resumed.step()
    weights = [torch.cat([p.detach().flatten() for p in t.policy.parameters()]) for t in (whole, ahead, resumed)]
    assert weights[0].dtype == torch.float32
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    threads = threading.active_count()
    for t in (ahead, resumed):
        t.finish()
    assert threading.active_count() < threads


@pytest.mark.parametrize("steps", [1, 2])
def test_a_coherent_policy_gets_its_coordinates_beside_frames_read_ahead(
    tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, found = dataset(write(tmp_path / "d.hdf5", shape=(20, 20, 3))[0]), []
    for cache in (2**30, 0):
        monkeypatch.setattr("postbc.data.windows.CACHE", cache)
        policy = DiffusionPolicy(
            DiffusionConfig(hidden=16, denoising_steps=10, encoder=EncoderConfig(4, (4,))), {**data.shapes, "posterior": (2,)}, 2, 2,
            fit_normalization(data, data), make_generator(0, "policy/initialisation"), steps,
        )  # fmt: skip
        windows = Windows(data, 2, observation_steps=steps)
        factor = Factor(torch.randn(len(windows), 2, 4, generator=torch.Generator().manual_seed(0)))
        settings = PretrainingConfig(coherent=2, steps=4, batch_size=8)
        trained = Pretraining(policy, windows, settings, 0, factor, Compute(device="cpu"))
        for _ in range(4):
            assert trained.step().isfinite()
        trained.finish()
        found.append(torch.cat([p.flatten() for p in policy.parameters()]))
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.usefixtures("uncached")
def test_a_gpu_gets_the_same_batches(tmp_path: Path) -> None:
    data = dataset(write(tmp_path / "d.hdf5")[0])
    here, there = Windows(data, 2), Windows(data, 2, device="cuda")
    batches = Batches(
        there, lambda g: torch.randint(len(there), (64,), generator=g, device="cuda"), make_generator(0, "pretraining/data", "cuda"),
        torch.device("cuda"),
    )  # fmt: skip
    for _ in range(20):
        rows, observation = batches.next()
        assert observation["image.top"].device.type == "cuda"
        assert torch.equal(observation["image.top"].cpu(), here.observation(rows.cpu())["image.top"])
    batches.restart()
