"""The three estimators and action coverage, against Bayes' rule and the definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate

from postbc.theory.estimators import (
    Parameters,
    action_coverage,
    behavioral_cloning,
    constant_needed,
    coverage_guarantee,
    posterior_demonstrator,
    posterior_mixture,
    uniform_mixture,
)
from postbc.theory.instances import random_instances, rare_starts
from postbc.theory.tabular import sample_counts

tallies = arrays(
    np.int64, st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(2, 5)), elements=st.integers(0, 9)
)
weights = st.floats(0, 1)


@given(tallies, weights, st.floats(0.1, 50))
@settings(max_examples=100, deadline=None)
def test_every_estimate_is_a_policy(counts: np.ndarray, weight: float, pseudo_count: float) -> None:
    for policy in (
        behavioral_cloning(counts),
        uniform_mixture(counts, weight),
        posterior_mixture(counts, weight, pseudo_count),
    ):
        assert policy.min() >= 0
        np.testing.assert_allclose(policy.sum(-1), 1.0, atol=1e-12)
        unseen = counts.sum(-1) == 0
        np.testing.assert_allclose(policy[unseen], 1 / counts.shape[-1])


@given(tallies, st.floats(0.1, 50))
@settings(max_examples=50, deadline=None)
def test_no_weight_is_behavioral_cloning_to_the_bit(counts: np.ndarray, pseudo_count: float) -> None:
    cloned = behavioral_cloning(counts)
    np.testing.assert_array_equal(uniform_mixture(counts, 0.0), cloned)
    np.testing.assert_array_equal(posterior_mixture(counts, 0.0, pseudo_count), cloned)
    np.testing.assert_allclose(posterior_mixture(counts, 1.0, pseudo_count), posterior_demonstrator(counts, pseudo_count))


def test_estimates_by_hand() -> None:
    counts = np.array([[[3, 1, 0], [0, 0, 0]]])
    np.testing.assert_allclose(behavioral_cloning(counts)[0], [[0.75, 0.25, 0], [1 / 3] * 3])
    np.testing.assert_allclose(uniform_mixture(counts, 0.3)[0, 0], [0.7 * 0.75 + 0.1, 0.7 * 0.25 + 0.1, 0.1])
    np.testing.assert_allclose(
        posterior_mixture(counts, 0.5, 3.0)[0, 0], [0.5 * 0.75 + 0.5 * 4 / 7, 0.5 * 0.25 + 0.5 * 2 / 7, 0.5 / 7]
    )


@pytest.mark.parametrize("pseudo_count", [2.0, 5.0])
def test_posterior_demonstrator_is_bayes_rule(pseudo_count: float) -> None:
    """Two actions: the posterior mean of the probability of a_1, by integrating prior times likelihood."""
    shape = pseudo_count / 2
    for first, second in ((0, 0), (1, 0), (3, 2), (7, 1)):

        def density(p: float, first: int = first, second: int = second) -> float:
            return p ** (first + shape - 1) * (1 - p) ** (second + shape - 1)

        mean = integrate.quad(lambda p, f=density: p * f(p), 0, 1)[0] / integrate.quad(density, 0, 1)[0]
        assert posterior_demonstrator(np.array([[[first, second]]]), pseudo_count)[0, 0, 0] == pytest.approx(mean, abs=1e-9)


def test_a_weight_a_repetition() -> None:
    counts = np.random.default_rng(0).integers(0, 4, size=(5, 2, 3, 4))
    alpha = np.linspace(0, 1, 5)
    for r in range(5):
        np.testing.assert_array_equal(uniform_mixture(counts, alpha)[r], uniform_mixture(counts[r], float(alpha[r])))
        np.testing.assert_array_equal(
            posterior_mixture(counts, alpha, 3.0)[r], posterior_mixture(counts[r], float(alpha[r]), 3.0)
        )


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_coverage_is_the_largest_gamma(seed: int) -> None:
    rng = np.random.default_rng(seed)
    demonstrator = rng.dirichlet(np.full(3, 0.5), size=(2, 2))
    demonstrator[0, 0] = [1.0, 0.0, 0.0]
    policy = behavioral_cloning(rng.integers(0, 3, size=(2, 2, 3)))
    gamma = float(action_coverage(policy, demonstrator))
    cells = list(itertools.product(range(2), range(2), range(3)))
    assert all(policy[c] >= gamma * demonstrator[c] - 1e-12 for c in cells)
    assert gamma == 1.0 or any(policy[c] < (gamma + 1e-6) * demonstrator[c] for c in cells)
    assert 0 <= gamma <= 1


def test_the_theorems_parameters() -> None:
    parameters = Parameters.of_theorem(actions=4, horizon=8, trajectories=1000)
    assert parameters.pseudo_count == pytest.approx(4 * math.log(8000))
    assert parameters.weight == pytest.approx(1 / math.log(8000))
    assert Parameters.of_theorem(50, 8, 10) == Parameters(1 / 50, 50)


@given(st.integers(1, 5), st.integers(2, 6), st.integers(1, 5), st.integers(2, 500), st.floats(0.05, 0.9), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_guarantee_holds_on_random_instances(
    states: int, actions: int, horizon: int, size: int, failure: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    instance = random_instances(states, actions, horizon, 50, rng, concentration=0.3)
    counts = sample_counts(instance.mdp, instance.demonstrator, size, 50, rng)
    parameters = Parameters.of_theorem(actions, horizon, size)
    policy = posterior_mixture(counts, parameters.weight, parameters.pseudo_count)
    assert (policy >= coverage_guarantee(instance.demonstrator, parameters, failure)).all()


def test_behavioral_cloning_breaks_the_guarantee() -> None:
    instance = rare_starts(8, 4, 0.1)
    counts = sample_counts(instance.mdp, instance.demonstrator, 512, 200, np.random.default_rng(0))
    parameters = Parameters.of_theorem(2, 4, 512)
    holds = (behavioral_cloning(counts) >= coverage_guarantee(instance.demonstrator, parameters, 0.1)).all((-3, -2, -1))
    assert holds.mean() < 0.5


def test_constant_needed_is_where_the_guarantee_turns() -> None:
    rng = np.random.default_rng(0)
    demonstrator = np.tile([0.97, 0.03], (1, 3, 1))
    counts = np.tile(np.array([400, 0]), (1, 3, 1))[None] + rng.integers(0, 2, size=(50, 1, 3, 2))
    parameters = Parameters(0.2, 4.0)
    policy = posterior_mixture(counts, parameters.weight, parameters.pseudo_count)
    constant = constant_needed(policy, demonstrator, parameters, 0.5)
    assert (constant > 0).all()
    for r in range(50):
        assert (policy[r] >= coverage_guarantee(demonstrator, parameters, 0.5, constant[r] * 1.0001)).all()
        assert not (policy[r] >= coverage_guarantee(demonstrator, parameters, 0.5, constant[r] * 0.999)).all()
