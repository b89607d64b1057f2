"""LIBERO's own demonstration files: recognised, read as what they are of, a folder of them as one; against LIBERO itself."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from made import LIFT, write_demonstrations
from postbc import cli
from postbc.data import TrainingSetConfig, load_training_set, read_dataset, write_robomimic
from postbc.data.batches import read_ahead
from postbc.data.lazy import LazyArray
from postbc.data.libero import environment_name, is_libero, quaternion
from postbc.data.libero_tasks import KITCHEN
from postbc.data.readers import list_dataset
from postbc.environments import find_environment
from postbc.errors import InputError

BOWL, STOVE = KITCHEN[3], KITCHEN[14]


def write_libero(folder: Path, task: str, episodes: Sequence[dict[str, Any]], suite: str = "libero_90") -> Path:
    """A file as LIBERO's `create_dataset.py` writes it; rows of an episode are those arrays, by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}_demo.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"problem_name": "x", "language_instruction": '"turn it on"'})
        data.attrs["bddl_file_name"] = f"chiliocosm/bddl_files/{suite}/{task}.bddl"
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["env_args"] = json.dumps(
            {"type": 1, "env_name": "Libero", "env_kwargs": {**LIFT["env_kwargs"], "bddl_file_name": task}}
        )
        for k, episode in enumerate(episodes):
            group = data.create_group(f"demo_{k}")
            group.attrs["num_samples"] = len(episode["actions"])
            group.attrs["model_file"] = episode.get("model_file", "<mujoco/>")
            for name, values in episode.items():
                if name != "model_file":
                    group[name if name in ("actions", "states", "rewards", "dones", "robot_states") else f"obs/{name}"] = values
    return path


def random_episode(rng: np.random.Generator, steps: int = 9, size: int = 8) -> dict[str, Any]:
    last = (np.arange(steps) == steps - 1).astype(np.uint8)
    return {
        "actions": rng.uniform(-1, 1, (steps, 7)), "states": rng.normal(size=(steps, 5)), "rewards": last, "dones": last,
        "agentview_rgb": rng.integers(0, 256, (steps, size, size, 3), dtype=np.uint8),
        "eye_in_hand_rgb": rng.integers(0, 256, (steps, size, size, 3), dtype=np.uint8),
        "ee_states": rng.uniform(-1, 1, (steps, 6)), "gripper_states": rng.normal(size=(steps, 2)),
        "joint_states": rng.normal(size=(steps, 7)),
    }  # fmt: skip


def test_a_file_is_recognised_and_read_lazily(tmp_path: Path) -> None:
    """An action is put together with what was seen before it, and frames are turned the right way up."""
    rng = np.random.default_rng(0)
    episodes = [random_episode(rng), random_episode(rng, 6)]
    path = write_libero(tmp_path, STOVE, episodes)
    assert is_libero(path)
    assert not is_libero(write_demonstrations(tmp_path / "lift.hdf5"))
    data = read_dataset(path, image_keys=["agentview_rgb", "wrist_image"])
    assert data.shapes == {"state": (9,), "image.agentview": (3, 8, 8), "image.wrist": (3, 8, 8)}
    assert (data.tasks, {e.task for e in data}, data.environment["env_name"]) == (KITCHEN, {STOVE}, f"libero/{STOVE}")
    assert data.lengths.tolist() == [8, 5]
    for episode, written in zip(data, episodes):
        assert isinstance(episode.observations["image.wrist"], LazyArray)
        np.testing.assert_allclose(episode.actions, written["actions"][1:], rtol=1e-6)
        np.testing.assert_allclose(episode.states, written["states"][1:])
        np.testing.assert_array_equal(episode.rewards, written["rewards"][1:])
        np.testing.assert_allclose(episode.state[:, :3], written["ee_states"][:-1, :3], rtol=1e-6)
        np.testing.assert_allclose(episode.state[:, 7:], written["gripper_states"][:-1], rtol=1e-6)
        for name, theirs in (("image.agentview", "agentview_rgb"), ("image.wrist", "eye_in_hand_rgb")):
            upright = np.moveaxis(written[theirs][:-1, ::-1], -1, 1)
            np.testing.assert_array_equal(episode.observations[name][:], upright)
            np.testing.assert_array_equal(episode.observations[name][[3, 0]], upright[[3, 0]])
            np.testing.assert_array_equal(episode.observations[name][-1], upright[-1])
    assert read_dataset(path, observation_keys=["joint_states"], names=["demo_1"]).shapes == {"state": (7,)}
    again = read_dataset(write_robomimic(tmp_path / "ours.hdf5", data), image_keys=["image.agentview"])  # and written as ours
    np.testing.assert_array_equal(again[1].observations["image.agentview"][:], data[1].observations["image.agentview"][:])
    assert again[1].task == STOVE


@pytest.mark.parametrize("stored", [{}, {"chunks": (2, 8, 8, 3), "compression": "gzip"}])
def test_frames_that_are_read_ahead_are_upright_too(
    tmp_path: Path, stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postbc.data.windows.CACHE", 0)
    written = [random_episode(np.random.default_rng(i), 6 + i) for i in range(2)]
    path = write_libero(tmp_path, STOVE, written)
    with h5py.File(path, "r+") as file:
        for i, episode in enumerate(written):
            del file[f"data/demo_{i}/obs/agentview_rgb"]
            file.create_dataset(f"data/demo_{i}/obs/agentview_rgb", data=episode["agentview_rgb"], **stored)
    windows = load_training_set(TrainingSetConfig(path, image_keys=("agentview_rgb",), chunk=2), 0).windows
    assert windows.reads_files
    rows = torch.randint(len(windows), (4, 8), generator=torch.Generator().manual_seed(0))
    for which, observation in zip(rows, read_ahead(windows, rows, "cpu"), strict=True):
        for n, frame in zip(which.tolist(), observation["image.agentview"].numpy()):
            expected = written[windows.episode[n]]["agentview_rgb"][windows.step[n], ::-1]
            np.testing.assert_array_equal(frame, np.moveaxis(expected, -1, 0))


@given(arrays(float, (5, 4), elements=st.floats(-1, 1)).filter(lambda q: bool((np.linalg.norm(q, axis=1) > 0.1).all())))
def test_quaternions_come_back(q: np.ndarray) -> None:
    """As robosuite turns them into rotation vectors (`quat2axisangle`): the same numbers, the sign included."""
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    sine = np.sqrt(1 - np.clip(q[:, 3], -1, 1) ** 2)
    turned = np.where(
        sine[:, None] > 1e-8, q[:, :3] / np.maximum(sine, 1e-12)[:, None] * 2 * np.arccos(np.clip(q[:, 3], -1, 1))[:, None], 0
    )
    back = quaternion(turned)
    sure = sine > 1e-6
    np.testing.assert_allclose(back[sure], q[sure], atol=1e-6)
    np.testing.assert_allclose(Rotation.from_quat(back).as_matrix(), Rotation.from_rotvec(turned).as_matrix(), atol=1e-9)


def test_a_folder_is_one_dataset_of_several_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    for task, count in ((BOWL, 3), (STOVE, 5)):
        write_libero(tmp_path / "two", task, [random_episode(rng) for _ in range(count)])
    data = read_dataset(tmp_path / "two", image_keys=["image.agentview"])
    assert len(data) == 8
    assert data.environment["env_name"] == "libero/kitchen/3+14"
    assert [e.task for e in data] == [BOWL] * 3 + [STOVE] * 5
    assert data.filters[STOVE] == tuple(f"{STOVE}_demo_{k}" for k in range(5)) == list_dataset(tmp_path / "two").filters[STOVE]
    assert set(find_environment("libero/kitchen/3+14-pixels").state_keys or ()) == set(data.state_keys)
    (one,) = read_dataset(tmp_path / "two", names=[f"{STOVE}_demo_2"])
    np.testing.assert_array_equal(one.actions, data.select(STOVE)[2].actions)
    assert read_dataset(tmp_path / "two", filter_key=BOWL).environment["env_name"] == f"libero/{BOWL}"
    # equally many of each task, however many there are
    config = TrainingSetConfig(
        tmp_path / "two", num_trajectories=4, image_keys=("image.agentview",), language="one-hot", tail="pad"
    )
    for seed in range(3):
        chosen = load_training_set(config, seed)
        assert sorted(e.task or "" for e in chosen.dataset) == [BOWL] * 2 + [STOVE] * 2
        assert chosen.shapes["language"] == (16,)
        told = chosen.windows.observation(torch.arange(len(chosen.windows)))["language"].argmax(1).tolist()
        assert set(told) == {3, 14}
    assert cli.main(["demos", "inspect", str(tmp_path / "two"), "--output", str(tmp_path / "two.png")]) == 0
    assert STOVE in "".join(capsys.readouterr().out.split())


def test_smaller_subsets_lie_inside_larger_ones(tmp_path: Path) -> None:
    data = read_dataset(write_demonstrations(tmp_path / "d.hdf5", 12, tasks=("a", "b", "c")))
    chosen = [set(data.subset(n, 5).names) for n in range(1, 13)]
    assert all(small < large for small, large in itertools.pairwise(chosen))
    tasks = data.task_of
    for names in chosen:
        counts = [sum(tasks[name] == task for name in names) for task in "abc"]
        assert max(counts) - min(counts) <= 1


def test_environments_of_tasks() -> None:
    assert environment_name([BOWL, BOWL], KITCHEN) == f"libero/{BOWL}"
    assert environment_name([STOVE, BOWL, STOVE], KITCHEN) == "libero/kitchen/3+14"
    assert environment_name(KITCHEN[::-1], KITCHEN) == "libero/kitchen"


def test_what_cannot_be_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    good = random_episode(rng)

    def refuses(words: str, task: str = STOVE, **changes: Any) -> None:
        path = write_libero(tmp_path / words.replace(" ", "_"), task, [{**good, **changes}])
        with pytest.raises(InputError, match=words):
            read_dataset(path, image_keys=["image.agentview"])

    refuses("one frame a step", agentview_rgb=good["agentview_rgb"].astype(float))
    refuses("disagree about its length", ee_states=good["ee_states"][1:])
    refuses("another width", ee_states=good["ee_states"][:, :5])
    refuses("outside the controller", actions=2 * good["actions"])
    refuses("too short", **{name: values[:1] for name, values in good.items()})
    refuses("finite", ee_states=np.full_like(good["ee_states"], np.nan))
    path = write_libero(tmp_path / "good", STOVE, [good])
    with pytest.raises(InputError, match="no such camera"):
        read_dataset(path, image_keys=["top_image"])
    with pytest.raises(InputError, match="no such demonstration"):
        read_dataset(path, names=["demo_9"])
    write_demonstrations(tmp_path / "good/lift.hdf5")
    with pytest.raises(InputError, match="do not belong together"):
        read_dataset(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="directory"):
        read_dataset(tmp_path / "empty")
