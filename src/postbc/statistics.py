"""Intervals, paired tests and aggregates for success rates: pure functions of numbers, exact where exactness is affordable.

What is random in an experiment here: the *seed* (initialisation, data order, exploration: one pretraining and one RL run) and, within
a seed, the *episode*. Two methods are compared seed by seed, because a seed shares its demonstrations and its evaluation episodes
between methods. Episodes of one seed are not independent evidence about a method: five seeds of 200 episodes are five numbers, each
known to ±0.07, not 1000 draws. So what is said about methods is over seeds, each the mean over its episodes (:func:`compare`), and what
is said over episodes (:func:`wilson_interval`, :func:`mcnemar`) is about these trained policies only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import special  # scipy.stats takes three quarters of a second to import

FEWEST_SEEDS = 3
"""With fewer nothing is said about a method: Student's interval of two success rates may reach from −4 to +4."""
Curve = Sequence[Sequence[float]]  # [[env_steps, success], ...], env_steps increasing
Array = np.ndarray


def wilson_interval(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial rate, without continuity correction (Wilson 1927).

    It keeps its coverage near 0 and 1, where p ± z·√(p(1−p)/n) shrinks to nothing. No trials: (0, 1).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie in [0, {trials}], found {successes}")
    if trials == 0:
        return 0.0, 1.0
    z = float(special.ndtri(0.5 + confidence / 2))
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # at the ends the two terms cancel exactly; rounding would leave 1e-17
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def mean_of_rates(successes: Sequence[float], trials: Sequence[int], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of m independent rates and an interval of it: Wilson's, at the m²/Σ(1/n) trials that would give one rate its variance.

    With equally many trials each these are all of them together. Rates that differ make the interval wider than it had to be.
    """
    mean = float(np.mean([k / n for k, n in zip(successes, trials, strict=True)]))
    together = len(trials) ** 2 / sum(1 / n for n in trials)
    return mean, *wilson_interval(mean * together, together, confidence)


def newcombe_interval(
    successes: float, trials: int, others: float, other_trials: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the difference of two independent rates, first − second (Newcombe 1998, method 10: of two Wilson intervals)."""
    p, q = successes / trials, others / other_trials
    (l1, u1), (l2, u2) = wilson_interval(successes, trials, confidence), wilson_interval(others, other_trials, confidence)
    return p - q - float(np.hypot(p - l1, u2 - q)), p - q + float(np.hypot(u1 - p, q - l2))


def mcnemar(a: Array, b: Array) -> float:
    """Exact two-sided McNemar (sign) test of two (E,) 0/1 outcomes on the same episodes: is one *policy* better than the other?

    Of several seeds' policies, their episodes one after the other: each is paired within its seed (the test stratified by seed).
    Under the null the episodes that only one of them solves are fair coins: p = P(|X − n/2| ≥ |x − n/2|), X ~ Binomial(n, 1/2).
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two (E,) arrays are expected, found {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def sign_flip_test(differences: Array, *, exact_up_to: int = 12, resamples: int = 20_000, seed: int = 0) -> float:
    """Two-sided permutation test of paired differences (S,): under the null each difference may as well have the other sign.

    p = share of the 2^S sign patterns whose |mean| is at least the observed one: every pattern for S ≤ `exact_up_to`, otherwise
    `resamples` random ones and (count + 1)/(resamples + 1). The smallest p possible is 2/2^S: 0.0625 for five seeds.
    """
    d = np.asarray(differences, float)
    if d.ndim != 1 or d.size == 0:
        raise ValueError(f"a non-empty (S,) array is expected, found shape {d.shape}")
    n = d.size
    if n <= exact_up_to:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (resamples, n))
    # patterns that tie with the observed one must count, whatever the order in which they were summed
    extreme = int((np.abs(signs @ d) >= abs(d.sum()) - 1e-9 * (1 + np.abs(d).sum())).sum())
    return extreme / len(signs) if n <= exact_up_to else (extreme + 1) / (len(signs) + 1)


def _paired(a: Array, b: Array) -> Array:
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim not in (1, 2) or a.size == 0:
        raise ValueError(f"a and b must be paired, (S,) or (S, E) both, found {a.shape} and {b.shape}")
    return a - b


@dataclass(frozen=True)
class Comparison:
    """a − b over paired seeds."""

    difference: float
    """Mean of the seeds' differences."""
    low: float
    """Lower end of Student's interval over seeds."""
    high: float
    """Upper end."""
    p: float
    """Paired t-test over seeds, two-sided: exact where seed means are normal (each is a mean over many episodes)."""
    p_sign_flip: float
    """Exact sign-flip permutation test over seeds: assumes symmetry only, but cannot go below `p_sign_flip_minimum`."""
    p_sign_flip_minimum: float
    """2/2^S."""
    seeds: int
    """S, pairs compared."""
    wins: int
    """Seeds in which a is ahead of b."""
    losses: int
    """Seeds in which b is ahead of a."""
    only_a: int | None = None
    """Episodes, of all seeds, that a solves and b does not; None: their outcomes were not given."""
    only_b: int | None = None
    """Episodes that b solves and a does not."""
    p_episodes: float | None = None
    """Exact McNemar test of all episodes, each paired within its seed: are *these policies* of a and b equally good?"""


def compare(a: Array, b: Array, *, confidence: float = 0.95) -> Comparison:
    """Compare two methods on the same seeds: (S,) scores or (S, E) outcomes of the same episodes. S = 1: no interval, p = 1.

    The interval is Student's over seeds (a seed's episodes are one cluster: their differences are averaged first), because with the
    usual 3 to 5 seeds a bootstrap is too narrow, and its p-value is the paired t-test's. Where all differences are equal there is no
    spread to judge by: the interval is the point, p the sign-flip test's.
    """
    d = _paired(a, b)
    per_seed = d.mean(1) if d.ndim == 2 else d
    n = len(per_seed)
    mean, low, high = mean_interval(per_seed, confidence)
    sign_flip = sign_flip_test(per_seed)
    if n == 1:
        p = 1.0
    else:
        error = float(per_seed.std(ddof=1)) / math.sqrt(n)
        p = float(2 * special.stdtr(n - 1, -abs(mean) / error)) if error > 1e-12 else sign_flip
    wins, losses = int((per_seed > 1e-12).sum()), int((per_seed < -1e-12).sum())
    episodes = (
        (int((d > 0).sum()), int((d < 0).sum()), mcnemar(np.ravel(a), np.ravel(b))) if d.ndim == 2 else (None, None, None)
    )
    return Comparison(mean, low, high, p, sign_flip, min(1.0, 2 / 2**n), n, wins, losses, *episodes)


def holm(p_values: Sequence[float]) -> Array:
    """(n,) Holm's step-down adjusted p-values: all the tests of one family may be read at one level (family-wise error)."""
    p = np.asarray(p_values, float)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1], found {p}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted


def mean_interval(values: Array, confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of (S,) scores, Student's interval over seeds; one score: (score, −inf, inf)."""
    v = np.asarray(values, float)
    if v.size < 2:
        return float(v.mean()), -math.inf, math.inf
    half = float(special.stdtrit(v.size - 1, 0.5 + confidence / 2) * v.std(ddof=1) / math.sqrt(v.size))
    return float(v.mean()), float(v.mean()) - half, float(v.mean()) + half


def iqm(scores: Array) -> float:
    """Interquartile mean of all runs of all tasks pooled (Agarwal et al. 2021, rliable): a quarter trimmed at each end."""
    pooled = np.sort(np.asarray(scores, float), axis=None)
    cut = pooled.size // 4
    return float(pooled[cut : pooled.size - cut].mean())


def stratified_bootstrap(
    scores: Array, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(iqm, low, high) of (runs, tasks) scores: runs resampled within each task, percentile interval (rliable's definition)."""
    scores = np.asarray(scores, float)
    if scores.ndim != 2:
        raise ValueError(f"(runs, tasks) scores are expected, found shape {scores.shape}")
    runs, tasks = scores.shape
    drawn = np.random.default_rng(seed).integers(runs, size=(resamples, runs, tasks))
    resampled = np.sort(scores[drawn, np.arange(tasks)].reshape(resamples, -1), 1)
    cut = int(0.25 * runs * tasks)
    values = resampled[:, cut : runs * tasks - cut].mean(1)
    low, high = np.quantile(values, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return iqm(scores), float(low), float(high)


def probability_of_improvement(
    x: Array, y: Array, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(p, low, high): how probably a run of X scores more than one of Y, ties half, averaged over tasks (Agarwal et al. 2021, rliable).

    Args:
        x, y: (runs, tasks) scores, of the same tasks; the numbers of runs may differ.

    p is Mann and Whitney's U over the number of pairs. The interval is the percentile bootstrap's: runs of X and of Y resampled
    independently within each task. Where it leaves 0.5 out, X is better; 1 says that every run of X is above every one of Y.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not x.size or not y.size:
        raise ValueError(f"(runs, tasks) scores of the same tasks are expected, found {x.shape} and {y.shape}")
    rng, (n, tasks), m = np.random.default_rng(seed), x.shape, len(y)
    p, means = 0.0, np.zeros(resamples)
    for a, b in zip(x.T, y.T):
        wins = (a[:, None] > b[None, :]) + 0.5 * (a[:, None] == b[None, :])
        times_a, times_b = (rng.multinomial(k, np.full(k, 1 / k), resamples) for k in (n, m))  # how often each run is drawn
        p += float(wins.mean()) / tasks
        means += ((times_a @ wins) * times_b).sum(1) / (n * m * tasks)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return p, float(low), float(high)


# -- learning curves -----------------------------------------------------------------------------------------------------------
def _points(curve: Curve) -> tuple[Array, Array]:
    points = np.asarray(curve, float)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"a curve is [[env_steps, success], ...], found shape {points.shape}")
    if (np.diff(points[:, 0]) <= 0).any():
        raise ValueError("a curve's env_steps must increase")
    return points[:, 0], points[:, 1]


def interpolate(
    curves: Sequence[Curve], grid: Array | None = None, method: Literal["linear", "step"] = "linear"
) -> tuple[Array, Array]:
    """Curves of several seeds on one grid: (G,) steps, (S, G) values.

    Args:
        grid: (G,) steps; default: every step at which some curve was measured and all curves are defined.
        method: "linear" between measurements, or "step": the last measurement holds until the next.

    Values outside a curve's own range are NaN: nothing is extrapolated.
    """
    points = [_points(curve) for curve in curves]
    if grid is None:
        first, last = max(x[0] for x, _ in points), min(x[-1] for x, _ in points)
        grid = np.unique(np.concatenate([x for x, _ in points]))
        grid = grid[(grid >= first) & (grid <= last)]
    grid = np.asarray(grid, float)
    values = np.empty((len(points), len(grid)))
    for row, (x, y) in zip(values, points, strict=True):
        if method == "linear":
            row[:] = np.interp(grid, x, y)
        else:
            row[:] = y[np.clip(np.searchsorted(x, grid, side="right") - 1, 0, None)]
        row[(grid < x[0]) | (grid > x[-1])] = np.nan
    return grid, values


def bootstrap_band(
    values: Array, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Array, Array, Array]:
    """(G,) mean, low, high of (S, G) curves: pointwise percentile bootstrap over seeds, whole curves resampled."""
    values = np.asarray(values, float)
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    means = np.stack([values[rows].mean(0) for rows in drawn])
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2], axis=0)
    return values.mean(0), low, high


def area_under_curve(curve: Curve) -> float:
    """Mean height of the piecewise linear curve over its range (area / range); a curve of one point: that point."""
    x, y = _points(curve)
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0])) if len(x) > 1 else float(y[0])


def steps_to_threshold(curve: Curve, threshold: float) -> float | None:
    """Environment steps at which the linearly interpolated curve first reaches `threshold`; None if it never does."""
    x, y = _points(curve)
    reached = np.flatnonzero(y >= threshold)
    if not len(reached):
        return None
    i = int(reached[0])
    return float(x[0]) if i == 0 else float(x[i - 1] + (threshold - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def log_rank(a: Sequence[float | None], b: Sequence[float | None], ends: tuple[Sequence[float], Sequence[float]]) -> float:
    """Two-sided p of the log-rank test: do two methods need equally many steps? (Mantel 1966; scipy's normal approximation.)

    Args:
        a, b: steps of each seed, None where it never got there.
        ends: until when the seeds of `a` and of `b` were watched.

    With fewer than two of all that got there: 1.
    """
    if sum(v is not None for v in (*a, *b)) < 2:
        return 1.0
    from scipy import stats  # three quarters of a second

    def data(values: Sequence[float | None], limits: Sequence[float]) -> Any:
        reached = [limit if v is None else v for v, limit in zip(values, limits, strict=True)]
        return stats.CensoredData.right_censored(reached, [v is None for v in values])

    p = float(stats.logrank(data(a, ends[0]), data(b, ends[1])).pvalue)
    return p if math.isfinite(p) else 1.0
