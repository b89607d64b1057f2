"""An interruption (Ctrl-C, a batch system's SIGTERM, a closed terminal) as one exception, raised once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP arrived; `number` says which. Its text is one clear line."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted ({signal.Signals(number).name})")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that a shell expects."""
        return 128 + self.number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted` inside, once; a second signal ends the process at once.

    A signal that is ignored from outside (nohup) stays ignored. Outside of the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    came: list[int] = []
    owner = os.getpid()

    def interrupt(number: int, _: object) -> None:
        if os.getpid() != owner:  # a forked worker (an environment's), to whom it does what it did before
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
            return
        for known in before:
            signal.signal(known, signal.SIG_DFL)
        came.append(number)
        raise Interrupted(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.getsignal(number)
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        if came and not isinstance(error, Interrupted):  # a library (Ray) that was waiting has made its own of it
            raise Interrupted(came[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
