"""The loop beside a robot: reset, play, keep, label, again; every episode is on the disk before the next begins."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from postbc.agents.base import Agent
from postbc.data.episodes import COORDINATES
from postbc.disk import remove_leftovers
from postbc.environments.robot.clock import Clock, RealClock, VirtualClock
from postbc.environments.robot.reading import RobotReader
from postbc.environments.robot.registry import Robot
from postbc.environments.robot.safety import ActionLimits, Stalled, WatchedRobot
from postbc.errors import InputError, NotFiniteError, require
from postbc.evaluation import check_shapes
from postbc.progress import say
from postbc.robot.keyboard import keyboard
from postbc.robot.labels import Label, Labels, user_name
from postbc.robot.planning import Planner
from postbc.robot.playing import Player, Recording
from postbc.robot.recorded import recorded, said_success, write_episode
from postbc.robot.session import Session
from postbc.schemas import Port, Positive, Share, schema
from postbc.seeding import make_generator

Labelling = Literal["keyboard", "page", "simulator", "later"]
STREAM = 17_017  # of wrong labels


@schema
class Control:
    """How a robot is moved, and what keeps it safe."""

    rate: Positive | None = None
    """Control steps a second; default the robot's own."""
    fast: bool = False
    """A simulated robot as fast as it goes: time passes by its control steps, and the same command gives the same episodes."""
    overlap: bool = True
    """Compute the next chunk while the current one plays; --no-overlap: the robot waits at the end of every chunk."""
    action_low: tuple[float, ...] = ()
    """Bounds of an action, within the robot's own: one number, or one a dimension."""
    action_high: tuple[float, ...] = ()
    rate_limit: tuple[float, ...] = ()
    """Largest change of an action from one control step to the next: one number, or one a dimension; none: unlimited."""
    watchdog: Positive = 1.0
    """Seconds without a new observation after which the robot holds its position and the episode ends."""


@schema
class Person:
    """Who resets the scene and says how an episode went."""

    label: Labelling = "keyboard"
    """keyboard: of this terminal; page: a web page, for a phone beside the robot (the keyboard works too); simulator: a simulated
    robot's own success; later: not now (`postbc robot label`)."""
    wrong_labels: Share = 0.0
    """Share of the simulator's labels that are flipped, at random, as a person is wrong at times."""
    automatic_resets: bool = False
    """Do not wait for a person who resets the scene; with --label simulator nobody is waited for anyway."""
    by: str = ""
    """Who labels, for the record; default the user of this machine."""
    host: str = "127.0.0.1"
    """Where the page listens; another than this machine's own needs a token."""
    port: Port = 8017
    """0: a free one."""
    token: Annotated[str, Field(min_length=8)] | None = None
    """Of the page, 8 characters or more; made and printed where one is needed and none is given."""


class Play(NamedTuple):
    """What the next episode is."""

    agent: int
    scene_seed: int
    random: tuple[int, int]
    """(seed, offset) of the agent's random numbers."""


Choose = Callable[[int, Mapping[int, Label]], "Play | None"]
"""(number of the next episode, labels so far) -> what it is; None: enough."""


class _End(Exception):
    """The person has ended the session."""


class Loop:
    """One session on one robot, with one agent or several: until enough is played, or a person ends it.

    Made, it is connected to the robot and has its buttons, and nothing is written.

    Args:
        robot: which one.
        agents: who plays.
        episodes: how many are expected, for the display.
        horizon: control steps of an episode; None: the robot's.
        seed: of wrong labels.

    Raises:
        InputError: an agent that reads or does something else than the robot gives and takes; actions without bounds; no keyboard, or
            no page.
    """

    def __init__(
        self, robot: Robot, agents: Sequence[Agent], control: Control, person: Person, *, episodes: int,
        horizon: int | None = None, seed: int = 0, state_keys: Sequence[str] = (), session: Session | None = None,
    ) -> None:  # fmt: skip
        self.robot, self.agents, self.control, self.person = robot, list(agents), control, person
        self.seed, self.facts = seed, dict(robot.facts())
        self.attended = person.label in ("keyboard", "page") or not (person.automatic_resets or person.label == "simulator")
        self.clock: Clock = VirtualClock() if control.fast else RealClock()
        rate = robot.rate if control.rate is None else control.rate
        steps = robot.horizon if horizon is None else horizon
        self.by = person.by or user_name()
        self.watched = WatchedRobot(robot.make, robot.name, self.clock, control.watchdog)
        with contextlib.ExitStack() as held:  # all of it is let go where something does not fit
            held.callback(self.watched.close)
            env = self.watched.env
            self.reader = RobotReader(env.observation_space, state_keys)
            limits = ActionLimits(env.action_space, control.action_low, control.action_high, control.rate_limit)
            for agent in self.agents:
                check_agent(agent, self.reader, limits)
            self.session = session or Session(episodes, None if control.fast else rate, steps, self.reader.cameras)
            self._open_buttons(held)
            self.player = Player(self.watched, self.reader, limits, self.session, self.clock, 1 / rate, steps)
            self.planners = [Planner(agent, 1 / rate, control.overlap, self.clock.real) for agent in self.agents]
            for planner in self.planners:
                held.callback(planner.close)
            self._held = held.pop_all()

    def run(self, folder: Path, choose: Choose) -> bool:
        """Play into a session's folder until `choose` says that it is enough (True), or a person ends the session (False)."""
        self.folder, self.labels = folder, Labels(folder)
        remove_leftovers(folder)
        try:
            while True:
                self._ask_labels()
                number = self._next_number()
                if number in self.labels.current():  # of an episode that a kill kept from being written
                    self.labels.set(number, None, note="there is no such episode")
                play = choose(number, self.labels.current())
                if play is None:
                    self.session.enter("finished", "Done. Thank you.")
                    return True
                if not self._resets(number):
                    continue
                recording = self._play(number, play)
                if recording is None:
                    continue
                if recording.broken:  # first, or a kill could leave an episode that looks whole
                    self.labels.set(number, "discard", "watchdog", recording.reason[:2000])
                write_episode(folder, number, recording, self.reader, self.facts, play.scene_seed)
                if recording.broken or self.watched.unheld:
                    self._must_be_looked_at(number, recording)
        except _End:
            self.session.enter("finished", "The session was ended; the same command with --resume goes on.")
            return False
        finally:
            self.watched.hold()

    def close(self) -> None:
        """Let the robot go, and its buttons; nothing is left to do the second time."""
        self._held.close()

    # -- phases ------------------------------------------------------------------------------------------------------------------
    def _open_buttons(self, held: contextlib.ExitStack) -> None:
        page = self.person.label == "page"
        if page:
            from postbc.robot.page import serve

            served = serve(self.session, host=self.person.host, port=self.person.port, token=self.person.token)
            held.callback(served.close)
        there = held.enter_context(keyboard(self.session, self.by))
        require(there or page or not self.attended, "There is no keyboard to reset and label by.", key="label", found="no terminal",
                expected="a terminal; or --label page; or nobody to wait for: --label simulator, or --automatic-resets --label later",
                remedy="run the command in a terminal, or give --label page")  # fmt: skip

    def _next_number(self) -> int:
        there = recorded(self.folder)
        return there[-1] + 1 if there else 0

    def _counted(self) -> None:
        labels = list(self.labels.current().values())
        self.session.count({name: labels.count(name) for name in ("success", "failure", "discard")})

    def _ask_labels(self) -> None:
        """Until every episode has a label: the simulator's, or a person's, who may also be at another page or terminal."""
        self._counted()
        asked = -1
        while self.person.label != "later":
            labels = self.labels.current()
            missing = [number for number in recorded(self.folder) if number not in labels]
            if not missing:
                return
            number = missing[0]
            if self.person.label == "simulator":
                self._simulated_label(number)
                self._counted()
                continue
            if number != asked:
                self._tell("label", f"Episode {number}: did it succeed?  (s: success, f: failure, d: discard, u: undo)", number)
            asked = number
            press = self.session.wait_for("success", "failure", "discard", "undo", timeout=1.0)
            if press is None:
                continue
            asked = -1
            if press.button == "undo":
                self.labels.undo(press.by)
            elif number in self.labels.current():
                say(f"Episode {number} has been labelled elsewhere meanwhile; {press.button} does not count.", stderr=True)
            elif press.button in ("success", "failure", "discard"):
                self.labels.set(number, press.button, press.by or self.by)
            self._counted()

    def _simulated_label(self, number: int) -> None:
        solved = said_success(self.folder, number)
        wrong = np.random.default_rng((STREAM, self.seed, number)).random() < self.person.wrong_labels
        self.labels.set(number, "success" if solved != wrong else "failure", "simulator")

    def _tell(self, phase: Any, message: str, number: int, error: str = "") -> None:
        self.session.enter(phase, message, episode=number, error=error)
        if self.attended:
            say(message if not error else f"{error}\n{message}")

    def _resets(self, number: int) -> bool:
        """Wait until the scene is reset; False if the person looked back at a label instead."""
        if not self.attended or self.person.automatic_resets:
            self.session.enter("reset", "", episode=number)
            return True
        self._tell("reset", f"Episode {number}: reset the scene, then start  (Enter)", number)
        press = self.session.wait_for("start", "undo", "stop")
        assert press is not None
        if press.button == "undo":
            self.labels.undo(press.by)
        if press.button == "stop":
            self._pause(number, "Paused: start goes on, stop ends the session  (Enter, q)")
        return press.button == "start"

    def _pause(self, number: int, message: str, error: str = "") -> None:
        """Wait until a person goes on; :class:`_End` if not."""
        self._tell("paused", message, number, error)
        press = self.session.wait_for("start", "undo", "stop")
        assert press is not None
        if press.button == "stop":
            raise _End
        if press.button == "undo":
            self.labels.undo(press.by)

    def _play(self, number: int, play: Play) -> Recording | None:
        """The episode; None where there was none: it was stopped before its first step, or the robot failed."""
        self._tell("running", "The robot moves. Any key stops it.", number)
        agent = self.agents[play.agent]
        seed, offset = play.random
        generator = make_generator(seed, "robot/acting", agent.device, offset)
        try:
            recording = self.player.play(self.planners[play.agent], play.scene_seed, generator)
        except NotFiniteError:
            raise
        except (Stalled, InputError) as error:
            said = f"The robot does not answer: {error}." if isinstance(error, Stalled) else str(error)
            if not self.attended:
                raise InputError(said, remedy="look at the robot; the same command with --resume goes on") from error
            self._pause(number, "The robot has failed and holds. Start tries again, stop ends the session  (Enter, q)", said)
            return None
        if recording.ended == "stop" and not self.attended:
            raise _End  # nobody resets or labels, but somebody was there to stop it
        if not len(recording):
            self._pause(number, "Stopped before it began: start goes on, stop ends the session  (Enter, q)")
            return None
        return recording

    def _must_be_looked_at(self, number: int, recording: Recording) -> None:
        """Somebody has to look at the robot before it goes on; where nobody is there the run ends, unless it only looked away."""
        said = self.watched.unheld
        if recording.broken:
            what = "Observations stopped" if recording.ended == "watchdog" else "The robot has failed"
            said = f"{what}: {recording.reason}. {said or 'It holds'}; episode {number} is discarded."
        if self.attended:
            self._pause(number, "Start goes on, stop ends the session  (Enter, q)", said)
        elif recording.ended == "failed" or self.watched.unheld:
            raise InputError(said, remedy="look at the robot; the same command with --resume goes on")
        else:
            say(f"warning: {said}", stderr=True)


def check_agent(agent: Agent, reader: RobotReader, limits: ActionLimits) -> None:
    """InputError where an agent reads what the robot does not observe, or acts in other dimensions."""
    observed = dataclasses.make_dataclass("Observed", ["shapes", "action_dim"])(reader.shapes, limits.box.dim)
    check_shapes({k: s for k, s in agent.shapes.items() if k != COORDINATES}, agent.action_dim, observed)
