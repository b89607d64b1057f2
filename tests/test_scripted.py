"""Scripted operators, recorded and replayed: deterministic, of different styles, and successful in the simulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from postbc import cli
from postbc.demonstrations import Demonstrations, read_robomimic, write_robomimic
from postbc.demonstrations.collect import Collection, collect
from postbc.demonstrations.inspect import summarise
from postbc.demonstrations.operators import OPERATORS, find_operators
from postbc.demonstrations.replay import replay
from postbc.demonstrations.scripted import GEOMETRIES, ScriptedOperators
from postbc.errors import InputError


def observation(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 19) like Lift's: the hand above a cube, pointing down."""
    x = np.zeros((n, 19), dtype=np.float32)
    x[:, :3] = rng.uniform([-0.1, -0.1, 0.9], [0.1, 0.1, 1.1], (n, 3))
    x[:, 3:7] = [1, 0, 0, 0]
    x[:, 9:12] = rng.uniform([-0.03, -0.03, 0.82], [0.03, 0.03, 0.84], (n, 3))
    angle = rng.uniform(-np.pi, np.pi, n)
    x[:, 14], x[:, 15] = np.sin(angle / 2), np.cos(angle / 2)
    return x


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


def test_seeds_and_people_differ() -> None:
    x = observation(np.random.default_rng(0), 1)

    def first_commands(name: str, seed: int) -> bytes:
        hands = ScriptedOperators("Lift", 1, 30)
        hands.begin(0, OPERATORS[name], seed)
        return np.stack([hands.act(x) for _ in range(5)]).tobytes()

    assert first_commands("operator_a", 1) == first_commands("operator_a", 1)
    assert len({first_commands(name, seed) for name in OPERATORS for seed in range(3)}) == 18


def test_finding_operators() -> None:
    assert [o.name for o in find_operators(["worse", "operator_a", "operator_e"])] == ["operator_a", "operator_e", "operator_f"]
    assert len(find_operators(["all"])) == len(OPERATORS) == 6
    assert sorted(o.quality for o in OPERATORS.values()) == ["better"] * 2 + ["okay"] * 2 + ["worse"] * 2
    for bad in ([], ["operator_q"]):
        with pytest.raises(InputError):
            find_operators(bad)
    with pytest.raises(InputError, match="knows this task"):
        ScriptedOperators("Square", 1, 10)


@pytest.fixture(scope="module")
def collection() -> Collection:
    pytest.importorskip("robosuite")
    return collect("Lift", num=7, seed=3, num_envs=7)


@pytest.mark.simulator
def test_what_is_collected(collection: Collection) -> None:
    demonstrations = collection.demonstrations
    assert len(demonstrations) == 7
    assert demonstrations.observation_dims == (3, 4, 2, 10)
    assert demonstrations.environment["env_name"] == "Lift"
    assert demonstrations.filters["operator_a"] == ("demo_0", "demo_6")  # people take turns
    assert demonstrations.filters["better"] == ("demo_0", "demo_1", "demo_6")
    assert {name: kept for name, (kept, _) in collection.attempts.items()} == {
        n: 2 if n == "operator_a" else 1 for n in OPERATORS
    }
    assert set(collection.model_xml) == set(demonstrations.names)
    for trajectory in demonstrations:
        assert trajectory.rewards[-1] == 1
        assert 5 <= trajectory.rewards.sum() <= 6  # the tail after the first success
        assert len(trajectory) <= GEOMETRIES["Lift"].patience + 5
        assert trajectory.states is not None
        assert trajectory.states.shape == (len(trajectory), 32)
        np.testing.assert_allclose(
            trajectory.states[:, 10:13], trajectory.observations[:, 9:12], atol=2e-3
        )  # the cube's position
        assert set(np.unique(trajectory.actions[:, 6])) == {-1, 1}
    narrow = [d.name for d in (*summarise(demonstrations).observations, *summarise(demonstrations).actions) if d.narrow]
    assert narrow == []


@pytest.mark.simulator
def test_number_of_environments_does_not_matter(collection: Collection, tmp_path: Path) -> None:
    again = collect("Lift", num=7, seed=3, num_envs=3)
    assert again.attempts == collection.attempts
    assert again.model_xml == collection.model_xml
    files = [
        write_robomimic(tmp_path / f"{i}.hdf5", c.demonstrations, model_xml=c.model_xml)
        for i, c in enumerate([again, collection])
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    for a, b in zip(again.demonstrations, collection.demonstrations):
        for key in ("observations", "actions", "rewards", "states"):
            np.testing.assert_array_equal(getattr(a, key), getattr(b, key))


@pytest.mark.simulator
def test_operators_alone_record_the_same(collection: Collection) -> None:
    """An operator's demonstrations do not depend on who else takes part; another seed gives others."""
    alone = collect("Lift", num=2, operators=["operator_a"], seed=3, num_envs=2).demonstrations
    among = collection.demonstrations.select("operator_a")
    for a, b in zip(alone, among):
        np.testing.assert_array_equal(a.actions, b.actions)
    other = collect("Lift", num=1, operators=["operator_a"], seed=4, num_envs=1).demonstrations
    assert not np.array_equal(other[0].states[0], alone[0].states[0])  # type: ignore[index]


@pytest.mark.simulator
def test_replay_native_and_not(collection: Collection) -> None:
    demonstrations = collection.demonstrations
    native = replay(demonstrations, num_envs=4)
    assert native.successes.all()
    assert native.drift.max() == 0  # every action is what was executed, every state what it was executed in
    assert native.first_success.tolist() == [int(np.argmax(t.rewards > 0)) for t in demonstrations]
    forgotten = replace(demonstrations, trajectories=tuple(replace(t, episode_seed=None) for t in demonstrations))
    assert replay(forgotten, num_envs=7).successes.sum() >= 5  # with another cube, 2 mm larger or smaller at most
    one = demonstrations.subset(1, 0)
    python = replay(one, native=False)
    assert python.names == one.names
    assert python.successes.all()
    assert python.drift.max() < 2e-3


@pytest.mark.simulator
def test_replay_refuses_another_controller(collection: Collection) -> None:
    """Absolute commands would be other movements: said, not silently played."""
    environment = {**collection.demonstrations.environment}
    controller = {**environment["env_kwargs"]["controller_configs"], "control_delta": False}
    environment["env_kwargs"] = {**environment["env_kwargs"], "controller_configs": controller}
    with pytest.raises(InputError, match="control_delta"):
        replay(replace(collection.demonstrations.subset(1, 0), environment=environment))


@pytest.mark.simulator
def test_hopeless_operator() -> None:
    pytest.importorskip("robosuite")
    with pytest.raises(InputError, match="hardly ever succeeds"):
        collect("Lift", num=1, operators=["operator_a"], horizon=3, num_envs=1)


@pytest.mark.simulator
@pytest.mark.slow
def test_can() -> None:
    pytest.importorskip("robosuite")
    demonstrations = collect("Can", num=1, operators=["operator_a"]).demonstrations
    assert demonstrations.observation_dims == (3, 4, 2, 14)
    assert demonstrations[0].rewards[-1] == 1


@pytest.mark.simulator
def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("robosuite")
    for name in ("Collect", "Inspect", "Replay"):
        monkeypatch.setitem(cli.COMMANDS, f"demos {name.lower()}", (f"postbc.demonstrations.commands:{name}", ""))
    path = tmp_path / "lift.hdf5"
    assert cli.main(["demos", "collect", "--output", str(path), "--num", "2", "--operators", "operator_a", "operator_b"]) == 0
    out = capsys.readouterr().out
    assert "operator_a" in out
    assert "Written" in out
    with h5py.File(path) as file:
        assert "<mujoco" in file["data/demo_0"].attrs["model_file"]
    assert cli.main(["demos", "inspect", str(path)]) == 0
    out = capsys.readouterr().out
    for word in ("2 demonstrations", "operator_b", "robot0_eef_pos[0]", "gripper", "lift.png", "robosuite 1.4"):
        assert word in out
    assert (tmp_path / "lift.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["demos", "replay", str(path), "--num", "1"]) == 0
    assert "1 of 1 succeeded: 1.000 (95 % Wilson interval" in capsys.readouterr().out
    assert isinstance(read_robomimic(path), Demonstrations)
