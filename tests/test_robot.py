"""Robots: time, limits, the watchdog, what is observed, the adapters of foreign interfaces, and the simulated one."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postbc.environments.robot import find_robot
from postbc.environments.robot.clock import RealClock, Ticks, VirtualClock
from postbc.environments.robot.images import resized
from postbc.environments.robot.lerobot import LeRobotConfig, LeRobotRobot
from postbc.environments.robot.manipulator_gym import ManipulatorConfig, ManipulatorRobot
from postbc.environments.robot.reading import History, RobotReader
from postbc.environments.robot.safety import ActionLimits, Stalled, WatchedRobot
from postbc.errors import InputError, NotFiniteError
from postbc.robot.keyboard import press as press_key
from postbc.robot.session import BUTTONS, Session
from robots import FakeClock, FakeLeRobot, FakeManipulator, Point

BOX = gymnasium.spaces.Box(-1, 1, (3,), np.float32)


# -- time
def test_actions_are_due_a_period_apart_and_after_a_late_one_a_period_after_it() -> None:
    clock = FakeClock()
    ticks, sent, late = Ticks(0.1, clock), [], []
    for working in (0.0, 0.005, 0.0, 0.25, 0.0, 0.0):  # seconds between being due and being sent
        ticks.wait()
        clock.time += working
        sent.append(clock.time)
        late.append(ticks.sent())
    assert sent == pytest.approx([0.0, 0.105, 0.2, 0.55, 0.65, 0.75])
    assert late == pytest.approx([0.0, 0.005, 0.0, 0.25, 0.0, 0.0])
    assert [ticks.missed(x) for x in late] == [False, False, False, True, False, False]


# -- limits
numbers = st.floats(-10, 10, allow_nan=False)


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=8), st.floats(0.01, 2), st.booleans())
def test_every_action_is_within_bounds_and_a_step_from_the_last(actions: list[list[float]], rate: float, known: bool) -> None:
    limits = ActionLimits(BOX, low=(-0.5,), high=(0.5, 0.25, 2.0), rate_limit=(rate,))
    last = np.zeros(3) if known else None
    limits.begin(last)
    for action in actions:
        safe, changed = limits.apply(np.array(action))
        assert (safe >= [-0.5, -0.5, -0.5]).all()
        assert (safe <= [0.5, 0.25, 1.0]).all()
        assert last is None or (np.abs(safe - last) <= rate + 1e-12).all()
        inside = np.clip(action, [-0.5] * 3, [0.5, 0.25, 1.0])
        if last is None or (np.abs(inside - last) <= rate).all():  # no more is taken than has to be
            np.testing.assert_allclose(safe, inside, atol=1e-9)
        np.testing.assert_array_equal(changed, np.abs(safe - action) > 1e-6 * (1 + np.abs(action)))
        last = safe


def test_what_no_limits_can_be_made_of() -> None:
    endless = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    with pytest.raises(InputError, match=r"(?s)need bounds.*\[0, 1\].*--action-low"):
        ActionLimits(endless)
    ActionLimits(endless, low=(-1.0,), high=(1.0, 2.0))
    with pytest.raises(InputError, match="one a dimension"):
        ActionLimits(BOX, low=(-1.0, -1.0))
    with pytest.raises(InputError, match="No action lies within"):
        ActionLimits(BOX, low=(0.5,), high=(0.2,))
    with pytest.raises(InputError, match="rate limit is positive"):
        ActionLimits(BOX, rate_limit=(0.0,))
    limits = ActionLimits(BOX)
    with pytest.raises(InputError, match="no action"):
        limits.begin(np.zeros(2))
    limits.begin(None)
    with pytest.raises(NotFiniteError, match="holds"):
        limits.apply(np.array([0, np.nan, 0]))


# -- the watchdog
def watched(env: Point, patience: float = 0.15) -> WatchedRobot:
    robot = WatchedRobot(lambda: env, "a point", RealClock(), patience)
    assert robot.reset(3) is not None
    return robot


def test_the_watchdog_holds_when_observations_stop() -> None:
    env = Point(silent_from=2)
    robot = watched(env)
    assert robot.step(np.zeros(2)).age == 0  # type: ignore[union-attr]
    robot.step(np.zeros(2))
    begin = time.monotonic()
    with pytest.raises(Stalled, match=r"0.15 s"):
        robot.step(np.ones(2))
    assert 0.14 < time.monotonic() - begin < 1.0
    assert len(env.held) == 1
    with pytest.raises(Stalled, match="has not answered"):  # nothing is sent meanwhile
        robot.step(np.ones(2))
    assert len(env.sent) == 3
    env.answer.set()
    time.sleep(0.1)
    env.silent_from = None
    assert robot.reset(4) is not None  # and it goes on
    assert robot.step(np.zeros(2)) is not None
    robot.close()


def test_old_observations_are_none() -> None:
    class Frozen(Point):
        def step(self, action: np.ndarray) -> Any:
            *rest, info = super().step(action)
            return *rest, info | {"observation_age": 0.1 * self.count}

    env = Frozen()
    robot = watched(env)
    assert robot.step(np.zeros(2)).age == pytest.approx(0.1)  # type: ignore[union-attr]
    with pytest.raises(Stalled, match=r"0.20 s old"):
        robot.step(np.zeros(2))
    assert env.held
    robot.close()


@pytest.mark.parametrize("age", [np.nan, -1.0, np.inf])
def test_an_age_that_is_none_is_old(age: float) -> None:
    class Ageless(Point):
        def step(self, action: np.ndarray) -> Any:
            *rest, info = super().step(action)
            return *rest, info | {"observation_age": age}

    robot = watched(Ageless())
    with pytest.raises(Stalled, match="newest observation"):
        robot.step(np.zeros(2))
    robot.close()


def test_a_stop_does_not_wait_for_the_robot() -> None:
    env, stop = Point(silent_from=0), threading.Event()
    robot = watched(env, patience=5.0)
    threading.Timer(0.1, stop.set).start()
    begin = time.monotonic()
    assert robot.step(np.ones(2), stop.is_set) is None
    assert time.monotonic() - begin < 1.0
    assert env.held
    env.answer.set()
    robot.close()


def test_what_the_robot_raises_names_it_and_a_hold_that_fails_is_a_warning() -> None:
    class Broken(Point):
        def hold(self) -> None:
            raise OSError("no")

    robot = watched(Broken(fails_at=0))
    with pytest.raises(InputError, match=r"(?s)has failed.*cable is loose.*a point"):
        robot.step(np.zeros(2))
    with pytest.warns(RuntimeWarning, match="could not be told to hold"):
        robot.close()


# -- what is observed
def test_vectors_are_put_together_in_the_order_of_the_agents_data() -> None:
    space, observation = Point().observation_space, {
        "at": np.array([1.0, 2.0]), "steps": np.array([3.0]), "image.top": np.zeros((4, 6, 3), np.uint8),
    }  # fmt: skip
    own, theirs = RobotReader(space), RobotReader(space, ("steps", "at"))
    assert (own.state_keys, own.state_dims, own.cameras) == (("at", "steps"), (2, 1), ("top",))
    assert own(observation)["state"].tolist() == [1, 2, 3]
    assert (theirs.state_keys, theirs.state_dims) == (("steps", "at"), (1, 2))
    assert theirs(observation)["state"].tolist() == [3, 1, 2]
    assert RobotReader(space, ("at",)).shapes == {"state": (2,), "image.top": (3, 4, 6)}
    assert RobotReader(space, ("state",)).state_keys == ("at", "steps")  # names that it does not have
    with pytest.raises(InputError, match="lacks"):
        theirs({"at": observation["at"]})
    with pytest.raises(InputError, match="not finite"):
        own({**observation, "steps": np.array([np.nan])})
    assert RobotReader(gymnasium.spaces.Box(-1, 1, (4,))).state_keys == ("state",)


def test_the_newest_few_observations_and_the_coordinates_of_the_episode() -> None:
    history = History({"state": (1,), "posterior": (2,)}, 3, episode_seed=5)
    first = history.add({"state": np.array([0.0]), "image.top": np.zeros(1)})
    assert first["state"].tolist() == [[[0], [0], [0]]]
    history.add({"state": np.array([1.0])})
    now = history.add({"state": np.array([2.0])})
    assert now["state"].tolist() == [[[0], [1], [2]]]
    from postbc.environments.coordinates import coordinates_of_episode

    np.testing.assert_array_equal(now["posterior"][0], np.tile(coordinates_of_episode(5, 2), (3, 1)))


def test_frames_are_resized_by_area() -> None:
    frame = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    expected = frame.reshape(2, 2, 2, 2, 3).mean((1, 3)).round()
    np.testing.assert_array_equal(resized(frame, 2), expected)
    np.testing.assert_array_equal(resized(frame, None), frame)
    with pytest.raises(InputError, match="no picture"):
        resized(np.zeros((4, 4)), 2)


# -- foreign interfaces
def test_the_widowx_is_moved_by_clipped_displacements_within_its_workspace() -> None:
    interface, clock = FakeManipulator(), FakeClock()
    config = ManipulatorConfig(rate=10.0, image_size=8, workspace=((0.1, -0.1, 0.05), (0.265, 0.1, 0.3)))
    env = ManipulatorRobot(config, interface, clock)
    np.testing.assert_allclose(env.action_space.low, [-0.02] * 6 + [0])  # type: ignore[attr-defined]
    np.testing.assert_allclose(env.action_space.high, [0.02] * 6 + [1])  # type: ignore[attr-defined]
    observation, info = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert observation["state"].tolist() == pytest.approx([0.25, 0, 0.2, 0, 1.5, 0, 0, 1])
    assert info["command"].tolist() == [0] * 6 + [1]
    observation, *_ = env.step(np.array([1.0, 0.01, -1, 0, 0.5, 0, 0.3]))
    assert interface.actions[-1].tolist() == pytest.approx([0.015, 0.01, -0.02, 0, 0.02, 0, 0.3])  # x stays in the workspace
    assert observation["state"][7] == pytest.approx(0.3)
    assert clock.time == pytest.approx(0.1)  # what is observed is observed a control step later
    env.step(np.zeros(7))
    assert clock.time == pytest.approx(0.2)
    interface.pose[0] = 0.5  # pushed out of the workspace: back by a step at most
    env.step(np.zeros(7))
    assert interface.actions[-1][0] == pytest.approx(-0.02)
    interface.step_action = lambda action: False  # type: ignore[method-assign]
    with pytest.raises(InputError, match="refused"):
        env.step(np.zeros(7))


def test_any_arm_that_lerobot_drives() -> None:
    robot, clock = FakeLeRobot(), FakeClock()
    config = LeRobotConfig({"type": "fake"}, rate=20.0, image_size=8, low=(-100.0, 0.0), high=(100.0,))
    env = LeRobotRobot(config, robot, clock)
    observation, info = env.reset()
    assert robot.is_connected
    assert env.observation_space.contains(observation)
    assert observation["observation.state"].tolist() == [10, 50]
    assert observation["image.front"].shape == (8, 8, 3)
    assert info["command"].tolist() == [10, 50]  # rate limits begin where it is
    env.step(np.array([12.0, 40.0], np.float32))
    assert robot.sent[-1] == {"shoulder.pos": 12.0, "gripper.pos": 40.0}
    assert clock.time == pytest.approx(0.05)
    robot.at = {"shoulder.pos": 11.0, "gripper.pos": 41.0}  # it has not got there yet
    env._observe()
    env.hold()
    assert robot.sent[-1] == {"shoulder.pos": 11.0, "gripper.pos": 41.0}
    with env._bus:  # the motors do not answer
        env.hold()
    assert len(robot.sent) == 2
    env.close()
    assert not robot.is_connected
    with pytest.raises(InputError, match="need bounds"):
        ActionLimits(LeRobotRobot(LeRobotConfig({"type": "fake"}), FakeLeRobot()).action_space)


def test_robots_by_name(tmp_path: Path) -> None:
    robot = find_robot("sim/Lift-pixels48")
    assert (robot.name, robot.rate, robot.simulated) == ("sim/Lift-pixels48", 20, True)
    for name, words in (
        ("sim/Lifft", "There is no such simulated robot"), ("sim/Lift48", "no such"), ("widow", "did you mean widowx"),
        ("lerobot", "which robot"), ("gymnasium:nothing:No-v0", "does not know"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            find_robot(name)
    options = tmp_path / "robot.yaml"
    options.write_text("rate: 5\ndisplacment: 1\n")
    with pytest.raises(InputError, match=r"(?s)robot.yaml.*displacment"):
        find_robot("widowx", options)
    options.write_text("rate: 5\n")
    found = find_robot("widowx", options)
    assert (found.rate, found.simulated, found.belonging().control_freq) == (5, False, 5)
    options.write_text("robot: {type: so101_follower, port: /dev/null}\nrate: 25\nlow: [-100]\nhigh: [100]\n")
    assert find_robot("lerobot", options).rate == 25
    for name in ("widowx", "lerobot"):
        with pytest.raises(InputError, match=r"(?s)is not installed.*pip install"):
            find_robot(name, None if name == "widowx" else options).check()


# -- the session
def test_buttons_mean_something_in_their_phases_only() -> None:
    for phase, buttons in BUTTONS.items():
        for button in ("start", "success", "failure", "discard", "stop", "undo"):
            session = Session(3)
            session.enter(phase, episode=1)  # type: ignore[arg-type]
            if button in buttons:
                session.press(button, "Ada", episode=1)  # type: ignore[arg-type]
                press = session.wait_for(button, timeout=0)  # type: ignore[arg-type]
                assert press is not None
                assert (press.button, press.by, press.episode) == (button, "Ada", 1)
                assert session.wait_for(button, timeout=0.01) is None  # type: ignore[arg-type]
            else:
                with pytest.raises(InputError, match=f"(?s)means nothing now.*{phase}"):
                    session.press(button)  # type: ignore[arg-type]


def test_a_decision_is_about_the_episode_that_was_meant_and_the_first_one_counts() -> None:
    session = Session(3)
    session.enter("label", episode=1)
    with pytest.raises(InputError, match="Another episode"):
        session.press("success", episode=0)
    session.press("success", "Ada", 1)
    with pytest.raises(InputError, match=r"(?s)came first.*success Ada"):
        session.press("failure", "Bob", 1)
    assert session.wait_for("success", "failure").by == "Ada"  # type: ignore[union-attr]
    session.enter("reset", episode=2)
    assert session.wait_for("success", timeout=0) is None
    assert json.dumps(session.state())


def test_a_stop_is_never_lost() -> None:
    session = Session(3)
    session.enter("reset", episode=0)
    session.press("start")
    session.press("stop", episode=7)  # whatever is meant
    session.press("stop")  # and as often as one likes
    assert session.stopped
    assert session.wait_for("start").button == "start"  # type: ignore[union-attr]
    session.enter("running")
    assert session.stopped  # it came after the start was pressed, and before the robot moved
    session.enter("label")
    assert not session.stopped
    waiting = threading.Timer(0.05, lambda: session.press("undo"))
    waiting.start()
    assert session.wait_for("success", "undo", timeout=5).button == "undo"  # type: ignore[union-attr]


def test_keys_are_buttons_and_any_key_stops() -> None:
    session = Session(1)
    session.enter("reset", episode=0)
    assert "means nothing" in str(press_key(session, "s"))
    assert "Enter" in str(press_key(session, "k"))
    assert press_key(session, "\n") is None
    assert session.wait_for("start") is not None
    session.enter("running")
    assert press_key(session, "k") is None
    assert session.stopped


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["reset", "running", "label", "paused"]), max_size=6), st.data())
def test_no_press_outlives_its_phase_but_a_stop_before_running(phases: list[Any], data: Any) -> None:
    session = Session(1)
    for phase in phases:
        session.enter(phase, episode=0)
        stopped = session.stopped
        assert not stopped or phase == "running"
        assert session.wait_for("start", "success", "failure", "discard", "undo", timeout=0) is None
        if data.draw(st.booleans()):
            session.press(data.draw(st.sampled_from(BUTTONS[phase])), episode=0)


# -- the simulated robot
@pytest.mark.simulator
def test_the_simulated_robot_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    options = tmp_path / "wrong.yaml"
    options.write_text("latency: 0.1\nsilent_from: 6\n")
    plain, wrong = find_robot("sim/Lift").make(), find_robot("sim/Lift", options).make()
    first, info = plain.reset(seed=5)
    assert plain.observation_space.contains(first)
    assert list(first) == ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"]
    assert info["command"].tolist() == [0] * 7
    wrong.reset(seed=5)
    seen, rng = [first], np.random.default_rng(0)
    for k in range(1, 8):
        action = rng.uniform(-1, 1, 7).astype(np.float32)
        observation, _, _, _, info = plain.step(action)
        seen.append(observation)
        late, _, terminated, _, about = wrong.step(action)
        assert not terminated
        old = min(k, 2) if k < 6 else 2 + (k - 5)
        assert about["observation_age"] == pytest.approx(old / 20)
        assert info["observation_age"] == 0
        for name, values in late.items():
            np.testing.assert_array_equal(values, seen[max(0, k - 2) if k < 6 else 3][name])
    again, _ = plain.reset(seed=5)
    np.testing.assert_array_equal(again["object"], first["object"])
    plain.close()
    wrong.close()


@pytest.mark.simulator
def test_the_simulated_robots_cameras_and_lost_frames(tmp_path: Path) -> None:
    options = tmp_path / "wrong.yaml"
    options.write_text("dropped_frames: 1.0\nimage_size: 16\n")
    robot = find_robot("sim/Lift-pixels", options)
    try:
        robot.check()
    except InputError:
        pytest.skip("no OpenGL")
    env = WatchedRobot(robot.make, robot.name, VirtualClock())
    begun = env.reset(1)
    assert begun is not None
    first = begun[0]
    assert first["image.robot0_eye_in_hand"].shape == (3, 16, 16)
    assert "object" not in first
    found = env.step(np.full(7, 0.5))
    assert found is not None
    np.testing.assert_array_equal(found.observation["image.agentview"], first["image.agentview"])  # its frame was lost
    assert (found.observation["robot0_eef_pos"] != first["robot0_eef_pos"]).any()
    assert found.age == pytest.approx(0.05)
    env.close()
