"""Best-of-N and the policy gradient in tables, against enumeration and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from postbc.theory.estimators import behavioral_cloning, posterior_mixture
from postbc.theory.finetuning import best_of, best_return_in_support, in_sample_values, policy_gradient
from postbc.theory.instances import corridor, random_instances
from postbc.theory.rl_finetuning import RICH, SPARSE, rl_finetuning
from postbc.theory.tabular import MDP, expected_return, optimal_policy, sample_counts, sample_transition_counts


def test_best_of_n_by_enumerating_the_candidates() -> None:
    rng = np.random.default_rng(0)
    for values in (
        rng.standard_normal(4),
        np.array([1.0, 1.0, 0.0, 2.0]),
        np.array([-np.inf, -np.inf, 3.0, -np.inf]),
        np.zeros(4),
    ):
        policy = rng.dirichlet(np.ones(4))
        policy[3] = 0.0
        policy /= policy.sum()
        for count in (1, 2, 3):
            exact = np.zeros(4)
            for drawn in itertools.product(range(4), repeat=count):
                exact[max(drawn, key=lambda a, v=values: v[a])] += np.prod(policy[list(drawn)])  # max keeps the first of ties
            np.testing.assert_allclose(best_of(policy, values, count), exact, atol=1e-12)


def test_critic_by_hand() -> None:
    """Two steps, two states: s0 → (a0: s0 twice, s1 once); at step 1 only (s0, a1) and (s1, a0) were tried."""
    counts = np.zeros((1, 2, 2, 2, 2), dtype=np.int64)
    counts[0, 0, 0, 0] = [2, 1]
    counts[0, 1, 0, 1] = [2, 0]
    counts[0, 1, 1, 0] = [0, 1]
    rewards = np.array([[[0.5, 9.0], [9.0, 9.0]], [[9.0, 0.3], [0.9, 9.0]]])
    values = in_sample_values(counts, rewards)[0]
    assert values[0, 0, 0] == pytest.approx(0.5 + (2 * 0.3 + 0.9) / 3)
    assert (values[1, 0, 1], values[1, 1, 0]) == (0.3, 0.9)
    assert np.isneginf(values).sum() == 5


def test_with_unlimited_rollouts_best_of_many_is_the_best_in_the_support() -> None:
    stacked = random_instances(3, 3, 3, 1, np.random.default_rng(2))
    mdp = MDP(stacked.mdp.initial[0], stacked.mdp.transitions[0], stacked.mdp.rewards[0])
    policy = stacked.demonstrator.copy()
    policy[..., 0] = 0.0
    policy = 0.5 * policy / policy.sum(-1, keepdims=True) + 0.5 * np.array([0.0, 0.5, 0.5])
    rolled = sample_transition_counts(mdp, policy, 10**7, 1, np.random.default_rng(0))
    finetuned = best_of(policy, in_sample_values(rolled, mdp.rewards), 1000)
    assert expected_return(mdp, finetuned)[0] == pytest.approx(best_return_in_support(mdp, policy)[0], abs=1e-3)
    # the ceiling itself, by trying every deterministic policy that avoids action 0
    choices = itertools.product((1, 2), repeat=9)
    best = max(float(expected_return(mdp, np.eye(3)[np.array(choice).reshape(3, 3)])) for choice in choices)
    assert best_return_in_support(mdp, policy)[0] == pytest.approx(best, abs=1e-12)
    assert best < float(expected_return(mdp, optimal_policy(mdp)))


def test_an_update_follows_the_gradient_of_the_return() -> None:
    """With very many episodes one update is logits + rate·∇J, ∇J by finite differences."""
    stacked = random_instances(2, 3, 2, 1, np.random.default_rng(6))
    rewards = np.stack([0.2 * stacked.mdp.rewards[0, 0], [[1.0, 0.8, 0.6], [0.0, 0.1, 0.3]]])  # the next state matters most
    mdp = MDP(stacked.mdp.initial[0], stacked.mdp.transitions[0], rewards)
    policy, rate, width = stacked.demonstrator, 5.0, 1e-5
    logits = np.log(policy[0])

    def value(table: np.ndarray) -> float:
        weights = np.exp(table)
        return float(expected_return(mdp, weights / weights.sum(-1, keepdims=True)))

    gradient = np.zeros_like(logits)
    for cell in np.ndindex(logits.shape):
        bump = np.zeros_like(logits)
        bump[cell] = width
        gradient[cell] = (value(logits + bump) - value(logits - bump)) / (2 * width)
    expected = value(logits + rate * gradient)
    assert expected > value(logits) + 0.05
    _, returns = policy_gradient(mdp, policy, 1, 200_000, rate, np.random.default_rng(0), evaluate_every=1)
    assert returns[0, 0] == pytest.approx(value(logits))
    assert returns[0, 1] == pytest.approx(expected, abs=1e-3)


def test_the_gradient_cannot_find_what_the_start_never_plays() -> None:
    instance = corridor(np.full(2, 0.2), 4, 4, 0.5)
    counts = sample_counts(instance.mdp, instance.demonstrator, 8, 20, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    cloned, mixed = behavioral_cloning(counts), posterior_mixture(counts, 0.2, 4.0)
    ceiling = best_return_in_support(instance.mdp, cloned)
    assert (ceiling < 1).any()
    _, from_clone = policy_gradient(instance.mdp, cloned, 300, 32, 3.0, rng)
    _, from_mixture = policy_gradient(instance.mdp, mixed, 300, 32, 3.0, rng)
    assert (from_clone <= ceiling[:, None] + 1e-9).all()
    assert (from_mixture[:, -1] > ceiling + 0.05)[ceiling < 0.8].all()
    np.testing.assert_allclose(best_return_in_support(instance.mdp, mixed), 1.0)


def test_finetuning_separates_with_few_demonstrations_and_not_with_many() -> None:
    result = rl_finetuning(seed=1, repetitions=16)
    assert [check.claim for check in result.checks() if not check.holds] == []
    sparse, rich = result.regimes[SPARSE], result.regimes[RICH]
    assert sparse.pretrained["posterior"].mean() == pytest.approx(sparse.pretrained["uniform"].mean(), abs=1e-3)
    # the price at T = 30, which is gone at T = 3000
    assert sparse.pretrained["BC"].mean() - sparse.pretrained["posterior"].mean() > 0.03
    assert abs(rich.pretrained["BC"].mean() - rich.pretrained["posterior"].mean()) < 0.01
    for curves in sparse.curves.values():
        assert (curves["BC"] <= sparse.ceiling["BC"][:, None] + 1e-9).all()
