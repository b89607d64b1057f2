"""Killing a stage with SIGKILL, at random moments and at every file operation, and resuming it: it must end with the same files.

A stage is a function of a directory that begins there or goes on (`resume=True`). Tests run these in a process of their own
(:func:`in_a_process`), because they fork.
"""

from __future__ import annotations

import fnmatch
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KILLS = 12
#: What two runs of the same thing need not have in common: contents (not names) of files by pattern; "pattern:key" a key in them.
VOLATILE = ("versions.json", "tensorboard/*", "*/tensorboard/*", "*.log")
Stage = Callable[[Path], Any]


def in_a_process(file: str, *arguments: str | Path) -> None:
    """Run a test file as a program (which calls :func:`kill_and_resume`), and check that most of its kills hit."""
    done = subprocess.run(
        [sys.executable, file, *map(str, arguments)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kills"] >= said["tries"] / 2, done.stdout


def kill_and_resume(stage: Stage, directory: Path, seed: str, ignore: Sequence[str] = (), number: int = KILLS) -> None:
    """An undisturbed run of `stage` in directory/reference; in directory/killed runs killed at random moments, `number` in all.

    One that comes to its end before it was killed (a moment on a busy machine says little) is compared, and begun anew.
    """
    begin = time.monotonic()
    assert _forked(stage, directory / "reference") == 0
    typical = (time.monotonic() - begin) / number
    random.seed(seed)
    kills, attempts, status, since = 0, 0, None, 0
    while kills < number or status is None:
        assert attempts < 400, "no progress"
        delay = random.uniform(0, 3 * typical + 0.02 * since) if kills < number else None
        status, attempts, since = _forked(stage, directory / "killed", delay), attempts + 1, since + 1
        kills += status is None
        assert status in (None, 0)
        if status == 0:
            assert_same_files(directory / "killed", directory / "reference", ignore)
            if kills < number:
                shutil.rmtree(directory / "killed")
                since = 0
    print(json.dumps({"kills": kills, "tries": number, "seconds": typical * number}))


def kill_at_every_operation(stage: Stage, directory: Path, ignore: Sequence[str] = (), stride: int = 1, first: int = 1) -> None:
    """Kill `stage` just before its n-th file operation (open for writing, fsync, rename, remove, link, mkdir …), for every n.

    Each time it is resumed from what that left, and must end with the files of an undisturbed run: names, links, bytes.

    Args:
        ignore: contents that may differ beside `VOLATILE`: a pattern of names, or "pattern:key" for a key in JSON files and trees.
        stride: try every stride-th operation only, where the stage is slow, from the `first` on.
    """
    run, reference = directory / "run", directory / "undisturbed"
    count = directory / "count.txt"
    directory.mkdir(parents=True, exist_ok=True)
    assert _forked(stage, run, operations=(None, count)) == 0
    run.rename(reference)
    total, kills = int(count.read_text()), 0
    tries = range(first, total + 1, stride)
    for n in tries:
        status = _forked(stage, run, operations=(n, count))
        kills += status is None
        assert status in (None, 0), f"killed at operation {n}"
        assert _forked(stage, run) == 0, f"resumed after a kill at operation {n} of {total}"
        try:
            assert_same_files(run, reference, ignore)
        except AssertionError as error:
            raise AssertionError(f"after a kill at operation {n} of {total}: {error}") from None
        shutil.rmtree(run)
    print(json.dumps({"kills": kills, "tries": len(tries), "operations": total}))


def assert_same_files(directory: Path, reference: Path, ignore: Sequence[str] = ()) -> None:
    """The same names (hidden ones included), kinds, link targets and bytes below both, but for what is volatile."""
    found, expected = _contents(directory, ignore), _contents(reference, ignore)
    assert sorted(found) == sorted(expected), f"more: {sorted({*found} - {*expected})}, less: {sorted({*expected} - {*found})}"
    differing = [name for name, content in found.items() if content != expected[name]]
    assert not differing, "\n".join(f"{n}: {str(found[n])[:300]} != {str(expected[n])[:300]}" for n in differing)


def _contents(directory: Path, ignore: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        matching = [p for p in (*VOLATILE, *ignore) if fnmatch.fnmatch(name, p.partition(":")[0])]
        keys = {p.partition(":")[2] for p in matching}
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = "directory"
        elif "" in keys:
            found[name] = "ignored"
        elif keys:
            found[name] = str(_without(_read(path), keys))
        else:
            found[name] = path.read_bytes()
    return found


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from postbc.files import load_tree

        return load_tree(path)
    return [json.loads(line) for line in path.open()] if path.suffix == ".jsonl" else json.loads(path.read_text())


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    if isinstance(value, (list, tuple)):
        return [_without(v, keys) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _forked(
    stage: Stage, directory: Path, delay: float | None = None, operations: tuple[int | None, Path] | None = None
) -> int | None:
    """Run in a fork (importing torch anew takes a second); its exit status, None if it was killed.

    Args:
        delay: kill it after so many seconds.
        operations: (kill it at this file operation, or None; where to write how many there were).
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        os.fsync = _no_sync  # a kill loses nothing that was written, only a power cut would
        try:
            count = _count_operations(directory, operations[0]) if operations else list
            stage(directory)
            number = len(count())
            if operations:
                operations[1].write_text(str(number))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def _no_sync(handle: int) -> None:
    pass


def _count_operations(directory: Path, kill_at: int | None) -> Callable[[], list[str]]:
    """From now on count this process's file operations in `directory`, and kill it just before the `kill_at`-th.

    Python reports all of them to audit hooks whoever calls (pathlib too), but for fsync. Hooks stay: only for a forked child.
    """
    seen: list[str] = []
    inside = os.fspath(directory.absolute())
    changing = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}

    def operation(name: str) -> None:
        seen.append(name)
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = [path] if writes else []
        else:
            paths = [a for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))] if event in changing else []
        if any(os.path.abspath(os.fsdecode(p)).startswith(inside) for p in paths if not isinstance(p, int)):
            operation(f"{event} {paths}")

    def counted(handle: int) -> None:
        operation("fsync")

    os.fsync = counted
    sys.addaudithook(hook)
    return lambda: list(seen)
