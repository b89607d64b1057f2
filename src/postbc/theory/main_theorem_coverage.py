"""Main theorem, second half: the posterior mixture covers the demonstrator's actions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from postbc.theory.estimators import (
    Parameters,
    action_coverage,
    behavioral_cloning,
    constant_needed,
    coverage_guarantee,
    posterior_mixture,
    uniform_mixture,
)
from postbc.theory.instances import Instance, random_instances, rare_actions, rare_starts
from postbc.theory.results import COLORS, Check, StatementResult, Track, tidy, untracked
from postbc.theory.tabular import Array, sample_counts
from postbc.theory.uniform_noise import contexts_for

ESTIMATORS = ("BC", "uniform", "posterior")


def _rare_actions(trajectories: int, failure: float, states: int = 6, actions: int = 64) -> Instance:
    """Each of S·(A − 1) rare actions is missed with probability about 3δ/(SA), so that more than δ of the datasets miss one.

    Many actions, because λ = A is then the theorem's pseudo-count, and an action that was missed gets no more than α/T(s).
    """
    each = states / trajectories * math.log(states * actions / (3 * failure))
    return rare_actions(states, actions, min(0.5, (actions - 1) * each))


def _families(trajectories: int, failure: float, repetitions: int, rng: np.random.Generator) -> dict[str, Instance]:
    """Random and adversarial instances; those with a leading axis differ from dataset to dataset."""
    states, actions, horizon = 6, 4, 5
    families = {
        "rare actions": _rare_actions(trajectories, failure),
        "rare starts": rare_starts(contexts_for(trajectories), horizon, gap=0.1),
    }
    kinds = {"random, Dirichlet(1)": 1.0, "random, Dirichlet(0.1)": 0.1, "random, noisily optimal": None}
    for name, concentration in kinds.items():
        families[name] = random_instances(states, actions, horizon, repetitions, rng, concentration=concentration)
    return families


@dataclass(frozen=True)
class Family:
    """One family of instances over T: arrays of shape (n,)."""

    holds: Array
    """Fraction of datasets on which the guarantee holds for all (s, a, h)."""
    constant: Array
    """Smallest constant in place of 64 for which it holds on a fraction 1 − δ of the datasets."""
    coverage: dict[str, Array]
    """The γ reached on a fraction 1 − δ of the datasets: BC, uniform, posterior."""


@dataclass(frozen=True)
class MainTheoremCoverage(StatementResult):
    """Quantities of the main theorem's second half."""

    trajectories: Array
    failure: float
    """δ."""
    repetitions: int
    families: dict[str, Family]

    def checks(self) -> list[Check]:
        held = min(float(family.holds.min()) for family in self.families.values())
        constants = {name: float(family.constant.max()) for name, family in self.families.items()}
        worst = max(constants, key=lambda name: constants[name])
        rare = self.families["rare starts"].coverage
        return [
            Check(f"the guarantee holds with probability ≥ 1 − δ = {1 - self.failure:g}", f"on {held:.4f} of the datasets at least",
                  held >= 1 - self.failure, "simulated"),
            Check("a smaller constant than 64 would do", f"{constants[worst]:.2f} ({worst})", constants[worst] <= 64, "simulated"),
            Check("rare starts: γ of the posterior mixture stays, BC's is 0, and uniform noise's vanishes",
                  f"posterior ≥ {rare['posterior'].min():.3f}, BC {rare['BC'].max():.3f}, uniform {rare['uniform'][-1]:.5f} at last",
                  bool((rare["posterior"] > rare["BC"]).all() and rare["posterior"][-1] > 10 * rare["uniform"][-1]), "simulated"),
        ]  # fmt: skip

    def rows(self) -> list[dict[str, float | int | str]]:
        return [
            {
                "instances": name,
                "T": int(t),
                "guarantee holds": float(family.holds[i]),
                "constant needed": float(family.constant[i]),
                **{f"γ {e}": float(family.coverage[e][i]) for e in ESTIMATORS},
            }
            for name, family in self.families.items()
            for i, t in enumerate(self.trajectories)
        ]

    def plot(self, figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for name, family in self.families.items():
            left.loglog(self.trajectories, np.maximum(family.constant, 1e-2), "o-", ms=4, label=name)
        left.set_yticks([0.01, 0.1, 1, 10, 64], ["0", "0.1", "1", "10", "64"])
        left.axhline(64, color=COLORS["bound"], ls="--", lw=1, label="the theorem's 64")
        left.set_ylim(top=150)
        tidy(left, f"Constant that the guarantee needs (δ = {self.failure:g})", "demonstrations T", "constant")
        labels = {"uniform": "uniform, α = S·log T/T", "posterior": "posterior, the theorem's α"}
        for estimator in ESTIMATORS:
            coverage = np.maximum(self.families["rare starts"].coverage[estimator], 1e-4)
            right.loglog(
                self.trajectories, coverage, "o-", ms=4, color=COLORS[estimator], label=labels.get(estimator, estimator)
            )
        right.set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0", "0.001", "0.01", "0.1", "1"])
        tidy(right, f"Rare starts: γ reached with probability {1 - self.failure:g}", "demonstrations T", "coverage γ")


def main_theorem_coverage(
    seed: int = 0, repetitions: int = 2_000, track: Track = untracked, *, failure: float = 0.1
) -> MainTheoremCoverage:
    """Main theorem, coverage.

    With λ = max{A, 4·log(HT)} and α = 1/max{A, H, log(HT)}, with probability ≥ 1 − δ over the demonstrations, for all s, a, h:
    π̃_h(a|s) ≥ α·min{π^β_h(a|s)/(64·log(SH/δ)), 1/(2λ)}.

    Over random MDPs (one a dataset) with random demonstrators, and over two adversarial families: actions just so rare that
    a dataset tends to miss one, and the rare starts of "mixing in uniform noise fails". The uniform mixture has the weight
    S·log T/T here, which is what keeps its return at the rate of BC.

    Args:
        failure: δ ≤ 0.9.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([10, 30, 100, 300, 1_000, 3_000, 10_000, 100_000])
    points: dict[str, list[tuple[float, float, dict[str, float]]]] = {}
    for size in track(sizes.tolist(), "numbers of trajectories"):
        for name, instance in _families(int(size), failure, repetitions, rng).items():
            mdp, demonstrator = instance.mdp, instance.demonstrator
            theorem = Parameters.of_theorem(mdp.actions, mdp.horizon, int(size))
            counts = sample_counts(mdp, demonstrator, int(size), repetitions, rng)
            policies = {
                "BC": behavioral_cloning(counts),
                "uniform": uniform_mixture(counts, min(1.0, mdp.states * math.log(size) / size)),
                "posterior": posterior_mixture(counts, theorem.weight, theorem.pseudo_count),
            }
            holds = (policies["posterior"] >= coverage_guarantee(demonstrator, theorem, failure)).all((-3, -2, -1))
            constant = np.quantile(constant_needed(policies["posterior"], demonstrator, theorem, failure), 1 - failure)
            coverage = {e: float(np.quantile(action_coverage(policies[e], demonstrator), failure)) for e in ESTIMATORS}
            points.setdefault(name, []).append((float(holds.mean()), float(constant), coverage))
    families = {
        name: Family(
            holds=np.array([holds for holds, _, _ in entries]),
            constant=np.array([constant for _, constant, _ in entries]),
            coverage={e: np.array([coverage[e] for _, _, coverage in entries]) for e in ESTIMATORS},
        )
        for name, entries in points.items()
    }
    return MainTheoremCoverage(sizes.astype(np.float64), failure, repetitions, families)
