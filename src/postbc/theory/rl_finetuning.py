"""What coverage is for: reinforcement learning from BC, uniform-noise and posterior-mixture policies, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from postbc.theory.estimators import Parameters, behavioral_cloning, posterior_mixture, uniform_mixture
from postbc.theory.finetuning import best_of, best_return_in_support, in_sample_values, policy_gradient
from postbc.theory.instances import Instance, corridor
from postbc.theory.results import COLORS, Check, StatementResult, Track, standard_error, tidy, untracked
from postbc.theory.tabular import Array, Counts, expected_return, sample_counts, sample_transition_counts

ESTIMATORS = ("BC", "uniform", "uniform, same α", "posterior")
LEARNERS = ("Best-of-N", "policy gradient")
SPARSE, RICH = 30, 3000


def matched_uniform_weight(instance: Instance, counts: Counts, goal: float, steps: int = 30) -> float:
    """The weight at which the uniform mixture has a mean return of `goal` over the datasets, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = 0.5 * (low + high)
        keeps = expected_return(instance.mdp, uniform_mixture(counts, middle)).mean() >= goal
        low, high = (middle, high) if keeps else (low, middle)
    return low


@dataclass(frozen=True)
class Regime:
    """Learning curves at one number of demonstrations."""

    trajectories: int
    weight: float
    """α of the posterior mixture and of "uniform, same α"."""
    matched_weight: float
    """α of the uniform mixture with the posterior mixture's pretrained return."""
    pretrained: dict[str, Array]
    """Estimator -> J of the pretrained policy, (R,)."""
    ceiling: dict[str, Array]
    """Estimator -> the best J within its support, (R,)."""
    curves: dict[str, dict[str, Array]]
    """Learner -> estimator -> J after so many rollouts, (R, n)."""

    def difference(self, learner: str, first: str, second: str) -> tuple[float, float, float]:
        """Mean of J(first) − J(second) after the last rollout, paired by dataset, with its 95 % interval."""
        paired = self.curves[learner][first][:, -1] - self.curves[learner][second][:, -1]
        half = float(stats.t.ppf(0.975, len(paired) - 1) * standard_error(paired))
        return float(paired.mean()), float(paired.mean()) - half, float(paired.mean()) + half


@dataclass(frozen=True)
class RLFinetuning(StatementResult):
    """Quantities of the finetuning experiment."""

    demonstrator: float
    """J(π^β); the optimum is 1."""
    candidates: int
    """N of Best-of-N."""
    rollouts: dict[str, Array]
    """Learner -> rollouts seen, (n,)."""
    regimes: dict[int, Regime]
    """By number of demonstrations."""

    def checks(self) -> list[Check]:
        sparse, rich = self.regimes[SPARSE], self.regimes[RICH]
        found = []
        for learner in LEARNERS:
            for other, name in (("BC", "BC"), ("uniform", "uniform noise of equal pretrained return")):
                mean, low, high = sparse.difference(learner, "posterior", other)
                claim = f"T = {SPARSE}, {learner}: posterior mixture ends above {name}"
                found.append(Check(claim, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", low > 0, "simulated"))
            gaps = [abs(rich.difference(learner, "posterior", other)[0]) for other in ESTIMATORS[:-1]]
            found.append(
                Check(f"T = {RICH}, {learner}: all end alike", f"within {max(gaps):.4f}", max(gaps) < 0.02, "simulated")
            )
        same = sparse.difference("policy gradient", "posterior", "uniform, same α")
        drop = {e: float(sparse.pretrained[e].mean()) for e in ESTIMATORS}
        above = max(
            float((regime.curves[learner][e] - regime.ceiling[e][:, None]).max())
            for regime in self.regimes.values()
            for learner in LEARNERS
            for e in ESTIMATORS
        )
        return [
            *found,
            Check(f"T = {SPARSE}: uniform noise of the same α ends like the posterior mixture", f"difference {same[0]:+.3f}",
                  abs(same[0]) < 0.03, "simulated"),
            Check("… but starts lower",
                  f"J {drop['uniform, same α']:.3f} pretrained, posterior {drop['posterior']:.3f}, BC {drop['BC']:.3f}",
                  drop["uniform, same α"] < drop["posterior"], "simulated"),
            Check("no learner leaves the support of its start", f"at most {above:+.1e} above the best return within it",
                  above < 1e-9, "simulated"),
        ]  # fmt: skip

    def rows(self) -> list[dict[str, float | int | str]]:
        return [
            {
                "T": trajectories,
                "pretraining": estimator,
                "α": {"BC": 0.0, "uniform": regime.matched_weight}.get(estimator, regime.weight),
                "J pretrained": float(regime.pretrained[estimator].mean()),
                **{
                    f"J after {self.rollouts[learner][-1]:.0f}, {learner}": float(
                        regime.curves[learner][estimator][:, -1].mean()
                    )
                    for learner in LEARNERS
                },
                "best J in its support": float(regime.ceiling[estimator].mean()),
            }
            for trajectories, regime in self.regimes.items()
            for estimator in ESTIMATORS
        ]

    def plot(self, figure: Figure) -> None:
        grid: list[list[Axes]] = figure.subplots(2, len(self.regimes), sharey=True).tolist()
        for row, learner in zip(grid, LEARNERS):
            for axes, (trajectories, regime) in zip(row, self.regimes.items()):
                for estimator in ESTIMATORS:
                    curve, x = regime.curves[learner][estimator], self.rollouts[learner]
                    axes.plot(x, curve.mean(0), color=COLORS[estimator], label=_label(estimator))
                    low, high = np.quantile(curve, [0.25, 0.75], axis=0)
                    axes.fill_between(x, low, high, color=COLORS[estimator], alpha=0.15, linewidth=0)
                axes.axhline(regime.ceiling["BC"].mean(), color=COLORS["BC"], ls=":", lw=1, label="best within BC's support")
                axes.axhline(self.demonstrator, color=COLORS["bound"], ls="--", lw=1, label="demonstrator")
                if learner == "Best-of-N":
                    axes.set_xscale("symlog", linthresh=8)
                    axes.set_xlim(0, float(self.rollouts[learner][-1]))
                    axes.set_xticks([0, 8, 32, 128, 512, 2048, 8192], ["0", "8", "32", "128", "512", "2048", "8192"])
                    axes.minorticks_off()
                axes.set_ylim(0, 1.02)
                first = trajectories == SPARSE
                tidy(axes, f"{learner}, T = {trajectories}", "rollouts seen", "success rate J" if first else "", legend=False)
        grid[1][-1].legend(fontsize=8, frameon=False, loc="lower right")


def _label(estimator: str) -> str:
    return {"uniform": "uniform, same pretrained J"}.get(estimator, estimator)


def rl_finetuning(
    seed: int = 0,
    repetitions: int = 60,
    track: Track = untracked,
    *,
    candidates: int = 32,
    updates: int = 400,
    episodes: int = 32,
    learning_rate: float = 3.0,
) -> RLFinetuning:
    """RL finetuning.

    In a corridor with four rooms that few demonstrations enter (T = 30, 100, 3000), a demonstrator perfect in the corridor
    and right half of the time in the rooms. Best-of-N (a critic fitted on rollouts of the pretrained policy, then the best of
    N of its actions) and REINFORCE start from BC, from the posterior mixture (uniform prior λ = A, the theorem's α), and from
    the uniform mixture, once with the same α and once with the α of equal pretrained return.

    The paper's argument: from BC neither learner can find what was not demonstrated; uniform noise that costs as little
    return as the posterior's covers too little; with ample data all agree.
    """
    rng = np.random.default_rng(seed)
    instance = corridor(np.full(4, 0.1), actions=5, horizon=6, skill=0.5)
    mdp = instance.mdp
    budgets = 2 ** np.arange(3, 14)
    regimes = {}
    seen: Array = np.zeros(0)
    for size, estimator in track([(size, e) for size in (SPARSE, 100, RICH) for e in ESTIMATORS], "learners"):
        if estimator == ESTIMATORS[0]:
            counts = sample_counts(mdp, instance.demonstrator, size, repetitions, rng)
            weight = Parameters.of_theorem(mdp.actions, mdp.horizon, size).weight
            posterior = posterior_mixture(counts, weight, mdp.actions)
            matched = matched_uniform_weight(instance, counts, float(expected_return(mdp, posterior).mean()))
            starts = {
                "BC": behavioral_cloning(counts),
                "uniform": uniform_mixture(counts, matched),
                "uniform, same α": uniform_mixture(counts, weight),
                "posterior": posterior,
            }
            pretrained = {e: expected_return(mdp, policy) for e, policy in starts.items()}
            ceiling = {e: best_return_in_support(mdp, policy) for e, policy in starts.items()}
            curves: dict[str, dict[str, Array]] = {learner: {} for learner in LEARNERS}
            regimes[size] = Regime(size, weight, matched, pretrained, ceiling, curves)
        start = starts[estimator]
        curves["Best-of-N"][estimator] = _best_of_n_curve(instance, start, budgets, candidates, rng)
        seen, returns = policy_gradient(mdp, start, updates, episodes, learning_rate, rng)
        curves["policy gradient"][estimator] = returns
    rollouts = {"Best-of-N": np.append(0.0, budgets), "policy gradient": seen}
    return RLFinetuning(float(expected_return(mdp, instance.demonstrator)), candidates, rollouts, regimes)


def _best_of_n_curve(instance: Instance, start: Array, budgets: Counts, candidates: int, rng: np.random.Generator) -> Array:
    """Exact J of Best-of-N with a critic fitted on the first n rollouts, for each budget n: (R, 1 + n)."""
    mdp = instance.mdp
    returns = [expected_return(mdp, start)]
    rolled: Counts = np.zeros((*start.shape, mdp.states), dtype=np.int64)
    for more in np.diff(budgets, prepend=0):
        rolled = rolled + sample_transition_counts(mdp, start, int(more), len(start), rng)
        values = in_sample_values(rolled, mdp.rewards)
        returns.append(expected_return(mdp, best_of(start, values, candidates)))
    return np.stack(returns, axis=-1)
