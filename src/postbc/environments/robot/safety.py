"""What stands between an agent and a robot: bounds and rate limits of every action, and a watchdog that does not wait for ever."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any, NamedTuple, TypeVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from postbc.environments.adapter import foreign_code
from postbc.environments.robot.clock import Clock
from postbc.environments.spaces import ActionBox
from postbc.errors import NotFiniteError, require

Floats = NDArray[np.float64]
T = TypeVar("T")
POLL = 0.01
"""Seconds between two looks for a stop while a robot is waited for."""


class ActionLimits:
    """Every action within its bounds, and no farther from the one before than a control step may take it.

    Args:
        space: the robot's actions.
        low, high: tighter bounds, one for all dimensions or one each; none: the space's own.
        rate_limit: largest change of an action from one control step to the next, likewise; none: unlimited.

    Raises:
        InputError: not one number or one a dimension, no finite bounds, or none that any action can hold to.
    """

    def __init__(
        self,
        space: gymnasium.spaces.Space[Any],
        low: Sequence[float] = (),
        high: Sequence[float] = (),
        rate_limit: Sequence[float] = (),
    ) -> None:
        self.box = ActionBox(space)
        n = self.box.dim
        self.low = np.maximum(self.box.low, _each("action_low", low, n, -math.inf)).astype(np.float64)
        self.high = np.minimum(self.box.high, _each("action_high", high, n, math.inf)).astype(np.float64)
        self.rate_limit = _each("rate_limit", rate_limit, n, math.inf)
        endless = np.flatnonzero(~(np.isfinite(self.low) & np.isfinite(self.high))).tolist()
        require(not endless, "A robot's actions need bounds before anything moves.", key="action_low, action_high",
                found=f"none for the dimensions {endless}", expected=f"one number, or {n}",
                remedy="give --action-low and --action-high: the range of your demonstrations' actions, say")  # fmt: skip
        require((self.low <= self.high).all(), "No action lies within these bounds.", key="action_low, action_high",
                found=f"{self.low.tolist()} to {self.high.tolist()}")  # fmt: skip
        require((self.rate_limit > 0).all(), "A rate limit is positive.", key="rate_limit", found=self.rate_limit.tolist())
        self._last: Floats | None = None

    def begin(self, command: Any = None) -> None:
        """An episode begins, where `command` (A,) is what holds the robot; None: unknown, so that the first action is free."""
        if command is not None:
            with foreign_code("the robot", 'info["command"]'):
                command = np.array(command, np.float64)
            good = command.shape == (self.box.dim,) and np.isfinite(command).all()
            require(good, "The command that holds the robot is no action.", key='info["command"]', found=command,
                    expected=f"{self.box.dim} finite numbers")  # fmt: skip
        self._last = command

    def apply(self, action: NDArray[np.floating[Any]]) -> tuple[Floats, NDArray[np.bool_]]:
        """The action (A,) that may be sent, and in which dimensions (A,) it is not the one that was asked for.

        Raises:
            NotFiniteError: an action that is not finite; nothing may be sent.
        """
        asked = np.asarray(action, np.float64)
        if not np.isfinite(asked).all():
            raise NotFiniteError("The agent's action is not finite; the robot holds.", key="action", found=asked.tolist())
        safe = np.clip(asked, self.low, self.high)
        if self._last is not None:
            safe = np.clip(np.clip(safe, self._last - self.rate_limit, self._last + self.rate_limit), self.low, self.high)
        self._last = safe
        return safe, np.abs(safe - asked) > 1e-6 * (1 + np.abs(asked))


def _each(name: str, values: Sequence[float], count: int, default: float) -> Floats:
    require(len(values) in (0, 1, count), "This is one number, or one a dimension of an action.", key=name,
            found=f"{len(values)} numbers", expected=f"1 or {count}")  # fmt: skip
    array = np.array(values or [default], np.float64)
    require(not np.isnan(array).any(), "This is no number.", key=name, found=list(values))
    return np.broadcast_to(array, (count,)).copy()


class Stalled(Exception):
    """The robot has not answered in time; it was told to hold."""


class Observed(NamedTuple):
    """What a step gave."""

    observation: Any
    terminated: bool
    truncated: bool
    success: bool | None
    """None: the robot does not say."""
    age: float
    """Seconds since the observation was taken."""


class WatchedRobot:
    """A robot's `Env` in a thread of its own, so that who waits for it can give up, and tell it to hold.

    Args:
        make: makes the Env, in that thread (OpenGL wants to be used where it was begun).
        name: what messages call it.
        clock: real, or virtual (then nothing can be late).
        patience: seconds that a step or an observation may take until the robot is told to hold.

    Attributes:
        unheld: why it could not be told to hold, the last time that it was; empty: it was.
    """

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]], name: str, clock: Clock, patience: float = 1.0) -> None:
        self.name, self.clock, self.patience = name, clock, patience
        self._thread = ThreadPoolExecutor(1, "postbc-robot")
        self._pending: Future[Any] | None = None
        self.unheld = ""
        self.env: Any = self._call("construction", make, None)

    def reset(self, seed: int, stopped: Callable[[], bool] = lambda: False) -> tuple[Any, Any, float] | None:
        """Begin an episode, however long that takes: observation, the command that holds the robot (None: unknown), the observation's
        age; None if it was stopped, and told to hold.

        Raises:
            Stalled, InputError: as :meth:`step`.
        """
        found = self._call("reset", lambda: self.env.reset(seed=seed), None, stopped)
        return None if found is None else (found[0], found[1].get("command"), self._age(found[1]))

    def step(self, action: Floats, stopped: Callable[[], bool] = lambda: False) -> Observed | None:
        """One control step; None if `stopped` became true while it was waited for: the robot has been told to hold.

        Raises:
            Stalled: it took longer than the patience, or what it observes is older; the robot has been told to hold.
            InputError: whatever the Env raises.
        """
        sent = action.astype(self.env.action_space.dtype)
        found = self._call("step", lambda: self.env.step(sent), self.patience, stopped)
        if found is None:
            return None
        observation, _, terminated, truncated, info = found
        return Observed(observation, bool(terminated), bool(truncated), _success(info), self._age(info))

    def _age(self, info: Mapping[str, Any]) -> float:
        """Seconds since the newest observation; Stalled where it is too old, or its age is no number."""
        with foreign_code(self.name, 'info["observation_age"]'):
            age = float(info.get("observation_age", 0.0))
        if not 0 <= age <= self.patience:
            self.hold()
            raise Stalled(f"its newest observation is {age:.2f} s old")
        return age

    def _call(
        self, doing: str, function: Callable[[], T], patience: float | None, stopped: Callable[[], bool] = lambda: False
    ) -> T | None:
        if self._pending is not None and not self._pending.done():
            raise Stalled("it has not answered the last call yet")
        self._pending = future = self._thread.submit(function)
        end = math.inf if patience is None or not self.clock.real else time.monotonic() + patience
        while not future.done():
            with contextlib.suppress(NotYet):
                future.exception(POLL)  # waits
            if future.done():
                break
            if stopped():
                self.hold()
                return None
            if time.monotonic() > end:
                self.hold()
                raise Stalled(f"its {doing} has taken more than {patience:g} s")
        with foreign_code(self.name, doing):
            return future.result()

    def hold(self) -> None:
        """Hold the position, now, whatever else it is doing. Never raises: it is what is left to do; see :attr:`unheld`."""
        try:
            hold = self.env.get_wrapper_attr("hold")
        except AttributeError:
            return  # it is sent nothing any more
        try:
            hold()
            self.unheld = ""
        except Exception as error:
            self.unheld = f"{self.name} could not be told to hold: {type(error).__name__}: {error}"
            warnings.warn(self.unheld, RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Hold, and let go; an Env that does not answer is left behind."""
        self.hold()
        try:
            self._call("close", self.env.close, 10.0)
        except Stalled:
            pass
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _success(info: Mapping[str, Any]) -> bool | None:
    from postbc.environments.success import KEYS, truth

    said = [truth(key, info[key]) for key in KEYS if info.get(key) is not None]
    return any(said) if said else None
