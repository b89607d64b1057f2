"""Several long jobs at once, each in a process of its own, with one progress bar a job."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from postbc.errors import InputError
from postbc.progress import STATUS_FILE, read_status

Job = tuple[Callable[..., None], tuple[Any, ...]]  # a module-level function and its arguments


def run_jobs(jobs: Mapping[str, Job], at_once: int, logs: Path) -> None:
    """Run every job; `at_once` of them at a time, each with its share of the processors.

    One at a time runs in this process. Otherwise what a job prints goes to `logs`/<name>.log, and its progress to one bar here.

    Raises:
        InputError: as a job raised it.
        RuntimeError: a job failed otherwise; its log says why. The other jobs are let finish first.
    """
    if at_once <= 1 or len(jobs) == 1:
        for function, arguments in jobs.values():
            function(*arguments)
        return
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's and the simulator's threads
    threads = max(1, (os.cpu_count() or 1) // at_once)
    waiting, failed = list(jobs), dict[str, int]()
    running: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[doing]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{', '.join(jobs)}: progress in {logs}", markup=False, soft_wrap=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as display:
        bars = {name: display.add_task(name, total=None, doing="waiting", start=False) for name in jobs}
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                process = context.Process(target=_work, args=(*jobs[name], logs / name, threads), daemon=True)
                process.start()
                running[name] = process
                display.start_task(bars[name])
            for name, process in list(running.items()):
                status = read_status(logs / f"{name}.status")
                if status:
                    text = f"{status['description']}  {status['figures']}"
                    display.update(bars[name], total=status["total"], completed=status["done"], doing=text)
                if not process.is_alive():
                    process.join()
                    del running[name]
                    display.update(bars[name], doing="done" if process.exitcode == 0 else "failed")
                    display.stop_task(bars[name])
                    if process.exitcode:
                        failed[name] = process.exitcode
            time.sleep(0.2)
    for name, code in failed.items():
        error = logs / f"{name}.error"
        if code == 2 and error.exists():
            raise InputError(error.read_text())
        raise RuntimeError(f"{name} ended with exit status {code}; see {logs / name}.log")


def _work(function: Callable[..., None], arguments: tuple[Any, ...], base: Path, threads: int) -> None:
    """The body of a job's process."""
    log = os.open(f"{base}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ[STATUS_FILE] = f"{base}.status"
    torch.set_num_threads(threads)
    try:
        function(*arguments)
    except InputError as error:
        Path(f"{base}.error").write_text(str(error))
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(2)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
