"""The MDPs and demonstrators on which the statements are made: the paper's constructions, hard and random instances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from postbc.theory.tabular import MDP, Array, action_values, optimal_policy


@dataclass(frozen=True)
class Instance:
    """An MDP with the demonstrator who acts in it."""

    mdp: MDP
    demonstrator: Array
    """π^β_h(a|s), (..., H, S, A)."""


def bandit(rewards: list[float], demonstrator: list[float]) -> Instance:
    """One state, one step."""
    arms = len(rewards)
    mdp = MDP(np.ones(1), np.ones((1, 1, arms, 1)), np.array(rewards, dtype=np.float64).reshape(1, 1, arms))
    return Instance(mdp, np.array(demonstrator, dtype=np.float64).reshape(1, 1, arms))


def uncovered_bandits(epsilon: float) -> tuple[Instance, Instance]:
    """The two bandits of "BC fails to cover": r¹ = (0, 1, 0), r² = (0, 0, 1), π^β = (1 − 4ε, 2ε, 2ε) in both."""
    demonstrator = [1 - 4 * epsilon, 2 * epsilon, 2 * epsilon]
    return bandit([0, 1, 0], demonstrator), bandit([0, 0, 1], demonstrator)


def one_rare_arm(arms: int, rare: int, probability: float) -> Instance:
    """The bandits of "near-optimality": r(a_1) = 1, others 0; π^{β,i} plays a_1, and a_i with a small probability."""
    demonstrator = [0.0] * arms
    demonstrator[0], demonstrator[rare] = 1.0 - probability, probability
    return bandit([1.0] + [0.0] * (arms - 1), demonstrator)


def rare_starts(contexts: int, horizon: int, gap: float) -> Instance:
    """The MDP of "mixing in uniform noise fails".

    States s̃_1 … s̃_k (indices 0 … k−1), s_1 (k), s_2 (k+1); actions a_1, a_2. The s̃_i are absorbing and pay only in the
    first step: 1 for a_1, 1 − 2Δ for a_2. s_1 pays 1 in the last step to who has played a_1 all along; a_2 leads from it
    to s_2, absorbing, where nothing is paid. π^β is uniform on the s̃_i and plays a_1 in s_1.

    Completed here, because the printed description leaves it open:
      * P_0(s_1) = 1/2 and P_0(s̃_i) = 2^{−i−1} for i ≥ 2 sum to 3/4 − 2^{−k−1}: s̃_1 takes the rest, 1/4 + 2^{−k−1}. The
        argument lives on the rare s̃_i, whose masses stay as printed.
      * π^β in s_2, which it never reaches: uniform. It changes no return and, BC being uniform there too, no coverage.

    Args:
        contexts: k.
        gap: Δ.
    """
    states, stay, fallen = contexts + 2, contexts, contexts + 1
    initial = np.zeros(states)
    initial[:contexts] = 2.0 ** -(np.arange(1, contexts + 1) + 1.0)
    initial[stay] = 0.5
    initial[0] = 1.0 - initial[1:].sum()

    transitions = np.zeros((horizon, states, 2, states))
    transitions[:, np.arange(states), :, np.arange(states)] = 1.0
    transitions[:, stay, 1] = 0.0
    transitions[:, stay, 1, fallen] = 1.0

    rewards = np.zeros((horizon, states, 2))
    rewards[0, :contexts] = [1.0, 1.0 - 2.0 * gap]
    rewards[-1, stay, 0] = 1.0

    demonstrator = np.full((horizon, states, 2), 0.5)
    demonstrator[:, stay] = [1.0, 0.0]
    return Instance(MDP(initial, transitions, rewards), demonstrator)


def fresh_draws(masses: Array, actions: int, horizon: int) -> Instance:
    """A hard instance for cloning (after Rajaraman et al. 2020): one mistake costs all the rest of the episode.

    In every good state the demonstrator's action pays 1 and draws the next good state afresh from `masses`; any other
    action pays nothing and leads to an absorbing bad state (the last index).

    Args:
        masses: distribution over the S − 1 good states.
    """
    states = len(masses) + 1
    initial = np.append(masses, 0.0)
    transitions = np.zeros((horizon, states, actions, states))
    transitions[..., -1] = 1.0
    transitions[:, :-1, 0] = initial
    rewards = np.zeros((horizon, states, actions))
    rewards[:, :-1, 0] = 1.0
    demonstrator = np.zeros((horizon, states, actions))
    demonstrator[..., 0] = 1.0
    return Instance(MDP(initial, transitions, rewards), demonstrator)


def hardest_masses(states: int, trajectories: int) -> Array:
    """S − 2 good states of mass 1/(T+1), each missed by T trajectories with probability about 1/e; one takes the rest."""
    rare = np.full(states - 2, 1.0 / (trajectories + 1))
    return np.append(rare, 1.0 - rare.sum())


def rare_actions(states: int, actions: int, probability: float) -> Instance:
    """One step, all states equally likely, every action but the first rare: what makes coverage hard."""
    mdp = MDP(
        np.full(states, 1.0 / states), np.full((1, states, actions, states), 1.0 / states), np.zeros((1, states, actions))
    )
    demonstrator = np.full((1, states, actions), probability / (actions - 1))
    demonstrator[..., 0] = 1.0 - probability
    return Instance(mdp, demonstrator)


def random_instances(
    states: int,
    actions: int,
    horizon: int,
    repetitions: int,
    rng: np.random.Generator,
    *,
    concentration: float | None = 1.0,
    temperature: float = 0.1,
) -> Instance:
    """A different random MDP a repetition: transitions Dirichlet(1/2), rewards uniform on [0, 1].

    Args:
        concentration: demonstrators drawn from Dirichlet(concentration) in every state; None: noisily optimal ones,
            softmax(Q*/temperature).
    """
    mdp = MDP(
        rng.dirichlet(np.ones(states), size=repetitions),
        rng.dirichlet(np.full(states, 0.5), size=(repetitions, horizon, states, actions)),
        rng.random((repetitions, horizon, states, actions)),
    )
    if concentration is not None:
        return Instance(mdp, rng.dirichlet(np.full(actions, concentration), size=(repetitions, horizon, states)))
    values = action_values(mdp, optimal_policy(mdp))
    weights = np.exp((values - values.max(-1, keepdims=True)) / temperature)
    return Instance(mdp, weights / weights.sum(-1, keepdims=True))


def corridor(rooms: Array, actions: int, horizon: int, skill: float) -> Instance:
    """A corridor in which every step is safe when done right, with rooms off it that few demonstrations enter.

    State 0 is the corridor, 1 … n the rooms, the last one failure (absorbing). In the corridor action 0 goes on: into
    room i with probability `rooms[i]`, else along the corridor; in room i one action (i + 1 mod A) leads back. Any other
    action fails. Who has not failed by the end of the last step has succeeded: return 1, so J is a success rate.
    The demonstrator is perfect in the corridor; in a room it does the right thing with probability `skill` and spreads
    the rest over the other actions.

    Args:
        rooms: probability of entering each room from the corridor, (n,).
    """
    count, failed = len(rooms), len(rooms) + 1
    states, room = count + 2, np.arange(1, count + 1)
    right = (np.arange(count) + 2) % actions
    transitions = np.zeros((horizon, states, actions, states))
    transitions[..., failed] = 1.0
    transitions[:, 0, 0] = np.concatenate([[1.0 - rooms.sum()], rooms, [0.0]])
    transitions[:, room, right] = np.eye(states)[0]

    rewards = np.zeros((horizon, states, actions))
    rewards[-1, 0, 0] = 1.0
    rewards[-1, room, right] = 1.0

    demonstrator = np.full((horizon, states, actions), (1.0 - skill) / (actions - 1))
    demonstrator[:, room, right] = skill
    demonstrator[:, [0, failed]] = np.eye(actions)[0]
    initial = np.eye(states)[0]
    return Instance(MDP(initial, transitions, rewards), demonstrator)
