"""Two learners that see nothing but rollouts of the pretrained policy: Best-of-N and a policy gradient."""

from __future__ import annotations

import numpy as np

from postbc.theory.tabular import MDP, Array, Counts, expected_return, sample_trajectories

UNTRIED = -np.inf
"""The critic's value of an action that no rollout tried."""


def in_sample_values(transition_counts: Counts, rewards: Array) -> Array:
    """The critic of Best-of-N, fitted on rollouts: Q̂_h(s, a) = r_h(s, a) + Σ_x P̂_h(x|s, a)·max over tried b of Q̂_{h+1}(x, b).

    The limit of implicit Q-learning in a table as the expectile goes to 1: it takes maxima over actions in the data alone.

    Args:
        transition_counts: (R, H, S, A, S).
        rewards: (H, S, A); deterministic, so one visit reveals them, and they are used only where there was one.

    Returns:
        (R, H, S, A), :data:`UNTRIED` where (s, a) was not visited at step h.
    """
    visits = transition_counts.sum(-1)
    values = np.full(visits.shape, UNTRIED)
    ahead = np.zeros((visits.shape[0], visits.shape[2]))
    for h in reversed(range(visits.shape[1])):
        model = transition_counts[:, h] / np.maximum(visits[:, h], 1)[..., None]
        values[:, h] = np.where(visits[:, h] > 0, rewards[h] + np.einsum("rsax,rx->rsa", model, ahead), UNTRIED)
        best = values[:, h].max(-1)
        ahead = np.where(np.isfinite(best), best, 0.0)  # a state without visits at this step follows no visited pair
    return values


def best_of(policy: Array, values: Array, candidates: int) -> Array:
    """The policy that draws N actions from π and plays the one of the highest value (of ties, the first drawn).

    An action is played with probability (F(a)^N − F⁻(a)^N)·π(a)/(F(a) − F⁻(a)), where F and F⁻ are the probabilities under π
    of a value at most, and below, its own.

    Args:
        policy: π, (..., A).
        values: (..., A).
        candidates: N.
    """
    own, other = values[..., :, None], values[..., None, :]
    at_most = (policy[..., None, :] * (other <= own)).sum(-1)
    below = (policy[..., None, :] * (other < own)).sum(-1)
    tied = at_most - below
    share = np.divide(policy, tied, out=np.zeros_like(policy), where=tied > 0)
    chosen = share * (at_most**candidates - below**candidates)
    return chosen / chosen.sum(-1, keepdims=True)


def policy_gradient(
    mdp: MDP,
    policy: Array,
    updates: int,
    episodes: int,
    learning_rate: float,
    rng: np.random.Generator,
    evaluate_every: int = 10,
) -> tuple[Array, Array]:
    """REINFORCE on the logits of a table, started from the pretrained policy: (R, H, S, A) -> learning curves.

    Every update rolls the current policy out and follows Σ_h ∇log π_h(a_h|s_h)·(return to go − mean return to go). An action
    that the pretrained policy never plays has the logit −∞ and stays there.

    Returns:
        episodes seen, (n,), and the exact J of the policy after as many, (R, n).
    """
    repetitions, horizon, states, actions = policy.shape
    with np.errstate(divide="ignore"):
        logits = np.log(policy)
    seen, returns = [0], [expected_return(mdp, policy)]
    steps = np.arange(horizon)
    rows = np.arange(repetitions)[:, None, None]
    for update in range(1, updates + 1):
        state, action = sample_trajectories(mdp, policy, episodes, rng)
        to_go = np.flip(np.flip(mdp.rewards[steps, state, action], -1).cumsum(-1), -1)
        advantage = to_go - to_go.mean(1, keepdims=True)
        cells = ((rows * horizon + steps) * states + state) * actions + action
        taken = np.bincount(cells.ravel(), weights=advantage.ravel(), minlength=policy.size).reshape(policy.shape)
        gradient = (taken - policy * taken.sum(-1, keepdims=True)) / episodes
        logits = logits + learning_rate * gradient
        logits -= logits.max(-1, keepdims=True)
        policy = np.exp(logits)
        policy /= policy.sum(-1, keepdims=True)
        if update % evaluate_every == 0:
            seen.append(update * episodes)
            returns.append(expected_return(mdp, policy))
    return np.array(seen, dtype=np.float64), np.stack(returns, axis=-1)


def best_return_in_support(mdp: MDP, policy: Array) -> Array:
    """The largest J of a policy that plays no action that `policy` never plays: the ceiling of either learner, (R,)."""
    ahead = np.zeros((*policy.shape[:-3], mdp.states))
    for h in reversed(range(mdp.horizon)):
        values = mdp.rewards[h] + np.einsum("sax,...x->...sa", mdp.transitions[h], ahead)
        ahead = np.where(policy[..., h, :, :] > 0, values, -np.inf).max(-1)
    return (mdp.initial * ahead).sum(-1)
