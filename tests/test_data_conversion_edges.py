"""Conversions and folders at their edges: several tasks' simulators, options that contradict the data, names that collide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from postbc.cli import main
from postbc.data import Dataset, Episode, read_dataset, write_robomimic
from postbc.data.folder import files_of, place_of
from postbc.errors import InputError

ENVIRONMENT = {"env_name": "Lift", "env_version": "1.4.0", "env_kwargs": {"control_freq": 20}}


def of_two_tasks(filters: dict[str, tuple[str, ...]] | None = None) -> Dataset:
    rng = np.random.default_rng(0)
    made = [
        Episode(
            {"state": rng.normal(size=(6, 5)).astype(np.float32)}, rng.uniform(-1, 1, (6, 2)).astype(np.float32),
            states=rng.normal(size=(6, width)), name=f"demo_{i}", task=task,
        )
        for i, (task, width) in enumerate((("stove", 47), ("bowl", 51)))
    ]  # fmt: skip
    return Dataset(tuple(made), ("pose",), (5,), ENVIRONMENT, filters or {}, tasks=("stove", "drawer", "bowl"))


def test_simulator_states_of_different_widths_and_the_order_of_tasks_survive_a_lerobot_dataset(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    data = of_two_tasks()
    write_robomimic(tmp_path / "a.hdf5", data)
    keys = ["--observation-keys", "pose"]
    assert main(["demos", "convert", str(tmp_path / "a.hdf5"), "--output", str(tmp_path / "l"), "--to", "lerobot", *keys]) == 0
    back = read_dataset(tmp_path / "l", parts=("states",))
    assert back.tasks == ("stove", "drawer", "bowl")
    assert [e.task for e in back] == ["stove", "bowl"]
    for ours, theirs in zip(data, back):
        assert ours.states is not None
        assert theirs.states is not None
        np.testing.assert_array_equal(ours.states, theirs.states)
    width = json.loads((tmp_path / "l/meta/info.json").read_text())["features"]["simulator_state"]["shape"]
    assert width == [51]


@pytest.mark.parametrize(
    ("options", "said"), [(["--fps", "10"], "another rate"), (["--image-size", "16"], "drawn into robomimic")]
)
def test_options_that_contradict_the_data_or_the_output_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    write_robomimic(tmp_path / "a.hdf5", of_two_tasks())
    command = ["demos", "convert", str(tmp_path / "a.hdf5"), "--output", str(tmp_path / "l"), "--to", "lerobot"]
    assert main([*command, "--observation-keys", "pose", *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "l").exists()


def test_observations_are_not_chosen_of_what_is_played_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_robomimic(tmp_path / "a.hdf5", of_two_tasks())
    assert (
        main(["demos", "convert", str(tmp_path / "a.hdf5"), "--output", str(tmp_path / "b.hdf5"), "--image-keys", "cam"]) == 2
    )
    assert "Only copied observations" in capsys.readouterr().err


def test_files_of_a_folder_that_would_hide_one_another_are_refused(tmp_path: Path) -> None:
    for name in ("a.hdf5", "a_demo.hdf5"):
        write_robomimic(tmp_path / name, of_two_tasks())
    assert len(files_of(tmp_path)) == 2
    with pytest.raises(InputError, match="the same names"):
        read_dataset(tmp_path, observation_keys=["pose"])


def test_the_place_of_a_demonstration_is_the_file_with_the_longest_name_that_fits(tmp_path: Path) -> None:
    for name in ("a.hdf5", "a_demo_1.hdf5"):
        write_robomimic(tmp_path / name, of_two_tasks())
    assert place_of(tmp_path, "a_demo_1") == (tmp_path / "a.hdf5", "demo_1")
    assert place_of(tmp_path, "a_demo_1_demo_0") == (tmp_path / "a_demo_1.hdf5", "demo_0")


def test_a_filter_that_means_something_else_than_the_file_of_its_name_is_refused(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "better.hdf5", of_two_tasks())
    write_robomimic(tmp_path / "other.hdf5", of_two_tasks({"better": ("demo_0",)}))
    with pytest.raises(InputError, match="name of a file"):
        read_dataset(tmp_path, observation_keys=["pose"])


def test_an_observation_is_not_named_twice(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "a.hdf5", of_two_tasks())
    with pytest.raises(InputError, match="named twice"):
        read_dataset(tmp_path / "a.hdf5", observation_keys=["pose", "pose"])
