"""robomimic files: written and read back, atomically, only what is asked for; the human file where it is there."""

from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from made import LIFT, write_demonstrations
from postbc.data import LOW_DIM_KEYS, Dataset, Facts, read_dataset, read_robomimic, write_robomimic
from postbc.data.belonging import check_belongs
from postbc.data.readers import list_dataset
from postbc.data.robomimic import list_robomimic
from postbc.environments.robosuite.playback import TASK_OF
from postbc.errors import InputError


def lift_like(lengths: list[int], seed: int = 0, states: bool = True) -> Dataset:
    """Random numbers in the shapes of Lift's demonstrations."""
    rng = np.random.default_rng(seed)
    names = [f"demo_{i}" for i in range(len(lengths))]
    return Dataset.from_arrays(
        [rng.standard_normal((n, 19)).astype(np.float32) for n in lengths],
        [rng.uniform(-1, 1, (n, 7)).astype(np.float32) for n in lengths],
        rewards=[(rng.random(n) < 0.5).astype(np.float32) for n in lengths] if seed % 2 else None,
        dones=[np.arange(n) == n - 1 for n in lengths] if seed % 3 else None,
        states=[rng.standard_normal((n, 32)) for n in lengths] if states else None,
        operators=["ann" if i % 2 else None for i in range(len(lengths))],
        state_keys=LOW_DIM_KEYS,
        state_dims=(3, 4, 2, 10),
        environment=LIFT,
        filters={"train": names[: max(1, len(names) // 2)], "all": names},
    )


def assert_same(one: Dataset, other: Dataset) -> None:
    assert one.names == other.names
    for a, b in zip(one, other):
        for key in ("state", "actions", "rewards", "dones", "states"):
            x, y = getattr(a, key), getattr(b, key)
            assert (x is None) == (y is None)
            if x is not None:
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)
        assert (a.operator, a.episode_seed) == (b.operator, b.episode_seed)
    for key in ("state_keys", "state_dims", "environment", "filters", "shapes"):
        assert getattr(one, key) == getattr(other, key)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 1000), states=st.booleans())
def test_written_then_read(tmp_path: Path, lengths: list[int], seed: int, states: bool) -> None:
    written = lift_like(lengths, seed, states)
    path = write_robomimic(tmp_path / "d.hdf5", written)
    assert_same(written, read_robomimic(path))


def test_layout(tmp_path: Path) -> None:
    """What robomimic's own reader looks for."""
    path = write_robomimic(tmp_path / "new" / "d.hdf5", lift_like([3, 5], 1), model_xml="<mujoco/>", next_observations=True)
    with h5py.File(path) as file:
        assert file["data"].attrs["total"] == 8
        demo = file["data/demo_1"]
        assert demo.attrs["num_samples"] == 5
        assert demo.attrs["model_file"] == "<mujoco/>"
        assert set(demo) == {"actions", "rewards", "dones", "states", "obs", "next_obs"}
        assert set(demo["obs"]) == set(LOW_DIM_KEYS)
        assert demo["obs/object"].shape == (5, 10)
        np.testing.assert_array_equal(demo["next_obs/object"][:-1], demo["obs/object"][1:])
        assert file["mask/train"][()].tolist() == [b"demo_0"]


def test_frames_are_robomimics(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 3, 6, 5), dtype=np.uint8)
    written = Dataset.from_arrays([{"image.agentview": frames}], [np.zeros((4, 2))])
    path = write_robomimic(tmp_path / "d.hdf5", written)
    with h5py.File(path) as file:
        assert file["data/demo_0/obs/agentview_image"].shape == (4, 6, 5, 3)
    for key in ("agentview_image", "image.agentview"):
        read = read_dataset(path, image_keys=[key])
        assert read.shapes == {"image.agentview": (3, 6, 5)}
        np.testing.assert_array_equal(read[0].observations["image.agentview"][:], frames)
    with pytest.raises(InputError, match="nothing to observe"):
        read_dataset(path)
    both = write_demonstrations(tmp_path / "both.hdf5", images={"top_image": (6, 5, 3), "first_image": (3, 6, 5)})
    assert read_robomimic(both, image_keys=["first_image", "top_image"]).shapes == {
        "state": (19,), "image.first": (3, 6, 5), "image.top": (3, 6, 5)
    }  # fmt: skip
    assert read_robomimic(both).shapes == {"state": (19,)}
    assert read_robomimic(both, observation_keys=[], image_keys=["top_image"]).shapes == {"image.top": (3, 6, 5)}


def test_reading_options(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "d.hdf5", lift_like([2] * 12, 1))
    assert read_robomimic(path).names == tuple(f"demo_{i}" for i in range(12))  # by number: demo_10 after demo_9
    assert list_robomimic(path).names == tuple(f"demo_{i}" for i in range(12))
    assert read_robomimic(path, filter_key="train").names == tuple(f"demo_{i}" for i in range(6))
    assert read_robomimic(path, names=["demo_11", "demo_2"]).names == ("demo_2", "demo_11")
    narrow = read_robomimic(path, observation_keys=["object", "robot0_eef_pos"])
    np.testing.assert_array_equal(narrow[0].state[:, :10], read_robomimic(path)[0].state[:, 9:])
    assert narrow.state_dims == (10, 3)
    bare = read_robomimic(path, parts=())[0]
    assert bare.rewards is bare.dones is bare.states is None
    with pytest.raises(InputError, match="no such demonstration"):
        read_robomimic(path, names=["demo_12"])


def test_what_is_left_out_is_not_read(tmp_path: Path) -> None:
    """A bad demonstration outside the filter or the names, bad states that nobody asked for, a bad filter beside the one asked for."""
    path = write_robomimic(tmp_path / "d.hdf5", lift_like([4] * 4, 1))
    with h5py.File(path, "r+") as file:
        file["data/demo_3/obs/object"][2, 2] = np.nan
        file["data/demo_0/states"][0, 0] = np.inf
        file["mask/old"] = np.array([b"demo_0", b"demo_17"])
    clean = read_robomimic(path, filter_key="train", parts=("rewards",))
    assert clean.names == ("demo_0", "demo_1")
    assert read_robomimic(path, filter_key="train", names=["demo_1"]).names == ("demo_1",)
    for options, words in (({}, "mask/old"), ({"filter_key": "old"}, "demo_17"), ({"filter_key": "train"}, "demo_0/states")):
        with pytest.raises(InputError, match=words):
            read_robomimic(path, **options)


def test_actions_beyond_the_range(tmp_path: Path) -> None:
    """Refused with the option that clips them; absolute commands and other robots are not bounded."""
    path = write_demonstrations(tmp_path / "d.hdf5", 1)
    with h5py.File(path, "r+") as file:
        file["data/demo_0/actions"][3, 2] = -11.25
    with pytest.raises(InputError, match=r"--data.clip-actions"):
        read_robomimic(path)
    clipped = read_robomimic(path, clip_actions=True)[0].actions
    assert clipped[3, 2] == -1
    assert read_robomimic(path, check_actions=False)[0].actions[3, 2] == -11.25
    absolute = {**LIFT, "env_kwargs": {"controller_configs": {"type": "OSC_POSE", "control_delta": False}}}
    for environment in ({"type": 2}, absolute):
        with h5py.File(path, "r+") as file:
            file["data"].attrs["env_args"] = json.dumps(environment)
        assert read_robomimic(path)[0].actions[3, 2] == -11.25
    with pytest.raises(InputError, match="Absolute"):
        read_robomimic(path, clip_actions=True)


def test_other_names_of_observations(tmp_path: Path) -> None:
    widths = {"eef_pos": 3, "joint_pos": 9}
    path = write_demonstrations(tmp_path / "lab.hdf5", 2, environment={"env_name": "", "type": 2}, widths=widths)
    with pytest.raises(InputError, match=r"eef_pos.*(?s:.)*observation-keys"):
        read_dataset(path)
    assert read_dataset(path, observation_keys=["joint_pos", "eef_pos"]).state_dims == (9, 3)
    for key in ("state", "observation"):  # what we or others call one vector
        path = write_demonstrations(tmp_path / "one.hdf5", 2, widths={key: 5})
        assert read_dataset(path).state_keys == (key,)


def test_operator_from_filters(tmp_path: Path) -> None:
    """The official multi-human files name people in filters only."""
    path = write_robomimic(tmp_path / "d.hdf5", lift_like([2, 2]))
    with h5py.File(path, "r+") as file:
        file["mask/better_operator_1"] = np.array([b"demo_0"])
    assert [episode.operator for episode in read_robomimic(path)] == ["better_operator_1", "ann"]


def test_layouts_that_are_all_right(tmp_path: Path) -> None:
    """Other types, compressed pieces, names in any text type, strangers beside, a link with accents and spaces to a read-only file."""
    folder = tmp_path / "données de Zoë (2)"
    path = write_demonstrations(folder / "mes démos.hdf5", 3)
    plain = read_robomimic(path)
    with h5py.File(path, "r+") as file:
        for i, demo in enumerate(file["data"].values()):
            for key in ("actions", "obs/object"):
                values = demo[key][()]
                del demo[key]
                kind = (np.float16, np.float64, np.float32)[i]
                demo.create_dataset(key, data=values.astype(kind), chunks=(5, values.shape[1]), compression="gzip")
            dones = demo["dones"][()]
            del demo["dones"]
            demo["dones"] = dones.astype((np.int8, bool, np.float64)[i])
            demo.create_group("datagen_info")["eef_pose"] = np.zeros((12, 4, 4))
        file["data/stray"] = np.zeros(3)
        file["data"].attrs["env_args"] = np.bytes_(file["data"].attrs["env_args"].encode())
        file.create_dataset("mask/text", data=["demo_2", "demo_0"], dtype=h5py.string_dtype())
        file["mask/nobody"] = np.array([], dtype="S8")
        file["mask/nothing"] = np.array([])
    path.chmod(0o444)
    link = tmp_path / "link.hdf5"
    link.symlink_to(path)
    read = read_robomimic(link)
    for a, b in zip(plain, read, strict=True):
        np.testing.assert_allclose(a.actions, b.actions, atol=1e-3)
        np.testing.assert_array_equal(a.dones, b.dones)
    assert read.select("text").names == ("demo_0", "demo_2")
    assert (read.filters["nobody"], read.environment) == ((), LIFT)


def test_same_bytes_and_replacement(tmp_path: Path) -> None:
    dataset = lift_like([4, 4])
    one, two = tmp_path / "one.hdf5", tmp_path / "two.hdf5"
    two.write_bytes(b"an older file")
    write_robomimic(one, dataset)
    write_robomimic(two, dataset)
    assert one.read_bytes() == two.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.hdf5", "two.hdf5"]


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the file size stands in for a full disk: write() fails in the same place."""
    path = tmp_path / "d.hdf5"
    path.write_bytes(b"the old file")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written|refuse"):
            write_robomimic(path, lift_like([50]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["d.hdf5"]


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        write_robomimic(tmp_path, lift_like([2]))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_robomimic(tmp_path / "file" / "d.hdf5", lift_like([2]))
    plain = lift_like([2])
    words = {**plain[0].observations, "language": np.zeros((2, 4), np.float32)}
    spoken = replace(plain, episodes=(replace(plain[0], observations=words),))
    with pytest.raises(InputError, match="language"):
        write_robomimic(tmp_path / "d.hdf5", spoken)
    assert not (tmp_path / "d.hdf5").exists()


def test_a_lerobot_dataset_is_named(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "meta/info.json").write_text("{}")
    with pytest.raises(InputError, match="LeRobot"):
        list_dataset(tmp_path)
    with pytest.raises(InputError, match="LeRobot"):
        read_dataset(tmp_path)


def test_real_robot_file(tmp_path: Path) -> None:
    """A file without env_args is of an unknown environment, unless the caller says of which."""
    path = write_robomimic(tmp_path / "d.hdf5", lift_like([3]))
    with h5py.File(path, "r+") as file:
        del file["data"].attrs["env_args"]
    assert read_robomimic(path).environment == {}
    assert read_robomimic(path, environment=LIFT).environment == LIFT
    assert Facts.of_dataset(read_robomimic(path)).environment is None


def human_file() -> Path:
    """The human demonstrations for local measurement: POSTBC_HUMAN_DATA, or ../shared beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "lift_human36.hdf5"
    return Path(os.environ.get("POSTBC_HUMAN_DATA", default))


@pytest.mark.skipif(not human_file().exists(), reason="the human demonstrations are not on this machine")
def test_human_file(tmp_path: Path) -> None:
    dataset = read_robomimic(human_file())
    assert (len(dataset), dataset.num_steps) == (36, 8642)
    assert (dataset.shapes, dataset.action_dim) == ({"state": (19,)}, 7)
    assert {key: len(names) for key, names in dataset.filters.items()} == {"operator_a": 29, "operator_b": 3, "operator_c": 4}
    assert (dataset.lengths.min(), dataset.lengths.max()) == (72, 1143)
    assert {episode.operator for episode in dataset.select("operator_c")} == {"operator_c"}
    facts: dict[str, Any] = {"env_name": "Lift", "env_version": "1.4.0", "env_kwargs": LIFT["env_kwargs"]}
    assert check_belongs(Facts.of_dataset(dataset), Facts.of_env_args(facts)) == []
    assert TASK_OF[dataset.environment["env_name"]] == "Lift"
    assert_same(dataset, read_robomimic(write_robomimic(tmp_path / "copy.hdf5", dataset)))
