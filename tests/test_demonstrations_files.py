"""robomimic files: written and read back, atomically; the human file where it is there."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postbc.demonstrations import LOW_DIM_KEYS, Demonstrations, read_robomimic, write_robomimic
from postbc.demonstrations.replay import TASK_OF
from postbc.demonstrations.versions import check_simulator_version
from postbc.errors import InputError

OSC = {"robots": ["Panda"], "controller_configs": {"type": "OSC_POSE"}}
ENVIRONMENT: dict[str, Any] = {"env_name": "Lift", "env_version": "1.4.0", "type": 1, "env_kwargs": OSC}


def lift_like(lengths: list[int], seed: int = 0, states: bool = True) -> Demonstrations:
    """Random numbers in the shapes of Lift's demonstrations."""
    rng = np.random.default_rng(seed)
    names = [f"demo_{i}" for i in range(len(lengths))]
    return Demonstrations.from_arrays(
        [rng.standard_normal((n, 19)).astype(np.float32) for n in lengths],
        [rng.uniform(-1, 1, (n, 7)).astype(np.float32) for n in lengths],
        rewards=[(rng.random(n) < 0.5).astype(np.float32) for n in lengths],
        states=[rng.standard_normal((n, 32)) for n in lengths] if states else None,
        operators=["ann" if i % 2 else None for i in range(len(lengths))],
        observation_keys=LOW_DIM_KEYS,
        observation_dims=(3, 4, 2, 10),
        environment=ENVIRONMENT,
        filters={"train": names[: max(1, len(names) // 2)], "all": names},
    )


def assert_same(one: Demonstrations, other: Demonstrations) -> None:
    assert one.names == other.names
    for a, b in zip(one, other):
        for key in ("observations", "actions", "rewards", "dones", "states"):
            x, y = getattr(a, key), getattr(b, key)
            assert (x is None) == (y is None)
            if x is not None:
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)
        assert (a.operator, a.episode_seed) == (b.operator, b.episode_seed)
    for key in ("observation_keys", "observation_dims", "environment", "filters"):
        assert getattr(one, key) == getattr(other, key)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 1000), states=st.booleans())
def test_written_then_read(tmp_path: Path, lengths: list[int], seed: int, states: bool) -> None:
    written = lift_like(lengths, seed, states)
    path = write_robomimic(tmp_path / "d.hdf5", written)
    assert_same(written, read_robomimic(path))


def test_layout(tmp_path: Path) -> None:
    """What robomimic's own reader looks for."""
    path = write_robomimic(tmp_path / "new" / "d.hdf5", lift_like([3, 5]), model_xml="<mujoco/>", next_observations=True)
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


def test_reading_options(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "d.hdf5", lift_like([2] * 12))
    assert read_robomimic(path).names == tuple(f"demo_{i}" for i in range(12))  # by number: demo_10 after demo_9
    assert read_robomimic(path, filter_key="train").names == tuple(f"demo_{i}" for i in range(6))
    narrow = read_robomimic(path, observation_keys=["object", "robot0_eef_pos"])
    np.testing.assert_array_equal(narrow[0].observations[:, :10], read_robomimic(path)[0].observations[:, 9:])
    assert narrow.observation_dims == (10, 3)


def test_operator_from_filters(tmp_path: Path) -> None:
    """The official multi-human files name people in filters only."""
    path = write_robomimic(tmp_path / "d.hdf5", lift_like([2, 2]))
    with h5py.File(path, "r+") as file:
        file["mask/better_operator_1"] = np.array([b"demo_0"])
    assert [trajectory.operator for trajectory in read_robomimic(path)] == ["better_operator_1", "ann"]


def test_same_bytes_and_replacement(tmp_path: Path) -> None:
    demonstrations = lift_like([4, 4])
    one, two = tmp_path / "one.hdf5", tmp_path / "two.hdf5"
    two.write_bytes(b"an older file")
    write_robomimic(one, demonstrations)
    write_robomimic(two, demonstrations)
    assert one.read_bytes() == two.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.hdf5", "two.hdf5"]


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the file size stands in for a full disk: write() fails in the same place."""
    path = tmp_path / "d.hdf5"
    path.write_bytes(b"the old file")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"):
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


def test_real_robot_file(tmp_path: Path) -> None:
    """A file without env_args is read when the caller says what stands in for it."""
    path = write_robomimic(tmp_path / "d.hdf5", lift_like([3]))
    with h5py.File(path, "r+") as file:
        del file["data"].attrs["env_args"]
    assert read_robomimic(path, environment={}).environment == {}
    with pytest.raises(InputError, match="env_args"):
        read_robomimic(path)


@pytest.mark.parametrize(
    ("recorded", "agrees"), [("1.4.0", True), ("1.4.1", True), ("1.5.1", False), ("1.3.9", False), ("", False)]
)
def test_simulator_version(recorded: str, agrees: bool) -> None:
    environment = {"env_version": recorded}
    if agrees:
        assert check_simulator_version(environment, installed="1.4.0") is None
        return
    with pytest.raises(InputError) as error:
        check_simulator_version(environment, installed="1.4.0", source="d.hdf5")
    assert "1.4.0" in str(error.value)
    assert (recorded or "unknown version") in str(error.value)
    warning = check_simulator_version(environment, installed="1.4.0", allow_mismatch=True)
    assert warning is not None
    assert "1.4.0" in warning


def human_file() -> Path:
    """The human demonstrations for local measurement: POSTBC_HUMAN_DATA, or ../shared beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "lift_human36.hdf5"
    return Path(os.environ.get("POSTBC_HUMAN_DATA", default))


@pytest.mark.skipif(not human_file().exists(), reason="the human demonstrations are not on this machine")
def test_human_file(tmp_path: Path) -> None:
    demonstrations = read_robomimic(human_file())
    assert (len(demonstrations), demonstrations.num_steps) == (36, 8642)
    assert (demonstrations.observation_dim, demonstrations.action_dim) == (19, 7)
    assert {key: len(names) for key, names in demonstrations.filters.items()} == {
        "operator_a": 29,
        "operator_b": 3,
        "operator_c": 4,
    }
    assert (demonstrations.lengths.min(), demonstrations.lengths.max()) == (72, 1143)
    assert {trajectory.operator for trajectory in demonstrations.select("operator_c")} == {"operator_c"}
    assert check_simulator_version(demonstrations.environment, installed="1.4.0") is None
    assert TASK_OF[demonstrations.environment["env_name"]] == "Lift"
    assert_same(demonstrations, read_robomimic(write_robomimic(tmp_path / "copy.hdf5", demonstrations)))
