"""Sweeps: a graph of runs over several recipes; each run made once, on any engine the same bits, whoever is killed meanwhile."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

import made
from kills import assert_same_files
from postbc import board as board_module
from postbc import cli
from postbc.board import Board
from postbc.data.training_set import load_training_set
from postbc.engines.base import Began, Ended, Event
from postbc.engines.processes import Here
from postbc.errors import InputError
from postbc.experiments import checks
from postbc.experiments.running import RunSweep
from postbc.experiments.sweep import run_sweep
from postbc.jobs import Job, JobError, local, raise_failures, run_graph
from postbc.progress import progress
from postbc.schemas import plain
from test_recipes import REACH, TINY, tiny

IGNORED = ["*results.json:wall_clock_s", "report/*", "*versions.json", "progress.html"]


# -- the graph -----------------------------------------------------------------------------------------------------------------
def work(folder: Path, name: str, seconds: float = 0.0, error: str = "") -> None:
    """A job: notes when it began and ended; `error` is how."""
    begun = time.monotonic()
    (folder / f"{name}.{os.getpid()}.attempt").touch()
    with progress(name, 3) as bar:
        for _ in range(3):
            time.sleep(seconds / 3)
            bar.advance(1)
    if error == "refused":
        raise InputError("This is wrong.", file=folder, remedy="mend it")
    if error == "bug":
        raise KeyError("bug")
    if error == "lost" or (error == "lost once" and len(list(folder.glob(f"{name}.*.attempt"))) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / name).write_text(json.dumps([begun, time.monotonic()]))


def work_after(folder: Path, name: str, other: str) -> None:
    """A job that ends when `other`, which runs beside it, has ended."""
    begun, patience = time.monotonic(), 120.0
    while not (folder / other).exists():
        assert time.monotonic() < begun + patience, f"{other} did not begin while {name} ran."
        time.sleep(0.02)
    work(folder, name)


def graph(folder: Path, **jobs: tuple[str, ...]) -> dict[str, Job]:
    return {name: Job(work, (folder, name), needs, folder / name) for name, needs in jobs.items()}


def run(jobs: dict[str, Job], folder: Path, at_once: int = 2) -> tuple[dict[str, Exception], Board]:
    board = Board([*jobs], "<b>a sweep", folder / "progress.html", told=True)
    return run_graph(jobs, local(at_once, folder / "logs"), folder / "logs", board), board


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_job_begins_when_what_it_needs_is_done_and_not_later(tmp_path: Path, at_once: int) -> None:
    jobs = graph(tmp_path, quick=(), slow=(), after_quick=("quick",), both=("slow", "after_quick"))
    if at_once == 2:  # "slow" ends after "after_quick" or never: a barrier between them is an error, however slow the machine
        jobs["slow"] = Job(work_after, (tmp_path, "slow", "after_quick"), (), tmp_path / "slow")
    failed, board = run(jobs, tmp_path, at_once)
    assert failed == {}
    times = {name: json.loads((tmp_path / name).read_text()) for name in jobs}
    for name, job in jobs.items():
        assert all(times[need][1] <= times[name][0] for need in job.needs)
    assert board.counts == {"done": 4}
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_fails_leaves_out_what_needs_it_and_nothing_else(
    tmp_path: Path, at_once: int, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = graph(tmp_path, bad=(), needs_bad=("bad",), needs_that=("needs_bad",), bug=(), good=(), fine=("good",))
    for name in ("bad", "bug"):
        jobs[name] = Job(work, (tmp_path, name, 0.0, {"bad": "refused"}.get(name, name)), (), tmp_path / name)
    failed, board = run(jobs, tmp_path, at_once)
    assert set(failed) == {"bad", "bug"}
    assert "KeyError: 'bug'" in str(failed["bug"])
    assert {name: row.state for name, row in board.rows.items()} == {
        "bad": "failed", "bug": "failed", "needs_bad": "left out", "needs_that": "left out", "good": "done", "fine": "done",
    }  # fmt: skip
    assert board.rows["needs_that"].note == "needs needs_bad"
    assert board.rows["bad"].note == f"This is wrong.; file: {tmp_path}; what to do: mend it"
    page = (tmp_path / "progress.html").read_text()
    for words in ("2 done", "2 failed", "2 left out", "needs bad", "This is wrong.", "&lt;b&gt;a sweep"):
        assert words in page
    assert "<b>a sweep" not in page
    assert "http-equiv" not in page  # it is at its end
    said = capfd.readouterr().err
    assert "needs_that is left out: needs needs_bad" in said
    with pytest.raises(InputError, match=r"(?s)bad: This is wrong.*bug: failed"):
        raise_failures(failed)
    # mended, only what is missing is done
    again, _ = run(graph(tmp_path, **{name: job.needs for name, job in jobs.items()}), tmp_path, at_once)
    assert again == {}
    assert len(list(tmp_path.glob("needs_bad.*.attempt"))) == 1


def test_a_lost_job_is_taken_up_and_one_that_is_always_lost_has_failed(tmp_path: Path) -> None:
    jobs = graph(tmp_path, once=(), after=("once",), always=(), never=("always",))
    jobs["once"] = Job(work, (tmp_path, "once", 0.0, "lost once"), (), tmp_path / "once")
    jobs["always"] = Job(work, (tmp_path, "always", 0.0, "lost"), (), tmp_path / "always")
    failed, board = run(jobs, tmp_path)
    assert set(failed) == {"always"}
    assert isinstance(failed["always"], JobError)
    assert board.counts == {"failed": 1, "left out": 1, "done": 2}
    assert len(list(tmp_path.glob("once.*.attempt"))) == 2
    assert len(list(tmp_path.glob("always.*.attempt"))) == 4
    assert "ended by SIGKILL; the same command goes on" in str(failed["always"])  # sweeps have no option that says so
    assert "--resume" not in str(failed["always"])


class Queue:
    """An engine that takes whatever it is given, as Ray does, and works on one job after the other."""

    def __init__(self, board: Board) -> None:
        self.board, self.given, self.working = board, collections.deque[str](), ""
        self.seen: list[dict[str, str]] = []

    def room(self) -> bool:
        return True

    def start(self, name: str, job: Job, attempt: int) -> None:
        self.given.append(name)

    def events(self) -> list[Event]:
        self.seen.append({name: row.state for name, row in self.board.rows.items()})
        if self.working:
            ended, self.working = self.working, ""
            return [(ended, Ended())]
        self.working = self.given.popleft()
        return [(self.working, Began("on another machine"))]

    def close(self) -> None:
        pass


def test_a_job_runs_when_its_engine_says_so_and_not_when_it_was_given(tmp_path: Path) -> None:
    board = Board(["a", "b"])
    engine = Queue(board)
    assert run_graph(graph(tmp_path, a=(), b=()), lambda _: engine, tmp_path / "logs", board) == {}
    assert engine.seen == [
        {"a": "waiting", "b": "waiting"}, {"a": "running", "b": "waiting"}, {"a": "done", "b": "waiting"},
        {"a": "done", "b": "running"},
    ]  # fmt: skip
    assert board.rows["b"].begun >= board.rows["a"].begun + (board.rows["a"].seconds or 0)  # type: ignore[operator]
    assert board.counts == {"done": 2}


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_board_hears_when_a_job_of_this_machine_begins(tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, str]] = []
    set_ = Board.set
    monkeypatch.setattr(
        Board, "set", lambda self, name, state, note="": (heard.append((name, state)), set_(self, name, state, note))
    )
    failed, board = run(graph(tmp_path, a=()), tmp_path, at_once)
    assert failed == {}
    assert heard == [("a", "running"), ("a", "done")]
    assert board.rows["a"].seconds is not None
    run(graph(tmp_path, a=()), tmp_path, at_once)  # what is done is only looked at
    assert heard[2:] == [("a", "done")]


def test_the_page_says_how_far_a_run_is_and_that_it_reads_itself_again(tmp_path: Path) -> None:
    seen: list[str] = []

    def look() -> None:
        seen.append((tmp_path / "progress.html").read_text())

    board = Board(["a", "b"], "two", tmp_path / "progress.html")
    with board:
        board.set("a", "running")
        Here(tmp_path, board.hear).start("a", Job(work, (tmp_path, "a")), 0)
        board._write()
        look()
    assert re.search(r'http-equiv="refresh" content="\d+"', seen[0])
    assert "a 3/3" in seen[0] or "a 0/3" in seen[0]
    assert "waiting" in seen[0]
    board = Board(["a"], "one", tmp_path / "progress.html")
    with contextlib.suppress(KeyboardInterrupt), board:
        board.set("a", "running")
        raise KeyboardInterrupt
    assert "The same command goes on" in (tmp_path / "progress.html").read_text()


def test_the_page_is_written_while_a_job_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of many minutes does not look as if nothing ran any more."""
    monkeypatch.setattr(board_module, "REFRESH", 0.02)
    page, until = tmp_path / "progress.html", time.monotonic() + 10

    def silent() -> None:
        written = {page.stat().st_mtime_ns}
        while len(written) < 4 and time.monotonic() < until:
            time.sleep(0.01)
            written.add(page.stat().st_mtime_ns)
        assert len(written) == 4

    board = Board(["a"], "one", page)
    assert run_graph({"a": Job(silent)}, local(1, tmp_path / "logs"), tmp_path / "logs", board) == {}
    assert "1 done" in page.read_text()
    assert "http-equiv" not in page.read_text()  # nothing is written after the last


@pytest.mark.parametrize("jobs", [{"a": ("b",)}, {"a": ("b",), "b": ("a",)}, {"a": ("a",)}])
def test_a_graph_that_is_none_is_a_bug(tmp_path: Path, jobs: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ValueError, match=r"no job|circle"):
        run(graph(tmp_path, **jobs), tmp_path)
    assert not list(tmp_path.iterdir())


# -- sweeps of recipes ---------------------------------------------------------------------------------------------------------
def recipes(folder: Path, **more: Any) -> dict[str, Any]:
    """Two that share demonstrations, posterior and BC: α is another, and one has a finetuner more."""
    own = {"methods": ["bc", "postbc"], "seeds": [0], "finetuners": ["best-of-n"], **more}
    pretraining = {**TINY["pretraining"], "posterior_weight": 0.25}
    return {"half": tiny(folder, **own), "quarter": tiny(folder, **{**own, "pretraining": pretraining})}


def test_what_recipes_share_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_sweep(recipes(tmp_path), tmp_path / "x")
    counted = {p.name: len(list(p.glob("*/seed_0"))) for p in (tmp_path / "x").iterdir() if p.is_dir() and p.name != "report"}
    assert counted == {"posterior": 1, "pretraining": 3, "evaluation": 3, "best-of-n": 3}
    entries = json.loads((report / "summary.json").read_text())
    assert sorted((e["pretraining"], e["posterior_weight"]) for e in entries if e["pretraining"] == "postbc") == [
        ("postbc", 0.25), ("postbc", 0.5)
    ]  # fmt: skip
    assert sum(e["pretraining"] == "bc" for e in entries) == 1
    shared = json.loads((tmp_path / "x/sweep.json").read_text())["runs"]
    assert sorted(map(tuple, shared.values())) == [("half",), ("half", "quarter"), ("quarter",)]
    # another order, another recipe, another seed: nothing that is there is made again
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "x").rglob("*.safetensors")}
    turned = dict(reversed(recipes(tmp_path, seeds=[0, 1]).items()))
    turned["third"] = tiny(
        tmp_path, methods=["bc"], seeds=[0], finetuners=["best-of-n"], best_of_n={"episodes": 6, "samples": 2}
    )
    run_sweep(turned, tmp_path / "x")
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert len(json.loads((report / "summary.json").read_text())) == 7
    shared = json.loads((tmp_path / "x/sweep.json").read_text())["runs"]
    assert sorted(sorted(v) for v in shared.values()) == [["half"], ["half", "quarter"], ["quarter"], ["third"]]


def test_each_recipe_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    both = {**recipes(tmp_path), "bad": tiny(tmp_path, data={**TINY["data"], "num_trajectories": 99})}
    with pytest.raises(InputError, match=r"(?s)bad: .*99"):
        run_sweep(both, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match=r"(?s)half: .*none\.hdf5"):
        run_sweep({"half": replace(recipes(tmp_path)["half"], demonstrations=tmp_path / "none.hdf5")}, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "y").mkdir()
    (tmp_path / "y/mine").touch()
    with pytest.raises(InputError, match="holds no sweep"):
        run_sweep(recipes(tmp_path), tmp_path / "y")


def test_recipes_of_the_same_training_set_read_it_once_before_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[Any, int]] = []

    def counted(config: Any, seed: int) -> Any:
        read.append((config, seed))
        return load_training_set(config, seed)

    monkeypatch.setattr(checks, "load_training_set", counted)
    fewer = tiny(tmp_path, data={**TINY["data"], "num_trajectories": 2})
    both = {**recipes(tmp_path), "fewer": fewer, "other-seed": replace(fewer, seeds=(3,))}
    both["bad"] = replace(both["half"], environment="gymnasium:reach:ReachPixels-v0", seeds=(0,))  # of other observations
    with pytest.raises(InputError, match="bad: "):
        run_sweep(both, tmp_path / "x")
    assert [(config.num_trajectories, seed) for config, seed in read] == [(3, 0), (2, 0), (2, 3), (3, 0)]


def test_a_sweeps_options(tmp_path: Path) -> None:
    made.write_demonstrations(tmp_path / "data.hdf5", environment=REACH, widths={"state": 4}, action_dim=2)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**TINY, "finetuners": ["dppo"]}))
    args = [
        str(tmp_path / "mine.yaml"),
        "demo",
        "--seeds",
        "3",
        "--methods",
        "bc",
        "--demonstrations",
        str(tmp_path / "data.hdf5"),
    ]
    config = cli.command("sweep").parse(args)
    chosen = config.chosen()
    assert list(chosen) == ["mine", "demo"]
    assert {(r.seeds, r.methods, r.demonstrations) for r in chosen.values()} == {((3,), ("bc",), tmp_path / "data.hdf5")}
    assert chosen["mine"].finetuners == ("dppo",)


@pytest.mark.parametrize(
    "options",
    [{"recipes": ()}, {"recipes": ("demo", "demo")}, {"recipes": ("demo", "x/demo.yaml")}, {"address": "auto"}, {"gpus_per_job": 0.5},
     {"engine": "ray", "gpus_per_job": 1.5}, {"engine": "ray", "address": "auto", "jobs": 2}, {"jobs": 0}, {"engine": "slurm"}],
)  # fmt: skip
def test_bad_options_of_sweeps(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RunSweep(**{"recipes": ("demo",), **options})


# -- Ray -----------------------------------------------------------------------------------------------------------------------
def killing(output: Path, killed: list[str]) -> Callable[[], None]:
    """Kill (SIGKILL) the worker that does the first DSRL run as soon as there is a checkpoint of it."""

    def watch() -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until and not killed:
            for checkpoint in output.glob("dsrl/*/seed_*/checkpoints/step_*.safetensors"):
                try:
                    pid = int((checkpoint.parent.parent / ".lock").read_text())
                    os.kill(pid, signal.SIGKILL)
                    killed.append(checkpoint.name)
                    return
                except (OSError, ValueError):
                    continue
            time.sleep(0.01)

    return watch


@pytest.mark.skipif(sys.platform != "linux", reason="Ray's workers are found by their process ids")
def test_a_ray_cluster_one_of_whose_workers_is_killed_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra [ray])")
    import toy_plugin  # noqa: F401  an environment that a resumed run finds as it was, which gymnasium's are not
    from postbc.engines.ray import RayEngine

    monkeypatch.setenv("POSTBC_PLUGINS", "toy_plugin")
    made.write_demonstrations(
        tmp_path / "data.hdf5", environment={**REACH, "env_name": "PointReach"}, widths={"state": 4}, action_dim=2
    )
    training = {**TINY["training"], "budget_env_steps": 1200, "checkpoint_seconds": 0.05}
    both = {
        "one": tiny(
            tmp_path, environment="toy/PointReach", methods=["bc"], finetuners=["dsrl"], training=training, seeds=[0, 1]
        ),
        "two": tiny(tmp_path, environment="toy/PointReach", methods=["bc"], finetuners=["best-of-n"], seeds=[0]),
    }
    for name in ("undisturbed", "killed"):  # records name the runs' directories
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    run_sweep(both, Path("x"), local(1, Path("x/logs")))
    monkeypatch.chdir(tmp_path / "killed")
    killed: list[str] = []
    watcher = threading.Thread(target=killing(Path("x").absolute(), killed), daemon=True)
    watcher.start()
    run_sweep(both, Path("x"), lambda _: RayEngine(Path("x/logs"), workers=2))
    watcher.join(timeout=1)
    assert killed
    assert "was lost" in capfd.readouterr().err
    assert_same_files(tmp_path / "killed/x", tmp_path / "undisturbed/x", IGNORED)


@pytest.mark.parametrize(("workers", "cpus", "had"), [(2, 2.0, 4), (3, 0.5, 2), (None, 2.0, None)])
def test_ray_on_this_machine_has_so_many_runs_at_a_time_however_many_cpus_each_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None, cpus: float, had: int | None
) -> None:
    """What Ray is asked for, and how many jobs it is given at a time."""
    from postbc.engines.ray import RayEngine

    ray = mock.MagicMock()
    ray.nodes.return_value = [{"Alive": True, "Resources": {"CPU": 16.0}}]
    ray.remote.return_value.return_value.options.return_value.remote.side_effect = lambda *_: object()
    monkeypatch.setitem(sys.modules, "ray", ray)
    engine = RayEngine(tmp_path / "logs", cpus=cpus, workers=workers)
    assert ray.init.call_args.kwargs["num_cpus"] == had
    assert mock.call(num_cpus=cpus, num_gpus=0.0, max_retries=0, max_calls=0) in ray.remote.call_args_list
    given = 0
    while engine.room() and given < 10:
        engine.start(f"job_{given}", Job(work, (tmp_path, "x")), 0)
        given += 1
    assert given == (10 if workers is None else workers)


# -- the docs ------------------------------------------------------------------------------------------------------------------
def test_the_sweep_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its recipes and its command as they stand, over a tiny base, one seed and one process."""
    page = (Path(__file__).parent.parent / "docs/sweeps.md").read_text()
    monkeypatch.chdir(tmp_path)
    made.write_demonstrations(tmp_path / "data.hdf5", environment=REACH, widths={"state": 4}, action_dim=2)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "demonstrations": "data.hdf5", "data": {**TINY["data"]}}))
    for name, text in re.findall(r"```yaml\n# (\S+)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(text.replace("base: lift-laptop", "base: tiny.yaml").replace("10}", "4}"))
    line = next(line for line in page.splitlines() if line.startswith("postbc sweep alpha-half.yaml"))
    args = shlex.split(line.replace("--seeds 0 1 2", "--seeds 0").replace("--jobs 2", "--jobs 1"))[1:]
    assert cli.main(args) == 0
    assert "report: runs/ablation/report/report.html" in capsys.readouterr().out
    entries = json.loads((tmp_path / "runs/ablation/report/summary.json").read_text())
    assert [e["pretraining"] for e in entries] == ["bc", "postbc", "postbc"]
    assert [e["recipes"] for e in entries] == [["alpha-half", "ten-members"], ["alpha-half"], ["ten-members"]]
    page = (tmp_path / "runs/ablation/report/report.html").read_text()
    assert "too few seeds to tell" in page
    assert 'href="report/report.html"' in (tmp_path / "runs/ablation/progress.html").read_text()


# -- Ray's errors --------------------------------------------------------------------------------------------------------------
def test_without_ray_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from postbc.engines.ray import RayEngine

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"(?s)Ray is not installed.*pip install 'postbc\[ray\]'"):
        RayEngine(tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_variants_of_a_file_are_recipes_of_the_sweep(tmp_path: Path) -> None:
    values = {**plain(tiny(tmp_path, finetuners=["best-of-n"], methods=["postbc"], seeds=[0])), "about": "two of them"}
    values["variants"] = {"few": {}, "many": {"ensemble": {"ensemble_size": 5}}}
    (tmp_path / "members.yaml").write_text(yaml.safe_dump(values))
    sweep = RunSweep((str(tmp_path / "members.yaml"),), tmp_path / "x", jobs=1)
    assert [(title, r.ensemble.ensemble_size) for title, r in sweep.chosen().items()] == [
        ("members-few", 3),
        ("members-many", 5),
    ]
    sweep.run()
    runs = json.loads((tmp_path / "x/sweep.json").read_text())["runs"]
    assert {title for titles in runs.values() for title in titles} == {"members-few", "members-many"}
    assert len(list((tmp_path / "x/posterior").iterdir())) == 2
