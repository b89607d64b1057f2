"""Jobs on a Ray cluster, or on Ray's workers of this machine; a job whose worker is lost may be begun again on another.

All machines share the file system on which the runs lie, and have postbc installed. A job is a Ray task; what it
says of its progress goes to an actor beside the driver. Nothing is kept in Ray: what a job has done is in its run directory.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from postbc.engines.base import Began, Ended, Event, Job, JobError, first_line, load_plugins, log_of, make_logs, taken
from postbc.engines.processes import print_to
from postbc.errors import InputError, InUseError, require
from postbc.progress import Status, listening, say

FREED = 60.0
"""Seconds for which a job that was taken up waits until its directory is free: a lost machine may take a while to let it go."""
PASSED_ON = ("POSTBC_", "OMP_", "MKL_", "MUJOCO_", "PYOPENGL_", "WANDB_", "HF_")
"""How variables of the environment begin that workers are given too."""


class RayEngine:
    """As many jobs at a time as the cluster has room for; those beyond wait in Ray.

    Args:
        address: of a cluster ("auto": the one of this machine or of RAY_ADDRESS); None starts one on this machine, which ends with this
            process.
        cpus, gpus: what each job takes of a machine; a fraction of a GPU is shared.
        workers: jobs at a time on the cluster that is started here, which has the CPUs that these take; None: as many as the machine's
            CPUs carry.

    Raises:
        InputError: Ray is not installed, there is no such cluster, or none of its machines has what a job takes.
    """

    def __init__(
        self, logs: Path, address: str | None = None, cpus: float = 1.0, gpus: float = 0.0, workers: int | None = None
    ) -> None:
        self.logs, self.cpus, self.gpus, self.workers = logs, cpus, gpus, workers
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call home
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a job that takes no GPU sees none
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise InputError(
                "Ray is not installed.", key="engine", found=str(error), expected="the package ray",
                remedy="pip install 'postbc[ray]', or leave --engine out: processes of this machine",
            ) from None  # fmt: skip
        self.ray = ray
        most = None if workers is None else math.ceil(workers * cpus)
        started = {} if address else {"num_cpus": most, "include_dashboard": False, "object_store_memory": 100_000_000}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **started)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                "There is no Ray cluster at this address." if address else "Ray cannot be started here.", key="address",
                found=f"{address}: {first_line(error)}" if address else first_line(error),
                remedy="start one by `ray start --head`, or leave --address out" if address else "use --engine local",
            ) from None  # fmt: skip
        try:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():  # Ray has put its own in their place
                    signal.signal(number, handler)
            self._check_resources()
            make_logs(logs)
            beside: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1}
            if address is None or not address.startswith("ray://"):
                here = ray.get_runtime_context().get_node_id()
                beside["scheduling_strategy"] = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
            self._news = ray.remote(**beside)(_News).remote()
            # a worker that held a GPU ends with its job, which frees the memory; others import what jobs need once
            self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=1 if gpus else 0)(_work)
        except BaseException:
            ray.shutdown()
            raise
        self._running: dict[Any, tuple[str, int]] = {}

    def _check_resources(self) -> None:
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for key, name, wanted in (("cpus_per_job", "CPU", self.cpus), ("gpus_per_job", "GPU", self.gpus)):
            most = max((node.get(name, 0.0) for node in nodes), default=0.0)
            require(
                wanted <= most, "No machine of the cluster has what a job would take.", key=key, found=f"{wanted:g}",
                expected=f"at most {most:g}, the {name}s of the largest of {len(nodes)}", remedy="ask for less, or add a machine",
            )  # fmt: skip

    def room(self) -> bool:
        return self.workers is None or len(self._running) < self.workers  # Ray itself makes what does not fit wait

    def start(self, name: str, job: Job, attempt: int) -> None:
        log = log_of(self.logs, name).absolute()
        passed = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
        place = {"cwd": os.getcwd(), "path": [*sys.path], "argv": [*sys.argv], "environment": passed}
        call = pickle.dumps(
            (job.function, job.arguments)
        )  # not Ray's way, which would import what the job needs before the place is right
        self._running[self._task.options(name=name).remote(call, name, attempt, str(log), place, self._news)] = (name, attempt)

    def events(self) -> list[Event]:
        tasks = [*self._running]
        self.ray.wait(tasks, num_returns=1, timeout=1.0)
        ended, _ = self.ray.wait(tasks, num_returns=len(tasks), timeout=0)
        attempts = {name: attempt for name, attempt in self._running.values()}
        found: list[Event] = []
        with contextlib.suppress(self.ray.exceptions.RayError):  # begun anew where it was lost: news is not needed
            for name, attempt, what in self.ray.get(self._news.take.remote(), timeout=10):
                if attempts.get(name) == attempt:  # not what a lost worker still had to say
                    found.append((name, Began(what) if isinstance(what, str) else Status(*what)))
        for task in ended:
            name, _ = self._running.pop(task)
            found.append((name, self._outcome(task, name)))
        return found

    def _outcome(self, task: Any, name: str) -> Ended:
        log = log_of(self.logs, name)
        try:
            error, said = self.ray.get(task)
        except self.ray.exceptions.RayTaskError as failure:  # before or after the job itself
            return Ended(JobError(f"failed: {first_line(failure.cause or failure)} (log: {log})"))
        except self.ray.exceptions.RayError as failure:
            return Ended(
                JobError(f"its worker was lost: {type(failure).__name__}; the same command goes on (log: {log})"), lost=True
            )
        if said:
            say(said)
        return Ended(JobError(f"{error} (log: {log})") if isinstance(error, str) else error)

    def close(self) -> None:
        for task in self._running:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.cancel(task, force=True)
        self.ray.shutdown()


class _News:
    """An actor: what jobs say, until the driver takes it."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def put(self, name: str, attempt: int, what: Any) -> None:
        """`what`: where the job began, or a status."""
        self.items.append((name, attempt, what))

    def take(self) -> list[Any]:
        """The newest of each kind and job."""
        items, self.items = self.items, []
        return list({(name, attempt, isinstance(what, str)): (name, attempt, what) for name, attempt, what in items}.values())


def _work(
    call: bytes, name: str, attempt: int, log: str, place: dict[str, Any], news: Any
) -> tuple[InputError | str | None, str]:
    """The body of a task: (its error, in words if it was a bug; what it printed, if it did its work)."""
    news.put.remote(name, attempt, f"on {socket.gethostname()}, process {os.getpid()}")
    os.environ.update(place["environment"])
    sys.argv[:] = place["argv"]  # which the records name
    sys.path += [entry for entry in place["path"] if entry not in sys.path]
    try:
        os.chdir(place["cwd"])
        begin = os.path.getsize(log) if os.path.exists(log) else 0
        print_to(log)
    except OSError as error:
        found = f"{error.strerror} on {socket.gethostname()}"
        remedy = "let all machines of the cluster share the file system, at the same path"
        return InputError(
            "A worker does not see the directory of the runs.", file=error.filename, found=found, remedy=remedy
        ), ""

    def send(status: Status) -> None:
        news.put.remote(name, attempt, tuple(status))

    until = time.monotonic() + (FREED if attempt else 0.0)
    try:
        with listening(send):
            load_plugins()
            function, arguments = pickle.loads(call)
            while True:
                try:
                    function(*arguments)
                    break
                except InUseError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(1.0)
        refused = None
    except InputError as error:
        refused = error
    except Exception as bug:
        traceback.print_exc()
        return f"failed: {first_line(bug)}", ""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return refused, taken(Path(log), begin)
