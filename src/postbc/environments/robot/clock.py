"""Time: the real one, or a simulation's own, which passes as fast as the loop does."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds from some beginning on.

    Attributes:
        real: whether time passes by itself.
    """

    real: bool

    def now(self) -> float: ...

    def wait(self, until: float) -> None:
        """Return at `until`, at once if that is over."""
        ...


class RealClock:
    """The machine's monotonic clock."""

    real = True

    def now(self) -> float:
        return time.monotonic()

    def wait(self, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            time.sleep(left)


class VirtualClock:
    """Time that passes only by waiting: a simulation as fast as it goes, and the same every time."""

    real = False

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def wait(self, until: float) -> None:
        self._now = max(self._now, until)


class Ticks:
    """When the actions of an episode are due: a period apart; after one that is late, a period after it was sent.

    So nobody catches up: a robot always has its whole control step, and one delay is one missed deadline.

    Args:
        period: seconds.
        clock: whose time.
    """

    LATE = 0.1
    """Share of a period by which an action may be late without having missed its deadline."""

    def __init__(self, period: float, clock: Clock) -> None:
        self.period, self.clock = period, clock
        self.due = clock.now()

    def start(self) -> None:
        """The first action is due now."""
        self.due = self.clock.now()

    def wait(self) -> None:
        """Return when the next action is due."""
        self.clock.wait(self.due)

    def sent(self) -> float:
        """The action is sent now: by how many seconds it is late."""
        now = self.clock.now()
        late = max(0.0, now - self.due)
        self.due = (now if self.missed(late) else self.due) + self.period
        return late

    def missed(self, late: float) -> bool:
        """Whether an action that is so late has missed its deadline."""
        return late > self.LATE * self.period
