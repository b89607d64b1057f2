"""Recorded episodes in the simulator again: replayed, refused where they do not belong, and observed from their states, resumable."""

from __future__ import annotations

import importlib.resources
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from kills import in_a_process, kill_at_every_operation
from made import LIFT, LIFT_15
from postbc import cli
from postbc.data import Dataset, Episode, read_dataset, read_robomimic, write_robomimic
from postbc.data.belonging import check_simulator
from postbc.data.convert import convert_recording, finish
from postbc.data.recordings import open_recording
from postbc.errors import InputError

robosuite = pytest.mark.simulator


@pytest.fixture(scope="module")
def recorded() -> Dataset:
    pytest.importorskip("robosuite")
    from postbc.environments.robosuite.collect import collect

    return collect("Lift", num=4, seed=3, num_envs=4).dataset


@robosuite
def test_replay(recorded: Dataset) -> None:
    from postbc.environments.robosuite.playback import replay

    native = replay(recorded, num_envs=3)
    assert native.successes.all()
    assert native.drift.max() == 0  # every action is what was executed, every state what it was executed in
    assert native.warnings == ()
    assert native.first_success.tolist() == [int(np.argmax(e.rewards)) for e in recorded]  # type: ignore[arg-type]
    forgotten = replace(recorded, episodes=tuple(replace(e, episode_seed=None) for e in recorded))
    assert replay(forgotten, num_envs=7).successes.sum() >= 3  # with another cube, 2 mm larger or smaller at most
    one = recorded.subset(1, 0)
    python = replay(one, native=False)
    assert python.names == one.names
    assert python.successes.all()
    assert python.drift.max() < 2e-3


@robosuite
def test_replay_refuses_another_controller(recorded: Dataset) -> None:
    """Absolute commands would be other movements: said, not silently played. What is not known is said too."""
    from postbc.environments.robosuite.playback import replay

    kwargs = recorded.environment["env_kwargs"]
    absolute = {**kwargs, "controller_configs": {**kwargs["controller_configs"], "control_delta": False}}
    one = recorded.subset(1, 0)
    with pytest.raises(InputError, match="control_delta"):
        replay(replace(one, environment={**recorded.environment, "env_kwargs": absolute}))
    [warning] = replay(replace(one, environment={"env_name": "Lift"})).warnings
    assert "version, robots, controller" in warning
    short = tuple(replace(e, states=np.asarray(e.states)[:, :31]) for e in one)
    with pytest.raises(InputError, match=r"(?s)not this simulator's.*31"):
        replay(replace(one, episodes=short))


@robosuite
def test_a_file_of_a_newer_robosuite_replays_where_that_is_allowed(
    recorded: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `env_args` as the hub's v1.5 files have them: the version alone stands in the way."""
    path = write_robomimic(tmp_path / "low_dim_v15.hdf5", replace(recorded, environment=LIFT_15))
    replaying = ["demos", "replay", str(path), "--num", "2"]
    assert cli.main(replaying) == 2
    assert "1.5.1" in (said := capsys.readouterr().err)
    assert "--allow-version-mismatch" in said
    assert cli.main([*replaying, "--allow-version-mismatch"]) == 0
    assert "2 of 2 succeeded" in (said := capsys.readouterr().out)
    assert "Made with simulator version 1.5.1" in said


@robosuite
def test_a_file_of_a_newer_robosuite_becomes_one_of_this(recorded: Dataset, tmp_path: Path) -> None:
    """Observed anew from its states: robosuite 1.5 has the cube minus the hand in "object", 1.4 the hand minus the cube."""
    theirs = np.where(np.arange(recorded.shapes["state"][0]) < 16, 1, -1).astype(np.float32)
    two = recorded.subset(2, 0)
    newer = tuple(replace(e, observations={"state": e.state * theirs}) for e in two)
    path = write_robomimic(tmp_path / "low_dim_v15.hdf5", replace(two, environment=LIFT_15, episodes=newer))
    assert cli.main(["demos", "convert", str(path), "--output", str(tmp_path / "ours.hdf5"), "--allow-version-mismatch"]) == 0
    ours = read_dataset(tmp_path / "ours.hdf5")
    assert ours.environment["env_version"] == "1.4.0"
    assert check_simulator(ours) == []
    np.testing.assert_allclose(ours.states, two.states, atol=0.02)  # of states, not of steps, which lag by a substep
    assert np.abs(ours.states[:, 16:] - read_dataset(path).states[:, 16:]).max() > 0.1


def record(path: Path, dataset: Dataset, version: str = "1.4.0") -> Path:
    """As robosuite's collection script writes it."""
    kwargs = LIFT["env_kwargs"]
    info = {"env_name": "Lift", "robots": "Panda", "controller_configs": kwargs["controller_configs"]}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update({"env": "Lift", "env_info": json.dumps(info), "repository_version": version, "date": "1-1-2025"})
        for i, episode in enumerate(dataset, 1):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["model_file"] = "<mujoco/>"
            demo["states"], demo["actions"] = episode.states, episode.actions.astype(np.float64)
    return path


@robosuite
def test_a_recording_becomes_demonstrations(recorded: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """States played back give the observations that were seen, and the successes."""
    path, output = record(tmp_path / "demo.hdf5", recorded), tmp_path / "lift.hdf5"
    assert cli.main(["demos", "inspect", str(path)]) == 2
    assert "raw robosuite recording" in (said := capsys.readouterr().err)
    assert "demos convert" in said
    assert cli.main(["demos", "convert", str(path), "--output", str(output)]) == 0
    assert "4 episodes" in (said := capsys.readouterr().out)
    assert "control freq" in said  # the recording does not say it
    converted = read_robomimic(output)
    assert converted.names == ("demo_1", "demo_2", "demo_3", "demo_4")
    for a, b in zip(converted, recorded):
        # MuJoCo's poses after a step are those before its last 2 ms, a state's own are not: under a millimetre (robomimic's lag too)
        np.testing.assert_allclose(a.state[:, :19], b.state, atol=3e-3)
        np.testing.assert_array_equal(a.actions, b.actions)
        assert np.abs(np.asarray(a.rewards) - b.rewards).sum() <= 1
        np.testing.assert_array_equal(a.dones, np.arange(len(b)) == len(b) - 1)
        np.testing.assert_array_equal(a.states, b.states)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.hdf5", "lift.hdf5"]
    assert cli.main(["demos", "replay", str(output), "--num", "1"]) == 0
    record(path, recorded, "1.5.0")
    assert cli.main(["demos", "convert", str(path), "--output", str(output), "--overwrite"]) == 2
    assert "1.5.0" in capsys.readouterr().err


@robosuite
@pytest.mark.slow
def test_robosuites_own_recording(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    path = importlib.resources.files("robosuite") / "models/assets/demonstrations/lift/demo.hdf5"
    assert cli.main(["demos", "convert", str(path), "--output", str(tmp_path / "lift.hdf5")]) == 0
    converted = read_robomimic(tmp_path / "lift.hdf5", clip_actions=True)
    assert converted.lengths.tolist() == [482, 510, 392]
    assert all(e.rewards is not None and e.rewards[-1] == 1 for e in converted)


class Counting:
    """An observer without a simulator: the state's first three numbers. It breaks down at the episode `fail`."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.seen = fail, list[str]()

    def env_args(self) -> dict[str, Any]:
        return LIFT

    def observe(self, name: str, states: np.ndarray, actions: np.ndarray, operator: str | None = None) -> Episode:
        if name == self.fail:
            raise KeyboardInterrupt
        self.seen.append(name)
        return Episode({"state": states[:, :19]}, actions, states[:, 0], None, states, name, operator)


def test_conversion_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = Dataset.from_arrays([np.zeros((5, 1))] * 4, [rng.normal(size=(5, 7)) for _ in range(4)],
                               states=[rng.normal(size=(5, 32)) for _ in range(4)])  # fmt: skip
    recording = open_recording(record(tmp_path / "demo.hdf5", data))
    undisturbed = convert_recording(recording, Counting(), tmp_path / "whole.hdf5").read_bytes()
    output = tmp_path / "new.hdf5"
    with pytest.raises(KeyboardInterrupt):
        convert_recording(recording, Counting("demo_3"), output)
    assert not output.exists()
    again = Counting()
    counted: list[int] = []
    assert convert_recording(recording, again, output, counted.append).read_bytes() == undisturbed
    assert again.seen == ["demo_3", "demo_4"]
    assert counted == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.hdf5", "new.hdf5", "whole.hdf5"]
    with pytest.raises(KeyboardInterrupt):
        convert_recording(recording, Counting("demo_3"), output)
    record(tmp_path / "demo.hdf5", data.subset(3, 0))  # another recording of the same name: nothing of the old one is used
    fresh = Counting()
    convert_recording(open_recording(tmp_path / "demo.hdf5"), fresh, output)
    assert fresh.seen == ["demo_1", "demo_2", "demo_3"]


def killed_stage(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    if not finish(directory / "new.hdf5"):
        convert_recording(open_recording(Path(sys.argv[1]) / "demo.hdf5"), Counting(), directory / "new.hdf5")


def test_killed_at_every_file_operation(tmp_path: Path) -> None:
    data = Dataset.from_arrays([np.zeros((5, 1))] * 3, [np.zeros((5, 7))] * 3, states=[np.zeros((5, 32))] * 3)
    record(tmp_path / "demo.hdf5", data)
    in_a_process(__file__, tmp_path)


def test_recordings_that_cannot_be_converted(tmp_path: Path) -> None:
    data = Dataset.from_arrays([np.zeros((5, 1))], [np.zeros((5, 7))], states=[np.zeros((5, 32))])
    path = record(tmp_path / "demo.hdf5", data)
    with h5py.File(path, "r+") as file:
        del file["data/demo_1/actions"]
        file["data/demo_1/actions"] = np.zeros((4, 7))
    with pytest.raises(InputError, match=r"(?s)disagree.*data/demo_1/actions"):
        convert_recording(open_recording(path), Counting(), tmp_path / "new.hdf5")
    with h5py.File(path, "r+") as file:
        del file["data"].attrs["env_info"]
    with pytest.raises(InputError, match="env_info"):
        open_recording(path)
    with pytest.raises(InputError, match="simulator states"):
        open_recording(write_robomimic(tmp_path / "none.hdf5", Dataset.from_arrays([np.zeros((2, 1))], [np.zeros((2, 1))])))


if __name__ == "__main__":
    kill_at_every_operation(killed_stage, Path(sys.argv[1]) / "kills")
