"""One episode on a robot, control step by control step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from postbc.data.episodes import is_image
from postbc.environments.robot.clock import Clock, Ticks
from postbc.environments.robot.reading import History, RobotReader
from postbc.environments.robot.safety import ActionLimits, Observed, Stalled, WatchedRobot
from postbc.errors import InputError, NotFiniteError
from postbc.robot.planning import Planner
from postbc.robot.session import Session

Ended = Literal["success", "terminated", "horizon", "stop", "watchdog", "failed"]


@dataclass(frozen=True)
class Timing:
    """One control step, as timing/episode_*.csv has it; seconds."""

    step: int
    time: float
    """When its action was sent, since the episode's first was due."""
    late: float
    """By how much the action was late."""
    missed: bool
    """Its deadline: a tenth of a control step."""
    observation_age: float
    """Age of the newest observation when it came, before this action."""
    plan_age: int
    """Control steps between the observation that the action was computed from, and this one."""
    inference: float
    """That computing its chunk took."""
    limited: int
    """Dimensions of the action that bounds or rate limits changed."""


@dataclass
class Recording:
    """What an episode was: N steps of observations before each action, the actions that were sent, and what they led to."""

    observations: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    actions: list[NDArray[np.float64]] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)
    """Whether the robot said that the task was solved after that action; False where it does not say."""
    timings: list[Timing] = field(default_factory=list)
    ended: Ended = "horizon"
    reason: str = ""
    """Of a watchdog's end, or of a robot's that has failed."""

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def broken(self) -> bool:
        """Whether the robot ended it: it was blind, or it failed."""
        return self.ended in ("watchdog", "failed")


class Player:
    """Plays episodes of several agents on one robot.

    Args:
        robot: in its thread.
        reader: of its observations.
        limits: of its actions.
        session: told of every step, asked for a stop before and during each.
        clock, period: time, and seconds of a control step.
        horizon: control steps until an episode ends by itself.
    """

    def __init__(
        self,
        robot: WatchedRobot,
        reader: RobotReader,
        limits: ActionLimits,
        session: Session,
        clock: Clock,
        period: float,
        horizon: int,
    ) -> None:
        self.robot, self.reader, self.limits, self.session = robot, reader, limits, session
        self.clock, self.period, self.horizon = clock, period, horizon

    def play(self, planner: Planner, scene_seed: int, generator: torch.Generator) -> Recording:
        """Reset the robot and play one episode; whatever ends it, the robot has been told to hold.

        Args:
            planner: of the agent.
            scene_seed: of a simulated robot's scene, and of a coherent agent's coordinates.
            generator: of the agent's random numbers.

        Raises:
            Stalled, InputError: before its first step was over, the robot did not answer, or raised an error; later that ends the
                episode.
            NotFiniteError: an action that is not finite.
        """
        recording = Recording()
        try:
            self._play(recording, planner, scene_seed, generator)
        except NotFiniteError:
            raise
        except (Stalled, InputError) as error:
            if not len(recording):
                raise
            recording.ended, recording.reason = "watchdog" if isinstance(error, Stalled) else "failed", str(error)
        finally:
            self.robot.hold()
        return recording

    def _stopped(self) -> bool:
        return self.session.stopped

    def _play(self, recording: Recording, planner: Planner, scene_seed: int, generator: torch.Generator) -> None:
        begun = self.robot.reset(scene_seed, self._stopped)
        if begun is None:
            recording.ended = "stop"
            return
        first, command, age = begun
        observation = self.reader(first)
        self.limits.begin(command)
        history = History(planner.agent.shapes, planner.agent.observation_steps, scene_seed)
        seen = history.add(observation)
        self._show(observation, 0)
        planner.begin(seen, generator, self._stopped)
        ticks = Ticks(self.period, self.clock)
        start = ticks.due
        for step in range(self.horizon):
            ticks.wait()
            if self._stopped() or (decided := planner.action(step, seen, self._stopped)) is None:
                recording.ended = "stop"
                return
            action, plan = decided
            safe, limited = self.limits.apply(action)
            late = ticks.sent()
            timing = Timing(
                step,
                ticks.due - self.period - start,
                late,
                ticks.missed(late),
                age,
                step - plan.step,
                plan.seconds,
                int(limited.sum()),
            )
            found = self.robot.step(safe, self._stopped)
            self._record(recording, observation, safe, found, timing)
            if found is None:
                recording.ended = "stop"
                return
            observation, age = self.reader(found.observation), found.age
            seen = history.add(observation)
            self._show(observation, step + 1)
            if found.success or found.terminated or found.truncated:
                recording.ended = "success" if found.success else "terminated" if found.terminated else "horizon"
                return

    @staticmethod
    def _record(
        recording: Recording,
        observation: Mapping[str, NDArray[Any]],
        action: NDArray[np.float64],
        found: Observed | None,
        timing: Timing,
    ) -> None:
        for name, values in observation.items():
            recording.observations.setdefault(name, []).append(values)
        recording.actions.append(action)
        recording.successes.append(bool(found is not None and found.success))
        recording.timings.append(timing)

    def _show(self, observation: Mapping[str, NDArray[Any]], step: int) -> None:
        frames = {n.removeprefix("image."): np.moveaxis(v, 0, -1) for n, v in observation.items() if is_image(n)}
        self.session.show(frames, step)
