"""Finite-horizon tabular MDPs: exact values and occupancies, and datasets of trajectories drawn from a policy.

Shape letters of this package: R repetitions, H horizon, S states, A actions. Every array may carry leading repetition
axes, which broadcast; there is no loop over repetitions anywhere, only over the H steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from postbc.errors import InputError

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class MDP:
    """A finite-horizon tabular MDP, or a stack of them along leading axes."""

    initial: Array
    """Distribution of the first state, (..., S)."""
    transitions: Array
    """Distribution of the next state, (..., H, S, A, S)."""
    rewards: Array
    """Deterministic rewards, (..., H, S, A)."""

    def __post_init__(self) -> None:
        steps, states, actions = self.rewards.shape[-3:]
        if self.transitions.shape[-4:] != (steps, states, actions, states) or self.initial.shape[-1] != states:
            raise InputError(
                "the arrays of the MDP disagree in shape",
                found=f"initial {self.initial.shape}, transitions {self.transitions.shape}, rewards {self.rewards.shape}",
                expected="initial (..., S), transitions (..., H, S, A, S), rewards (..., H, S, A)",
            )
        for name, probabilities in (("initial", self.initial), ("transitions", self.transitions)):
            if (probabilities < 0).any() or not np.allclose(probabilities.sum(-1), 1.0, rtol=0, atol=1e-9):
                raise InputError("the MDP holds something that is no probability distribution", key=name)

    @property
    def horizon(self) -> int:
        return self.rewards.shape[-3]

    @property
    def states(self) -> int:
        return self.rewards.shape[-2]

    @property
    def actions(self) -> int:
        return self.rewards.shape[-1]


def action_values(mdp: MDP, policy: Array) -> Array:
    """Q_h(s, a) = r_h(s, a) + Σ_x P_h(x|s, a) Σ_b π_{h+1}(b|x) Q_{h+1}(x, b), by backward induction.

    Args:
        policy: π_h(a|s), (..., H, S, A).

    Returns:
        (..., H, S, A).
    """
    batch = np.broadcast_shapes(policy.shape[:-3], mdp.rewards.shape[:-3], mdp.transitions.shape[:-4])
    values = np.zeros((*batch, *mdp.rewards.shape[-3:]))
    ahead = np.zeros((*batch, mdp.states))
    for h in reversed(range(mdp.horizon)):
        values[..., h, :, :] = mdp.rewards[..., h, :, :] + _expect(mdp.transitions[..., h, :, :, :], ahead)
        ahead = (policy[..., h, :, :] * values[..., h, :, :]).sum(-1)
    return values


def _expect(transitions: Array, values: Array) -> Array:
    """Σ_x P(x|s, a) V(x): transitions (..., S, A, S), values (..., S) -> (..., S, A)."""
    if transitions.ndim == 3:  # one MDP for all repetitions: a single matrix product
        return np.asarray(np.tensordot(values, transitions, axes=([-1], [-1])), np.float64)
    return np.einsum("...sax,...x->...sa", transitions, values)


def expected_return(mdp: MDP, policy: Array) -> Array:
    """J(π), exactly: (...)."""
    first = (policy[..., 0, :, :] * action_values(mdp, policy)[..., 0, :, :]).sum(-1)
    return (mdp.initial * first).sum(-1)


def optimal_policy(mdp: MDP) -> Array:
    """A deterministic optimal policy, (..., H, S, A); of tied actions, the first."""
    greedy = np.zeros(mdp.rewards.shape)
    ahead = np.zeros(mdp.rewards.shape[:-3] + (mdp.states,))
    for h in reversed(range(mdp.horizon)):
        values = mdp.rewards[..., h, :, :] + _expect(mdp.transitions[..., h, :, :, :], ahead)
        np.put_along_axis(greedy[..., h, :, :], values.argmax(-1)[..., None], 1.0, axis=-1)
        ahead = values.max(-1)
    return greedy


def occupancies(mdp: MDP, policy: Array) -> Array:
    """The probability of being in s at step h and playing a there, by forward induction: (..., H, S, A)."""
    batch = np.broadcast_shapes(policy.shape[:-3], mdp.initial.shape[:-1], mdp.transitions.shape[:-4])
    visits = np.zeros((*batch, *mdp.rewards.shape[-3:]))
    states = np.broadcast_to(mdp.initial, (*batch, mdp.states))
    for h in range(mdp.horizon):
        visits[..., h, :, :] = states[..., None] * policy[..., h, :, :]
        states = np.einsum("...sa,...sax->...x", visits[..., h, :, :], mdp.transitions[..., h, :, :, :])
    return visits


def _walk(
    mdp: MDP, policy: Array, trajectories: int, repetitions: int, rng: np.random.Generator
) -> Iterator[tuple[Counts, Counts]]:
    """Step by step, how often each (s, a) and each (s, a, next s) occurs among the trajectories.

    The counts of T independent trajectories are themselves a Markov chain of multinomials, so a dataset costs the same
    whatever T is, and has exactly the distribution of T single trajectories tallied.
    """
    states = rng.multinomial(trajectories, mdp.initial, size=(repetitions,) if mdp.initial.ndim == 1 else None)
    for h in range(mdp.horizon):
        pairs = rng.multinomial(states, policy[..., h, :, :])
        triples = rng.multinomial(pairs, mdp.transitions[..., h, :, :, :])
        yield pairs, triples
        states = triples.sum((-3, -2))


def sample_counts(mdp: MDP, policy: Array, trajectories: int, repetitions: int, rng: np.random.Generator) -> Counts:
    """T_h(s, a) of `repetitions` independent datasets of T trajectories each: (R, H, S, A).

    An MDP or policy with a leading axis has one entry a repetition.
    """
    return np.stack([pairs for pairs, _ in _walk(mdp, policy, trajectories, repetitions, rng)], axis=-3)


def sample_transition_counts(mdp: MDP, policy: Array, trajectories: int, repetitions: int, rng: np.random.Generator) -> Counts:
    """How often (s, a, next s) occurs at step h: (R, H, S, A, S)."""
    return np.stack([triples for _, triples in _walk(mdp, policy, trajectories, repetitions, rng)], axis=-4)


def sample_trajectories(
    mdp: MDP, policy: Array, episodes: int, rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Single trajectories, for learners that need to know which reward followed which action.

    Args:
        mdp: one MDP for all repetitions.
        policy: (R, H, S, A).

    Returns:
        states and actions, each (R, episodes, H).
    """
    repetitions = policy.shape[0]
    rows = np.arange(repetitions)[:, None]
    states = np.zeros((repetitions, episodes, mdp.horizon), dtype=np.intp)
    actions = np.zeros_like(states)
    state = _draw(np.broadcast_to(mdp.initial, (repetitions, episodes, mdp.states)), rng)
    for h in range(mdp.horizon):
        action = _draw(policy[rows, h, state], rng)
        states[..., h], actions[..., h] = state, action
        state = _draw(mdp.transitions[h, state, action], rng)
    return states, actions


def _draw(probabilities: Array, rng: np.random.Generator) -> NDArray[np.intp]:
    """One index a row by inverting the distribution function; what has probability zero is never drawn."""
    cumulative = probabilities.cumsum(-1)
    threshold = rng.random(probabilities.shape[:-1]) * cumulative[..., -1]  # rounding may leave the total below one
    return (threshold[..., None] >= cumulative).sum(-1)
