"""Rollouts on robots: chunks in time, the loop with people, what is on the disk whenever it is killed, and learning from it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import postbc.robot.rollout as rollout
from kills import in_a_process, kill_and_resume, kill_at_every_operation
from made import save_policy
from postbc import cli
from postbc.agents.base import load_agent
from postbc.data.readers import read_dataset
from postbc.environments.robot.registry import ROBOTS, Robot
from postbc.errors import InputError
from postbc.policies.base import load_policy
from postbc.robot.labels import Labels
from postbc.robot.planning import Planner
from postbc.robot.recorded import read_session, read_timings, recorded, session_digest
from postbc.robot.rollout import Control, Loop, Person, Play
from postbc.robot.session import Session
from postbc.robot.summary import read_summary
from postbc.stages.robot_rollout import RobotRollout, roll_out
from postbc.training.best_of_n import finetune_best_of_n
from postbc.training.rollouts import read_rollouts
from robots import Point

torch.set_num_threads(1)


class Counting:
    """Decides action k of its chunk at observation s as (s, k), after some seconds."""

    action_dim, observation_steps, shapes, device = 2, 1, {"state": (3,)}, torch.device("cpu")

    def __init__(self, chunk: int, seconds: float = 0.0) -> None:
        self.chunk, self.seconds = chunk, seconds

    def act(self, observation: Any, generator: torch.Generator) -> torch.Tensor:
        time.sleep(self.seconds)
        step = float(observation["state"][0, -1])
        return torch.tensor([[[step, k] for k in range(self.chunk)]])


def played(chunk: int, overlap: bool, steps: int = 7, **options: Any) -> list[tuple[int, int]]:
    """(observation, index in its chunk) of the actions of an episode."""
    planner, found = Planner(Counting(chunk), 0.05, overlap, **options), []  # type: ignore[arg-type]
    for step in range(steps):
        seen = {"state": np.array([[0, 0, step]], np.float32)}
        if step == 0:
            planner.begin(seen, torch.Generator())
        action, plan = planner.action(step, seen)  # type: ignore[misc]
        assert plan.step == action[0]
        found.append((int(action[0]), int(action[1])))
    planner.close()
    return found


# -- chunks in time
def test_synchronous_chunks_are_those_of_an_evaluation() -> None:
    assert played(3, overlap=False, real=False) == [(0, 0), (0, 1), (0, 2), (3, 0), (3, 1), (3, 2), (6, 0)]
    assert played(1, overlap=False, real=False, steps=3) == [(0, 0), (1, 0), (2, 0)]


def test_overlapping_chunks_skip_the_actions_whose_time_is_over() -> None:
    # the second chunk is computed from the observation of step 2 while action 2 plays: its own action for step 2 is skipped
    assert played(3, overlap=True, real=False) == [(0, 0), (0, 1), (0, 2), (2, 1), (2, 2), (4, 1), (4, 2)]
    assert played(1, overlap=True, real=False, steps=4) == [
        (0, 0),
        (0, 0),
        (1, 0),
        (2, 0),
    ]  # nothing would be left: a step late


def test_a_slow_agent_is_asked_earlier() -> None:
    period, planner = 0.05, Planner(Counting(6, seconds=0.08), 0.05, True)  # type: ignore[arg-type]
    plans, begin = [], 0.0
    for step in range(16):
        seen = {"state": np.array([[0, 0, step]], np.float32)}
        if step == 0:
            planner.begin(seen, torch.Generator())
            begin = time.monotonic()
        time.sleep(max(0.0, begin + step * period - time.monotonic()))
        plans.append((step, planner.action(step, seen)[1].step))  # type: ignore[index]
    planner.close()
    ages = [step - plan for step, plan in plans if plan > 0]
    assert min(ages) >= 2  # 0.08 s are two control steps
    assert max(ages) <= 9


# -- the loop
@contextlib.contextmanager
def no_keyboard(session: Session, by: str = "") -> Iterator[bool]:
    yield True


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody is there, whose buttons are pressed by the test."""
    monkeypatch.setattr(rollout, "keyboard", no_keyboard)


def loop_of(
    folder: Path, env: Point, episodes: int = 2, horizon: int = 6, rate: float = 50.0, **person: Any
) -> tuple[Loop, Session]:
    robot = Robot("point", lambda: env, rate, horizon, simulated=True)
    folder.mkdir(exist_ok=True)
    session = Session(episodes, rate, horizon, ("top",))
    control = Control(watchdog=person.pop("watchdog", 1.0), fast=person.pop("fast", False))
    agent: Any = Counting(2)
    return Loop(robot, [agent], control, Person(**person), episodes=episodes, session=session), session


def until(number: int) -> Callable[[int, Any], Play | None]:
    return lambda episode, labels: Play(0, 100 + episode, (0, episode)) if episode < number else None


class Beside:
    """A person: presses buttons in the phases that come, one after another."""

    def __init__(self, session: Session, *script: tuple[str, Any]) -> None:
        self.session, self.script, self.states = session, list(script), []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        for phase, button in self.script:
            end = time.monotonic() + 20
            while self.session.phase != phase:
                assert time.monotonic() < end, f"no {phase}"
                time.sleep(0.002)
            self.states.append(self.session.state())
            if callable(button):
                button()
            elif button is not None:
                self.session.press(button, "Ada")
            while self.session.phase == phase and button not in (None, "undo"):
                assert time.monotonic() < end, f"{phase} does not end"
                time.sleep(0.002)


def test_a_person_resets_labels_and_takes_a_label_back(tmp_path: Path, attended: None) -> None:
    env = Point()
    loop, session = loop_of(tmp_path / "s", env)
    person = Beside(
        session, ("reset", "start"), ("label", "success"), ("reset", "undo"), ("label", "failure"), ("reset", "start"),
        ("label", "discard"),
    )  # fmt: skip
    assert loop.run(tmp_path / "s", until(2))
    loop.close()
    person.thread.join(5)
    assert Labels(tmp_path / "s").current() == {0: "failure", 1: "discard"}
    assert [(d.label, d.by) for d in Labels(tmp_path / "s").history()] == [
        ("success", "Ada"), (None, "Ada"), ("failure", "Ada"), ("discard", "Ada"),
    ]  # fmt: skip
    assert env.seeds == [100, 101]
    state = person.states[1]
    assert (state["phase"], state["episode"], state["episodes"], state["step"]) == ("label", 0, 2, 6)
    assert "did it succeed" in state["message"]
    assert session.phase == "finished"
    assert session.frame("top").shape == (4, 6, 3)  # type: ignore[union-attr]
    episode = read_dataset(tmp_path / "s/episodes/episode_00000.hdf5", image_keys=["image.top"])[0]
    np.testing.assert_array_equal(np.asarray(episode.observations["image.top"][:])[:, 0, 0, 0], np.arange(6))
    np.testing.assert_allclose(episode.state[:, 2], np.arange(6))
    np.testing.assert_allclose(episode.actions[:2], [[0, 0], [0, 1]])


@pytest.mark.parametrize("seconds", [0.0, 0.04], ids=["waiting", "stepping"])
def test_a_stop_ends_the_episode_within_one_control_step(tmp_path: Path, attended: None, seconds: float) -> None:
    """Whether the robot is being waited for, or the next tick is."""
    rate, pressed = 20.0, []
    env = Point(seconds)
    loop, session = loop_of(tmp_path / "s", env, 1, 1000, rate)

    def stop() -> None:
        while len(env.sent) < 5:
            time.sleep(0.001)
        time.sleep(0.02)
        pressed.append(time.monotonic())
        session.press("stop")

    Beside(session, ("reset", "start"), ("running", stop), ("label", "failure"))
    assert loop.run(tmp_path / "s", until(1))
    loop.close()
    (at,) = pressed
    assert len([when for when, _ in env.sent if when > at]) <= 1
    assert min(when for when in env.held if when > at) - at < 1.5 / rate  # half a step for a busy machine
    assert read_dataset(tmp_path / "s/episodes/episode_00000.hdf5")[0].dones[-1]  # type: ignore[index]


def test_a_stop_while_nothing_moves_pauses_and_another_one_ends(tmp_path: Path, attended: None) -> None:
    loop, session = loop_of(tmp_path / "s", Point())
    person = Beside(session, ("reset", "stop"), ("paused", "start"), ("reset", "stop"), ("paused", "stop"))
    assert not loop.run(tmp_path / "s", until(2))
    loop.close()
    person.thread.join(5)
    assert recorded(tmp_path / "s") == []


def test_the_watchdog_discards_the_episode_and_waits_for_a_person(tmp_path: Path, attended: None) -> None:
    env = Point(silent_from=3)
    loop, session = loop_of(tmp_path / "s", env, watchdog=0.2)

    def mend() -> None:
        env.answer.set()
        env.silent_from = None
        time.sleep(0.1)
        session.press("start")

    person = Beside(session, ("reset", "start"), ("paused", mend), ("reset", "start"), ("label", "success"))
    assert loop.run(tmp_path / "s", until(2))
    loop.close()
    person.thread.join(5)
    assert "0.2 s" in person.states[1]["error"]
    assert Labels(tmp_path / "s").current() == {0: "discard", 1: "success"}
    assert len(read_dataset(tmp_path / "s/episodes/episode_00000.hdf5")[0]) == 3
    with pytest.raises(InputError, match="no success"):
        read_rollouts_of(tmp_path / "s", successes=False)


def read_rollouts_of(folder: Path, successes: bool = True) -> Any:
    """A session's transitions for a policy of its shapes."""
    from postbc.data.transitions import TransitionConfig
    from postbc.training.rollouts import transition_batch

    policy = load_policy(save_policy(folder.parent / "policy", 3, 2, task=None, chunk=2))
    if not successes:
        labels = Labels(folder)
        for number in labels.current():
            if labels.current()[number] == "success":
                labels.set(number, "failure")
        return transition_batch(read_rollouts(folder, policy), policy, 0.9, TransitionConfig(success="zero-one"))
    return transition_batch(read_rollouts(folder, policy), policy, 0.9, TransitionConfig())


def test_a_robot_that_fails_is_tried_again_or_ends_the_run_where_nobody_is_there(tmp_path: Path, attended: None) -> None:
    env = Point(fails_at=2)
    loop, session = loop_of(tmp_path / "s", env)

    def mend() -> None:
        env.fails_at = None
        session.press("start")

    person = Beside(session, ("reset", "start"), ("paused", mend), ("reset", "start"), ("label", "success"))
    assert loop.run(tmp_path / "s", until(2))
    loop.close()
    person.thread.join(5)
    assert "cable is loose" in person.states[1]["error"]
    assert recorded(tmp_path / "s") == [0, 1]
    assert Labels(tmp_path / "s").current() == {0: "discard", 1: "success"}
    assert len(read_dataset(tmp_path / "s/episodes/episode_00000.hdf5")[0]) == 2  # what there was before it failed
    (tmp_path / "t").mkdir()
    for fails_at, kept in ((2, [0]), (0, [0])):  # before its first step is over there is no episode
        loop, _ = loop_of(tmp_path / "t", Point(fails_at=fails_at), 1, label="simulator", fast=True)
        with pytest.raises(InputError, match=r"(?s)cable is loose.*--resume"):
            loop.run(tmp_path / "t", until(2))
        loop.close()
        assert recorded(tmp_path / "t") == kept
    assert Labels(tmp_path / "t").current() == {0: "discard"}


def test_a_robot_that_cannot_be_told_to_hold_is_looked_at(tmp_path: Path, attended: None) -> None:
    class Loose(Point):
        broken = True

        def hold(self) -> None:
            if self.broken:
                raise OSError("no")

    env = Loose()
    loop, session = loop_of(tmp_path / "s", env, 1)

    def mend() -> None:
        env.broken = False
        session.press("start")

    person = Beside(session, ("reset", "start"), ("paused", mend), ("label", "success"))
    with pytest.warns(RuntimeWarning, match="could not be told"):
        assert loop.run(tmp_path / "s", until(1))
    loop.close()
    person.thread.join(5)
    assert "could not be told to hold" in person.states[1]["error"]
    (tmp_path / "t").mkdir()
    loop, _ = loop_of(tmp_path / "t", Loose(), 2, label="simulator", fast=True)
    with pytest.warns(RuntimeWarning), pytest.raises(InputError, match="could not be told to hold"):
        loop.run(tmp_path / "t", until(2))
    with pytest.warns(RuntimeWarning):
        loop.close()
    assert recorded(tmp_path / "t") == [0]


def test_a_label_given_elsewhere_is_heard_of(tmp_path: Path, attended: None) -> None:
    loop, session = loop_of(tmp_path / "s", Point(), 1)
    person = Beside(session, ("reset", "start"), ("label", lambda: Labels(tmp_path / "s").set(0, "failure", "Cleo")))
    assert loop.run(tmp_path / "s", until(1))
    loop.close()
    person.thread.join(5)
    assert [(d.label, d.by) for d in Labels(tmp_path / "s").history()] == [("failure", "Cleo")]


def test_a_label_of_an_episode_that_was_never_written_is_taken_back(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    Labels(tmp_path / "s").set(0, "discard", "watchdog")
    loop, _ = loop_of(tmp_path / "s", Point(), 1, label="later", automatic_resets=True, fast=True)
    assert loop.run(tmp_path / "s", until(1))
    loop.close()
    assert Labels(tmp_path / "s").current() == {}


def test_what_does_not_fit_is_refused_before_anything_moves(tmp_path: Path) -> None:
    class Wide(Counting):
        shapes = {"state": (4,)}  # noqa: RUF012

    robot, env = Robot("point", Point, 20, 5, simulated=True), Point()
    with pytest.raises(InputError, match="observation size"):
        Loop(robot, [Wide(2)], Control(), Person(), episodes=1)  # type: ignore[list-item]
    with open(os.devnull) as nothing, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", nothing)
        with pytest.raises(InputError, match=r"(?s)no keyboard.*--automatic-resets"):
            loop_of(tmp_path / "s", env, 1)
    assert env.sent == []
    assert env.held  # and it was let go


# -- the command
REACH = ["--robot", "gymnasium:reach:Reach-v0"]


def policy_of(folder: Path, seeds: tuple[int, ...] = (0,)) -> Path:
    for seed in seeds:
        save_policy(folder / f"seed_{seed}", 4, 2, task="Reach-v0", chunk=3, seed=seed)
    return folder


def test_unattended_rollouts_are_learnt_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = policy_of(tmp_path / "p", (0, 1))
    command = [
        "robot",
        "rollout",
        "--policy",
        str(policy),
        *REACH,
        "--fast",
        "--label",
        "simulator",
        "--output",
        str(tmp_path / "o"),
    ]
    assert cli.main([*command, "--episodes", "8"]) == 0
    assert "missed" in capsys.readouterr().out
    folder = tmp_path / "o/seed_0"
    first = [(folder / f"episodes/episode_{k:05}.hdf5").read_bytes() for k in range(8)]
    assert cli.main([*command, "--episodes", "10", "--resume"]) == 0
    assert recorded(folder) == list(range(10))
    assert [(folder / f"episodes/episode_{k:05}.hdf5").read_bytes() for k in range(8)] == first
    labels = Labels(folder).current()
    data = read_session(folder)
    assert data.environment["env_name"] == "gymnasium:reach:Reach-v0"
    for (number, label), episode in zip(labels.items(), data):
        said = read_dataset(folder / f"episodes/episode_{number:05}.hdf5")[0]
        assert (label == "success") == bool(said.rewards.any())  # type: ignore[union-attr]
        assert episode.rewards.tolist() == [0] * (len(episode) - 1) + [label == "success"]  # type: ignore[union-attr]
    assert len(set(labels.values())) == 2
    summary = read_summary(folder)
    assert (summary.episodes, summary.success) == (10, list(labels.values()).count("success"))
    timing = read_timings(folder, [0])[0]
    assert [t.step for t in timing] == list(range(len(timing)))
    assert np.diff([t.time for t in timing]) == pytest.approx(0.05)
    assert not any(t.missed for t in timing)
    learn = ["finetune", "best-of-n", "--policy", str(policy), "--rollouts", str(tmp_path / "o"), "--output", str(tmp_path / "n"),
             "--best-of-n.eval-episodes", "0", "--iql.steps", "5", "--iql.hidden", "8", "--iql.batch-size", "4"]  # fmt: skip
    assert cli.main(learn) == 0
    agent, _ = load_agent(tmp_path / "n/seed_1")
    assert agent.finetuner == "best-of-n"  # type: ignore[attr-defined]
    Labels(folder).set(3, None)
    assert cli.main([*learn[:-1], "5", "--output", str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err
    assert re.search(r"(?s)no label.*key: 3\n.*postbc robot label", error), error
    assert cli.main([*learn[:-1], "6", "--rollouts", str(folder / "episodes"), "--output", str(tmp_path / "e")]) == 2
    assert "without their labels" in capsys.readouterr().err
    before = session_digest_without(folder, 3)
    assert before != session_digest_without(folder, 4)
    assert len(read_session(folder)) == 8
    damaged = folder / "episodes/episode_00004.hdf5"  # it is discarded: nobody reads it
    damaged.write_bytes(damaged.read_bytes()[:900])
    assert len(read_session(folder)) == 8
    (folder / "episodes/episode_00006.hdf5").unlink()
    with pytest.raises(InputError, match=r"(?s)are not there.*key: 6\n.*\"discard\""):
        read_session(folder)
    with (folder / "labels.jsonl").open("a") as file:  # as the error says
        file.write('{"episode": 6, "label": "discard"}\n')
    assert len(read_session(folder)) == 7


def session_digest_without(folder: Path, number: int) -> str:
    Labels(folder).set(number, "discard")
    return session_digest(folder)


def test_wrong_labels_are_as_many_as_asked_for_and_the_same_again(tmp_path: Path) -> None:
    flipped: list[list[int]] = []
    for name, count in (("a", 40), ("b", 10)):
        config = RobotRollout(
            policy_of(tmp_path / "p"), REACH[1], tmp_path / name, episodes=count, horizon=2, control=Control(fast=True),
            person=Person(label="simulator", wrong_labels=0.3),
        )  # fmt: skip
        roll_out(config, 0)
        folder = tmp_path / name / "seed_0"
        said = {k: bool(read_dataset(folder / f"episodes/episode_{k:05}.hdf5")[0].rewards.any()) for k in range(count)}  # type: ignore[union-attr]
        flipped.append([k for k, label in Labels(folder).current().items() if (label == "success") != said[k]])
    assert [k for k in flipped[0] if k < 10] == flipped[1]
    assert 4 <= len(flipped[0]) <= 20  # 12 expected, 3 standard deviations


def test_images_are_learnt_from_too(tmp_path: Path) -> None:
    from postbc.agents.best_of_n import BestOfNConfig
    from postbc.agents.iql import IQLConfig
    from postbc.data.normalization import Normalization
    from postbc.policies.base import About, save_policy
    from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
    from postbc.policies.networks.encoders import EncoderConfig
    from postbc.seeding import make_generator

    config = DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2, encoder=EncoderConfig(keypoints=3, channels=(4,)))
    normalization = Normalization(np.zeros(0), np.zeros(0), -np.ones(2), np.ones(2))
    about = About(method="bc", seed=0, task="ReachPixels-v0")
    generator = make_generator(0, "policy/initialisation")
    policy = DiffusionPolicy(config, {"image.top": (3, 8, 8)}, 2, 2, normalization, generator, 2, about)
    (tmp_path / "p").mkdir()
    save_policy(tmp_path / "p/policy.safetensors", policy)
    command = RobotRollout(
        tmp_path / "p", "gymnasium:reach:ReachPixels-v0", tmp_path / "o", episodes=6, control=Control(fast=True),
        person=Person(label="simulator"),
    )  # fmt: skip
    roll_out(command, 0)
    loaded = load_policy(tmp_path / "p")
    data = read_rollouts(tmp_path / "o/seed_0", loaded)
    assert data.shapes == {"image.top": (3, 8, 8)}
    agent = finetune_best_of_n(
        loaded, None, tmp_path / "n", BestOfNConfig(samples=2, eval_episodes=0), IQLConfig(steps=4, hidden=(8,), batch_size=4),
        rollouts=tmp_path / "o/seed_0",
    )  # fmt: skip
    seen = {"image.top": torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8)}
    assert agent.act(seen, torch.Generator()).shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--wrong-labels", "0.1"], "Only the simulator's labels"),
        (["--label", "simulator", "--robot", "widowx"], "Only a simulated robot"),
        (["--label", "later", "--robot", "widowx"], "manipulator_gym is not installed"),
        (["--label", "simulator", "--fast", "--action-low", "0", "0", "0"], "one a dimension"),
        (["--label", "simulator", "--fast", "--seeds", "4"], "no policy of this seed"),
        (["--label", "simulator", "--fast", "--robot", "gymnasium:robots:RobotPoint-v0"], "does not belong|observation size"),
        (["--label", "simulator", "--robot", "gymnasium:robots:RobotArm-v0"], r"(?s)Only a simulated robot.*simulated"),
        (["--label", "later", "--fast", "--robot", "gymnasium:robots:RobotArm-v0"], r"(?s)Only a simulated robot.*simulated"),
        (["--label", "simulator", "--fast", "--rate-limit", "-1"], "rate limit is positive"),
        (["--label", "simulator", "--fast", "--samples", "2"], "Only a Best-of-N agent"),
        (["--label", "page", "--port", "99999"], "port"),
        (["--label", "page", "--host", "300.0.0.1"], "cannot listen"),
        (["--label", "page", "--token", "abc"], "token"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    policy = policy_of(tmp_path / "p")
    try:
        status = cli.main(["robot", "rollout", "--policy", str(policy), *REACH, "--output", str(tmp_path / "o"), *options])
    except SystemExit as refused:  # by the parser
        status = int(refused.code or 0)
    assert status == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "o").exists()  # so that the corrected command may be given


def test_a_session_at_the_terminals_keyboard(tmp_path: Path) -> None:
    """Real keys in a real terminal: start, failure, the label taken back, success, pause, end."""
    policy = policy_of(tmp_path / "p")
    master, slave = pty.openpty()
    command = ["-m", "postbc", "robot", "rollout", "--policy", str(policy), *REACH, "--output", str(tmp_path / "o"), "--episodes", "2",
               "--horizon", "4"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "COLUMNS": "200"}
    process = subprocess.Popen([sys.executable, *command], stdin=slave, stdout=slave, stderr=slave, env=env, close_fds=True)
    os.close(slave)
    text = ""

    def wait(words: str) -> None:
        nonlocal text
        end = time.monotonic() + 90
        while words not in text:
            assert time.monotonic() < end, text
            assert process.poll() is None or words in text, text
            if select.select([master], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    text += os.read(master, 4096).decode()
        text = text.split(words, 1)[1]

    try:
        said, asked, paused = "reset the scene", "did it succeed", "Paused"
        for words, key in ((said, "\n"), (asked, "f"), (said, "u"), (asked, "s"), (said, "q"), (paused, "q")):
            wait(words)
            os.write(master, key.encode())
        wait("Rollouts")
        while process.poll() is None:
            if select.select([master], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    os.read(master, 4096)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert [d.label for d in Labels(tmp_path / "o/seed_0").history()] == ["failure", None, "success"]
    assert recorded(tmp_path / "o/seed_0") == [0]


# -- the simulated robot
@pytest.mark.simulator
def test_the_story_on_the_simulated_robot(tmp_path: Path) -> None:
    """Its state; a person's labels stand in for successes that a policy of random weights does not have."""
    save_policy(tmp_path / "p/seed_0")
    out = ["--output", str(tmp_path / "o"), "--allow-version-mismatch"]
    play = [
        "robot",
        "rollout",
        "--policy",
        str(tmp_path / "p"),
        "--robot",
        "sim/Lift",
        "--horizon",
        "9",
        "--fast",
        "--episodes",
        "2",
    ]
    assert cli.main([*play, "--label", "simulator", *out]) == 0
    folder = tmp_path / "o/seed_0"
    data = read_dataset(folder / "episodes")
    assert data.state_keys == ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    assert (data.environment["env_name"], data.lengths.tolist()) == ("Lift", [9, 9])
    Labels(folder).set(1, "success")
    assert cli.main(["finetune", "best-of-n", "--policy", str(tmp_path / "p"), "--rollouts", str(tmp_path / "o"), "--output",
                     str(tmp_path / "n"), "--allow-version-mismatch", "--best-of-n.eval-episodes", "0", "--iql.steps", "3",
                     "--iql.hidden", "8", "--iql.batch-size", "4"]) == 0  # fmt: skip
    assert cli.main([*play, "--policy", str(tmp_path / "n"), "--label", "simulator", "--episodes", "1", "--output", str(tmp_path / "m"),
                     "--allow-version-mismatch"]) == 0  # fmt: skip


@pytest.mark.simulator
def test_the_simulated_robots_cameras_are_recorded_and_demonstrated(tmp_path: Path) -> None:
    from postbc.environments.robosuite import check
    from postbc.environments.robosuite.collect import collect

    try:
        check(images=True)
    except InputError:
        pytest.skip("no OpenGL")
    shown = collect("Lift", 1, ("better",), 0, num_envs=1, images=True, image_size=16).dataset
    robot, folder = rollout_robot("sim/Lift-pixels16"), tmp_path / "s"
    folder.mkdir()

    class Still(Counting):
        action_dim, shapes = 7, {"state": (9,), "image.agentview": (3, 16, 16)}

        def act(self, observation: Any, generator: torch.Generator) -> torch.Tensor:
            return torch.zeros(1, self.chunk, 7)

    agent: Any = Still(2)
    loop = Loop(robot, [agent], Control(fast=True), Person(label="simulator"), episodes=1, horizon=3)
    assert loop.run(folder, until(1))
    loop.close()
    recorded_too = read_dataset(folder / "episodes", image_keys=["image.agentview", "image.robot0_eye_in_hand"])
    assert shown.shapes == recorded_too.shapes  # what is demonstrated is what is played on
    assert np.asarray(recorded_too[0].observations["image.agentview"][:]).std() > 5


def rollout_robot(name: str) -> Robot:
    from postbc.environments.robot import find_robot

    return find_robot(name)


# -- kills
IGNORE = ("*/timing/*", "*/labels.jsonl:time", "*/session.json:timing")


def rolled(directory: Path) -> None:
    """Three episodes as a run that begins, or goes on."""
    policy = next(above / "p" for above in directory.parents if (above / "p").exists())
    config = RobotRollout(
        policy, REACH[1], directory, episodes=3, horizon=4, control=Control(fast=True),
        person=Person(label="simulator", wrong_labels=0.2), resume=True,
    )  # fmt: skip
    roll_out(config, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["moments", "operations"])
def test_kills_lose_the_running_episode_at_most(tmp_path: Path, how: str) -> None:
    policy_of(tmp_path / "p")
    in_a_process(__file__, tmp_path, how)


def test_a_robot_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROBOTS, "mine", lambda config: Robot("mine", Point, 20, 4, simulated=True))
    save_policy(tmp_path / "p/seed_0", 3, 2, task=None, chunk=2)
    config = RobotRollout(tmp_path / "p", "mine", tmp_path / "o", episodes=1, control=Control(fast=True, rate_limit=(0.1,)),
                          person=Person(label="simulator"))  # fmt: skip
    assert roll_out(config, 0).episodes == 1
    actions = read_dataset(tmp_path / "o/seed_0/episodes/episode_00000.hdf5")[0].actions
    assert (np.abs(np.diff(actions, axis=0, prepend=np.zeros((1, 2)))) <= 0.1 + 1e-6).all()


if __name__ == "__main__":
    import reach  # noqa: F401

    if sys.argv[2] == "moments":
        kill_and_resume(rolled, Path(sys.argv[1]), "robot", IGNORE)
    else:
        kill_at_every_operation(rolled, Path(sys.argv[1]) / "k", IGNORE, stride=9)
