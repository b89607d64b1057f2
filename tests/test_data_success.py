"""What rewards say about success, and the chunk transitions that are made of it, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postbc.data import Dataset, Episode
from postbc.data.success import step_successes, success_rule
from postbc.data.transitions import TransitionConfig, Transitions, transitions
from postbc.errors import InputError
from postbc.schemas import parse, plain


def dataset(*rewards: Any) -> Dataset:
    return Dataset.from_arrays([np.zeros((len(r), 1)) for r in rewards], [np.zeros((len(r), 1)) for r in rewards],
                               rewards=[np.array(r, float) for r in rewards])  # fmt: skip


@pytest.mark.parametrize(
    ("rewards", "rule", "expected"),
    [
        ([[0, 0, 1], [0, 0]], "auto", [[0, 0, 1], [0, 0]]),
        ([[-1, 0, -1], [-1]], "auto", [[0, 1, 0], [0]]),
        ([[0, 0, 1], [1]], "zero-one", [[0, 0, 1], [1]]),
        ([[0, 0], [0]], "zero-one", [[0, 0], [0]]),  # told: nobody succeeded
        ([[0, 0], [0]], "minus-one-zero", [[1, 1], [1]]),  # told: everybody did
        ([[0.2, 0.7, 2], [0.5]], 0.5, [[0, 1, 1], [1]]),
        ([[-3, -1, -2]], -1, [[0, 1, 0]]),
    ],
)
def test_success(rewards: Any, rule: Any, expected: Any) -> None:
    found = step_successes(dataset(*rewards), rule)
    assert [s.dtype for s in found] == [bool] * len(rewards)
    assert [s.astype(int).tolist() for s in found] == expected


@pytest.mark.parametrize(
    ("rewards", "rule", "words"),
    [
        ([[0, 0], [0]], "auto", ["nothing to learn", "every reward is 0"]),
        ([[1, 1]], "auto", ["every reward is 1"]),
        ([[-1, -1]], "auto", ["every reward is -1"]),
        ([[0.1, 0.6, 0.3]], "auto", ["shaped", "0.1, 0.3, 0.6", "zero-one"]),
        ([[-1, 0, 1]], "auto", ["shaped", "-1, 0, 1"]),
        ([[0, 100]], "auto", ["shaped", "0, 100"]),
        ([[0, 1], [0.5]], "zero-one", ["do not fit", "0.5"]),
        ([[0, 1]], "minus-one-zero", ["do not fit", "only -1 and 0"]),
        ([[0, 1]], "sign", ["no such rule"]),
    ],
)
def test_no_guess(rewards: Any, rule: Any, words: list[str]) -> None:
    """Shaped and all-equal rewards: what success is has to be said."""
    with pytest.raises(InputError) as error:
        step_successes(dataset(*rewards), rule)
    for word in words:
        assert word in str(error.value)


def test_without_rewards() -> None:
    data = Dataset.from_arrays([np.zeros((2, 1))], [np.zeros((2, 1))])
    for rule in ("auto", "zero-one", 0.5):
        with pytest.raises(InputError, match="no rewards"):
            success_rule(data, rule)  # type: ignore[arg-type]


def test_the_rule_is_part_of_a_schema() -> None:
    for rule in ("auto", "zero-one", "minus-one-zero", 0.5, -1.0):
        config = TransitionConfig(success=rule)  # type: ignore[arg-type]
        assert parse(TransitionConfig, plain(config)) == config
        assert config.success == rule
    for bad in ({"success": "sign"}, {"success": float("nan")}, {"stride": 0}, {"reward": "dense"}):
        with pytest.raises(InputError):
            TransitionConfig(**bad)  # type: ignore[arg-type]


# -- transitions -----------------------------------------------------------------------------------------------------------------
def of(rewards: list[float], chunk: int, discount: float, config: TransitionConfig, last_done: bool = False) -> Transitions:
    """Step t plays 10 t."""
    n = len(rewards)
    t, dones = np.arange(n, dtype=np.float32), np.zeros(n, bool)
    dones[-1] = last_done
    episode = Episode({"state": t[:, None]}, 10 * t[:, None], np.array(rewards), dones)
    return transitions(episode, np.array(rewards) > 0, chunk, discount, config)


def test_transitions_of_a_success() -> None:
    rows = of([0, 0, 0, 0, 0, 1, 1, 1], 4, 0.9, TransitionConfig())
    assert rows.row.tolist() == [0, 4]
    assert rows.action[:, :, 0].tolist() == [[0, 10, 20, 30], [40, 50, 60, 70]]
    assert rows.reward.tolist() == [0, 1]  # the steps after the first success do not count
    np.testing.assert_allclose(rows.discount, [0.9, 0])
    assert rows.next_row[0] == 4


def test_transitions_with_negative_rewards_and_discounts_within_the_chunk() -> None:
    episode: list[float] = [0, 0, 0, 0, 0, 0, 1, 1]
    rows = of(episode, 4, 0.5, TransitionConfig(reward="negative"))
    assert rows.reward.tolist() == [-4, -2]
    config = TransitionConfig(reward="negative", chunk_reward="discounted", chunk_discount="per_step")
    rows = of(episode, 4, 0.5, config)
    assert rows.reward.tolist() == [-1.875, -1.5]
    assert rows.discount.tolist() == [0.5**4, 0]


def test_a_time_limit_is_not_an_end() -> None:
    rows = of([0] * 9, 4, 0.9, TransitionConfig(), last_done=True)
    assert rows.row.tolist() == [0, 4]
    np.testing.assert_allclose(rows.discount, [0.9, 0.9])
    rows = of([0] * 8, 4, 0.9, TransitionConfig())  # the last chunk would need an observation after the end
    assert rows.row.tolist() == [0]
    rows = of([0] * 8, 4, 0.9, TransitionConfig(termination="dones"), last_done=True)
    np.testing.assert_allclose(rows.discount, [0.9, 0])
    episode = replace(dataset([0, 0])[0], dones=None)
    with pytest.raises(InputError, match="where episodes ended"):
        transitions(episode, np.zeros(2, bool), 1, 0.9, TransitionConfig(termination="dones"))


@pytest.mark.parametrize(("tail", "start", "last"), [("align", [0, 2], [20, 30, 40, 50]), ("pad", [0, 4], [40, 50, 50, 50])])
def test_a_last_chunk_that_does_not_fit(tail: Any, start: list[int], last: list[int]) -> None:
    rows = of([0, 0, 0, 0, 0, 1], 4, 0.9, TransitionConfig(tail=tail))
    assert rows.row.tolist() == start
    assert rows.action[-1, :, 0].tolist() == last
    assert rows.reward.tolist() == [0, 1]
    assert rows.discount[-1] == 0


def test_every_window_with_stride_one() -> None:
    rows = of([0, 0, 0, 0, 0, 1, 0, 0, 0], 3, 0.9, TransitionConfig(stride=1))
    assert rows.row.tolist() == [0, 1, 2, 3, 4, 5]  # none begins after the success
    assert rows.reward.tolist() == [0, 0, 0, 1, 1, 1]
    assert (rows.discount == 0).tolist() == [False, False, False, True, True, True]
    assert len(of([0, 0], 4, 0.9, TransitionConfig())) == 0


@settings(max_examples=80, deadline=None)
@given(
    rewards=st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0]), min_size=1, max_size=20), chunk=st.integers(1, 6),
    stride=st.one_of(st.none(), st.integers(1, 6)), tail=st.sampled_from(["align", "pad"]), last_done=st.booleans(),
    termination=st.sampled_from(["success", "dones"]), discount=st.floats(0.1, 1),
)  # fmt: skip
def test_transitions_are_consistent(
    rewards: list[float], chunk: int, stride: int | None, tail: Any, last_done: bool, termination: Any, discount: float
) -> None:
    n, config = len(rewards), TransitionConfig(stride=stride, tail=tail, termination=termination)
    rows = of(rewards, chunk, discount, config, last_done)
    success = np.array(rewards) > 0
    ends = success | ((np.arange(n) == n - 1) & last_done) if termination == "dones" else success
    assert len(set(rows.row.tolist())) == len(rows)
    for i, following, reward, factor in zip(rows.row, rows.next_row, rows.reward, rows.discount):
        over = ends[i : i + chunk].any()
        assert factor == (0 if over else pytest.approx(discount, rel=1e-6))
        assert over or following == i + chunk < n  # an observation is there
        taken = int(np.argmax(ends[i : i + chunk])) + 1 if over else chunk
        assert reward == success[i : i + taken].sum()
        assert not ends[:i].any() or tail == "align"
