"""Blind comparisons: whose turn it is, that claims are as rare as promised, the command, and kills."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kills import in_a_process, kill_at_every_operation
from made import save_policy
from postbc import cli
from postbc.errors import InputError
from postbc.robot.comparison import Comparison, Tournament, compare_agents
from postbc.robot.labels import Label, Labels
from postbc.robot.rollout import Control, Person
from postbc.schemas import read_json
from postbc.sequential import PairedTest
from postbc.stages.robot_compare import RobotCompare, compare
from postbc.statistics import mcnemar

REACH = "gymnasium:reach:Reach-v0"


def simulated(
    folder: Path, rates: tuple[float, ...], rounds: int, seed: int, level: float = 0.05, discard: float = 0.0
) -> Tournament:
    """A comparison whose agents succeed at these rates; its labels are kept in `tournament.labels`."""
    rng, labels = np.random.default_rng(seed), {}
    tournament: Any = Tournament(folder, len(rates), rounds, seed, 10**9, level)
    while (play := tournament.choose(len(labels), labels)) is not None:
        label: Label = "success" if rng.random() < rates[play.agent] else "failure"
        labels[len(labels)] = "discard" if rng.random() < discard else label
    tournament.labels = labels
    return tournament


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 1000), st.sampled_from([0.0, 0.3]))
def test_every_round_has_every_agent_once_on_the_same_scene(agents: int, rounds: int, seed: int, discard: float) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tournament: Any = simulated(Path(folder), (0.5,) * agents, rounds, seed, level=1e-9, discard=discard)
        kept = [t for t in tournament.turns.values() if tournament.labels[t.episode] != "discard"]
        assert Counter((t.round, t.agent) for t in kept) == Counter((r, a) for r in range(rounds) for a in range(agents))
        assert [t.round for t in sorted(kept, key=lambda t: t.episode)] == sorted(t.round for t in kept)
        for number in range(rounds):  # in the order that was drawn
            order = [t.agent for t in sorted(kept, key=lambda t: t.episode) if t.round == number]
            assert order == tournament.order(number)
        again: Any = Tournament(Path(folder), agents, rounds, seed, 10**9, 1e-9)  # from the file
        assert again.turns == tournament.turns
        assert again.choose(len(tournament.labels), tournament.labels) is None


def test_orders_are_balanced_and_not_predictable() -> None:
    tournament = Tournament(Path("nowhere"), 2, 400, 3, 10**9, 0.05)
    first = [tournament.order(r)[0] for r in range(400)]
    assert 160 < sum(first) < 240
    assert first != [Tournament(Path("nowhere"), 2, 400, 4, 10**9, 0.05).order(r)[0] for r in range(400)]


def test_it_stops_when_the_answer_is_clear_and_says_who(tmp_path: Path) -> None:
    tournament: Any = simulated(tmp_path, (0.1, 0.95, 0.2), 60, seed=1)
    found = compare_agents(tournament, tournament.labels, "r", ["a", "b", "c"])
    assert found.best == "B"
    assert found.rounds < 40
    assert {p.better for p in found.pairs if "B" in (p.first, p.second)} == {"B"}
    whole = tournament.complete(tournament.labels)
    a_b = next(p for p in found.pairs if (p.first, p.second) == ("A", "B"))
    assert (a_b.only_first, a_b.only_second) == (
        int((whole[:, 0] & ~whole[:, 1]).sum()),
        int((~whole[:, 0] & whole[:, 1]).sum()),
    )
    assert a_b.needed == 120  # 3 pairs, 2 sides, level 0.05
    assert mcnemar(whole[:, 0], whole[:, 1]) < 0.05


def test_equal_agents_are_told_apart_as_rarely_as_promised() -> None:
    """The bets behind it, without files: the level 0.2 shared by two sides, looked at after every round."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(120):
        test = PairedTest(0.0, 0.1)
        wrong += any(test.add(*pair) for pair in (rng.random((40, 2)) < 0.5).tolist())
    assert wrong / 120 <= 0.2 + 2 * np.sqrt(0.2 * 0.8 / 120)
    for margin in (-0.1, 1.0):
        with pytest.raises(InputError, match="margin"):
            PairedTest(margin)


def agents_of(folder: Path) -> list[Path]:
    return [save_policy(folder / name / "seed_0", 4, 2, task="Reach-v0", chunk=3, seed=0) for name in ("one", "two")]


def test_the_command_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path.parent) for path in agents_of(tmp_path)]
    command = ["robot", "compare", *paths, "--robot", REACH, "--fast", "--label", "simulator", "--output", str(tmp_path / "o")]
    assert cli.main([*command, "--episodes", "3"]) == 0
    assert "not known which is better" in capsys.readouterr().out
    found = read_json(tmp_path / "o/comparison.json", Comparison)
    assert (found.rounds, found.best, [row.episodes for row in found.agents]) == (3, None, [3, 3])
    assert found.pairs[0].difference == 0  # the same policy, on the same scenes (but for its noise)
    seeds = json.loads((tmp_path / "o/plays.json").read_text())["turns"]
    assert len(seeds) == 6
    page, text = (tmp_path / "o/report.html").read_text(), (tmp_path / "o/report.md").read_text()
    assert "it is not known which is better" in page
    assert "no camera" in text
    assert cli.main([*command, "--episodes", "4", "--resume"]) == 0  # some more
    assert read_json(tmp_path / "o/comparison.json", Comparison).rounds == 4
    assert cli.main([*command, "--episodes", "4"]) == 2
    for more, words in (
        (["--label", "later"], "needs labels"), (["--robot", "sim/Lifft"], "no such simulated robot"),
        (["--horizon", "0"], "horizon"),
    ):  # fmt: skip
        try:
            status = cli.main([*command, "--output", str(tmp_path / "x"), *more])
        except SystemExit as refused:
            status = int(refused.code or 0)
        assert status == 2
        assert words in " ".join(capsys.readouterr().err.split())
    save_policy(tmp_path / "one/seed_1", 4, 2, task="Reach-v0", seed=1)
    assert cli.main([*command, "--output", str(tmp_path / "x")]) == 2
    assert "several seeds" in capsys.readouterr().err


def test_videos_of_what_the_cameras_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    from postbc.environments.robot.registry import ROBOTS, Robot
    from robots import Point

    monkeypatch.setitem(ROBOTS, "point", lambda config: Robot("point", Point, 20, 4, simulated=True))
    paths = [save_policy(tmp_path / name, 3, 2, task=None, chunk=2, seed=0) for name in ("one", "two")]
    config = RobotCompare(
        tuple(paths), "point", tmp_path / "o", episodes=2, control=Control(fast=True), person=Person(label="simulator")
    )
    compare(config)
    films = sorted((tmp_path / "o/videos").iterdir())
    assert len(films) == 4
    assert {film.name[0] for film in films} == {"A", "B"}
    assert imageio.imread(films[0]).shape[0] == 4
    assert f"videos/{films[0].name}" in (tmp_path / "o/report.html").read_text()


def compared(directory: Path) -> None:
    """Two rounds as a run that begins, or goes on."""
    above = next(p for p in directory.parents if (p / "one").exists())
    config = RobotCompare(
        (above / "one", above / "two"), REACH, directory, episodes=2, horizon=3, control=Control(fast=True),
        person=Person(label="simulator", wrong_labels=0.3), resume=True,
    )  # fmt: skip
    compare(config)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_change_nothing(tmp_path: Path) -> None:
    agents_of(tmp_path)
    in_a_process(__file__, tmp_path)


def test_labels_that_are_taken_back_are_asked_for_again(tmp_path: Path) -> None:
    tournament = Tournament(tmp_path, 2, 3, 0, 10**9, 0.05)
    first = tournament.choose(0, {})
    labels: dict[int, Label] = {0: "success"}
    second = tournament.choose(1, labels)
    assert first is not None
    assert second is not None
    assert {first.agent, second.agent} == {0, 1}
    assert first.scene_seed == second.scene_seed == 10**9
    third = tournament.choose(2, {0: "discard", 1: "failure"})  # the first is played again, in its round
    assert third is not None
    assert (third.agent, third.scene_seed) == (first.agent, 10**9)
    assert Labels(tmp_path).current() == {}


if __name__ == "__main__":
    import reach  # noqa: F401

    kill_at_every_operation(compared, Path(sys.argv[1]) / "k", ("timing/*", "labels.jsonl:time"), stride=53)
