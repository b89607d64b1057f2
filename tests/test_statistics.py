"""Statistics against scipy, hand-computed values, brute force and simulated coverage."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from postbc import statistics as s


# -- intervals -----------------------------------------------------------------------------------------------------------------
def test_newcombes_interval_of_his_own_table() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table II, method 10: 56/70 − 48/80."""
    low, high = s.newcombe_interval(56, 70, 48, 80)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
    low, high = s.newcombe_interval(5, 56, 0, 29)
    assert (round(low, 4), round(high, 4)) == (-0.0381, 0.1926)


def test_a_mean_of_rates_is_wilsons_of_all_trials_where_they_are_equal() -> None:
    assert s.mean_of_rates([8], [10]) == pytest.approx((0.8, *s.wilson_interval(8, 10)))
    assert s.mean_of_rates([1, 5, 3], [10] * 3) == pytest.approx((0.3, *s.wilson_interval(9, 30)))
    # 4 of 10 and 3 of 5: variance p(1−p)·(1/10 + 1/5)/4, that of 13⅓ trials
    assert s.mean_of_rates([4, 3], [10, 5]) == pytest.approx((0.5, *s.wilson_interval(0.5 * 40 / 3, 40 / 3)))
    assert s.mean_of_rates([0, 0], [5, 4])[1] == 0.0
    assert s.mean_of_rates([5, 4], [5, 4])[2] == pytest.approx(1.0)


@pytest.mark.parametrize("rates", [(0.3, 1.0), (0.1, 0.9), (0.9, 0.9), (0.5, 0.5)])
def test_the_interval_of_a_mean_of_tasks_covers(rates: tuple[float, float]) -> None:
    """Sixteen tasks, from hard to easy or alike, of five or ten episodes each."""
    rng, of_tasks, trials = np.random.default_rng(0), np.linspace(*rates, 16), [5, 10] * 8
    drawn = (s.mean_of_rates(rng.binomial(trials, of_tasks).tolist(), trials) for _ in range(500))
    assert np.mean([low <= of_tasks.mean() <= high for _, low, high in drawn]) > 0.93


def test_wilson_hand_computed() -> None:
    # 8 of 10, z = 1.959964: centre (0.8 + 0.192073)/1.384146 = 0.716735, half 1.415979·√(0.016 + 0.009604) = 0.226573
    assert s.wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert s.wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
@settings(max_examples=150, deadline=None)
def test_wilson_equals_scipy_and_is_symmetric(trials: int, share: float, confidence: float) -> None:
    successes = round(share * trials)
    low, high = s.wilson_interval(successes, trials, confidence)
    oracle = stats.binomtest(successes, trials).proportion_ci(confidence, "wilson")
    assert (low, high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)
    assert 0 <= low <= successes / trials <= high <= 1
    mirrored = s.wilson_interval(trials - successes, trials, confidence)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.93])
def test_wilson_covers(rate: float) -> None:
    pmf = stats.binom.pmf(np.arange(201), 200, rate)
    inside = [low <= rate <= high for low, high in (s.wilson_interval(k, 200) for k in range(201))]
    assert 0.93 < (pmf * inside).sum() < 0.97  # exact coverage, no simulation


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="successes"):
        s.wilson_interval(11, 10)


# -- paired tests --------------------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_mcnemar_brute_force(pairs: list[tuple[bool, bool]]) -> None:
    a, b = np.array(pairs).T
    discordant = [int(x) - int(y) for x, y in pairs if x != y]
    observed = abs(sum(discordant))
    patterns = list(itertools.product((-1, 1), repeat=len(discordant)))
    expected = sum(abs(sum(p)) >= observed for p in patterns) / len(patterns)
    assert s.mcnemar(a, b) == pytest.approx(expected, abs=1e-12)
    assert s.mcnemar(b, a) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_known_value() -> None:
    # 15 discordant episodes, 12 to 3: 2·(C(15,0)+C(15,1)+C(15,2)+C(15,3))/2^15 = 2·576/32768
    a = np.array([1] * 12 + [0] * 3 + [1] * 50 + [0] * 20)
    b = np.array([0] * 12 + [1] * 3 + [1] * 50 + [0] * 20)
    assert s.mcnemar(a, b) == pytest.approx(2 * 576 / 32768)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_sign_flip_brute_force(values: list[int]) -> None:
    d = np.array(values) / 200  # success rates of 200 episodes: ties abound
    patterns = [abs(sum(x * sign for x, sign in zip(values, p))) for p in itertools.product((-1, 1), repeat=len(values))]
    assert s.sign_flip_test(d) == pytest.approx(sum(v >= abs(sum(values)) for v in patterns) / len(patterns))
    assert s.sign_flip_test(d) == s.sign_flip_test(-d)


def test_sign_flip_equals_scipy_and_its_floor() -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 10)
    oracle = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert s.sign_flip_test(d) == pytest.approx(oracle)
    assert s.sign_flip_test(np.full(5, 0.4)) == pytest.approx(2 / 32)  # five seeds cannot reach 0.05
    big = np.random.default_rng(1).normal(0.5, 1, 16)
    exact, sampled = s.sign_flip_test(big, exact_up_to=16), s.sign_flip_test(big)
    assert sampled == pytest.approx(exact, abs=0.01)
    assert sampled > 0


def test_compare_equals_scipy_t() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(5), rng.random(5)
    oracle = stats.ttest_rel(a, b)
    found = s.compare(a, b)
    assert found.p == pytest.approx(oracle.pvalue)
    interval = oracle.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_sign_flip == s.sign_flip_test(a - b)
    assert found.p_sign_flip_minimum == 2 / 32
    assert found.wins + found.losses == found.seeds == 5
    reverse = s.compare(b, a)
    assert (reverse.difference, reverse.low, reverse.high) == pytest.approx((-found.difference, -found.high, -found.low))


def test_compare_of_episodes_is_over_seeds_and_tells_of_these_policies_by_their_episodes() -> None:
    """Two seeds of 8 episodes each, by hand: alone solved 6 and 1, so p = 2·(C(7,0)+C(7,1))/2^7; over seeds as of the means."""
    a = np.array([[1, 1, 1, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0, 0, 1, 0]])
    b = np.array([[0, 0, 0, 0, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0, 1, 0]])
    found = s.compare(a, b)
    assert (found.only_a, found.only_b) == (6, 1)
    assert found.p_episodes == pytest.approx(16 / 128)
    of_means = s.compare(a.mean(1), b.mean(1))
    assert (found.difference, found.low, found.high, found.p) == pytest.approx(
        (of_means.difference, of_means.low, of_means.high, of_means.p)
    )
    assert (of_means.only_a, of_means.only_b, of_means.p_episodes) == (None, None, None)
    with pytest.raises(ValueError, match="paired"):
        s.compare(a, b[:, :7])


def test_seeds_are_clusters() -> None:
    """Seeds that differ by luck in their training, methods that do not: over seeds the level holds, over episodes it does not."""
    rng = np.random.default_rng(0)
    over_seeds = over_episodes = 0
    for _ in range(400):
        rates = np.clip(rng.normal(0.6, 0.1, (2, 5)), 0, 1)
        a, b = rng.random((2, 5, 100)) < rates[:, :, None]
        found = s.compare(a, b)
        assert found.p_episodes is not None
        over_seeds += found.p < 0.05
        over_episodes += found.p_episodes < 0.05
    assert 0.02 < over_seeds / 400 < 0.08
    assert over_episodes / 400 > 0.2  # as its docstring says, it is about these policies


def test_compare_edges() -> None:
    alone = s.compare(np.array([0.9]), np.array([0.1]))
    assert (alone.p, alone.low, alone.high, alone.seeds) == (1.0, -math.inf, math.inf, 1)
    same = s.compare(np.array([0.5] * 4), np.array([0.5] * 4))
    assert (same.p, same.difference, same.wins, same.losses) == (1.0, 0.0, 0, 0)
    constant = s.compare(np.array([0.6] * 5), np.array([0.5] * 5))
    assert constant.p == pytest.approx(2 / 32)
    with pytest.raises(ValueError, match="paired"):
        s.compare(np.zeros(3), np.zeros(4))


def test_coverage_of_the_intervals_over_seeds() -> None:
    """Student's interval covers at its nominal rate with five seeds; a percentile bootstrap does not, as the docstring says."""
    rng = np.random.default_rng(0)
    student = boot = 0
    for i in range(600):
        skill = rng.normal(0.1, 0.08, 5)  # the seeds' true differences
        a, b = rng.binomial(200, np.clip(0.6 + skill, 0, 1)) / 200, rng.binomial(200, 0.6, 5) / 200
        found = s.compare(a, b)
        student += found.low <= 0.1 <= found.high
        low, high = np.quantile((a - b)[np.random.default_rng(i).integers(5, size=(400, 5))].mean(1), [0.025, 0.975])
        boot += low <= 0.1 <= high
    assert 0.92 < student / 600 < 0.98
    assert 0.76 < boot / 600 < 0.90


def test_holm() -> None:
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # statsmodels' documented example
    assert s.holm([]).size == 0
    with pytest.raises(ValueError, match="p-values"):
        s.holm([1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_holm_properties(p: list[float]) -> None:
    adjusted = s.holm(p)
    assert (adjusted >= np.array(p) - 1e-15).all()
    assert (adjusted <= np.minimum(1, len(p) * np.array(p)) + 1e-12).all()  # never worse than Bonferroni
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


# -- aggregates ----------------------------------------------------------------------------------------------------------------
def test_iqm_and_stratified_bootstrap() -> None:
    assert s.iqm(np.arange(8).reshape(4, 2)) == 3.5  # 2, 3, 4, 5 remain
    scores = np.stack([np.zeros(6), np.ones(6)], 1)  # tasks differ, runs do not: stratified resampling has no spread
    assert s.stratified_bootstrap(scores, resamples=200) == pytest.approx((0.5, 0.5, 0.5))
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(30, 2))
    value, low, high = s.stratified_bootstrap(scores, resamples=4000)
    oracle = [s.iqm(np.stack([rng.choice(scores[:, t], 30) for t in range(2)], 1)) for _ in range(4000)]
    assert value == s.iqm(scores)
    assert (low, high) == pytest.approx(tuple(np.quantile(oracle, [0.025, 0.975])), abs=0.03)


REFERENCE = json.loads((Path(__file__).parent / "rliable_reference.json").read_text())


@pytest.mark.parametrize("case", REFERENCE, ids=lambda c: f"{np.shape(c['x'])}")
def test_aggregates_are_rliables(case: dict[str, Any]) -> None:
    """Against values that rliable computed (rliable_reference.py says how); intervals to the bootstrap's own noise."""
    x, y = np.array(case["x"]), np.array(case["y"])
    value, *interval = s.stratified_bootstrap(x, resamples=50_000)
    assert value == pytest.approx(case["iqm"], abs=1e-12)
    assert interval == pytest.approx(case["iqm_interval"], abs=0.006)
    value, *interval = s.probability_of_improvement(x, y, resamples=50_000)
    assert value == pytest.approx(case["improvement"], abs=1e-12)
    assert interval == pytest.approx(case["improvement_interval"], abs=0.012)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=6))
@settings(deadline=None)
def test_probability_of_improvement(a: list[int], b: list[int]) -> None:
    x, y = np.array(a, float)[:, None], np.array(b, float)[:, None]
    p, low, high = s.probability_of_improvement(x, y, resamples=200)
    wins = sum((u > v) + 0.5 * (u == v) for u in a for v in b) / (len(a) * len(b))
    assert p == pytest.approx(wins)
    assert 0 <= low <= high <= 1
    back = s.probability_of_improvement(y, x, resamples=200)[0]
    assert p + back == pytest.approx(1)
    assert s.probability_of_improvement(np.hstack([x, x]), np.hstack([y, y]), resamples=20)[0] == pytest.approx(p)


def test_the_interval_of_the_probability_of_improvement_is_the_one_enumerated() -> None:
    """Every resample of three runs against two, each as probable as any other."""
    x, y = np.array([[0.2], [0.5], [0.9]]), np.array([[0.4], [0.5]])
    values = [
        np.mean([(u > v) + 0.5 * (u == v) for u in x[list(i), 0] for v in y[list(j), 0]])
        for i in itertools.product(range(3), repeat=3)
        for j in itertools.product(range(2), repeat=2)
    ]
    _, low, high = s.probability_of_improvement(x, y, confidence=0.9, resamples=40_000)
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])), abs=0.02)


@pytest.mark.parametrize(("x", "y"), [((3,), (3,)), ((3, 2), (3, 1)), ((0, 1), (3, 1))])
def test_probability_of_improvement_refuses_other_shapes(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="same tasks"):
        s.probability_of_improvement(np.zeros(x), np.zeros(y))


def test_mean_interval() -> None:
    v = np.array([0.2, 0.4, 0.9])
    interval = stats.t.interval(0.95, 2, v.mean(), stats.sem(v))
    assert s.mean_interval(v) == pytest.approx((v.mean(), *interval))
    assert s.mean_interval(np.array([0.3])) == (0.3, -math.inf, math.inf)


# -- curves --------------------------------------------------------------------------------------------------------------------
def test_interpolation() -> None:
    a, b = [[0, 0.0], [10, 1.0]], [[0, 0.5], [4, 0.5], [20, 0.9]]
    grid, values = s.interpolate([a, b])
    assert grid.tolist() == [0, 4, 10]
    assert values[0] == pytest.approx([0, 0.4, 1.0])
    assert values[1] == pytest.approx([0.5, 0.5, 0.65])
    _, stepped = s.interpolate([a, b], np.array([0, 9.9, 10, 15]), "step")
    assert stepped[0] == pytest.approx([0, 0, 1, np.nan], nan_ok=True)
    assert stepped[1] == pytest.approx([0.5, 0.5, 0.5, 0.5])
    for bad in ([[0, 1], [0, 2]], [], [[1, 2, 3]]):
        with pytest.raises(ValueError, match="curve"):
            s.interpolate([bad])


def test_band_contains_the_mean_and_collapses_for_equal_curves() -> None:
    values = np.random.default_rng(0).random((5, 7))
    mean, low, high = s.bootstrap_band(values)
    assert mean == pytest.approx(values.mean(0))
    assert (low < mean).all()
    assert (mean < high).all()
    assert low[0] >= values[:, 0].min()
    mean, low, high = s.bootstrap_band(np.tile(values[:1], (5, 1)))
    assert low == pytest.approx(high)


def test_area_and_threshold() -> None:
    curve = [[0, 0.2], [100, 0.6], [300, 0.6], [400, 1.0]]
    assert s.area_under_curve(curve) == pytest.approx((40 + 120 + 80) / 400)
    assert s.area_under_curve([[5, 0.3]]) == 0.3
    assert s.steps_to_threshold(curve, 0.4) == pytest.approx(50)
    assert s.steps_to_threshold(curve, 0.1) == 0
    assert s.steps_to_threshold(curve, 0.6) == pytest.approx(100)
    assert s.steps_to_threshold([[0, 0.2], [9, 0.3]], 0.5) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 20), st.integers(0, 20))
def test_trimmed_means_and_sign_tests_are_scipys(scores, only_a, only_b):
    assert s.iqm([scores]) == pytest.approx(stats.trim_mean(scores, 0.25))
    a, b = np.repeat([1, 0], [only_a, only_b]), np.repeat([0, 1], [only_a, only_b])
    expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert s.mcnemar(a, b) == pytest.approx(expected)


def test_the_log_rank_test_is_the_one_written_out() -> None:
    """Observed minus expected among those still on their way, at every time that somebody gets there."""
    a, b, end = [3.0, 5.0, None, 8.0, 5.0], [6.0, None, None, 9.0], 10.0
    times = sorted({v for v in a + b if v is not None})
    observed = expected = variance = 0.0
    for t in times:
        at_risk = [sum(v is None or v >= t for v in group) for group in (a, b)]
        events = [sum(v == t for v in group) for group in (a, b)]
        n, d = sum(at_risk), sum(events)
        observed, expected = observed + events[0], expected + d * at_risk[0] / n
        if n > 1:
            variance += d * at_risk[0] / n * at_risk[1] / n * (n - d) / (n - 1)
    z = (observed - expected) / math.sqrt(variance)
    p = math.erfc(abs(z) / math.sqrt(2))
    assert s.log_rank(a, b, ([end] * 5, [end] * 4)) == pytest.approx(p, rel=1e-6)
    assert s.log_rank([None, None], [None, 4.0], ([end] * 2, [end] * 2)) == 1.0
    assert s.log_rank(a, a, ([end] * 5, [end] * 5)) == pytest.approx(1.0)
