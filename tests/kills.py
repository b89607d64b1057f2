"""Killing a stage with SIGKILL at random moments, resuming it each time: for the tests that nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

KILLS = 20


def in_a_process(file: str, *arguments: str | Path) -> None:
    """Run a test file as a program (which calls :func:`kill_and_resume`), and check that most of its kills hit."""
    done = subprocess.run(
        [sys.executable, file, *map(str, arguments)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["kills"] >= KILLS / 2, done.stdout


def kill_and_resume(stage: Callable[[Path], None], directory: Path, seed: str) -> None:
    """An undisturbed run of `stage` in directory/reference; in directory/killed one killed 20 times at random moments."""
    import torch.utils.tensorboard  # noqa: F401, a slow import that the forks then have already

    begin = time.monotonic()
    assert _forked(stage, directory / "reference") == 0
    typical = (time.monotonic() - begin) / KILLS
    random.seed(seed)
    kills, attempts, status = 0, 0, None
    while status is None:
        assert attempts < 400, "no progress"
        delay = random.uniform(0, 3 * typical + 0.02 * attempts) if kills < KILLS else None
        status, attempts = _forked(stage, directory / "killed", delay), attempts + 1
        kills += status is None
    assert status == 0
    print(json.dumps({"kills": kills, "seconds": typical * KILLS}))


def _forked(stage: Callable[[Path], None], directory: Path, delay: float | None = None) -> int | None:
    """Run in a fork (importing torch anew takes a second), killed after `delay` seconds; its exit status, None if it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            stage(directory)
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
