"""Scripted operators: deterministic, of different styles, successful in the simulator, and those of the first house bit for bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from postbc import cli
from postbc.data import Dataset, read_robomimic, write_robomimic
from postbc.data.inspect import summarise
from postbc.data.scripted.hands import GEOMETRIES, WRIST, ScriptedOperators
from postbc.data.scripted.operators import OPERATORS, find_operators
from postbc.errors import InputError
from postbc.seeding import EVALUATION_SEED

#: SHA-256 of the commands of the first house's hands in `test_the_first_houses_hands`.
HANDS = "e336976a5ec429cf31f724b6100812bd7a7732ccc684762317ce138dfbdc4c3a"

#: Everybody but the proficient.
MULTI_HUMAN = ("better", "okay", "worse")


def observation(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 19) like Lift's: the hand above a cube, pointing down."""
    x = np.zeros((n, 19), dtype=np.float32)
    x[:, :3] = rng.uniform([-0.1, -0.1, 0.9], [0.1, 0.1, 1.1], (n, 3))
    x[:, 3:7] = [1, 0, 0, 0]
    x[:, 9:12] = rng.uniform([-0.03, -0.03, 0.82], [0.03, 0.03, 0.84], (n, 3))
    angle = rng.uniform(-np.pi, np.pi, n)
    x[:, 14], x[:, 15] = np.sin(angle / 2), np.cos(angle / 2)
    return x


def test_the_first_houses_hands() -> None:
    """Six people at both tasks, 60 steps, the hand following its commands. Rounded: SciPy's rotations differ in the last bits.

    They gripped every can alike.
    """
    digest = hashlib.sha256()
    for task in ("Lift", "Can"):
        hands = ScriptedOperators(task, 6, 60)
        for i, operator in enumerate(find_operators(MULTI_HUMAN)):
            hands.begin(i, replace(operator, turn=(0.0, 0.0), depth=(0.0, 0.0)), [3, i, 0, 1])
        x = observation(np.random.default_rng(1), 6)
        for _ in range(60):
            commands = hands.act(x)
            x[:, :3] += 0.05 * np.round(commands[:, :3], 4)
            digest.update(np.round(commands, 4).tobytes())
    assert digest.hexdigest() == HANDS


@settings(deadline=None)  # the simulator is imported in the first
@given(st.lists(st.booleans(), min_size=30, max_size=30), st.integers(1, 20), st.integers(0, 5))
def test_an_episode_is_over_when_it_stays_solved_or_out_of_time(solved: list[bool], horizon: int, tail: int) -> None:
    pytest.importorskip("robosuite")
    from postbc.environments.robosuite.collect import is_over

    last = next((n for n in range(1, 31) if is_over(solved[:n], horizon, tail)), None)
    assert last is not None
    assert last <= horizon + tail
    stays = all(solved[last - tail - 1 : last]) and last > tail
    assert stays or (last >= horizon and not solved[last - 1])  # nothing else ends it
    before = range(tail + 1, last)
    assert not any(all(solved[n - tail - 1 : n]) for n in before)  # and it is ended as soon as that
    assert not any(n >= horizon and not solved[n - 1] for n in range(1, last))


def test_hands_do_not_depend_on_their_neighbours() -> None:
    """One episode alone gives the same commands as beside others, in another place, after an earlier episode there."""
    rng = np.random.default_rng(0)
    seen = [observation(rng, 3) for _ in range(40)]
    together, alone = ScriptedOperators("Lift", 3, 50), ScriptedOperators("Lift", 1, 50)
    for i, name in enumerate(["operator_a", "operator_f", "operator_e"]):
        together.begin(i, OPERATORS[name], [7, i])
    for x in seen[:10]:
        together.act(x)
    together.begin(2, OPERATORS["operator_b"], 99)
    alone.begin(0, OPERATORS["operator_b"], 99)
    for x in seen:
        a = together.act(x)
        assert a.shape == (3, 7)
        assert a.dtype == np.float32
        assert np.abs(a).max() <= 1
        np.testing.assert_array_equal(a[2], alone.act(x[2:])[0])


@given(st.floats(-np.pi, np.pi), st.sampled_from(sorted(OPERATORS)), st.integers(0, 99))
def test_a_nut_is_held_across_its_handle_and_placed_where_the_arm_reaches(angle: float, name: str, seed: int) -> None:
    """However it lies: the gripper closes across the handle, turns within the wrist's limits, and ends square to the peg."""
    hands, x = ScriptedOperators("Square", 1, 5), observation(np.random.default_rng(seed), 1)
    x[0, 14:16] = np.sin(angle / 2), np.cos(angle / 2)
    hands.begin(0, OPERATORS[name], seed)
    hands.act(x)
    grasp, place = (
        hands.yaw[0],
        hands.place_yaw[0],
    )  # the hand begins at yaw 0, where it closes along y, across a handle along x
    assert np.sin(grasp - angle) == pytest.approx(0, abs=1e-5)
    assert np.sin(2 * place) == pytest.approx(0, abs=1e-5)
    assert np.cos(place) < 0.5  # with the handle towards the far side the arm would not reach
    assert max(abs(grasp), abs(grasp + place - angle)) <= WRIST


def test_seeds_and_people_differ() -> None:
    x = observation(np.random.default_rng(0), 1)

    def first_commands(name: str, seed: int) -> bytes:
        hands = ScriptedOperators("Lift", 1, 30)
        hands.begin(0, OPERATORS[name], seed)
        return np.stack([hands.act(x) for _ in range(5)]).tobytes()

    assert first_commands("operator_a", 1) == first_commands("operator_a", 1)
    assert len({first_commands(name, seed) for name in OPERATORS for seed in range(3)}) == 24


def test_the_side_and_the_face_are_what_the_hand_does() -> None:
    """From above a cube that stands at 0.6 rad: to which side the hand swerves, and to which of the two pairs of faces it turns."""
    seen = set()
    for seed in range(20):
        hands, x = ScriptedOperators("Lift", 1, 60), observation(np.random.default_rng(0), 1)
        x[0, :3], x[0, 9:12], x[0, 14:16] = (0, 0, 1), (0, 0, 0.83), (np.sin(0.3), np.cos(0.3))
        hands.begin(0, OPERATORS["operator_d"], seed)
        ways = []
        for _ in range(30):
            x[:, :3] += 0.05 * hands.act(x)[:, :3]
            ways.append(x[0, 1])
        habits = hands.habits(0)
        assert habits["side"] == ("left" if ways[np.abs(ways).argmax()] > 0 else "right")
        turned = {0.6: "nearest", round(0.6 - np.pi / 2, 4): "other", 0.0: "none"}
        assert habits["face"] == turned[round(float(hands.yaw[0]), 4)]
        seen |= {habits["side"], habits["face"]}
    assert seen == {"left", "right", "nearest", "other", "none"}


def test_a_can_is_gripped_at_each_persons_yaw_and_height() -> None:
    """It is round and tall: by which yaw and at what height is a matter of taste; the proficient have none."""
    turns: dict[str, list[float]] = {}
    for operator in OPERATORS.values():
        for seed in range(20):
            hands, x = ScriptedOperators("Can", 1, 60), observation(np.random.default_rng(0), 1)
            x[0, :7], x[0, 9:12] = (0, 0, 1, 1, 0, 0, 0), (0, 0, 0.86)
            hands.begin(0, operator, seed)
            hands.act(x)
            habits = hands.habits(0)
            assert habits["turn"] == hands.yaw[0] == pytest.approx(operator.turn[0], abs=4 * operator.turn[1])
            spread = 4 * np.hypot(operator.depth[1], 0.7 * operator.precision)
            height = GEOMETRIES["Can"].grasp_height + operator.depth[0] + 0.012 * hands.fumbles[0]
            assert habits["grasp_height"] == pytest.approx(height, abs=spread)
            assert "face" not in habits
            turns.setdefault(operator.quality, []).append(float(hands.yaw[0]))
    assert np.ptp(turns["proficient"]) == 0
    assert all(np.std(turns[quality]) > 0.1 for quality in ("better", "okay", "worse"))


def test_finding_operators() -> None:
    assert [o.name for o in find_operators(["worse", "operator_a", "operator_e"])] == ["operator_a", "operator_e", "operator_f"]
    assert len(find_operators(["all"])) == len(OPERATORS) == 8
    assert sorted(o.quality for o in OPERATORS.values()) == [q for q in ("better", "okay", "proficient", "worse") for _ in "12"]
    for bad in ([], ["operator_q"]):
        with pytest.raises(InputError):
            find_operators(bad)
    with pytest.raises(InputError, match="knows this task"):
        ScriptedOperators("Door", 1, 10)


@pytest.mark.simulator
class TestCollected:
    """Seven demonstrations of Lift in the simulator."""

    @pytest.fixture(scope="class")
    def collection(self):  # type: ignore[no-untyped-def]
        pytest.importorskip("robosuite")
        from postbc.environments.robosuite.collect import collect

        return collect("Lift", num=7, operators=MULTI_HUMAN, seed=3, num_envs=7)

    def test_what_is_collected(self, collection) -> None:  # type: ignore[no-untyped-def]
        dataset: Dataset = collection.dataset
        assert dataset.lengths.tolist() == [54, 83, 58, 110, 167, 115, 47]  # the first house's
        assert dataset.state_dims == (3, 4, 2, 10)
        assert dataset.environment["env_name"] == "Lift"
        assert dataset.filters["operator_a"] == ("demo_0", "demo_6")  # people take turns
        assert dataset.filters["better"] == ("demo_0", "demo_1", "demo_6")
        assert {n: kept for n, (kept, _) in collection.attempts.items()} == {
            o.name: 2 if o.name == "operator_a" else 1 for o in find_operators(MULTI_HUMAN)
        }
        assert set(collection.model_xml) == set(dataset.names)
        for episode in dataset:
            assert episode.rewards is not None
            assert episode.rewards[-1] == 1
            assert 5 <= episode.rewards.sum() <= 6  # the tail after the first success
            assert len(episode) <= GEOMETRIES["Lift"].patience + 5
            assert episode.states is not None
            assert episode.states.shape == (len(episode), 32)
            np.testing.assert_allclose(episode.states[:, 10:13], episode.state[:, 9:12], atol=2e-3)  # the cube's position
            assert set(np.unique(episode.actions[:, 6])) == {-1, 1}
            assert episode.episode_seed is not None
            assert episode.episode_seed < EVALUATION_SEED
        summary = summarise(dataset)
        assert not any(d.narrow for d in (*summary.observations, *summary.actions))
        assert summary.total.solved == 1

    def test_habits_are_labelled_as_they_were_played(self, collection, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        """Words are filters, numbers attributes; read from the recorded motions again."""
        dataset, seen = collection.dataset, set()
        path = write_robomimic(tmp_path / "d.hdf5", dataset, attributes=collection.habits)
        again = read_robomimic(path)
        for episode in dataset:
            words = dict(key.split("=") for key, names in again.filters.items() if "=" in key and episode.name in names)
            assert sorted(words) == ["face", "fumble", "pause", "regrasp", "side"]
            with h5py.File(path) as file:
                numbers = {key: file[f"data/{episode.name}"].attrs[key] for key in collection.habits[episode.name]}
            closed = episode.actions[:, 6] > 0
            closings = np.flatnonzero(closed & ~np.append(False, closed[:-1]))
            assert numbers["grasps"] == len(closings)
            assert words["regrasp"] == ("yes" if len(closings) > 1 else "no")
            if words["fumble"] == "yes":  # it was aimed 3.5 cm beside the cube, or more
                at = episode.state[closings[0]]
                assert np.linalg.norm(at[:2] - at[9:11]) > 0.025
            operator = OPERATORS[episode.operator]
            assert 0.85 <= numbers["speed"] / operator.speed <= 1.1
            assert words["pause"] == ("yes" if numbers["pause_steps"] else "no")
            assert numbers["pause_steps"] < len(episode)
            assert (words["side"] == "straight") == (operator.side == 0)
            aside = episode.state[: closings[0], 1] - episode.state[: closings[0], 10]  # y points to the left
            if words["side"] != "straight":
                assert (aside[np.abs(aside).argmax()] > 0) == (words["side"] == "left")
            at = episode.state[closings[0]]
            hand = Rotation.from_quat(at[3:7]) * Rotation.from_rotvec([-np.pi, 0, 0])
            turned = (hand.as_euler("ZYX")[0] - Rotation.from_quat(at[12:16]).as_euler("ZYX")[0]) % (np.pi / 2)
            assert (min(turned, np.pi / 2 - turned) < 0.15) == (words["face"] != "none")
            seen |= {f"{key}={value}" for key, value in words.items()}
        assert {"face=nearest", "face=none", "side=left", "side=straight", "fumble=yes", "regrasp=yes", "pause=yes"} <= seen
        assert again.select("side=straight").names == tuple(e.name for e in dataset if OPERATORS[e.operator].side == 0)
        summary = summarise(again)
        assert not any("=" in group.name for group in summary.filters)
        assert sum(summary.habits["side"].values()) == len(dataset)

    def test_number_of_environments_does_not_matter(self, collection, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        from postbc.environments.robosuite.collect import collect

        again = collect("Lift", num=7, operators=MULTI_HUMAN, seed=3, num_envs=3)
        assert again.attempts == collection.attempts
        assert again.model_xml == collection.model_xml
        one, two = (
            write_robomimic(tmp_path / f"{i}.hdf5", c.dataset, model_xml=c.model_xml, attributes=c.habits)
            for i, c in enumerate([again, collection])
        )
        assert one.read_bytes() == two.read_bytes()

    def test_operators_alone_record_the_same(self, collection) -> None:  # type: ignore[no-untyped-def]
        """An operator's demonstrations do not depend on who else takes part; another seed gives others."""
        from postbc.environments.robosuite.collect import collect

        alone = collect("Lift", num=2, operators=["operator_a"], seed=3, num_envs=2).dataset
        for a, b in zip(alone, collection.dataset.select("operator_a")):
            np.testing.assert_array_equal(a.actions, b.actions)
        other = collect("Lift", num=1, operators=["operator_a"], seed=4, num_envs=1).dataset
        assert not np.array_equal(other[0].states[0], alone[0].states[0])  # type: ignore[index]


@pytest.mark.simulator
def test_hopeless_operator() -> None:
    pytest.importorskip("robosuite")
    from postbc.environments.robosuite.collect import collect

    with pytest.raises(InputError, match="hardly ever succeeds"):
        collect("Lift", num=1, operators=["operator_a"], horizon=3, num_envs=1)


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize(("task", "proficient"), [("Lift", 48), ("Can", 116), ("Square", 151)])
def test_the_proficient_are_as_quick_as_people(task: str, proficient: int) -> None:
    """Within a third of the mean length of robomimic's PH sets, and nobody misses."""
    pytest.importorskip("robosuite")
    from postbc.environments.robosuite.collect import collect

    collection = collect(task, num=4, operators=["proficient"], seed=1, num_envs=4)
    dataset = collection.dataset
    assert dataset.state_dims == (3, 4, 2, {"Lift": 10, "Can": 14, "Square": 14}[task])
    assert {key for key in dataset.filters if "=" not in key} == {"operator_g", "operator_h", "proficient"}
    assert 0.67 < dataset.lengths.mean() / proficient < 1.33
    assert all(kept == tried for kept, tried in collection.attempts.values())
    assert all(episode.rewards is not None and episode.rewards[-1] == 1 for episode in dataset)


@pytest.mark.simulator
def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("robosuite")
    path = tmp_path / "lift.hdf5"
    assert cli.main(["demos", "collect", "--output", str(path), "--num", "2", "--operators", "operator_a", "operator_b"]) == 0
    out = capsys.readouterr().out
    assert "operator_a" in out
    assert "Written" in out
    with h5py.File(path) as file:
        assert "<mujoco" in file["data/demo_0"].attrs["model_file"]
    assert cli.main(["demos", "inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "Habits (filters, as side=left): face nearest" in out
    for word in ("2 demonstrations", "operator_b", "robot0_eef_pos[0]", "gripper", "lift.png", "simulator 1.4"):
        assert word in out
    assert (tmp_path / "lift.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["demos", "inspect", str(path)]) == 0
    assert "lift-2.png" in capsys.readouterr().out
    assert cli.main(["demos", "replay", str(path), "--num", "1"]) == 0
    assert "1 of 1 succeeded: 1.000 (95 % Wilson interval" in capsys.readouterr().out
    assert isinstance(read_robomimic(path), Dataset)
