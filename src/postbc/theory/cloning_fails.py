"""Statement: behavioral cloning fails to cover the demonstrator's actions, and no learner recovers from that."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from scipy.optimize import linprog

from postbc.errors import InputError
from postbc.theory.estimators import Parameters, behavioral_cloning, posterior_mixture, uniform_mixture
from postbc.theory.instances import uncovered_bandits
from postbc.theory.results import COLORS, Check, StatementResult, Track, tidy, untracked
from postbc.theory.tabular import Array, Counts, expected_return, sample_counts

ESTIMATORS = ("BC", "uniform", "posterior")


def minimax_suboptimality(likelihoods: Array, gaps: Array) -> float:
    """min over learners of the worst instance's expected suboptimality, by linear programming.

    Args:
        likelihoods: P_i(o), the probability of each observation under each instance, (I, O).
        gaps: suboptimality of each arm under each instance, (I, arms).

    A learner maps an observation to a distribution over arms: variables d(o, a) ≥ 0 with Σ_a d(o, a) = 1, and the value v
    with Σ_o P_i(o) Σ_a d(o, a)·gap_i(a) ≤ v for every i.
    """
    instances, observations = likelihoods.shape
    arms = gaps.shape[1]
    risk = (likelihoods[:, :, None] * gaps[:, None, :]).reshape(instances, -1)
    solution = linprog(
        np.append(np.zeros(observations * arms), 1.0),
        A_ub=np.hstack([risk, -np.ones((instances, 1))]),
        b_ub=np.zeros(instances),
        A_eq=np.hstack([np.kron(np.eye(observations), np.ones(arms)), np.zeros((observations, 1))]),
        b_eq=np.ones(observations),
    )
    return float(solution.fun)


def _tallies(total: int, cells: int) -> list[tuple[int, ...]]:
    return [t for t in itertools.product(range(total + 1), repeat=cells) if sum(t) == total]


def _estimates(counts: Counts, trajectories: int) -> dict[str, Array]:
    """The three estimates of a bandit's demonstrator from tallies (n, 3): name -> (n, 3)."""
    theorem = Parameters.of_theorem(3, 1, trajectories)
    counts = counts[:, None, None, :]
    estimates = {
        "BC": behavioral_cloning(counts),
        "uniform": uniform_mixture(counts, theorem.weight),
        "posterior": posterior_mixture(counts, theorem.weight, theorem.pseudo_count),
    }
    return {name: policy[:, 0, 0] for name, policy in estimates.items()}


def enumerated_minimax(epsilon: float, trajectories: int, rollouts: int, *, only_uncovered: bool = False) -> dict[str, float]:
    """The minimax suboptimality over the two instances, every observation enumerated; estimator -> value.

    The learner observes the tally of the demonstrations and the tally, with rewards, of its rollouts of the estimate.

    Args:
        only_uncovered: condition on the event T(a_2) = T(a_3) = 0.
    """
    instances = uncovered_bandits(epsilon)
    rewards = np.stack([instance.mdp.rewards[0, 0] for instance in instances])
    demonstrated = _tallies(trajectories, 3)
    weights = stats.multinomial.pmf(demonstrated, trajectories, instances[0].demonstrator[0, 0])
    if only_uncovered:
        weights = np.where(np.array(demonstrated)[:, 1:].sum(1) == 0, weights, 0.0)
        weights = weights / weights.sum()
    rolled = _tallies(rollouts, 3)
    values = {}
    for name, policies in _estimates(np.array(demonstrated), trajectories).items():
        index: dict[tuple[object, ...], int] = {}
        entries: list[tuple[int, int, float]] = []
        for (d, weight), policy in zip(zip(demonstrated, weights), policies):
            probabilities = stats.multinomial.pmf(rolled, rollouts, policy / policy.sum())
            for tally, probability in zip(rolled, probabilities):
                for i in range(2):
                    seen = (d, tally, tuple(np.array(tally) * rewards[i]))  # rewards are deterministic: arm by arm
                    entries.append((i, index.setdefault(seen, len(index)), weight * probability))
        likelihoods = np.zeros((2, len(index)))
        for i, observation, probability in entries:
            likelihoods[i, observation] += probability
        values[name] = minimax_suboptimality(likelihoods[:, likelihoods.sum(0) > 0], rewards.max(1, keepdims=True) - rewards)
    return values


def minimax_by_formula(epsilon: float, trajectories: int, rollouts: Array) -> dict[str, Array]:
    """½·E[π̂(a_1)^N], exactly, for every N: estimator -> (N,).

    One rollout of a_2 or a_3 tells the instances apart; without any, they are equally likely, and the best learner is
    wrong with probability 1/2. π̂(a_1) depends on T(a_1) ~ Binomial(T, 1 − 4ε) alone.
    """
    common = np.arange(trajectories + 1)
    weights = stats.binom.pmf(common, trajectories, 1 - 4 * epsilon)
    estimates = _estimates(np.stack([common, trajectories - common, np.zeros_like(common)], axis=-1), trajectories)
    return {name: 0.5 * (weights * policy[:, :1].T ** rollouts[:, None]).sum(-1) for name, policy in estimates.items()}


def smallest_probability() -> float:
    """The smallest (1 − 4ε)^T over all ε > 0 and 1 ≤ T ≤ 1/(20ε).

    For a given T the worst ε is 1/(20T), which leaves (1 − 1/(5T))^T, increasing in T to e^{−1/5}: T = 1 decides.
    """
    trajectories = np.arange(1, 10_001)
    return float(((1 - 1 / (5 * trajectories)) ** trajectories).min())


@dataclass(frozen=True)
class CloningFails(StatementResult):
    """Quantities of "BC fails to cover"."""

    epsilon: float
    trajectories: Array
    """T, (n,); the last is ⌊1/(20ε)⌋."""
    probability: Array
    """P[T(a_2) = T(a_3) = 0] = (1 − 4ε)^T, (n,)."""
    frequency: Array
    """How often that happened among the sampled datasets, (n,)."""
    repetitions: int
    returns: tuple[float, float]
    """J(π^β) and the largest J(π^bc) on that event, over both instances."""
    small: tuple[int, int]
    """T and N of the enumeration."""
    enumerated: dict[str, float]
    conditional: dict[str, float]
    formula: dict[str, float]
    """The minimax suboptimality at T, N = small: by linear program, on the event alone, and by formula."""
    rollouts: Array
    minimax: dict[str, Array]
    """At the largest T, estimator -> (N,)."""

    def checks(self) -> list[Check]:
        error = np.abs(self.frequency - self.probability)
        spread = 4 * np.sqrt(self.probability * (1 - self.probability) / self.repetitions)
        gap = max(abs(self.enumerated[name] - self.formula[name]) for name in ESTIMATORS)
        last, plateau = float(self.probability[-1]), float(self.minimax["BC"][-1])
        return [
            Check("(1 − 4ε)^T ≥ 1/2 whenever T ≤ 1/(20ε)", f"≥ {smallest_probability():.4g}; here ≥ {last:.4f}",
                  min(smallest_probability(), last) >= 0.5, "exact"),
            Check("sampled datasets agree with (1 − 4ε)^T", f"largest error {error.max():.4f}",
                  bool((error <= spread).all()), "simulated"),
            Check("J(π^β) = 2ε, and J(π^bc) = 0 on the event", f"{self.returns[0]:.4g}, {self.returns[1]:.4g}",
                  bool(np.isclose(self.returns[0], 2 * self.epsilon) and self.returns[1] == 0), "exact"),
            Check("minimax suboptimality on the event ≥ 1/2", f"{self.conditional['BC']:.6f} (linear program)",
                  self.conditional["BC"] >= 0.5 - 1e-9, "exact"),
            Check("minimax suboptimality over all datasets ≥ 1/4", f"{plateau:.4f} = ½(1−4ε)^T = {last / 2:.4f}",
                  plateau >= 0.25, "exact"),
            Check("formula ½·E[π̂(a1)^N] = linear program", f"difference {gap:.1e}", gap < 1e-7, "exact"),
        ]  # fmt: skip

    def rows(self) -> list[dict[str, float | int | str]]:
        return [
            {"rollouts N": int(n), **{f"minimax suboptimality, {name}": float(self.minimax[name][i]) for name in ESTIMATORS}}
            for i, n in enumerate(self.rollouts)
        ]

    def plot(self, figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.plot(self.trajectories, self.probability, color=COLORS["BC"], label="$(1-4\\varepsilon)^T$, exact")
        left.plot(self.trajectories, self.frequency, "o", ms=4, mfc="white", color=COLORS["BC"], label="sampled datasets")
        left.axhline(0.5, color=COLORS["bound"], ls="--", lw=1, label="1/2")
        left.set_ylim(0, 1.02)
        tidy(left, f"BC never plays $a_2$, $a_3$ (ε = {self.epsilon:g})", "demonstrations T", "probability")
        for name in ESTIMATORS:
            right.plot(self.rollouts, self.minimax[name], color=COLORS[name], label=name)
        right.axhline(self.probability[-1] / 2, color=COLORS["bound"], ls="--", lw=1, label="$\\frac{1}{2}(1-4\\varepsilon)^T$")
        right.set_xscale("log")
        right.set_ylim(0, 0.52)
        title = f"Best possible learner, T = {int(self.trajectories[-1])}"
        tidy(right, title, "rollouts of the pretrained policy, N", "worst-case suboptimality")


def bc_fails_to_cover(
    seed: int = 0, repetitions: int = 20_000, track: Track = untracked, *, epsilon: float = 0.005
) -> CloningFails:
    """BC fails to cover.

    Bandits with three arms, r¹ = (0, 1, 0) and r² = (0, 0, 1), demonstrator π^β = (1 − 4ε, 2ε, 2ε), ε ∈ (0, 1/8] and
    T ≤ 1/(20ε) demonstrations. With probability (1 − 4ε)^T ≥ 1/2 neither a_2 nor a_3 is demonstrated. Then J(π^β) = 2ε
    but J(π^bc) = 0, and every learner, given any number of rollouts of π^bc, has expected suboptimality ≥ 1/2 on one of
    the two instances.

    The 1/2 is a statement about that event; over all datasets the value is ½·(1 − 4ε)^T ≥ 1/4, for any N.
    """
    if not 0 < epsilon <= 1 / 20:
        raise InputError("no dataset is small enough", key="epsilon", found=epsilon, expected="0 < ε ≤ 1/20, so that T ≥ 1")
    rng = np.random.default_rng(seed)
    most = math.floor(1 / (20 * epsilon) + 1e-9)
    sizes = np.arange(1, most + 1)
    first, second = uncovered_bandits(epsilon)
    frequency, cloned = [], 0.0
    for size in track(sizes.tolist(), "datasets"):
        counts = sample_counts(first.mdp, first.demonstrator, int(size), repetitions, rng)
        event = counts[:, 0, 0, 1:].sum(-1) == 0
        frequency.append(event.mean())
        policies = behavioral_cloning(counts[event])
        cloned = max(cloned, *(float(expected_return(i.mdp, policies).max(initial=0.0)) for i in (first, second)))
    small = (min(most, 4), 5)
    rollouts = np.unique(np.geomspace(1, 1_000, 19).round())
    return CloningFails(
        epsilon=epsilon,
        trajectories=sizes.astype(np.float64),
        probability=np.power(1 - 4 * epsilon, sizes.astype(np.float64)),
        frequency=np.array(frequency),
        repetitions=repetitions,
        returns=(float(expected_return(second.mdp, second.demonstrator)), cloned),
        small=small,
        enumerated=enumerated_minimax(epsilon, *small),
        conditional=enumerated_minimax(epsilon, *small, only_uncovered=True),
        formula={name: float(v[0]) for name, v in minimax_by_formula(epsilon, small[0], np.array([small[1]])).items()},
        rollouts=rollouts,
        minimax=minimax_by_formula(epsilon, most, rollouts),
    )
