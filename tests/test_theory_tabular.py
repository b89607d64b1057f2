"""Exact evaluation and sampling of tabular MDPs, against enumeration of all trajectories."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from postbc.errors import InputError
from postbc.theory.instances import corridor, fresh_draws, hardest_masses, random_instances, rare_starts
from postbc.theory.tabular import (
    MDP,
    action_values,
    expected_return,
    occupancies,
    optimal_policy,
    sample_counts,
    sample_trajectories,
    sample_transition_counts,
)

sizes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))


def one(states: int, actions: int, horizon: int, seed: int) -> tuple[MDP, np.ndarray]:
    """A random MDP with a random policy, without repetition axis."""
    instance = random_instances(states, actions, horizon, 1, np.random.default_rng(seed), concentration=0.5)
    mdp = MDP(instance.mdp.initial[0], instance.mdp.transitions[0], instance.mdp.rewards[0])
    return mdp, instance.demonstrator[0]


def all_trajectories(mdp: MDP, policy: np.ndarray) -> list[tuple[tuple[int, ...], tuple[int, ...], float, float]]:
    """Every (states, actions, probability, return): the definition, without any recursion."""
    found = []
    for path in itertools.product(range(mdp.states), repeat=mdp.horizon):
        for play in itertools.product(range(mdp.actions), repeat=mdp.horizon):
            probability, total = mdp.initial[path[0]], 0.0
            for h, (s, a) in enumerate(zip(path, play)):
                probability *= policy[h, s, a]
                total += mdp.rewards[h, s, a]
                if h + 1 < mdp.horizon:
                    probability *= mdp.transitions[h, s, a, path[h + 1]]
            found.append((path, play, float(probability), float(total)))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_evaluation_agrees_with_enumeration(seed: int) -> None:
    mdp, policy = one(3, 2, 3, seed)
    trajectories = all_trajectories(mdp, policy)
    assert sum(p for *_, p, _ in trajectories) == pytest.approx(1.0)
    assert expected_return(mdp, policy) == pytest.approx(sum(p * total for *_, p, total in trajectories), abs=1e-12)
    visits = np.zeros(policy.shape)
    for path, play, probability, _ in trajectories:
        for h, (s, a) in enumerate(zip(path, play)):
            visits[h, s, a] += probability
    np.testing.assert_allclose(occupancies(mdp, policy), visits, atol=1e-12)


def test_action_values_are_conditional_returns() -> None:
    mdp, policy = one(2, 3, 3, 7)
    values = action_values(mdp, policy)
    for h, s, a in itertools.product(range(3), range(2), range(3)):
        mass = gain = 0.0
        for path, play, probability, _ in all_trajectories(mdp, policy):
            if path[h] == s and play[h] == a:
                mass += probability
                gain += probability * sum(mdp.rewards[k, path[k], play[k]] for k in range(h, 3))
        assert values[h, s, a] == pytest.approx(gain / mass, abs=1e-10)


def test_optimal_policy_beats_every_deterministic_policy() -> None:
    mdp, _ = one(2, 2, 3, 3)
    best = max(
        float(expected_return(mdp, np.eye(2)[np.array(choice).reshape(3, 2)]))
        for choice in itertools.product(range(2), repeat=6)
    )
    assert expected_return(mdp, optimal_policy(mdp)) == pytest.approx(best, abs=1e-12)


@given(sizes)
@settings(max_examples=50, deadline=None)
def test_invariants(size: tuple[int, int, int, int]) -> None:
    states, actions, horizon, seed = size
    instance = random_instances(states, actions, horizon, 3, np.random.default_rng(seed), concentration=0.3)
    visits = occupancies(instance.mdp, instance.demonstrator)
    assert visits.min() >= 0
    np.testing.assert_allclose(visits.sum((-2, -1)), 1.0, atol=1e-12)
    values = action_values(instance.mdp, instance.demonstrator)
    ahead = horizon - np.arange(horizon)[:, None, None]
    assert (values >= 0).all()
    assert (values <= ahead + 1e-12).all()
    # the two recursions meet: backward values and forward occupancies give the same return
    np.testing.assert_allclose(
        (visits * instance.mdp.rewards).sum((-3, -2, -1)), expected_return(instance.mdp, instance.demonstrator)
    )
    assert (
        expected_return(instance.mdp, optimal_policy(instance.mdp))
        >= expected_return(instance.mdp, instance.demonstrator) - 1e-12
    ).all()


def test_a_stack_of_mdps_equals_the_single_ones() -> None:
    stacked = random_instances(4, 3, 3, 6, np.random.default_rng(0))
    together = expected_return(stacked.mdp, stacked.demonstrator)
    for r in range(6):
        mdp = MDP(stacked.mdp.initial[r], stacked.mdp.transitions[r], stacked.mdp.rewards[r])
        assert expected_return(mdp, stacked.demonstrator[r]) == pytest.approx(together[r], abs=1e-12)


def test_counts_have_the_distribution_of_tallied_trajectories() -> None:
    """Every table of counts of T = 2 trajectories, its probability by enumerating pairs of trajectories."""
    mdp, policy = one(2, 2, 2, 11)
    single = all_trajectories(mdp, policy)

    def table(*trajectories: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
        counts = np.zeros(policy.shape, dtype=int)
        for path, play in trajectories:
            for h, (s, a) in enumerate(zip(path, play)):
                counts[h, s, a] += 1
        return tuple(counts.ravel())

    exact: dict[tuple[int, ...], float] = {}
    for (path, play, p, _), (path2, play2, p2, _) in itertools.product(single, single):
        key = table((path, play), (path2, play2))
        exact[key] = exact.get(key, 0.0) + p * p2
    draws = 20_000
    sampled = sample_counts(mdp, policy, 2, draws, np.random.default_rng(0)).reshape(draws, -1)
    keys = [key for key, p in exact.items() if p * draws >= 5]
    seen = np.array([(sampled == key).all(1).sum() for key in keys])
    expected = np.array([exact[key] for key in keys]) * draws
    rest = draws - expected.sum()
    if rest > 5:
        seen, expected = np.append(seen, draws - seen.sum()), np.append(expected, rest)
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert stats.chi2.sf(statistic, len(expected) - 1) > 1e-3


def test_every_step_counts_every_trajectory() -> None:
    instance = random_instances(3, 2, 4, 20, np.random.default_rng(1))
    counts = sample_counts(instance.mdp, instance.demonstrator, 17, 20, np.random.default_rng(2))
    assert counts.shape == (20, 4, 3, 2)
    assert (counts.sum((-2, -1)) == 17).all()
    triples = sample_transition_counts(instance.mdp, instance.demonstrator, 17, 20, np.random.default_rng(2))
    assert (triples.sum(-1) == counts).all()  # the same generator walks the same way
    np.testing.assert_array_equal(triples[:, :-1].sum((-3, -2)), counts[:, 1:].sum(-1))


def test_trajectories_visit_like_the_occupancies_and_never_play_the_impossible() -> None:
    mdp, policy = one(3, 3, 3, 5)
    policy[:, :, 1] = 0.0
    policy /= policy.sum(-1, keepdims=True)
    states, actions = sample_trajectories(mdp, np.stack([policy, policy]), 20_000, np.random.default_rng(0))
    assert (actions != 1).all()
    expected = occupancies(mdp, policy)
    for h, s, a in itertools.product(range(3), range(3), (0, 2)):
        seen = ((states[..., h] == s) & (actions[..., h] == a)).mean()
        assert seen == pytest.approx(expected[h, s, a], abs=5 * np.sqrt(0.25 / 40_000))


@pytest.mark.parametrize(
    "instance",
    [rare_starts(5, 3, 0.1), fresh_draws(hardest_masses(6, 100), 3, 4), corridor(np.full(3, 0.1), 4, 5, 0.5)],
)
def test_constructions_are_mdps_with_demonstrators(instance: object) -> None:
    np.testing.assert_allclose(instance.demonstrator.sum(-1), 1.0)
    np.testing.assert_allclose(instance.mdp.transitions.sum(-1), 1.0)
    assert instance.mdp.initial.sum() == pytest.approx(1.0)


def test_corridor_success_is_surviving_every_room() -> None:
    """Each step is a room with probability 0.4 after the first; each room is survived with probability 0.5."""
    horizon, room, skill = 4, 0.4, 0.5
    instance = corridor(np.full(4, room / 4), 5, horizon, skill)
    in_corridor, in_room = 1.0, 0.0
    for _ in range(horizon - 1):
        in_corridor, in_room = in_corridor * (1 - room) + in_room * skill, in_corridor * room
    assert expected_return(instance.mdp, instance.demonstrator) == pytest.approx(in_corridor + in_room * skill)


def test_wrong_shapes_and_wrong_probabilities_are_refused() -> None:
    with pytest.raises(InputError, match="shape"):
        MDP(np.ones(2) / 2, np.ones((1, 2, 2, 3)) / 3, np.zeros((1, 2, 2)))
    with pytest.raises(InputError, match="probability"):
        MDP(np.ones(2), np.ones((1, 2, 2, 2)) / 2, np.zeros((1, 2, 2)))
