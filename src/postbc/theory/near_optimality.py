"""Statement: no estimator that keeps the demonstrator's return covers much more than the posterior mixture does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from scipy.optimize import linprog

from postbc.theory.estimators import Parameters, action_coverage, posterior_mixture
from postbc.theory.instances import one_rare_arm
from postbc.theory.results import COLORS, Check, StatementResult, Track, tidy, untracked
from postbc.theory.tabular import Array, expected_return


def best_coverage(arms: int, rare: float, trajectories: int, slack: float) -> float:
    """The largest coverage γ of any estimator within `slack` in expected return of every demonstrator, exactly.

    The demonstrators π^{β,2} … π^{β,A} play a_1 with probability 1 − α and a_i with α. A dataset shows either no rare arm
    (probability q = (1 − α)^T) or which i it is. By symmetry the best estimator then plays each rare arm with the same
    probability m in the first case, and a_i with probability f in the second. Linear program in (m, f, γ): maximise γ with
        m ≥ γα,  f ≥ γα,  1 − (A−1)m ≥ γ(1−α),  1 − f ≥ γ(1−α)      (coverage of a_i and of a_1, on every dataset)
        q·(A−1)m + (1−q)·f − α ≤ slack                              (J(π^{β,i}) − E[J(π̂)], the same for all i)
    """
    unseen = (1.0 - rare) ** trajectories
    constraints = [
        ([-1, 0, rare], 0),
        ([0, -1, rare], 0),
        ([arms - 1, 0, 1 - rare], 1),
        ([0, 1, 1 - rare], 1),
        ([unseen * (arms - 1), 1 - unseen, 0], slack + rare),
    ]
    solution = linprog([0, 0, -1], A_ub=[row for row, _ in constraints], b_ub=[b for _, b in constraints], bounds=(0, 1))
    return float(-solution.fun)


def best_coverage_formula(arms: int, rare: float, trajectories: int, slack: float) -> float:
    """min{1/(1 + (A−2)α), (ξ + α) / (α·((A−1)q + 1 − q))}: what the linear program comes to.

    The first is what a distribution can cover of all demonstrators at once. The second should be compared with the printed
    ξ/(2Aα): the demonstrator itself loses α to its rare arm, so the loss that an estimator may have is ξ + α, not ξ, and
    nothing halves it.
    """
    unseen = (1.0 - rare) ** trajectories
    return min(1.0 / (1.0 + (arms - 2) * rare), (slack + rare) / (rare * ((arms - 1) * unseen + 1 - unseen)))


def posterior_mixture_exactly(arms: int, rare: float, trajectories: int, failure: float) -> tuple[float, float]:
    """The γ that the posterior mixture reaches with probability ≥ 1 − δ, and its expected loss J(π^β) − E[J(π̃)].

    Both by summing over T(a_i) ~ Binomial(T, α), on which alone they depend.
    """
    parameters = Parameters.of_theorem(arms, 1, trajectories)
    instance = one_rare_arm(arms, 1, rare)
    seen = np.arange(trajectories + 1)
    counts = np.zeros((trajectories + 1, 1, 1, arms), dtype=np.int64)
    counts[:, 0, 0, 0], counts[:, 0, 0, 1] = trajectories - seen, seen
    weights = stats.binom.pmf(seen, trajectories, rare)
    policy = posterior_mixture(counts, parameters.weight, parameters.pseudo_count)
    loss = expected_return(instance.mdp, instance.demonstrator) - expected_return(instance.mdp, policy)
    coverage = action_coverage(policy, instance.demonstrator)
    worst_first = np.argsort(coverage)
    allowed = np.cumsum(weights[worst_first]) <= failure
    return float(coverage[worst_first][allowed.sum()]), float((weights * loss).sum())


@dataclass(frozen=True)
class NearOptimality(StatementResult):
    """Quantities of "near-optimality", by number of arms A."""

    trajectories: int
    constant: float
    """c of ξ = c·log T/T."""
    arms: Array
    best: Array
    """Largest γ of any estimator within ξ (linear program), (n,)."""
    formula: Array
    """The same in closed form, (n,)."""
    printed: Array
    """ξ/(2Aα), the bound as printed, (n,)."""
    achieved: Array
    """The γ that the posterior mixture reaches with probability ≥ 1 − δ, (n,)."""
    achieved_slack: Array
    """J(π^β) − E[J(π̃)] of the posterior mixture, (n,)."""
    best_at_same_slack: Array
    """Largest γ of any estimator that loses no more than the posterior mixture, (n,)."""
    guaranteed: Array
    """The main theorem's γ for these demonstrators, (n,)."""
    failure: float
    """δ."""

    @property
    def slack(self) -> float:
        """ξ = c·log T/T."""
        return self.constant * math.log(self.trajectories) / self.trajectories

    def checks(self) -> list[Check]:
        small = self.arms > 16 * math.log(self.trajectories)  # where A, not the cap γ ≤ 1, decides
        scaled = (self.best * self.arms / (self.constant * math.log(self.trajectories)))[small]
        fraction = self.achieved / self.best_at_same_slack
        over = self.best / self.printed
        behind = (self.best / self.achieved / math.log(self.trajectories))[self.arms <= self.trajectories]
        return [
            Check("linear program = closed form", f"difference {np.abs(self.best - self.formula).max():.1e}",
                  bool(np.allclose(self.best, self.formula, atol=1e-9)), "exact"),
            Check("as printed: best γ ≤ ξ/(2Aα)", f"best γ is up to {over.max():.2f}× that", bool((over <= 1).all()), "exact"),
            Check("best γ ≤ C·c·log T/A", f"C = {scaled.max():.2f} (α = 1/(4T), A > 16·log T)", bool(scaled.max() <= 8), "exact"),
            Check("posterior mixture is within ξ", f"loses at most {self.achieved_slack.max() / self.slack:.2f}·ξ",
                  bool((self.achieved_slack <= self.slack).all()), "exact"),
            Check("posterior mixture: γ ≥ the main theorem's", f"at least {(self.achieved / self.guaranteed).min():.0f}× that",
                  bool((self.achieved >= self.guaranteed).all()), "exact"),
            Check("posterior mixture: γ ≥ best γ/(C·log T)", f"C = {behind.max():.2f} for A ≤ T", bool(behind.max() <= 8), "exact"),
            Check("against estimators that lose no more than it", f"{fraction.min():.2f} to {fraction.max():.2f} of the best γ",
                  bool(fraction.min() > 0.25), "exact"),
        ]  # fmt: skip

    def rows(self) -> list[dict[str, float | int | str]]:
        return [
            {
                "A": int(a),
                "best γ within ξ": float(self.best[i]),
                "printed ξ/(2Aα)": float(self.printed[i]),
                "posterior's loss/ξ": float(self.achieved_slack[i] / self.slack),
                "best γ at that loss": float(self.best_at_same_slack[i]),
                "posterior's γ": float(self.achieved[i]),
                "theorem's γ": float(self.guaranteed[i]),
            }
            for i, a in enumerate(self.arms)
        ]

    def plot(self, figure: Figure) -> None:
        axes = figure.subplots()
        axes.loglog(self.arms, self.best, color="black", label="any estimator within ξ = c·log T/T: best possible")
        axes.loglog(
            self.arms, self.best_at_same_slack, color="black", ls=":", label="any estimator losing what the mixture loses"
        )
        axes.loglog(self.arms, self.achieved, "o-", ms=4, color=COLORS["posterior"], label="posterior mixture")
        axes.loglog(self.arms, self.printed, color=COLORS["bound"], ls="--", lw=1, label="bound as printed, ξ/(2Aα)")
        axes.loglog(self.arms, self.guaranteed, color=COLORS["posterior"], ls="--", lw=1, label="main theorem's guarantee")
        title = f"One rare arm among A, T = {self.trajectories}, α = 1/(4T); BC covers with γ = 0"
        tidy(axes, title, "arms A", "coverage γ")


def near_optimality(
    seed: int = 0,
    repetitions: int = 1,
    track: Track = untracked,
    *,
    trajectories: int = 1_000,
    constant: float = 1.0,
    failure: float = 0.1,
) -> NearOptimality:
    """Near-optimality of the posterior mixture.

    Bandits r(a_1) = 1, others 0, demonstrators π^{β,i} that play a_1 with probability 1 − α and a_i with α. Any estimator
    within ξ = c·log T/T of every demonstrator in expected return covers them with γ of the order of c·log T/A at most
    (printed: γ ≤ ξ/(2Aα) for T ≤ 1/(4α)). The posterior mixture reaches the best γ up to a constant and the logarithm.

    Completed here: the printed choice α = 1/(2T) violates the condition T ≤ 1/(4α); α = 1/(4T) is used. The best γ is
    computed by a linear program instead of bounded, which shows that the printed constant is too small. Nothing is sampled:
    `seed` and `repetitions` change nothing.
    """
    arms = 2 ** np.arange(1, 12)
    rare, slack = 1.0 / (4 * trajectories), constant * math.log(trajectories) / trajectories
    reached = [posterior_mixture_exactly(int(a), rare, trajectories, failure) for a in track(arms.tolist(), "numbers of arms")]
    achieved, losses = np.array(reached).T
    parameters = [Parameters.of_theorem(int(a), 1, trajectories) for a in arms]
    log = math.log(1 / failure)  # S = H = 1
    return NearOptimality(
        trajectories=trajectories,
        constant=constant,
        arms=arms.astype(np.float64),
        best=np.array([best_coverage(int(a), rare, trajectories, slack) for a in arms]),
        formula=np.array([best_coverage_formula(int(a), rare, trajectories, slack) for a in arms]),
        printed=np.asarray(slack / (2 * arms * rare), dtype=np.float64),
        achieved=achieved,
        achieved_slack=losses,
        best_at_same_slack=np.array([best_coverage(int(a), rare, trajectories, loss) for a, loss in zip(arms, losses)]),
        # of the two arms that the demonstrator plays, the theorem asks least of the frequent one
        guaranteed=np.array([p.weight * min(1 / (64 * log), 1 / (2 * p.pseudo_count * (1 - rare))) for p in parameters]),
        failure=failure,
    )
