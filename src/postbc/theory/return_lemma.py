"""The lemma behind the main theorem: how much return mixing in the posterior costs, compared with behavioral cloning."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from postbc.theory.estimators import behavioral_cloning, posterior_mixture
from postbc.theory.instances import Instance, fresh_draws, hardest_masses, random_instances
from postbc.theory.results import Check, StatementResult, Track, standard_error, tidy, untracked
from postbc.theory.tabular import Array, expected_return, sample_counts

FAMILIES = {"hard: rare states": "#D55E00", "hard: equal states": "#0072B2", "random": "#009E73"}


@dataclass(frozen=True)
class ReturnLemma(StatementResult):
    """Quantities of the lemma, one entry a combination of family, T, S, H, α, λ: arrays of shape (n,)."""

    family: tuple[str, ...]
    T: Array
    S: Array
    H: Array
    weight: Array
    """α."""
    pseudo_count: Array
    """λ ≥ 4·log(HT)."""
    cost: Array
    """E[J(π^bc) − J(π̃)]."""
    error: Array
    """Its standard error."""

    @property
    def cloning_term(self) -> Array:
        """(1 + αH)·H²S·log T/T."""
        return (1 + self.weight * self.H) * self.H**2 * self.S * np.log(self.T) / self.T

    @property
    def posterior_term(self) -> Array:
        """α·H²Sλ/T."""
        return self.weight * self.H**2 * self.S * self.pseudo_count / self.T

    @property
    def ratio(self) -> Array:
        """Cost, with four standard errors on top, over the lemma's right-hand side."""
        return (self.cost + 4 * self.error) / (self.cloning_term + self.posterior_term)

    def checks(self) -> list[Check]:
        alone = float((self.cost / self.posterior_term).max())
        return [
            Check("E[J(bc) − J(π̃)] ≤ C·((1+αH)·H²S·log T/T + α·H²Sλ/T)", f"C = {self.ratio.max():.3f} over {len(self.T)} settings",
                  bool(self.ratio.max() <= 1), "simulated"),
            Check("the second term alone suffices here", f"cost ≤ {alone:.3f} of it", alone <= 1, "simulated"),
        ]  # fmt: skip

    def rows(self) -> list[dict[str, float | int | str]]:
        worst = np.argsort(-self.ratio)[:20]
        return [
            {
                "instances": self.family[i],
                "T": int(self.T[i]),
                "S": int(self.S[i]),
                "H": int(self.H[i]),
                "α": float(self.weight[i]),
                "λ": float(self.pseudo_count[i]),
                "cost": float(self.cost[i]),
                "± s.e.": float(self.error[i]),
                "right-hand side": float((self.cloning_term + self.posterior_term)[i]),
                "ratio": float(self.ratio[i]),
            }
            for i in worst
        ]

    def plot(self, figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for family, color in FAMILIES.items():
            of = np.array(self.family) == family
            positive = of & (self.cost > 0)
            bound = self.cloning_term + self.posterior_term
            left.loglog(bound[positive], self.cost[positive], "o", ms=3, color=color, alpha=0.7, label=family)
            right.loglog(self.posterior_term[positive], self.cost[positive], "o", ms=3, color=color, alpha=0.7, label=family)
        for axes, label in ((left, "bound, C = 1"), (right, "the term, C = 1")):
            ends = np.array(axes.get_xlim())
            axes.loglog(ends, ends, color="#555555", ls="--", lw=1, label=label)
        tidy(left, "Both terms of the lemma", "(1+αH)·H²S·log T/T + α·H²Sλ/T", "E[J(bc) − J(π̃)]")
        tidy(right, "The second term alone", "α·H²Sλ/T", "")


def _instance(family: str, sizes: tuple[int, int, int], repetitions: int, rng: np.random.Generator) -> Instance:
    trajectories, states, horizon = sizes
    if family == "hard: rare states":
        return fresh_draws(hardest_masses(states, trajectories), 4, horizon)
    if family == "hard: equal states":
        return fresh_draws(np.full(states - 1, 1.0 / (states - 1)), 4, horizon)
    return random_instances(states, 4, horizon, repetitions, rng, concentration=None)


def return_lemma(seed: int = 0, repetitions: int = 300, track: Track = untracked) -> ReturnLemma:
    """The lemma: what the posterior costs in return.

    For λ ≥ 4·log(HT): E[J(π^bc) − J(π̃)] ≲ (1 + αH)·H²S·log T/T + α·H²Sλ/T.

    Over a grid of T, S, H, α and λ, on two hard instances (fresh draws with rare, or with equally likely, states) and on
    random MDPs with noisily optimal demonstrators. BC and mixture are compared on the same datasets.
    """
    rng = np.random.default_rng(seed)
    grid = list(itertools.product(FAMILIES, (100, 1_000, 10_000), (4, 12), (1, 3, 10)))
    columns: list[tuple[float, ...]] = []
    names: list[str] = []
    for family, *sizes in track(grid, "instances"):
        trajectories, states, horizon = sizes
        instance = _instance(family, (trajectories, states, horizon), repetitions, rng)
        counts = sample_counts(instance.mdp, instance.demonstrator, trajectories, repetitions, rng)
        cloned = expected_return(instance.mdp, behavioral_cloning(counts))
        for weight, factor in itertools.product((0.01, 0.1, 0.5, 1.0), (1, 4)):
            pseudo_count = factor * max(4 * math.log(horizon * trajectories), 4.0)
            cost = cloned - expected_return(instance.mdp, posterior_mixture(counts, weight, pseudo_count))
            entry = (trajectories, states, horizon, weight, pseudo_count, float(cost.mean()), float(standard_error(cost)))
            names.append(family)
            columns.append(entry)
    return ReturnLemma(tuple(names), *np.array(columns).T)
