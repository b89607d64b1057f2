"""Chunks of an agent in real time: the next one is computed while the current one plays, or where it is played out."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from postbc.agents.base import Agent
from postbc.environments.robot.safety import POLL

Seen = Mapping[str, NDArray[Any]]


class Plan(NamedTuple):
    """A chunk."""

    chunk: NDArray[np.float64]
    """(T, A) raw."""
    step: int
    """Control step whose observation it was computed from."""
    seconds: float
    """That it took."""


class Planner:
    """What an agent does at each control step of an episode.

    With `overlap`, a chunk is computed as late as it can be while the one before still plays, by the slowest of the last ten: the
    observation that it comes from is then so many steps old. Of its actions those are skipped whose time is over, unless none is left.
    Without, the robot waits at the end of every chunk.

    Args:
        agent: plays; in a thread of its own.
        period: seconds of a control step.
        overlap: whether it computes while the robot moves.
        real: whether time passes by itself; otherwise computing takes no time, and an overlapping chunk is begun one step before.
    """

    def __init__(self, agent: Agent, period: float, overlap: bool, real: bool = True) -> None:
        self.agent, self.period, self.overlap, self.real = agent, period, overlap, real
        self._thread = ThreadPoolExecutor(1, "postbc-agent")
        self._generator = torch.Generator(device=agent.device)
        self._pending: Future[Plan] | None = None
        self._plan: Plan | None = None
        self._begins = 0
        self._recent: deque[float] = deque(maxlen=10)  # seconds, the newest last

    def begin(self, seen: Seen, generator: torch.Generator, stopped: Callable[[], bool] = lambda: False) -> None:
        """An episode begins, whose first chunk is computed before its clock runs; `generator` is that of all its chunks."""
        if self._pending is not None:
            self._pending.exception()  # of an episode that was stopped
        self._generator, self._pending, self._plan = generator, None, None
        self._ask(0, seen)
        self._take(0, stopped)

    def action(
        self, step: int, seen: Seen, stopped: Callable[[], bool] = lambda: False
    ) -> tuple[NDArray[np.float64], Plan] | None:
        """The action (A,) of this control step and the plan that it is of, from what is seen now; None if it was stopped meanwhile."""
        if self._plan is None or step - self._begins >= len(self._plan.chunk):
            if self._pending is None:
                self._ask(step, seen)
            if not self._take(step, stopped):
                return None
        plan = self._plan
        assert plan is not None
        index = step - self._begins
        if self.overlap and self._pending is None and len(plan.chunk) - index <= self._lead:
            self._ask(step, seen)
        return plan.chunk[index], plan

    @property
    def _lead(self) -> int:
        """Control steps before a chunk's end at which the next one has to be begun."""
        return max(1, math.ceil(max(self._recent, default=0.0) / self.period)) if self.real else 1

    def _ask(self, step: int, seen: Seen) -> None:
        self._pending = self._thread.submit(self._compute, step, seen)

    def _compute(self, step: int, seen: Seen) -> Plan:
        begin = time.monotonic()
        tensors = {name: torch.as_tensor(values).to(self.agent.device) for name, values in seen.items()}
        with torch.inference_mode():
            chunk = self.agent.act(tensors, self._generator)[0].cpu().numpy()
        return Plan(np.asarray(chunk, np.float64), step, time.monotonic() - begin)

    def _take(self, step: int, stopped: Callable[[], bool]) -> bool:
        """Wait for the chunk that is being computed, and play it from now on; False if it was stopped."""
        assert self._pending is not None
        while not self._pending.done():
            try:
                self._pending.exception(POLL)
            except NotYet:
                if stopped():
                    return False
        plan, self._pending = self._pending.result(), None
        self._plan = plan
        self._recent.append(plan.seconds)
        self._begins = step - min(step - plan.step, len(plan.chunk) - 1)
        return True

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
