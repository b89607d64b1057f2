"""Main theorem, first half: the posterior mixture loses return at the rate of behavioral cloning itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from postbc.theory.estimators import Parameters, behavioral_cloning, posterior_mixture, uniform_mixture
from postbc.theory.instances import Instance, fresh_draws, hardest_masses, random_instances
from postbc.theory.results import (
    COLORS,
    Check,
    PowerLaw,
    StatementResult,
    Track,
    fit_power_law,
    standard_error,
    tidy,
    untracked,
)
from postbc.theory.tabular import Array, expected_return, sample_counts

ESTIMATORS = ("BC", "posterior", "uniform, same α")


class Sizes(NamedTuple):
    """What the rate depends on."""

    T: int = 8192
    S: int = 16
    A: int = 4
    H: int = 8

    @property
    def rate(self) -> float:
        """H²S·log T/T."""
        return self.H**2 * self.S * math.log(self.T) / self.T


#: The grid of every sweep; the other sizes stay at their defaults.
SWEEPS: dict[str, tuple[int, ...]] = {
    "T": (512, 1024, 2048, 4096, 8192, 16384, 32768),
    "S": (8, 16, 32, 64, 128),
    "A": (2, 4, 8, 16, 32, 64),
    "H": (2, 4, 8, 16, 32),
}


def suboptimalities(instance: Instance, sizes: Sizes, repetitions: int, rng: np.random.Generator) -> dict[str, Array]:
    """J(π^β) − J(π̂) of each estimator, one value a dataset: name -> (R,). Parameters as in the theorem."""
    theorem = Parameters.of_theorem(sizes.A, sizes.H, sizes.T)
    counts = sample_counts(instance.mdp, instance.demonstrator, sizes.T, repetitions, rng)
    goal = expected_return(instance.mdp, instance.demonstrator)
    policies = {
        "BC": behavioral_cloning(counts),
        "posterior": posterior_mixture(counts, theorem.weight, theorem.pseudo_count),
        "uniform, same α": uniform_mixture(counts, theorem.weight),
    }
    return {name: goal - expected_return(instance.mdp, policy) for name, policy in policies.items()}


def expected_suboptimality_of_fresh_draws(sizes: Sizes, masses: Array, weight: float, pseudo_count: float) -> float:
    """J(π^β) − E[J(π̃)] on :func:`~postbc.theory.instances.fresh_draws`, exactly (weight = 0: of BC).

    The counts of different steps are independent there, and so are the mistakes of π̃: it is still in a good state after
    h steps with probability (1 − e)^h, where e = Σ_i ρ_i·E[1 − π̃(a_1|i)] sums over T(i) ~ Binomial(T, ρ_i).
    """
    visits = np.arange(sizes.T + 1)[:, None]
    probabilities = stats.binom.pmf(visits, sizes.T, masses)
    other = 1 - 1 / sizes.A
    mistake = np.where(visits > 0, weight * pseudo_count * other / (visits + pseudo_count), other)
    error = float((masses * (probabilities * mistake).sum(0)).sum())
    return float(sizes.H - ((1 - error) ** np.arange(1, sizes.H + 1)).sum())


@dataclass(frozen=True)
class Sweep:
    """Suboptimality against one of the sizes, on the hard instance."""

    name: str
    sizes: tuple[Sizes, ...]
    mean: dict[str, Array]
    """Estimator -> (n,)."""
    error: dict[str, Array]
    """Standard errors of the same."""
    exact: dict[str, Array]
    """BC and posterior in closed form, (n,)."""

    @property
    def x(self) -> Array:
        return np.array([getattr(sizes, self.name) for sizes in self.sizes], dtype=np.float64)

    @property
    def rate(self) -> Array:
        """H²S·log T/T, (n,)."""
        return np.array([sizes.rate for sizes in self.sizes])

    def slope(self, estimator: str) -> PowerLaw:
        return fit_power_law(self.x, self.mean[estimator])


@dataclass(frozen=True)
class MainTheoremReturn(StatementResult):
    """Quantities of the main theorem's first half."""

    sweeps: dict[str, Sweep]
    """One a size: T, S, A, H."""
    random: dict[str, Array]
    """Mean suboptimality over random MDPs and demonstrators, estimator -> (n,), at `random_sizes`."""
    random_error: dict[str, Array]
    random_sizes: tuple[Sizes, ...]

    def constant(self, estimator: str) -> float:
        """The largest suboptimality / (H²S·log T/T) over all hard and random instances: the constant behind ≲."""
        hard = max(float((sweep.mean[estimator] / sweep.rate).max()) for sweep in self.sweeps.values())
        random = self.random[estimator] / np.array([sizes.rate for sizes in self.random_sizes])
        return max(hard, float(random.max()))

    def checks(self) -> list[Check]:
        slopes = {name: {e: sweep.slope(e) for e in ESTIMATORS} for name, sweep in self.sweeps.items()}
        expected = {"T": (-1.15, -0.85), "S": (0.6, 1.1), "A": (-0.3, 0.3), "H": (1.6, 2.1)}
        found = [
            Check(f"posterior mixture: slope in {name} within [{low}, {high}]", f"{slopes[name]['posterior']}, BC {slopes[name]['BC']}",
                  low <= slopes[name]["posterior"].slope <= high, "simulated")
            for name, (low, high) in expected.items()
        ]  # fmt: skip
        gaps = [
            (np.abs(sweep.mean[estimator] - sweep.exact[estimator]) / sweep.error[estimator]).max()
            for sweep in self.sweeps.values()
            for estimator in ("BC", "posterior")
        ]
        noise = slopes["T"]["uniform, same α"]
        return [
            Check("posterior mixture: J(π^β) − E[J] ≤ C·H²S·log T/T", f"C = {self.constant('posterior'):.3f}",
                  self.constant("posterior") <= 1, "simulated"),
            Check("BC: the same", f"C = {self.constant('BC'):.3f}", self.constant("BC") <= 1, "simulated"),
            *found,
            Check("uniform mixture at the same α: no decay in T", f"slope {noise}", noise.low > -0.25, "simulated"),
            Check("simulation = closed form on the hard instance", f"largest deviation {max(gaps):.1f} standard errors",
                  bool(max(gaps) < 5), "simulated"),
        ]  # fmt: skip

    def rows(self) -> list[dict[str, float | int | str]]:
        return [
            {
                "sweep": name,
                **sizes._asdict(),
                **{e: float(sweep.mean[e][i]) for e in ESTIMATORS},
                "posterior, exactly": float(sweep.exact["posterior"][i]),
                "H²S·log T/T": sizes.rate,
            }
            for name, sweep in self.sweeps.items()
            for i, sizes in enumerate(sweep.sizes)
        ]

    def plot(self, figure: Figure) -> None:
        for axes, (name, sweep) in zip(figure.subplots(1, 4, sharey=True), self.sweeps.items()):
            for estimator in ESTIMATORS:
                label = f"{estimator}: {sweep.slope(estimator).slope:+.2f}"
                axes.loglog(sweep.x, sweep.mean[estimator], "o-", ms=4, color=COLORS[estimator], label=label)
            axes.set_ylim(bottom=2e-4)
            axes.loglog(sweep.x, sweep.rate, color=COLORS["bound"], ls="--", lw=1, label="$H^2 S\\,\\log T/T$")
            fixed = ", ".join(f"{k} = {v}" for k, v in Sizes()._asdict().items() if k != name)
            tidy(axes, fixed, name, "J(demonstrator) − J" if name == "T" else "")
            axes.set_xticks(sweep.x, [f"{x:.0f}" for x in sweep.x], rotation=45 if name == "T" else 0)
            axes.minorticks_off()
            axes.legend(
                fontsize=7, frameon=False, loc="best" if name == "T" else "lower right", title="slope", title_fontsize=7
            )


def main_theorem_return(seed: int = 0, repetitions: int = 200, track: Track = untracked) -> MainTheoremReturn:
    """Main theorem, return.

    With λ = max{A, 4·log(HT)} and α = 1/max{A, H, log(HT)}, the posterior mixture has
    E[J(π^β) − J(π̃)] ≲ H²S·log T/T, the rate of BC itself.

    Swept over T, S, A and H on a hard instance (fresh draws, S − 2 states that T demonstrations miss with probability 1/e:
    BC loses of the order of H²S/T there, so the rate is tight up to the logarithm), and evaluated on random MDPs with
    random demonstrators.
    """
    rng = np.random.default_rng(seed)
    grid = [(name, Sizes()._replace(**{name: value})) for name, values in SWEEPS.items() for value in values]
    values: dict[str, list[tuple[Sizes, dict[str, Array], dict[str, float]]]] = {name: [] for name in SWEEPS}
    for name, sizes in track(grid, "hard instances"):
        masses = hardest_masses(sizes.S, sizes.T)
        theorem = Parameters.of_theorem(sizes.A, sizes.H, sizes.T)
        exact = {
            "BC": expected_suboptimality_of_fresh_draws(sizes, masses, 0.0, 1.0),
            "posterior": expected_suboptimality_of_fresh_draws(sizes, masses, theorem.weight, theorem.pseudo_count),
        }
        losses = suboptimalities(fresh_draws(masses, sizes.A, sizes.H), sizes, repetitions, rng)
        values[name].append((sizes, losses, exact))
    sweeps = {
        name: Sweep(
            name=name,
            sizes=tuple(sizes for sizes, _, _ in points),
            mean={e: np.array([losses[e].mean() for _, losses, _ in points]) for e in ESTIMATORS},
            error={e: np.array([standard_error(losses[e]) for _, losses, _ in points]) for e in ESTIMATORS},
            exact={e: np.array([exact[e] for _, _, exact in points]) for e in ("BC", "posterior")},
        )
        for name, points in values.items()
    }
    random_sizes = tuple(Sizes(T=t, S=6, A=4, H=5) for t in (30, 100, 300, 1000))
    random = []
    for sizes in track(random_sizes, "random MDPs"):
        halves = [
            suboptimalities(random_instances(6, 4, 5, repetitions, rng, concentration=c), sizes, repetitions, rng)
            for c in (0.3, None)
        ]
        random.append({e: np.concatenate([half[e] for half in halves]) for e in ESTIMATORS})
    return MainTheoremReturn(
        sweeps=sweeps,
        random={e: np.array([losses[e].mean() for losses in random]) for e in ESTIMATORS},
        random_error={e: np.array([standard_error(losses[e]) for losses in random]) for e in ESTIMATORS},
        random_sizes=random_sizes,
    )
