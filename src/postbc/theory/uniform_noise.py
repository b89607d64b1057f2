"""Statement: a policy mixed with uniform noise either loses return or barely covers the demonstrator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from postbc.theory.estimators import Parameters, action_coverage, behavioral_cloning, posterior_mixture, uniform_mixture
from postbc.theory.instances import Instance, rare_starts
from postbc.theory.results import COLORS, Check, StatementResult, Track, tidy, untracked
from postbc.theory.tabular import Array, Counts, expected_return, sample_counts


def largest_uniform_weight(instance: Instance, counts: Counts, tolerance: float, steps: int = 40) -> Array:
    """The largest α for which π^{u,α} keeps J(π^β) − J(π^{u,α}) ≤ tolerance, on every dataset: (R,).

    Bisection with exact policy evaluation. The bracket keeps a weight that stays within tolerance below and one that does
    not above; there is one crossing only, because J(π^{u,α}) is convex in α here, is within tolerance at α = 0 and outside
    at α = 1 (where not, 1 is returned).
    """
    floor = expected_return(instance.mdp, instance.demonstrator) - tolerance
    low: Array = np.zeros(counts.shape[0])
    high: Array = np.ones(counts.shape[0])
    high_is_close = expected_return(instance.mdp, uniform_mixture(counts, high)) >= floor
    for _ in range(steps):
        middle = 0.5 * (low + high)
        close = expected_return(instance.mdp, uniform_mixture(counts, middle)) >= floor
        low, high = np.where(close, middle, low), np.where(close, high, middle)
    return np.where(high_is_close, 1.0, low)


def contexts_for(trajectories: int) -> int:
    """k = ⌈log2 T⌉ − 1, at least 2: the rarest start s̃_k then has a mass 2^{−k−1} in [1/(2T), 1/T]."""
    return max(2, math.ceil(math.log2(trajectories)) - 1)


@dataclass(frozen=True)
class UniformNoise(StatementResult):
    """Quantities of "mixing in uniform noise fails"; every array has one entry a number of trajectories T."""

    trajectories: Array
    horizon: int
    tolerance: Array
    """ε = H²S·log T/T + ξ."""
    weight: Array
    """The largest α over all datasets that keeps the return ε-close."""
    typical_weight: Array
    """Its median."""
    event: Array
    """P[T_1(s̃_k) = 1] = T·p·(1 − p)^{T−1}, exactly."""
    covered_little: Array
    """Fraction of datasets on which γ ≤ 64ε/A."""
    event_coverage: Array
    """The largest γ of π^{u,α}, at each dataset's largest α, over the datasets in the event."""
    clones_within: Array
    """Fraction of datasets on which BC itself is ε-close in return."""
    loss: dict[str, Array]
    """J(π^β) − J, mean over datasets: BC, posterior."""
    coverage: dict[str, Array]
    """Median γ over the datasets in the event: BC, uniform (at its largest α), posterior (at the theorem's parameters)."""

    def checks(self) -> list[Check]:
        small = self.tolerance < 1 / 32  # elsewhere the bounds say nothing
        ratio = (self.weight / self.tolerance)[small]
        fraction = (self.covered_little - self.event)[small]
        factor = (self.coverage["posterior"] / self.coverage["uniform"])[small]
        return [
            Check("α ≤ 32ε on every dataset", f"α ≤ {ratio.max():.2f}ε", bool((ratio <= 32).all()), "simulated"),
            Check("γ ≤ 64ε/A on the event T(s̃_k) = 1", f"γ ≤ {(2 * self.event_coverage / self.tolerance)[small].max():.2f}ε/A",
                  bool((self.event_coverage <= 32 * self.tolerance)[small].all()), "simulated"),
            Check("that event has probability ≥ 1/(4e) = 0.092", f"≥ {self.event.min():.4f}",
                  bool((self.event >= 1 / (4 * math.e)).all()), "exact"),
            Check("γ ≤ 64ε/A on at least that many datasets", f"on {self.covered_little[small].min():.3f} of them or more",
                  bool((fraction >= -0.02).all()), "simulated"),
            Check("BC itself is ε-close", f"on {self.clones_within.min():.4f} of the datasets", bool((self.clones_within == 1).all()),
                  "simulated"),
            Check("the posterior mixture is ε-close in expectation",
                  f"loses {(self.loss['posterior'] / self.tolerance)[small].max():.3f}ε or less",
                  bool((self.loss["posterior"] <= self.tolerance)[small].all()), "simulated"),
            Check("and covers more than uniform noise may", f"γ {factor.min():.1f}× to {factor.max():.0f}× as large",
                  bool((factor > 1).all()), "simulated"),
        ]  # fmt: skip

    def rows(self) -> list[dict[str, float | int | str]]:
        return [
            {
                "T": int(t),
                "ε": float(self.tolerance[i]),
                "largest α": float(self.weight[i]),
                "α/ε": float(self.weight[i] / self.tolerance[i]),
                "P[event]": float(self.event[i]),
                "γ uniform": float(self.coverage["uniform"][i]),
                "64ε/A": float(32 * self.tolerance[i]),
                "γ posterior": float(self.coverage["posterior"][i]),
                "loss of posterior/ε": float(self.loss["posterior"][i] / self.tolerance[i]),
            }
            for i, t in enumerate(self.trajectories)
        ]

    def plot(self, figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.loglog(self.trajectories, 32 * self.tolerance, color=COLORS["bound"], ls="--", lw=1, label="printed bound, 32ε")
        left.loglog(self.trajectories, self.tolerance, color=COLORS["bound"], ls=":", label="ε")
        left.loglog(self.trajectories, self.weight, "o-", ms=4, color=COLORS["uniform"], label="largest over all datasets")
        left.loglog(self.trajectories, self.typical_weight, color=COLORS["uniform"], lw=1, label="median dataset")
        tidy(left, "Uniform noise that the return allows", "demonstrations T", "largest weight α")
        right.loglog(self.trajectories, self.coverage["posterior"], "o-", ms=4, color=COLORS["posterior"], label="posterior")
        right.loglog(
            self.trajectories, self.coverage["uniform"], "o-", ms=4, color=COLORS["uniform"], label="uniform, largest α"
        )
        bound = np.minimum(32 * self.tolerance, 1)
        right.loglog(self.trajectories, bound, color=COLORS["bound"], ls="--", lw=1, label="bound on uniform, 64ε/A")
        tidy(right, "Coverage when one start was seen once (BC: 0)", "demonstrations T", "coverage γ (median)")


def uniform_noise_fails(
    seed: int = 0,
    repetitions: int = 4_000,
    track: Track = untracked,
    *,
    horizon: int = 4,
    slack: float = 0.0,
) -> UniformNoise:
    """Mixing in uniform noise fails.

    In the MDP of :func:`postbc.theory.instances.rare_starts` (S = k + 2 states, A = 2 actions), with ε = H²S·log T/T + ξ and
    Δ = 2ε: to stay ε-close to the demonstrator in return, π^{u,α} = (1 − α)·π^bc + α·unif needs α ≤ 32ε; and then it covers
    the demonstrator with γ ≤ 64ε/A at most, on an event of probability ≥ 1/(4e).

    The event, completed: the rarest start s̃_k was visited exactly once, so that BC is sure of one of two equally likely
    actions there. k is chosen so that its mass p lies in [1/(2T), 1/T]; T·p·(1 − p)^{T−1} ≥ 1/(2e). α is the largest one
    that keeps the return on the dataset at hand, by exact evaluation and bisection; T is large, because the bounds say
    something only when ε < 1/32.

    Args:
        horizon: H.
        slack: ξ.
    """
    rng = np.random.default_rng(seed)
    sizes = 2 ** np.arange(12, 25, 2)
    columns: dict[str, list[float]] = {}

    def note(name: str, value: float | np.floating) -> None:
        columns.setdefault(name, []).append(float(value))

    for size in track(sizes.tolist(), "numbers of trajectories"):
        contexts = contexts_for(int(size))
        states = contexts + 2
        tolerance = horizon**2 * states * math.log(size) / size + slack
        instance = rare_starts(contexts, horizon, gap=2 * tolerance)
        mass = float(instance.mdp.initial[contexts - 1])
        counts = sample_counts(instance.mdp, instance.demonstrator, int(size), repetitions, rng)
        event = counts[:, 0, contexts - 1].sum(-1) == 1

        theorem = Parameters.of_theorem(2, horizon, int(size))
        weight = largest_uniform_weight(instance, counts, tolerance)
        policies = {
            "BC": behavioral_cloning(counts),
            "uniform": uniform_mixture(counts, weight),
            "posterior": posterior_mixture(counts, theorem.weight, theorem.pseudo_count),
        }
        goal = float(expected_return(instance.mdp, instance.demonstrator))
        coverage = {name: action_coverage(policy, instance.demonstrator) for name, policy in policies.items()}
        loss = {name: goal - expected_return(instance.mdp, policy) for name, policy in policies.items()}
        note("tolerance", tolerance)
        note("weight", weight.max())
        note("typical_weight", np.median(weight))
        note("event", size * mass * (1 - mass) ** (size - 1.0))
        note("covered_little", (coverage["uniform"] <= 32 * tolerance).mean())
        note("event_coverage", coverage["uniform"][event].max(initial=0.0))
        note("clones_within", (loss["BC"] <= tolerance).mean())
        for name in policies:
            note(f"coverage {name}", np.median(coverage[name][event]) if event.any() else np.nan)
            note(f"loss {name}", loss[name].mean())
    arrays = {name: np.array(values) for name, values in columns.items()}
    plain = {name: values for name, values in arrays.items() if " " not in name}
    return UniformNoise(
        trajectories=sizes.astype(np.float64),
        horizon=horizon,
        loss={name: arrays[f"loss {name}"] for name in ("BC", "posterior")},
        coverage={name: arrays[f"coverage {name}"] for name in ("BC", "uniform", "posterior")},
        **plain,
    )
