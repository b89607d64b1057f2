"""Run directories: atomic files, checkpoints without pickle, metrics that forget what is past the checkpoint."""

import csv
import errno
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postbc import runs
from postbc.errors import InputError
from postbc.runs import Run, atomic_path, load_tree, save_tree


@dataclass(frozen=True)
class Config:
    output: Path
    width: int = 3
    seeds: tuple[int, ...] = (0, 1)


def same(a, b):
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


leaves = (
    st.none() | st.booleans() | st.integers(-(2**130), 2**130) | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from([torch.arange(6).view(2, 3), torch.zeros(0), torch.tensor(1.5), torch.ones(2, dtype=torch.bfloat16)])
    | st.sampled_from([np.arange(3, dtype=np.uint8), np.eye(2), np.array(True), np.arange(3, dtype=np.uint64)])
)  # fmt: skip
keys = st.text(max_size=5) | st.integers(0, 9)


@given(
    st.dictionaries(
        keys, st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3)), max_size=4
    )
)
@settings(max_examples=60, deadline=None)
def test_trees_come_back_as_they_were(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "t.safetensors"
    save_tree(path, tree)
    assert same(load_tree(path), tree)


def test_optimiser_states_and_generator_states_survive(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    rng = np.random.default_rng(0)
    save_tree(tmp_path / "t", {"o": optimiser.state_dict(), "r": rng.bit_generator.state})
    loaded = load_tree(tmp_path / "t")
    other = torch.optim.Adam(model.parameters(), fused=True)
    other.load_state_dict(loaded["o"])
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], optimiser.state_dict()["state"][0]["exp_avg"])
    again = np.random.default_rng(1)
    again.bit_generator.state = loaded["r"]
    assert again.random() == rng.random()


def test_a_failing_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "save_file", full)
    with pytest.raises(InputError, match=r"(?s)disk is full.*what to do"):
        save_tree(tmp_path / "t.safetensors", {"a": torch.ones(3)})
    assert not list(tmp_path.iterdir())


def test_things_that_cannot_be_saved_are_named(tmp_path):
    with pytest.raises(TypeError, match="/a/0: a object"):
        save_tree(tmp_path / "t", {"a": [object()]})


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 64])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_tree(path)


def test_truncated_foreign_missing_and_directory(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tree(path, {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_tree(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, str(path))
    with pytest.raises(InputError, match="not written by postbc"):
        load_tree(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        load_tree(tmp_path / "none")
    with pytest.raises(InputError, match="not a directory"):
        load_tree(tmp_path)


def test_run_directory_refuses_others_and_resumes_its_own(tmp_path):
    config = Config(tmp_path / "run")
    run = Run(config.output, config)
    run.log(1, {"loss": 1.0})
    run.save(1, {"x": torch.ones(2)})
    run.log(2, {"loss": 2.0, "extra": 5.0})
    with pytest.raises(InputError, match="already holds a run"):
        Run(config.output, config)
    with pytest.raises(InputError, match=r"(?s)another configuration.*width"):
        Run(config.output, Config(config.output, width=4), resume=True)
    Run(config.output, Config(config.output, width=4), resume=True, revisable=("width",))  # recorded as last given
    assert "width: 4" in (config.output / "config.yaml").read_text()
    Run(config.output, Config(config.output), resume=True, revisable=("width",))
    again = Run(config.output, Config(config.output), resume=True)
    step, state = again.load()
    assert step == 1
    assert torch.equal(state["x"], torch.ones(2))
    again.log(2, {"loss": 3.0})
    again.close()
    with open(config.output / "metrics.csv") as file:
        assert [(int(r["step"]), float(r["loss"])) for r in csv.DictReader(file)] == [(1, 1.0), (2, 3.0)]


def test_a_kill_while_the_run_is_being_set_up_leaves_something_to_resume(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(runs, "versions", killed)
    with pytest.raises(Killed):
        Run(tmp_path / "r", Config(tmp_path / "r"))
    monkeypatch.undo()
    Run(tmp_path / "r", Config(tmp_path / "r"), resume=True)
    assert (tmp_path / "r/versions.json").exists()


def test_a_directory_with_other_things_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"(?s)not empty.*thesis"):
        Run(tmp_path, Config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_old_checkpoints_go_and_latest_points_to_the_newest(tmp_path):
    run = Run(tmp_path / "r", Config(tmp_path / "r"), keep=2)
    for step in (10, 20, 30):
        run.save(step, {"step": step})
    assert [p.name for p in sorted((tmp_path / "r/checkpoints").iterdir())] == [
        "step_000000020.safetensors",
        "step_000000030.safetensors",
    ]
    assert load_tree(tmp_path / "r/latest")["step"] == 30


def test_metrics_gain_columns(tmp_path):
    run = Run(tmp_path / "r", Config(tmp_path / "r"))
    run.log(1, {"a": 1.0})
    run.log(2, {"b": 2.0})
    run.log(3, {"a": 3.0, "b": 4.0})
    with open(tmp_path / "r/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["a"], r["b"]) for r in rows] == [("1.0", ""), ("", "2.0"), ("3.0", "4.0")]


def test_wandb_where_the_environment_names_a_project(tmp_path, monkeypatch):
    calls, rows = [], []

    class Fake:
        @staticmethod
        def init(**options):
            calls.append(options)
            return Fake

        @staticmethod
        def log(row, step):
            rows.append((step, row))

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    monkeypatch.setenv("WANDB_PROJECT", "lift")
    for step in (1, 2):  # a run, and the same resumed
        Run(tmp_path / "run", {"a": 1}, resume=step == 2).log(step, {"loss": 0.5})
    assert rows == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert [c["project"] for c in calls] == ["lift", "lift"]
    assert calls[0]["id"] == calls[1]["id"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"postbc\[wandb\]"):
        Run(tmp_path / "other", {"a": 1}).log(1, {"loss": 0.5})
