"""The keyboard of the terminal as a session's buttons: one key a button, and while the robot moves any key stops it."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

from postbc.errors import InputError
from postbc.progress import say
from postbc.robot.session import Button, Session

KEYS: dict[str, Button] = {
    "\r": "start", "\n": "start", " ": "start", "s": "success", "f": "failure", "d": "discard", "u": "undo", "q": "stop", "x": "stop",
    "\x1b": "stop",
}  # fmt: skip
HELP = "Enter: the scene is reset, go   s: success   f: failure   d: discard   u: undo the last label   q: pause, again: end   " \
       "while the robot moves ANY key stops it"  # fmt: skip


def press(session: Session, key: str, by: str = "") -> str | None:
    """What a key means in the session's phase; a line to say where it means nothing.

    While the robot moves any key is a stop, also one that nobody knows.
    """
    button = "stop" if session.phase == "running" else KEYS.get(key.lower())
    if button is None:
        return HELP
    try:
        session.press(button, by)
    except InputError as error:
        return error.what
    return None


@contextlib.contextmanager
def keyboard(session: Session, by: str = "", stream: IO[str] | None = None) -> Iterator[bool]:
    """Inside, keys of the terminal press the session's buttons; whether there is a keyboard at all.

    Of a terminal each key counts at once; of a pipe each line's first letter does (an empty line is Enter), until it ends.
    """
    source: Any = sys.stdin if stream is None else stream
    try:
        handle = source.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or replaced by something
        yield False
        return
    over = threading.Event()
    terminal = os.isatty(handle)
    if not terminal and stream is None and not _piped(handle):
        yield False
        return
    with _single_keys(handle) if terminal else contextlib.nullcontext():
        thread = threading.Thread(
            target=_listen, args=(session, handle, terminal, by, over), name="postbc-keyboard", daemon=True
        )
        thread.start()
        try:
            if terminal:
                say(HELP)
            yield True
        finally:
            over.set()
            thread.join(1.0)


def _piped(handle: int) -> bool:
    """Whether somebody may be writing: /dev/null and a closed stream are no keyboard."""
    try:
        return os.fstat(handle).st_rdev != os.stat(os.devnull).st_rdev
    except OSError:
        return False


@contextlib.contextmanager
def _single_keys(handle: int) -> Iterator[None]:
    try:
        import termios
        import tty
    except ImportError:  # another system: keys count when Enter is pressed
        yield
        return
    before = termios.tcgetattr(handle)
    try:
        tty.setcbreak(handle)  # Ctrl-C still interrupts
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _listen(session: Session, handle: int, single: bool, by: str, over: threading.Event) -> None:
    pending = b""
    while not over.is_set():
        ready, _, _ = select.select([handle], [], [], 0.05)
        if not ready:
            continue
        read = os.read(handle, 1024)
        if not read:
            return
        if single:
            typed = read.decode("utf-8", "replace")
            keys = ["\x1b"] if typed.startswith("\x1b") else list(typed)  # an arrow is a sequence
        else:
            *lines, pending = (pending + read).split(b"\n")
            keys = [line.strip().decode("utf-8", "replace")[:1] or "\n" for line in lines]
        for key in keys:
            said = press(session, key, by)
            if said:
                say(said)
