"""The sequential test: its level holds whenever one looks, it ends soon where the difference is large; the command, and resuming it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

import postbc.stages.no_regression as module
from made import save_policy
from postbc import cli
from postbc.errors import InputError
from postbc.schemas import read_json
from postbc.sequential import BETS, PairedTest
from postbc.stages.no_regression import NoRegression, Verdict, play_pairs


def simulate(candidate, reference, rng, margin=0.1, level=0.1, most=400):
    """Decision and pairs of one run; successes independent of each other."""
    test = PairedTest(margin, level)
    outcomes = rng.random((most, 2)) < (candidate, reference)
    decision = next((d for pair in outcomes.tolist() if (d := test.add(*pair)) is not None), None)
    return decision, test.pairs


@pytest.mark.parametrize(("rates", "wrong"), [((0.4, 0.5), "not worse"), ((0.4, 0.5), "worse"), ((0.85, 0.95), "not worse")])
def test_the_level_holds_at_the_margin_though_one_looks_after_every_pair(rates, wrong):
    rng = np.random.default_rng(0)
    said = [simulate(*rates, rng)[0] == wrong for _ in range(300)]
    assert np.mean(said) <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / 300)


def test_it_ends_soon_where_the_answer_is_clear():
    rng = np.random.default_rng(1)
    for rates, answer, median in (((0.9, 0.5), "not worse", 40), ((0.3, 0.7), "worse", 50), ((0.5, 0.5), "not worse", 350)):
        found = [simulate(*rates, rng, most=2000) for _ in range(60)]
        assert np.mean([decision == answer for decision, _ in found]) > 0.9
        assert np.median([pairs for _, pairs in found]) < median


def test_by_default_most_equal_policies_are_told():
    """At half of the episodes solved and independently, where it takes longest (a thousand pairs leave two thirds open)."""
    rng, of = np.random.default_rng(2), {field.name: field.default for field in dataclasses.fields(NoRegression)}
    found = [simulate(0.5, 0.5, rng, of["margin"], of["level"], of["max_episodes"])[0] for _ in range(40)]
    assert np.mean([decision == "not worse" for decision in found]) > 0.8


def test_capital_is_the_mean_over_bets_and_a_fair_game():
    """By enumeration: after three pairs the expected capital under the hypothesis' edge is what it was at the start."""
    margin, equal = 0.2, [(0.3, (True, False)), (0.5, (False, True)), (0.2, (True, True))]  # E d = −0.2
    expected = np.zeros(2)
    for path in itertools.product(equal, repeat=3):
        test, direct = PairedTest(margin, 1e-9), np.ones((2, len(BETS)))
        for _, (a, b) in path:
            test.add(a, b)
            direct *= 1 + np.stack((BETS / (1 - margin), -BETS / (1 + margin))) * (int(a) - int(b) + margin)
        assert test.capital == pytest.approx(tuple(direct.mean(1)))
        expected += math.prod(p for p, _ in path) * np.array(test.capital)
    assert expected == pytest.approx((1.0, 1.0))


def test_after_the_decision_nothing_changes():
    test = PairedTest(0.1, 0.05)
    while test.add(True, False) is None:
        pass
    assert (test.decision, test.pairs) == ("not worse", before := test.pairs)
    assert test.add(False, True) == "not worse"
    assert test.pairs == before
    for margin in (-0.01, 1.0):
        with pytest.raises(InputError, match="margin"):
            PairedTest(margin)


# -- command -----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def policies(tmp_path: Path) -> Path:
    for name, seed in (("a", 0), ("b", 0), ("other", 1)):
        save_policy(tmp_path / name / f"seed_{seed}", 18, 2, task=None, seed=seed)
    return tmp_path


def config(folder: Path, **more) -> NoRegression:
    small = {"environment": "postbc/PushT", "max_episodes": 6, "batch": 2, "num_envs": 2, "horizon": 8}
    where = {"policy": folder / "a", "reference": folder / "b", "output": folder / "o"}
    return NoRegression(**{**where, **small, **more})


def test_the_command_ends_open_where_nobody_succeeds(policies, capsys):
    words = ["no-regression", "--policy", str(policies / "a"), "--reference", str(policies / "b"), "--output", str(policies / "o"),
             "--environment", "postbc/PushT", "--max-episodes", "5", "--batch", "3", "--num-envs", "2", "--horizon", "8"]  # fmt: skip
    assert cli.main(words) == 0
    assert "not known yet, after 5 pairs" in capsys.readouterr().out
    verdict = read_json(policies / "o/seed_0/no_regression.json", Verdict)
    assert (verdict.decision, verdict.pairs, verdict.success) == ("open", 5, 0.0)
    rows = (policies / "o/seed_0/pairs.csv").read_text().splitlines()
    assert rows[1:] == [f"{1_250_000_000 + i},0,0" for i in range(5)]
    assert cli.main([*words, "--resume"]) == 0  # nothing more was asked for
    assert "not known yet, after 5 pairs" in capsys.readouterr().out

    more = [*words, "--max-episodes", "7", "--resume"]
    assert cli.main(more) == 0
    assert "not known yet, after 7 pairs" in capsys.readouterr().out
    assert (policies / "o/seed_0/pairs.csv").read_text().splitlines() == [
        *rows,
        *(f"{1_250_000_005 + i},0,0" for i in range(2)),
    ]


def test_what_decides_stops_it_and_a_stopped_run_goes_on(policies, monkeypatch):
    real, calls = module.evaluate, []

    class Known:
        chooses_episodes = True

        def __init__(self, count):
            self.won = np.full(count, len(calls) % 2 == 1)  # the candidate plays first

        def outcomes(self):
            return self.won

    def candidate_always_wins(agent, environment, *, episodes, seed, **rest):
        assert len(real(agent, environment, episodes=episodes, seed=seed, **rest).episodes) == episodes
        calls.append(seed)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return Known(episodes)

    monkeypatch.setattr(module, "evaluate", candidate_always_wins)
    wanted = config(policies, max_episodes=100, batch=2, margin=0.5, level=1e-4)
    with pytest.raises(KeyboardInterrupt):
        play_pairs(wanted, 0)
    first = calls[:4]
    calls[:] = first
    monkeypatch.setattr(module, "evaluate", lambda *a, **k: (calls.append(k["seed"]), Known(k["episodes"]))[1])
    verdict = play_pairs(dataclasses.replace(wanted, resume=True), 0)
    expected = PairedTest(0.5, 1e-4)
    while expected.add(True, False) is None:
        pass
    assert (verdict.decision, verdict.pairs) == ("not worse", expected.pairs)
    assert calls == [1_250_000_000 + 2 * (i // 2) for i in range(len(calls))]
    played = len(calls)
    assert play_pairs(dataclasses.replace(wanted, resume=True), 0) == verdict
    assert len(calls) == played  # a finished run is shown, not played again


def test_what_does_not_belong_together_is_refused(policies):
    with pytest.raises(InputError, match="no policy of this seed"):
        play_pairs(config(policies, policy=policies / "other"), 0)
    with pytest.raises(InputError, match="kept apart"):
        config(policies, episode_seed=2**32 - 5)
    with pytest.raises(InputError, match="observation size"):
        play_pairs(config(policies, reference=save_policy(policies / "c/seed_0", 5, 2, task=None).parent), 0)
    assert not (policies / "o").exists()
