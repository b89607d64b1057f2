"""Training sets: the first house's numbers, what is read, what is warned of; and which data belongs to which simulator."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from made import LIFT, LIFT_15, RIGHT, write_demonstrations
from postbc.data import Facts, TrainingSetConfig, check_belongs, load_training_set, read_robomimic
from postbc.data import training_set as module
from postbc.data.belonging import check_simulator
from postbc.data.robomimic import action_bounds, expected_action_dim
from postbc.errors import InputError
from postbc.schemas import parse, plain

#: What the first house's `load_training_sets` gave for `waves`: names, windows, three entries of states and chunks, sums of both.
GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_training_set.json").read_text(encoding="utf-8"))
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "all": ({}, 0),
    "subset": ({"num_trajectories": 3, "statistics": "subset"}, 1),
    "pad": ({"num_trajectories": 2, "chunk": 3, "tail": "pad"}, 2),
    "filter": ({"filter_key": "half", "subset_seed": 7, "num_trajectories": 2}, 0),
}


def waves(path: Path) -> Path:
    """Six episodes of sines, in robomimic's layout."""
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps(LIFT)
        for i in range(6):
            t = np.arange(9 + i)[:, None]
            demo = file.create_group(f"data/demo_{i}")
            demo["actions"], demo["rewards"], demo["dones"] = np.cos(0.3 * i + 0.7 * t + np.arange(7)), t[:, 0] * 0, t[:, 0] * 0
            for k, (key, width) in enumerate(
                {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}.items()
            ):
                demo[f"obs/{key}"] = np.sin(1 + k + 0.7 * i + 0.31 * t + 1.3 * np.arange(width)) * (k + 1)
        file["mask/half"] = np.array([b"demo_0", b"demo_2", b"demo_4"])
    return path


@pytest.mark.parametrize("case", CASES)
def test_the_first_houses_numbers(tmp_path: Path, case: str) -> None:
    options, seed = CASES[case]
    data = load_training_set(TrainingSetConfig(demonstrations=waves(tmp_path / "d.hdf5"), **options), seed)
    rows, golden = torch.arange(len(data.windows)), GOLDEN[case]
    states = data.normalization.normalize_state(data.windows.observation(rows)["state"])
    chunks = data.normalization.normalize_action(data.windows.chunk(rows))
    assert list(data.dataset.names) == golden["names"]
    assert len(rows) == golden["windows"]
    np.testing.assert_allclose(states[[0, 5, -1], [0, 9, 18]], golden["states"], atol=1e-6)
    np.testing.assert_allclose(chunks[[0, 5, -1], [0, 1, -1], [0, 3, 6]], golden["chunks"], atol=1e-6)
    np.testing.assert_allclose([states.double().sum(), chunks.double().sum()], golden["sums"], atol=1e-3)


def test_seeds_and_fingerprints(tmp_path: Path) -> None:
    config = TrainingSetConfig(demonstrations=waves(tmp_path / "d.hdf5"), num_trajectories=2)
    one = load_training_set(config, 0)
    assert one.fingerprint == load_training_set(config, 0).fingerprint
    others = [load_training_set(config, 1), *(load_training_set(replace(config, **change), 0) for change in (
        {"chunk": 3}, {"statistics": "subset"}, {"minimum_range": 9.0}, {"observation_steps": 2}, {"tail": "pad"},
        {"observation_keys": ("object",)}))]  # fmt: skip
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 8
    fixed = replace(config, subset_seed=3)
    assert load_training_set(fixed, 0).dataset.names == load_training_set(fixed, 1).dataset.names
    assert load_training_set(config, 0, full=read_robomimic(config.demonstrations)).fingerprint == one.fingerprint
    with pytest.raises(InputError, match="seed"):
        load_training_set(config, -1)


def test_the_config_is_a_schema(tmp_path: Path) -> None:
    config = TrainingSetConfig(demonstrations=tmp_path / "d.hdf5", observation_keys=("a", "b"), num_trajectories=3)
    assert parse(TrainingSetConfig, plain(config)) == config
    for bad in (
        {"chunk": 0},
        {"num_trajectories": 0},
        {"subset_seed": -1},
        {"minimum_range": float("nan")},
        {"tail": "wrap"},
        {"more": 1},
    ):
        with pytest.raises(InputError):
            TrainingSetConfig(**{"demonstrations": tmp_path / "d.hdf5", **bad})


def test_only_what_is_asked_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad demonstration outside the filter or the drawn subset does not matter; nor do rewards, dones and states."""
    path = write_demonstrations(tmp_path / "d.hdf5", 6)
    with h5py.File(path, "r+") as file:
        file["data/demo_1/obs/object"][5, 2] = np.nan
        file["data/demo_0/rewards"][0] = np.nan
        for demo in file["data"].values():
            demo.pop("dones")
    asked: list[Any] = []
    monkeypatch.setattr(
        module, "read_dataset", lambda *args, **more: asked.append(more["names"]) or read_robomimic(*args, **more)
    )
    config = TrainingSetConfig(demonstrations=path, filter_key="half", statistics="subset")
    assert load_training_set(config, 0).dataset.names == ("demo_0", "demo_2", "demo_4")
    assert len(load_training_set(replace(config, num_trajectories=1), 0).dataset) == len(asked[-1]) == 1
    with pytest.raises(InputError, match="demo_1"):
        load_training_set(replace(config, statistics="full"), 0)
    with pytest.raises(InputError, match="no such filter"):
        load_training_set(replace(config, filter_key="quarter"), 0)


def test_constant_dimensions_are_warned_of(tmp_path: Path) -> None:
    path = write_demonstrations(tmp_path / "d.hdf5", 3)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["obs/object"][:, 2] = 0.83
    config = TrainingSetConfig(demonstrations=path)
    with pytest.warns(UserWarning, match=r"Constant.*object\[2\].*--data.minimum-range"):
        narrow = load_training_set(config, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = load_training_set(replace(config, minimum_range=0.05), 0)
    unseen = torch.zeros(1, 19)
    unseen[0, 11] = 0.831
    assert narrow.normalization.normalize_state(unseen)[0, 11] > 1000
    assert abs(wide.normalization.normalize_state(unseen)[0, 11]) < 0.1


def test_frames(tmp_path: Path) -> None:
    path = write_demonstrations(tmp_path / "d.hdf5", 3, images={"top_image": (6, 5, 3)})
    config = TrainingSetConfig(demonstrations=path, observation_keys=(), image_keys=("top_image",), observation_steps=2)
    data = load_training_set(config, 0)
    assert data.shapes == {"image.top": (3, 6, 5)}
    assert data.windows.observation(torch.arange(3))["image.top"].shape == (3, 2, 3, 6, 5)
    assert data.facts.images == {"image.top": (3, 6, 5)}
    assert data.normalization.state_dim == 0


# -- belonging -------------------------------------------------------------------------------------------------------------------
HERE = Facts.of_env_args({**LIFT, "env_version": "1.4.0"})


def of(**changes: Any) -> Facts:
    return Facts.of_env_args({**LIFT, "env_kwargs": {**LIFT["env_kwargs"], **changes.pop("kwargs", {})}, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env_name": "PickPlaceCan"}, ["environment", "PickPlaceCan", "Lift"]),
        ({"env_version": "1.5.1"}, ["version", "1.5.1", "1.4.0", "--allow-version-mismatch"]),
        ({"env_version": "1.3.9"}, ["1.3.9"]),
        ({"kwargs": {"robots": "Sawyer"}}, ["robots", "Sawyer"]),
        ({"kwargs": {"robots": ["Panda", "Panda"]}}, ["robots"]),
        ({"kwargs": {"control_freq": 10}}, ["control freq", "10", "20"]),
        ({"kwargs": {"controller_configs": {**LIFT["env_kwargs"]["controller_configs"], "control_delta": False}}}, ["control_delta"]),
        ({"kwargs": {"controller_configs": [{**LIFT["env_kwargs"]["controller_configs"], "kp": 300}]}}, ["controller kp", "300"]),
    ],
)  # fmt: skip
def test_what_does_not_belong(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        check_belongs(of(**changes), HERE, file="d.hdf5")
    for word in ["d.hdf5", *words]:
        assert word in str(error.value)


def test_what_belongs() -> None:
    assert check_belongs(of(), HERE) == []
    assert check_belongs(of(kwargs={"robots": "Panda"}), HERE) == []  # a word, or a list of one
    controller = LIFT["env_kwargs"]["controller_configs"]
    assert check_belongs(of(kwargs={"controller_configs": [{**controller, "input_max": [1] * 6}]}), HERE) == []
    [warning] = check_belongs(of(env_version="1.5.1"), HERE, allow_version_mismatch=True)
    assert "1.5.1" in warning
    [warning] = check_belongs(Facts(environment="Lift"), HERE, file="d.hdf5")  # a missing key is not a match
    for word in ("version", "robots", "controller kp", "control freq", "d.hdf5"):
        assert word in warning
    assert check_belongs(of(), Facts()) == []  # nothing is asked


def test_the_controller_of_a_newer_robosuite_is_the_arms() -> None:
    """robosuite 1.5 keeps it among the parts of the body, and newer releases call `control_delta` `input_type`."""
    right = {key: value for key, value in RIGHT.items() if key != "control_delta"}

    def found(**changes: Any) -> Facts:
        configs = {"type": "BASIC", "body_parts": {"right": {**right, **changes}, "base": {"type": "JOINT_VELOCITY"}}}
        return Facts.of_env_args({**LIFT_15, "env_kwargs": {**LIFT_15["env_kwargs"], "controller_configs": configs}})

    for facts in (Facts.of_env_args(LIFT_15), found(control_delta=True), found(input_type="delta")):
        [warning] = check_belongs(facts, HERE, allow_version_mismatch=True)  # nothing is unknown
        assert "1.5.1" in warning
    absolute = {"input_type": "absolute"}
    for change, word in (({"kp": 300}, "kp"), ({"control_delta": False}, "control_delta"), (absolute, "control_delta"),
                         ({"type": "JOINT_POSITION"}, "controller type")):  # fmt: skip
        with pytest.raises(InputError, match=word):
            check_belongs(found(**change), HERE, allow_version_mismatch=True)
    assert expected_action_dim(LIFT_15) == 7
    assert action_bounds(LIFT_15) == (-1.0, 1.0)
    kwargs = {"controller_configs": {"body_parts": {"right": {**right, **absolute}}}}
    assert action_bounds({"type": 1, "env_kwargs": kwargs}) is None
    for bad in ({"body_parts": "right"}, {"body_parts": {"right": 3}}):
        with pytest.raises(InputError, match="controller's settings cannot be compared"):
            Facts.of_env_args({"env_kwargs": {"controller_configs": bad}})


def test_observations_belong() -> None:
    """Keys in their order, widths, frames and actions; a policy may look at fewer cameras than there are."""
    data = Facts(
        state_keys=("a", "b"), state_dims=(1, 2), images={"image.top": (3, 8, 8), "image.side": (3, 8, 8)}, action_dim=7
    )
    assert check_belongs(data, replace(data, images={"image.top": (3, 8, 8)})) == []
    for change in ({"state_keys": ("b", "a")}, {"state_dims": (2, 1)}, {"action_dim": 6}, {"images": {"image.top": (3, 9, 9)}},
                   {"images": {"image.back": (3, 8, 8)}}):  # fmt: skip
        with pytest.raises(InputError, match="does not belong"):
            check_belongs(data, replace(data, **change))


def test_facts_are_kept(tmp_path: Path) -> None:
    facts = Facts.of_dataset(read_robomimic(write_demonstrations(tmp_path / "d.hdf5", 2)))
    assert facts.state_keys == ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    assert Facts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts
    for bad in ({"robots": "Panda"}, {"version": 1.4}, {"more": 1}, {"action_dim": 0}, [], {"control_freq": "x"}):
        with pytest.raises(InputError):
            Facts.from_dict(bad)
    for args in ({"env_kwargs": "robots=Panda"}, {"env_kwargs": {"controller_configs": "OSC"}}, {"env_name": 3},
                 {"env_kwargs": {"controller_configs": [{}, {}]}}, {"env_kwargs": {"robots": {"a": 1}}}):  # fmt: skip
        with pytest.raises(InputError, match=r"d\.hdf5"):
            Facts.of_env_args(args, "d.hdf5")


def test_data_of_another_simulator_version_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postbc.data.belonging.installed_robosuite", lambda: "1.4.0")
    path = write_demonstrations(tmp_path / "d.hdf5", 2, environment={**LIFT, "env_version": "1.5.1"})
    config = TrainingSetConfig(demonstrations=path)
    with pytest.raises(InputError, match=r"(?s)another version.*d\.hdf5.*1\.5\.1.*1\.4\.0.*demos convert"):
        load_training_set(config, 0)
    with pytest.warns(UserWarning, match=r"1\.5\.1"), pytest.warns(UserWarning, match=r'"object".*demos convert'):
        load_training_set(replace(config, allow_version_mismatch=True), 0)
    of_the_hand = read_robomimic(path, observation_keys=["robot0_eef_pos"])
    assert len(check_simulator(of_the_hand, allow_version_mismatch=True)) == 1
    monkeypatch.setattr("postbc.data.belonging.installed_robosuite", lambda: None)
    assert check_simulator(read_robomimic(path)) == []  # nothing to compare with
