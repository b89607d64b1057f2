"""What the loop tells the people beside the robot, and what they tell it: phase, pictures, buttons. No web and no robot in it.

The loop enters phases and waits; whoever has buttons (the terminal's keyboard, the page) presses them. A press is checked against the
phase and the episode at the moment it comes, so that a late or a second one never decides something else. A stop is never lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from postbc.errors import require

Phase = Literal["reset", "running", "label", "paused", "finished"]
Button = Literal["start", "success", "failure", "discard", "stop", "undo"]

#: What means something when. A stop during a reset pauses, a stop of a paused session ends it; labelling, the robot already holds.
BUTTONS: dict[str, tuple[Button, ...]] = {
    "reset": ("start", "undo", "stop"),
    "running": ("stop",),
    "label": ("success", "failure", "discard", "undo"),
    "paused": ("start", "undo", "stop"),
    "finished": (),
}


@dataclass(frozen=True)
class Press:
    """A button that somebody pressed."""

    button: Button
    by: str
    """Who; empty: unknown."""
    episode: int | None
    """The session's episode at that moment."""
    time: float
    """time.monotonic() of it."""


class Session:
    """One session's state, safe for several threads.

    Args:
        episodes: how many it is to have.
        rate: control steps a second; None: as fast as possible.
        max_steps: of an episode.
        cameras: names of the pictures that :meth:`frame` will have.
    """

    def __init__(
        self, episodes: int, rate: float | None = None, max_steps: int | None = None, cameras: tuple[str, ...] = ()
    ) -> None:
        self.episodes, self.rate, self.max_steps, self.cameras = episodes, rate, max_steps, list(cameras)
        self._changed = threading.Condition()
        self._phase: Phase = "paused"
        self._since = time.monotonic()
        self._episode: int | None = None
        self._step = 0
        self._message, self._error = "", ""
        self._labels: dict[str, int] = {}
        self._frames: dict[str, NDArray[np.uint8]] = {}
        self._pressed: Press | None = None
        self._stop: Press | None = None

    # -- what is shown -----------------------------------------------------------------------------------------------------------
    @property
    def phase(self) -> Phase:
        return self._phase

    def state(self) -> dict[str, Any]:
        """Plain data: phase, seconds in it, buttons that mean something now, episode (None before the first) of episodes, step of
        max_steps, rate (Hz, None: as fast as possible), message (what the person is to do), labels (label -> count), cameras, error.
        """
        with self._changed:
            return {
                "phase": self._phase, "seconds": time.monotonic() - self._since, "buttons": list(BUTTONS[self._phase]),
                "episode": self._episode, "episodes": self.episodes, "step": self._step, "max_steps": self.max_steps, "rate": self.rate,
                "message": self._message, "labels": dict(self._labels), "cameras": list(self.cameras), "error": self._error,
            }  # fmt: skip

    def frame(self, camera: str) -> NDArray[np.uint8] | None:
        """The newest picture (H, W, 3) of a camera, None before the first. Not to be written to."""
        with self._changed:
            return self._frames.get(camera)

    # -- whoever has buttons -----------------------------------------------------------------------------------------------------
    def press(self, button: Button, by: str = "", episode: int | None = None) -> None:
        """Press a button; it returns at once.

        Args:
            by: who presses.
            episode: which episode is meant; refused where it is another one by now.

        Raises:
            InputError: it means nothing now, another episode is meant, or somebody else has just pressed.
        """
        with self._changed:
            allowed = BUTTONS[self._phase]
            require(button in allowed, "This button means nothing now.", key=str(button), found=f"phase {self._phase}",
                    expected=", ".join(allowed) or "no button: the session is over")  # fmt: skip
            meant = button == "stop" or episode is None or episode == self._episode  # a stop is a stop
            require(meant, "Another episode is meant than the one that is here now.", key="episode", found=episode,
                    expected=self._episode, remedy="look again, and decide again")  # fmt: skip
            press = Press(button, by, self._episode, time.monotonic())
            if button == "stop":
                self._stop = self._stop or press
            else:
                other = self._pressed
                came = other and f"{other.button} {other.by}".strip()
                require(other is None, "Another press came first.", key=str(button), found=came,
                        remedy="look again; a label can be taken back")  # fmt: skip
                self._pressed = press
            self._changed.notify_all()

    # -- the loop ----------------------------------------------------------------------------------------------------------------
    def enter(self, phase: Phase, message: str = "", *, episode: int | None = None, error: str = "") -> None:
        """Begin a phase; presses of the one before are forgotten, but for a stop that came while an episode was about to run.

        Args:
            message: what the person is to do now.
            episode: which one it is about; None: as before.
            error: what went wrong last, if anything did.
        """
        with self._changed:
            self._phase, self._message, self._error, self._since = phase, message, error, time.monotonic()
            self._episode = self._episode if episode is None else episode
            self._pressed = None
            if phase == "running":
                self._step = 0
            else:
                self._stop = None
            self._changed.notify_all()

    def show(self, frames: Mapping[str, NDArray[np.uint8]], step: int | None = None) -> None:
        """The newest pictures (H, W, 3), which nobody writes to any more, and the step that the episode is in."""
        with self._changed:
            self._frames.update(frames)
            self._step = self._step if step is None else step

    def count(self, labels: Mapping[str, int]) -> None:
        """How many episodes have which label."""
        with self._changed:
            self._labels = dict(labels)

    @property
    def stopped(self) -> bool:
        """Whether a stop waits to be heeded: asked before every control step, cheap."""
        return self._stop is not None

    def wait_for(self, *buttons: Button, timeout: float | None = None) -> Press | None:
        """The first press of one of `buttons`, which is taken; others are dropped. None after `timeout` seconds without one."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                if self._stop is not None and "stop" in buttons:
                    stop, self._stop = self._stop, None
                    return stop
                press, self._pressed = self._pressed, None
                if press is not None and press.button in buttons:
                    return press
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
