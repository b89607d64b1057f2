"""Seeds as processes: the same files one after the other or at once, no orphans, clear ends; and what the terminal can take."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table

from postbc import jobs as jobs_module
from postbc import progress as progress_module
from postbc.errors import InputError, NotFiniteError
from postbc.jobs import Interrupted, Job, JobError, interruptible, run_jobs, run_seeds
from postbc.progress import Status, clock, console, progress, say


def work(config, seed):
    """A seed's job: writes a file; `config` is (output, {seed: how it ends})."""
    output, ends = config
    end = ends.get(seed)
    print(f"printed by {seed}: α")
    with progress(f"work [/red] {seed}", 4) as bar:
        for i in range(4):
            bar.advance(loss=i)
    (output / f"seed_{seed}").mkdir(parents=True, exist_ok=True)
    (output / f"seed_{seed}/pid").write_text(str(os.getpid()))
    if end == "wrong":
        raise InputError("This is wrong.", file=output)
    if end == "nan":
        raise NotFiniteError("Not finite.")
    if end == "bug":
        raise KeyError("bug")
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "wait":
        time.sleep(60)
    (output / f"seed_{seed}/result").write_text(f"{seed}")


def results(output):
    return sorted(p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file() and p.name != "pid")


@pytest.mark.parametrize("at_once", [1, 2])
def test_one_that_fails_stops_no_other(tmp_path, at_once, capfd):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"(?s)This is wrong") as raised:
        run_seeds(work, (tmp_path / "out", {1: "wrong"}), [0, 1, 2], at_once, tmp_path / "out")
    assert results(tmp_path / "out") == ["seed_0/result", "seed_2/result"]  # no logs: what they hold was said here
    said = capfd.readouterr()
    for seed in (0, 1, 2):
        assert f"printed by {seed}: α" in said.out
    assert said.err.count("seed_1 failed") == 1
    if at_once == 1:  # at once with others it may be the last to end
        assert "seed_1 failed; the others go on" in said.err
    assert "Traceback" not in said.err + said.out
    assert type(raised.value) is InputError
    run_seeds(work, (tmp_path / "out", {}), [0, 1, 2], at_once, tmp_path / "out")
    assert results(tmp_path / "out") == [f"seed_{s}/result" for s in (0, 1, 2)]


def test_kills_and_bugs_are_a_line_and_a_log_and_then_nothing(tmp_path, capfd):
    with pytest.raises(JobError) as raised:
        run_seeds(work, (tmp_path, {0: "bug", 1: "kill"}), [0, 1, 2], 2, tmp_path)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert any("seed_0: failed with exit status 1" in line and "seed_0.log" in line for line in lines)
    assert any("seed_1: ended by SIGKILL; the same command with --resume goes on" in line for line in lines)  # a stage's option
    assert "Traceback" not in capfd.readouterr().err
    assert results(tmp_path) == ["logs/seed_0.log", "logs/seed_1.log", "seed_2/result"]
    assert "KeyError: 'bug'" in (tmp_path / "logs/seed_0.log").read_text()
    run_seeds(work, (tmp_path, {}), [0, 1, 2], 1, tmp_path)  # in the other way: it tidies up all the same
    assert results(tmp_path) == [f"seed_{s}/result" for s in (0, 1, 2)]
    assert not (tmp_path / "logs").exists()


def test_errors_of_several_are_one_error(tmp_path, capfd):
    with pytest.raises(InputError, match=r"(?s)seed_0: Not finite.*seed_1: failed: KeyError: 'bug'"):
        run_seeds(work, (tmp_path, {0: "nan", 1: "bug"}), [0, 1, 2], 1, tmp_path)
    with pytest.raises(NotFiniteError):
        run_seeds(work, (tmp_path, {0: "nan"}), [0, 1], 1, tmp_path)
    with pytest.raises(KeyError):  # alone it is as if it had been called
        run_seeds(work, (tmp_path, {0: "bug"}), [0], 2, tmp_path)


def test_an_errors_kind_comes_back_from_a_process(tmp_path):
    with pytest.raises(NotFiniteError, match="Not finite"):
        run_seeds(work, (tmp_path, {0: "nan"}), [0, 1], 2, tmp_path)


@pytest.mark.parametrize(("seeds", "at_once"), [([], 1), ([0, 0], 2), ([0, 1], 0), ([0], -1)])
def test_seeds_and_jobs_are_checked_first(tmp_path, seeds, at_once):
    with pytest.raises(InputError):
        run_seeds(work, (tmp_path, {}), seeds, at_once, tmp_path)
    assert not list(tmp_path.iterdir())


def test_logs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"(?s)cannot be written.*file/logs"):
        run_seeds(work, (tmp_path, {}), [0, 1], 2, tmp_path / "file")


def parent(tmp_path, ends, at_once):
    """This file as a program that runs seeds 0 and 1; returned once both wait."""
    code = f"import test_jobs; test_jobs.main({str(tmp_path)!r}, {ends!r}, {at_once})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # the tests themselves may run where it is ignored (nohup, &)
    )
    waiting, begin = [s for s, end in ends.items() if end == "wait"], time.monotonic()
    while not all((tmp_path / f"seed_{s}/pid").exists() for s in waiting):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < 60
        time.sleep(0.05)
    time.sleep(0.2)
    return process, [int((tmp_path / f"seed_{s}/pid").read_text()) for s in waiting]


def main(output, ends, at_once):
    try:
        with interruptible():
            run_seeds(work, (Path(output), ends), list(ends), at_once, output)
    except Interrupted as error:
        print(error)
        sys.exit(error.status)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pids, seconds):
    begin = time.monotonic()
    while any(map(alive, pids)) and time.monotonic() - begin < seconds:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes live")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_job_outlives_its_parent(tmp_path, number):
    process, pids = parent(tmp_path, {0: "wait", 1: "wait"}, 2)
    process.send_signal(number)
    assert wait_for_end(pids, 3 if number == signal.SIGKILL else 8)
    out, err = process.communicate(timeout=10)
    assert "Traceback" not in out + err
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert not (tmp_path / "seed_0/result").exists()
        assert out.strip() == f"interrupted ({number.name})"
    run_seeds(work, (tmp_path, {}), [0, 1], 1, tmp_path)
    assert results(tmp_path) == ["seed_0/result", "seed_1/result"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_is_interrupted_with_one_line(tmp_path, number):
    process, _ = parent(tmp_path, {0: "wait"}, 1)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (128 + number, "")
    assert out.splitlines()[-1] == f"interrupted ({number.name})"


def test_signals_are_as_they_were_afterwards():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(Interrupted) as raised, interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.status == 143
    assert isinstance(raised.value, KeyboardInterrupt)
    assert before == {n: signal.getsignal(n) for n in before}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])


def test_a_forked_worker_ends_by_a_signal_as_any_other():
    with interruptible():
        pid = os.fork()
        if pid == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM


def test_a_job_is_watched_before_it_imports_torch():
    code = "import sys, postbc.jobs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def noisy(path):
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=path.write_text, args=("from a job's own process",), daemon=True)
    child.start()
    child.join()


def test_a_job_may_have_processes_of_its_own(tmp_path):
    run_jobs({"a": Job(noisy, (tmp_path / "a",)), "b": Job(noisy, (tmp_path / "b",))}, 2, tmp_path / "logs")
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "from a job's own process"


def environment(path):
    path.write_text(os.environ.get("POSTBC_TEST", "") + " " + str("postbc.stages.pretrain" in sys.modules))


def test_jobs_see_todays_environment_and_find_what_they_need_imported(tmp_path, monkeypatch):
    for value in ("one", "two"):
        monkeypatch.setenv("POSTBC_TEST", value)
        run_jobs({name: Job(environment, (tmp_path / name,)) for name in "ab"}, 2, tmp_path / "logs")
        imported = sys.platform.startswith("linux")  # elsewhere processes begin empty
        assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == f"{value} {imported}"


def test_every_stage_is_imported_for_the_jobs():
    folder = Path(jobs_module.__file__).parent / "stages"
    stages = {p.stem for p in folder.glob("*.py")} - {"__init__", "finetuning", "seeds"}  # these two hold what stages share
    stages = {name for name in stages if not name.startswith("robot_")}  # one at a time, in the process that people sit at
    assert {*jobs_module.STAGES} == {f"postbc.stages.{name}" for name in stages}


# -- the terminal ------------------------------------------------------------------------------------------------------------------
class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


def test_rate_and_time_left_count_from_the_first_advance(monkeypatch):
    clock_ = Clock()
    monkeypatch.setattr(progress_module, "time", clock_)
    shown = []
    monkeypatch.setattr(progress_module, "_listener", shown.append)
    with progress("train", 1000, done=100) as bar:
        assert shown[-1].doing == "starting …"
        clock_.now += 600  # compiling
        bar.advance(1, loss=0.5)
        assert shown[-1].rate is None
        assert shown[-1].doing == "starting …"
        for _ in range(20):
            clock_.now += 1
            bar.advance(5)
        assert shown[-1] == Status("train", 201, 1000, 5.0, "")
        assert shown[-1].doing == "5.0/s  2:39 left"
        for _ in range(200):  # ten times slower from here on: it is the last minute that counts
            clock_.now += 1
            bar.advance(0.5)
        assert shown[-1].rate == pytest.approx(0.5)


def test_clock():
    assert [clock(s) for s in (0, 61, 3600, 1e30)] == ["0:00", "1:01", "1:00:00", "99999:59:59"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("terminal", [False, True])
def test_any_terminal_takes_any_text(monkeypatch, encoding, terminal):
    class Stream(io.TextIOWrapper):
        def isatty(self):
            return terminal

    monkeypatch.setenv("TERM", "xterm")
    streams = {name: Stream(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    text = "α [/red] [bold]μ[/bold] 成功 \udcff :smile:"
    say(text)
    table = Table("σ [/x]")
    table.add_row("[/red] ✓")
    console().print(table)
    say(text, stderr=True)
    with progress("δ [/red] [", 3) as bar:
        for _ in range(3):
            bar.advance(loss=1.0)
    out, err = (s.buffer.getvalue() if not s.flush() else b"" for s in streams.values())
    assert b"[/red]" in out
    assert b"[bold]" in out
    assert b":smile:" in out
    assert b"[/red]" in err
    assert b"3/3" in (err if terminal else out)


def test_say_does_not_wrap(capsys):
    say("x" * 500)
    assert capsys.readouterr().out == "x" * 500 + "\n"
