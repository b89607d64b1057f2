"""Run directories: one process at a time, the same run or none, metrics and checkpoints that survive kills and damage."""

import contextlib
import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import kills
from postbc import disk, runs
from postbc.errors import InputError, NotFiniteError
from postbc.files import digest, load_tree, save_tree, write_json
from postbc.metrics import EVENTS
from postbc.runs import Checkpoints, Run, read_metrics, versions


@dataclass(frozen=True)
class Part:
    rate: float = 0.5
    name: str = "2020-01-01"


@dataclass(frozen=True)
class Config:
    output: Path
    width: int = 3
    seeds: tuple[int, ...] = (0, 1)
    part: Part = field(default_factory=Part)
    data: Path | None = None


def names(directory):
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*"))


def contents(directory):
    return {name: (directory / name).read_bytes() for name in names(directory) if (directory / name).is_file()}


def begun(directory, steps=(10, 20, 30), **options):
    with Run(directory, {"a": 1}, **options) as run:
        for step in steps:
            run.log(step, {"loss": 1 / step})
            run.save(step, {"x": torch.full((3,), float(step))})
    return directory


# -- whose directory it is ---------------------------------------------------------------------------------------------------------
def test_a_run_directory_refuses_others_and_resumes_its_own(tmp_path):
    config = Config(tmp_path / "run")
    with Run(config.output, config) as run:
        run.log(1, {"loss": 1.0})
        run.save(1, {"x": torch.ones(2)})
        run.log(2, {"loss": 2.0, "extra": 5.0})
    with pytest.raises(InputError, match="already holds a run"):
        Run(config.output, config)
    with pytest.raises(InputError, match=r"(?s)another configuration.*width, part\.rate.*width: 3") as raised:
        Run(config.output, Config(config.output, width=4, part=Part(rate=1.0)), resume=True)
    assert "part.name" not in str(raised.value)
    Run(config.output, Config(config.output, width=4), resume=True, revisable=("width",)).close()  # recorded as last given
    assert "width: 4" in (config.output / "config.yaml").read_text()
    Run(config.output, Config(config.output), resume=True, revisable=("width",)).close()
    other = Config(config.output, part=Part(rate=1.0))
    with pytest.raises(InputError, match=r"part\.rate"):
        Run(config.output, other, resume=True, revisable=("part.name", "par"))
    Run(config.output, other, resume=True, revisable=("part.rate",)).close()
    Run(config.output, Config(config.output), resume=True, revisable=("part",)).close()
    with Run(config.output, Config(config.output), resume=True) as again:
        step, state = again.load()
        assert step == 1
        assert torch.equal(state["x"], torch.ones(2))
        again.log(2, {"loss": 3.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(config.output / "metrics.csv")] == [(1, 1.0), (2, 3.0)]


def test_inputs_are_known_by_their_contents(tmp_path):
    data = tmp_path / "data.hdf5"
    data.write_bytes(b"one")
    Run(tmp_path / "r", {"data": str(data)}, inputs={"data": digest(data)}).close()
    Run(tmp_path / "r", {"data": str(data)}, inputs={"data": digest(data)}, resume=True).close()
    data.write_bytes(b"two")
    with pytest.raises(InputError, match=r"(?s)An input of this run.*inputs\.data"):
        Run(tmp_path / "r", {"data": str(data)}, inputs={"data": digest(data)}, resume=True)
    with pytest.raises(InputError, match=r"(?s)An input of this run.*inputs\.more"):
        Run(tmp_path / "r", {"data": str(data)}, inputs={"data": digest(__file__), "more": "x"}, resume=True)


@pytest.mark.parametrize(
    "content", [b"", b"- 1", b"a: [", b"\xff\x00", b"a: &a [1]\nb: *a", b"a: " + b"[" * 9999, b"a: 1\nz: {y: 2}"]
)
def test_a_broken_configuration_is_refused_and_nothing_touched(tmp_path, content):
    begun(tmp_path / "r")
    (tmp_path / "r/config.yaml").write_bytes(content)
    before = contents(tmp_path / "r")
    with pytest.raises(InputError, match=r"config\.yaml"):
        Run(tmp_path / "r", {"a": 1}, resume=True)
    assert contents(tmp_path / "r") == before


def test_a_directory_with_other_things_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"(?s)not empty.*thesis"):
        Run(tmp_path, Config(tmp_path))
    with pytest.raises(InputError, match="must be a directory"):
        Run(tmp_path / "thesis.tex", Config(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "none")
    with pytest.raises(InputError, match="must be a directory"):
        Run(tmp_path / "link", Config(tmp_path))
    assert names(tmp_path) == ["link", "thesis.tex"]


@pytest.mark.parametrize("place", ["n" * 300, "a\0b", "file/below", "\ud800"])
def test_places_that_cannot_be(tmp_path, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="what to do"):
        Run(tmp_path / place, {"a": 1})
    assert names(tmp_path) == ["file"]


def test_a_kill_while_the_run_is_being_set_up_leaves_something_to_resume(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(runs, "versions", killed)
    with pytest.raises(Killed):
        Run(tmp_path / "r", Config(tmp_path / "r"))
    monkeypatch.undo()
    Run(tmp_path / "r", Config(tmp_path / "r"), resume=True).close()
    assert names(tmp_path / "r") == ["config.yaml", "versions.json"]


def test_strange_values_come_back_the_same(tmp_path):
    config = {
        "path": "a\udcff\x00é\u2028[/red]",
        "date": "2020-01-01",
        "no": "no",
        "small": 1e-5,
        "big": 10**30,
        "list": [[1], []],
    }
    Run(tmp_path / "r", config).close()
    Run(tmp_path / "r", config, resume=True).close()


def test_a_run_is_resumed_under_another_locale(tmp_path):
    place = tmp_path / "données 成"
    Run(place, {"data": str(place)}).close()
    code = (
        "import sys\nfrom postbc.runs import Run\nwith Run(sys.argv[1], {'data': sys.argv[1]}, resume=True) as run: run.load()"
    )
    extra = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, place], env={**os.environ, **extra}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "données 成/config.yaml").read_text("utf-8"))["data"] == str(place)


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
    code = (
        "import sys, time\nfrom postbc.runs import Run\nrun = Run(sys.argv[1], {'a': 1}, resume=True)\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path / "r"], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "ready\n"
        before = contents(tmp_path / "r")
        for resume in (False, True):
            with pytest.raises(InputError, match=rf"(?s)in use by another process.*{first.pid}"):
                Run(tmp_path / "r", {"a": 1}, resume=resume)
        assert contents(tmp_path / "r") == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with Run(tmp_path / "r", {"a": 1}, resume=True) as run, pytest.raises(InputError, match="in use"):
        Run(tmp_path / "r", {"a": 1}, resume=True)
    run.finish()
    assert ".lock" not in names(tmp_path / "r")


def test_a_forked_worker_does_not_hold_the_lock(tmp_path):
    run = Run(tmp_path / "r", {"a": 1})
    read, write = os.pipe()
    ready, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:  # an environment's worker, which outlives its parent a little
        os.close(write)
        os.write(ready_write, b"x")
        os.read(read, 1)
        os._exit(0)
    os.read(ready, 1)
    os.close(run._lock._handle)  # as the kernel does when the parent is killed
    run._lock._handle = -1
    Run(tmp_path / "r", {"a": 1}, resume=True).close()
    os.close(write)
    os.waitpid(pid, 0)


@pytest.mark.parametrize(
    "name", ["config.yaml", "versions.json", "metrics.csv", ".lock", "checkpoints/step_000000030.safetensors"]
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_not_a_file_is_neither_followed_nor_waited_for(tmp_path, name, kind):
    begun(tmp_path / "r")
    mine = tmp_path / "mine"
    mine.write_text("mine")
    path = tmp_path / "r" / name
    path.unlink(missing_ok=True)
    path.symlink_to(mine) if kind == "link" else os.mkfifo(path)
    with contextlib.suppress(InputError), Run(tmp_path / "r", {"a": 1}, resume=True) as run:
        assert run.load()[0] in (20, 30)
        run.log(40, {"loss": 1.0})
        run.save(40, {})
        run.finish()
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("lacking", ["module", "file system"])
def test_without_locks_it_goes_on_without(tmp_path, monkeypatch, lacking):
    if lacking == "module":
        monkeypatch.setattr(runs, "fcntl", None)
    else:

        def refuse(*_):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(runs.fcntl, "flock", refuse)
    with Run(tmp_path / "r", {"a": 1}) as run:
        run.finish()
    assert names(tmp_path / "r") == ["config.yaml", "versions.json"]


def test_versions_are_recorded_with_a_command_that_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/postbc", "pretrain", "--data", "my file's.hdf5"])
    Run(tmp_path / "r", {"a": 1}).close()
    found = json.loads((tmp_path / "r/versions.json").read_text())
    assert shlex.split(found["command"]) == ["postbc", "pretrain", "--data", "my file's.hdf5"]
    assert {"postbc", "torch", "python", "commit"} <= {*found}
    for content in (b"", b"[1]", b"\xff", b"[" * 100_000):
        (tmp_path / "r/versions.json").write_bytes(content)
        with pytest.warns(UserWarning, match="written anew"):
            Run(tmp_path / "r", {"a": 1}, resume=True).close()
        assert json.loads((tmp_path / "r/versions.json").read_text())["command"] == found["command"]


# -- checkpoints -------------------------------------------------------------------------------------------------------------------
def test_old_checkpoints_go_and_latest_points_to_the_newest(tmp_path):
    begun(tmp_path / "r")
    assert names(tmp_path / "r/checkpoints") == ["step_000000020.safetensors", "step_000000030.safetensors"]
    assert load_tree(tmp_path / "r/latest")["step"] == 30


def test_finishing_leaves_the_results_alone(tmp_path):
    begun(tmp_path / "r")
    (tmp_path / "r/.policy.json.01234567.tmp").write_text("half")
    with Run(tmp_path / "r", {"a": 1}, resume=True) as run:
        run.load()
        write_json(tmp_path / "r/result.json", 1)
        run.finish()
        run.finish()
    expected = ["config.yaml", "metrics.csv", "result.json", "versions.json"]
    assert [n for n in names(tmp_path / "r") if "tensorboard" not in n] == expected
    Run(tmp_path / "r", {"a": 1}, resume=True).finish()
    assert [n for n in names(tmp_path / "r") if "tensorboard" not in n] == expected


def damages(path):
    content = path.read_bytes()
    yield content[:-7]
    yield b""
    yield content[:-1] + bytes([content[-1] ^ 1])
    for tree in ({"kind": "policy"}, {"kind": "checkpoint"}, {"kind": "checkpoint", "step": 30}, [1],
                 {"kind": "checkpoint", "step": "30", "elapsed": 1.0, "state": {}},
                 {"kind": "checkpoint", "step": 31, "elapsed": 1.0, "state": {}},
                 {"kind": "checkpoint", "step": 30, "elapsed": math.nan, "state": {}}):  # fmt: skip
        save_tree(path, tree)
        yield path.read_bytes()


def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(tmp_path):
    run_directory = begun(tmp_path / "r")
    newest = run_directory / "checkpoints/step_000000030.safetensors"
    original = contents(run_directory)
    for damage in list(damages(newest)):
        for name, content in original.items():
            (run_directory / name).write_bytes(content)
        newest.write_bytes(damage)
        with Run(run_directory, {"a": 1}, resume=True) as run:
            with pytest.warns(UserWarning, match=r"(?s)step_000000030.*before it, step 20"):
                step, state = run.load()
            assert (step, state["x"].tolist()) == (20, [20.0] * 3)
            assert [row["step"] for row in run.metrics] == [10, 20]
            assert run.checkpoint.name == "step_000000020.safetensors"
    with Run(run_directory, {"a": 1}, resume=True, keep=1) as run:
        with pytest.warns(UserWarning, match="step_000000030"):
            run.load()
        run.save(25, {"x": torch.ones(1)})  # the damaged one is not kept instead of this
    assert names(run_directory / "checkpoints") == ["step_000000025.safetensors"]


def test_no_readable_checkpoint_is_an_error_and_not_a_new_beginning(tmp_path):
    begun(tmp_path / "r")
    for path in (tmp_path / "r/checkpoints").iterdir():
        path.write_bytes(b"")
    with Run(tmp_path / "r", {"a": 1}, resume=True) as run, pytest.raises(InputError, match=r"(?s)No checkpoint.*checkpoints"):
        run.load()


@pytest.mark.parametrize("link", ["gone", "dangling", "older", "text"])
def test_the_newest_is_found_whatever_latest_says(tmp_path, link):
    begun(tmp_path / "r")
    latest = tmp_path / "r/latest"
    latest.unlink()
    if link == "text":
        latest.write_text("x")
    elif link != "gone":
        latest.symlink_to("checkpoints/none" if link == "dangling" else "checkpoints/step_000000020.safetensors")
    with Run(tmp_path / "r", {"a": 1}, resume=True) as run:
        assert run.load()[0] == 30
        run.save(40, {"x": torch.ones(1)})
    assert os.readlink(latest) == "checkpoints/step_000000040.safetensors"


def test_a_state_that_does_not_fit_names_its_file(tmp_path):
    begun(tmp_path / "r")
    with Run(tmp_path / "r", {"a": 1}, resume=True) as run:
        _, state = run.load()
        with pytest.raises(InputError, match=r"(?s)does not fit.*step_000000030.*no 'y'"), run.restoring():
            _ = state["y"]
        with pytest.raises(InputError, match=r"(?s)does not fit.*step_000000030"), run.restoring():
            torch.nn.Linear(2, 2).load_state_dict({"weight": state["x"]})


def test_numbers_that_are_not_finite_end_the_run(tmp_path):
    begun(tmp_path / "r")
    with Run(tmp_path / "r", {"a": 1}, resume=True) as run:
        before = contents(tmp_path / "r")
        with pytest.raises(NotFiniteError, match=r"(?s)critic/loss.*nan at step 40"):
            run.log(40, {"critic/loss": torch.tensor(torch.nan)})
        with pytest.raises(NotFiniteError, match=r"(?s)model/w.*step 40"):
            run.save(40, {"model": {"w": torch.tensor([1, torch.inf])}})
        assert contents(tmp_path / "r") == before


def test_elapsed_counts_all_attempts(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    with Run(tmp_path / "r", {"a": 1}) as run:
        now[0] += 50
        run.save(1, {})
        now[0] += 5  # lost with the kill
    with Run(tmp_path / "r", {"a": 1}, resume=True) as run:
        run.load()
        now[0] += 7
        assert run.elapsed == 57


def test_checkpoints_are_due_seldom(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    assert not Checkpoints(None, 0.0).due
    with Run(tmp_path / "r", {"a": 1}) as run:
        monkeypatch.setattr(run, "save", lambda *_: now.__setitem__(0, now[0] + 10))
        checkpoints = Checkpoints(run, 60)
        now[0] = 59
        assert not checkpoints.due
        now[0] = 60
        assert checkpoints.due
        checkpoints.save(1, {})
        now[0] = 70 + 199
        assert not checkpoints.due  # it took 10 seconds: not more than 5 % of the time
        now[0] = 70 + 200
        assert checkpoints.due


# -- metrics -----------------------------------------------------------------------------------------------------------------------
def test_metrics_gain_columns(tmp_path):
    with Run(tmp_path / "r", Config(tmp_path / "r")) as run:
        run.log(1, {"a": 1.0})
        run.log(2, {"b": 2.0})
        run.log(3, {"a": 3.0, "b": 4.0})
    with open(tmp_path / "r/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["a"], r["b"]) for r in rows] == [("1.0", ""), ("", "2.0"), ("3.0", "4.0")]


def test_resumed_metrics_are_the_undisturbed_ones(tmp_path):
    rows = [(1, {"a": 1 / 3}), (2, {"a": 1e-30, "b": 2.0}), (3, {"c": 5}), (4, {"a": 1e30})]
    with Run(tmp_path / "whole", {"a": 1}) as run:
        for step, row in rows:
            run.log(step, row)
    with Run(tmp_path / "r", {"a": 1}) as run:
        for step, row in rows[:3]:
            run.log(step, row)
            if step == 2:
                run.save(2, {})
    with open(tmp_path / "r/metrics.csv", "a") as file:
        file.write("4,1e3")  # the machine stopped here
    with Run(tmp_path / "r", {"a": 1}, resume=True) as run:
        run.load()
        for step, row in rows[2:]:
            run.log(step, row)
    assert (tmp_path / "r/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


def test_tensorboard_has_one_file_however_often_resumed(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    begun(tmp_path / "r", (1, 2))
    for last in (3, 4):
        with Run(tmp_path / "r", {"a": 1}, resume=True) as run:
            run.load()
            run.log(last, {"loss": 1.0 / last, "x": last})
            if last == 4:
                run.save(4, {})
    assert names(tmp_path / "r/tensorboard") == [EVENTS]
    events = accumulator.EventAccumulator(str(tmp_path / "r/tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("x")] == [(4, 4.0)]


TABLES = [
    b"text", b"\xff\x00", b"step,loss\n1\n", b"step,loss\n1,2,3\n", b"step,loss\n1,x\n", b"step,loss\n1,nan\n", b"step,loss\n1,inf\n",
    b"loss\n1\n", b"step,a,a\n1,2,3\n", b"step,loss\n-5,1\n", b"step,loss\n1.5,1\n", b"step,loss\n,1\n", b'step,loss\n"1,1\n', b"\n",
    b"\x89HDF\r\n\x1a\n", b"step,loss\n" + b"1" * 400 + b",1\n",
]  # fmt: skip


@pytest.mark.parametrize("content", TABLES)
def test_a_broken_table_of_metrics_is_refused_and_nothing_touched(tmp_path, content):
    begun(tmp_path / "r")
    (tmp_path / "r/metrics.csv").write_bytes(content)
    before = contents(tmp_path / "r")
    with pytest.raises(InputError, match=r"metrics\.csv"):
        Run(tmp_path / "r", {"a": 1}, resume=True)
    assert contents(tmp_path / "r") == before


@given(st.binary(max_size=80) | st.text(alphabet='step,los1-.e\n"\r ', max_size=60).map(lambda t: f"step,loss\n{t}\n".encode()))
@settings(max_examples=150, deadline=None)
def test_any_bytes_as_metrics(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert all(row["step"] >= 0 for row in read_metrics(path))


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

        @staticmethod
        def finish():
            rows.append("end")

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    monkeypatch.setenv("WANDB_PROJECT", "lift")
    for step in (1, 2):  # a run, and the same resumed
        with Run(tmp_path / "run", {"a": 1}, resume=step == 2) as run:
            run.log(step, {"loss": 0.5})
    assert rows == [(1, {"loss": 0.5}), "end", (2, {"loss": 0.5}), "end"]
    assert [c["project"] for c in calls] == ["lift", "lift"]
    assert calls[0]["id"] == calls[1]["id"]

    def refuse(**_):
        raise RuntimeError("not logged in")

    monkeypatch.setattr(Fake, "init", refuse)
    with (
        Run(tmp_path / "run", {"a": 1}, resume=True) as run,
        pytest.raises(InputError, match=r"(?s)did not start.*not logged in"),
    ):
        run.log(3, {"loss": 0.5})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"postbc\[wandb\]"):  # when the run is made, not an hour later
        Run(tmp_path / "other", {"a": 1})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("act", ["begin", "log", "save"])
def test_a_full_disk_at_any_time_is_a_clear_error(tmp_path, monkeypatch, act):
    run = None if act == "begin" else Run(tmp_path / "r", {"a": 1})
    if run:
        run.log(1, {"loss": 1.0})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os if act != "log" else runs.os, "fsync", full)
    if act == "log":
        monkeypatch.setattr("builtins.open", full)
    acts = {
        "begin": lambda: Run(tmp_path / "r", {"a": 1}), "log": lambda: run.log(2, {"loss": 1.0}),
        "save": lambda: run.save(2, {"x": torch.ones(3)}),
    }  # fmt: skip
    with pytest.raises(InputError, match=r"(?s)disk is full.*--resume"):
        acts[act]()
    monkeypatch.undo()
    assert not [n for n in names(tmp_path) if n.endswith(".tmp")]
    if run:
        run.close()
    Run(tmp_path / "r", {"a": 1}, resume=True).close()


# -- kills -------------------------------------------------------------------------------------------------------------------------
def stage(directory: Path, seconds: float = 0.0) -> None:
    """Four steps with two checkpoints, two result files; what is random comes from a generator in the checkpoint."""
    with Run(directory, {"a": 1}, resume=True) as run:
        results = directory / "policy.safetensors", directory / "policy.json"
        if not all(path.exists() for path in results):
            found, generator = run.load(), torch.Generator().manual_seed(1)
            step, x = 0, torch.zeros(3)
            if found:
                step, x = found[0], found[1]["x"]
                generator.set_state(found[1]["generator"])
            while step < 4:
                step += 1
                time.sleep(seconds)
                x = x * 0.5 + torch.randn(3, generator=generator)
                run.log(step, {"loss": x.sum(), **({"late": 1.0} if step > 2 else {})})
                if step % 2 == 0:
                    run.save(step, {"x": x, "generator": generator.get_state()})
            save_tree(results[0], {"kind": "policy", "x": x})
            write_json(results[1], {"x": x.tolist(), "seconds": run.elapsed})
        run.finish()


@pytest.mark.parametrize("how", ["kill_and_resume", "kill_at_every_operation"])
def test_a_killed_run_resumes_to_the_same_files(tmp_path, how):
    kills.in_a_process(__file__, how, tmp_path)


if __name__ == "__main__":
    import tensorboard.compat.proto.event_pb2
    import tensorboard.summary.writer.record_writer  # noqa: F401, slow imports that the forks then have already

    versions()
    if sys.argv[1] == "kill_and_resume":
        kills.kill_and_resume(
            lambda directory: stage(directory, 0.2), Path(sys.argv[2]), "runs", ignore=("policy.json:seconds",)
        )
    else:
        kills.kill_at_every_operation(stage, Path(sys.argv[2]), ignore=("policy.json:seconds",))
