"""α from the data: trajectories that the posterior has not seen say by how much its spread must be multiplied to explain its errors.

Every trajectory is predicted by what was fitted without it (*out of bag*): residuals e (D,) with an estimated covariance C of ν
degrees of freedom. The model is e ~ N(0, (α² + s)C + σ²), one σ an action dimension; s = 1/m where the prediction is the mean of m
members, which errs by that much itself, and 0 where it is a fit. As C is an estimate, each number's likelihood is Student's with the
degrees of freedom of v = (α² + s)C + σ² (Welch 1947): ν·(v/(v − σ²))². Without either, few members would make α too large.

The likelihood is the product over numbers, windows and steps, as if they were independent (a composite likelihood, whose α is
consistent all the same): the covariance of few members is singular in a chunk's D numbers, so that the chunk has no joint density.
Numbers and windows of a trajectory are not independent; what is left out for the interval, and what is tested, is therefore the whole
trajectory. The covariance's off-diagonals are judged by the coverage of ellipsoids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import special
from torch import Tensor

from postbc.posterior.factor import Factor
from postbc.schemas import CountOrZero, NonNegative, Share, schema

ALPHAS = (0.0, *np.geomspace(1 / 16, 16, 57).round(4).tolist())
SIGMAS = tuple(np.geomspace(1 / 32, 2, 25).tolist())
"""σ as a share of the dimension's root mean square residual."""
WINDOWS = 2000
"""At most so many, evenly spaced, are used: neighbours overlap."""
FEW_WINDOWS = 400
"""So many where posteriors are compared."""
FALLBACK = 1.0
"""α where the trajectories are too few to tell: the paper's for most tasks."""
MOST = 1.0
"""`auto` takes no more. Where the posterior is wide demonstrators may differ too, which the likelihood cannot tell apart and the policy
plays anyway: on Push-T it said 2, and policies of 2 played worse (results/posterior-calibration)."""
SAFE_FROM = 0.25
"""The smallest α that is held against BC; below it there is little to lose."""
FEWEST, WIDEST = 5, 4.0
"""Not told: fewer trajectories, or an interval whose ends differ by a larger factor (the lower counts as `SAFE_FROM` at least)."""
LEVELS = (0.5, 0.8, 0.95)


@dataclass(frozen=True)
class OutOfBag:
    """Windows of trajectories, each predicted by what was fitted without its trajectory; normalised units."""

    residual: Tensor
    """(N, D) chunk less prediction."""
    factor: Factor
    """Of the covariance C that the same fits estimate, (N, R, D)."""
    freedom: Tensor
    """(N,) its degrees of freedom ν; a window has ν + 1 rows that are not zero, each a fit less their mean."""
    share: Tensor
    """(N,) s: the prediction errs by s·C of itself, 1/m for the mean of m members, 0 for a fit."""
    trajectory: Tensor
    """(N,)."""
    action_dim: int
    """A."""
    demonstrations: int
    """Trajectories that there are; too few members leave not all of them out."""

    def of(self, keep: Tensor) -> OutOfBag:
        """These windows of it, in double precision."""
        return OutOfBag(
            self.residual[keep].double(), Factor(self.factor.rows[keep].double()), self.freedom[keep].double(),
            self.share[keep].double(), self.trajectory[keep], self.action_dim, self.demonstrations,
        )  # fmt: skip

    def thinned(self, most: int = WINDOWS) -> OutOfBag:
        """At most so many of the windows, evenly spaced."""
        return self.of(evenly(len(self.residual), most))

    @property
    def noise(self) -> Tensor:
        """(D,) root mean square residual of each number's action dimension."""
        by_dimension = self.residual.unflatten(1, (-1, self.action_dim)).square().mean((0, 1)).sqrt().clamp(min=1e-3)
        return by_dimension.repeat(self.residual.shape[1] // self.action_dim)


def evenly(count: int, most: int | None = None) -> Tensor:
    """At most `most` of the numbers from 0 to `count` − 1, evenly spaced."""
    return torch.linspace(0, count - 1, min(most or count, count)).round().long()


@schema
class Estimate:
    """α of an action dimension, or of the whole chunk."""

    alpha: NonNegative
    """Of greatest likelihood."""
    low: NonNegative
    """Lower end of the 90 % interval: jackknife of log(α + 1/4) over trajectories, with Student's t."""
    high: NonNegative
    """Upper end."""
    sigma: NonNegative
    """σ that goes with it, normalised units (whole chunk: mean over the dimensions)."""
    moments: NonNegative
    """√(mean (e² − sC) / mean C): α if there were no σ, an upper bound."""


@schema
class Coverage:
    """Shares of windows inside the ellipsoids that should hold 50, 80 and 95 % of them if N(mean, α²C + σ²) were right."""

    alpha: NonNegative
    shares: tuple[Share, Share, Share]
    log_likelihood: float
    """Of trajectories left out, nats a number."""


@schema
class Calibration:
    """calibration.json: which α, and why."""

    posterior_weight: NonNegative
    """α that `auto` takes."""
    source: Literal["calibrated", "no-regression", "fallback"]
    """The likelihood's α (at most `MOST`); the largest that is shown to be no worse than BC; or neither is told."""
    reason: str
    """The same in a sentence."""
    chunk: Estimate
    """One α for the chunk as a whole."""
    dimensions: tuple[Estimate, ...]
    """(A,) each action dimension alone."""
    level: Share
    """Of the one-sided test that left-out trajectories are explained no worse than by BC."""
    safe: NonNegative | None
    """The largest α that passes; none: no α does."""
    p_values: tuple[tuple[NonNegative, Share], ...]
    """(α, p) of that test, adjusted for all α that are tested."""
    curve: tuple[tuple[NonNegative, float], ...]
    """(α, log-likelihood of trajectories left out), one α for the chunk, nats a number."""
    coverage: tuple[Coverage, ...]
    """For α = 0, 1 and the chunk's own."""
    pit: tuple[Share, ...]
    """Probability integral transform of the numbers at the chunk's own α, ten bins: 0.1 each if calibrated."""
    trajectories: CountOrZero
    """That could be left out."""
    windows: CountOrZero


def log_likelihoods(oob: OutOfBag, alphas: tuple[float, ...], sigmas: tuple[float, ...]) -> Tensor:
    """Sum over each trajectory's windows and steps, by action dimension: (G, A, alphas, sigmas)."""
    variance, noise = oob.factor.std().square()[..., None], oob.noise[:, None] * torch.tensor(sigmas, dtype=torch.float64)
    square, freedom, share = oob.residual.square()[..., None], oob.freedom[:, None, None], oob.share[:, None, None]
    names, which = torch.unique(oob.trajectory, return_inverse=True)
    table = []
    for alpha in alphas:
        of_posterior = (alpha**2 + share) * variance
        total = of_posterior + noise.square()  # (N, D, sigmas)
        nu = welch(freedom, of_posterior, total)
        each = (
            torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * torch.log(nu * math.pi * total)
            - (nu + 1) / 2 * torch.log1p(square / (nu * total))
        )  # fmt: skip
        steps = each.unflatten(1, (-1, oob.action_dim)).sum(1)  # (N, A, sigmas)
        table.append(torch.zeros(len(names), *steps.shape[1:], dtype=torch.float64).index_add_(0, which, steps))
    return torch.stack(table, 2)


def welch(freedom: Tensor, estimated: Tensor, total: Tensor) -> Tensor:
    """Degrees of freedom of a variance `total` whose part `estimated` has `freedom`."""
    return (freedom * (total / estimated.clamp(min=1e-12)).square()).clamp(max=1e6)


def best_likelihood(oob: OutOfBag) -> float:
    """The greatest likelihood of left-out trajectories over α and σ, nats a number: the criterion by which a posterior is chosen."""
    oob = oob.thinned(FEW_WINDOWS)
    table = log_likelihoods(oob, (0.0, *np.geomspace(1 / 8, 16, 8).tolist()), SIGMAS[::6]).sum(0)
    return table.amax(-1).sum(0).max().item() / oob.residual.numel()


def calibrate(oob: OutOfBag, level: float = 0.05, seed: int = 0) -> Calibration:
    """α, its uncertainty, how well N(mean, α²C + σ²) fits with it, and how large it may be without doing worse than BC.

    Args:
        oob: of :meth:`postbc.posterior.ensemble.Ensemble.out_of_bag` or that of a closed form.
        level: of the test against BC.
        seed: of its random sign patterns, and of the draws that ellipsoids are judged by.
    """
    oob = oob.thinned()
    table = log_likelihoods(oob, ALPHAS, SIGMAS)  # (G, A, alphas, sigmas)
    count = len(table)
    best = table.sum(0).amax(-1)  # (A, alphas)
    profile = profiles(table)
    squares = (oob.residual.square() - oob.share[:, None] * oob.factor.std().square(), oob.factor.std().square())
    moments = [each.unflatten(1, (-1, oob.action_dim)).mean((0, 1)) for each in squares]  # (A,) each
    at_best = table.sum(0).argmax(-1)  # (A, alphas)
    sigma = oob.noise[: oob.action_dim, None] * torch.tensor(SIGMAS, dtype=torch.float64)[at_best]

    def estimate(curve: Tensor, profile: Tensor, sigmas: Tensor, square: Tensor, variance: Tensor) -> Estimate:
        alpha, low, high = interval(profile)
        moment = math.sqrt(max(float(square), 0.0) / max(float(variance), 1e-12))
        return Estimate(alpha, low, high, float(sigmas[int(curve.argmax())]), moment)

    dimensions = [estimate(best[d], profile[:, d], sigma[d], moments[0][d], moments[1][d]) for d in range(oob.action_dim)]
    chunk = estimate(best.sum(0), profile.sum(1), sigma.mean(0), moments[0].mean(), moments[1].mean())
    tested = ALPHAS[ALPHAS.index(SAFE_FROM) :]
    p_values = sign_flips(against_bc(table), seed).tolist()
    safe = max((a for a, p in zip(tested, p_values) if p <= level), default=None)
    weight, source, reason = choose(chunk, safe, count, oob.demonstrations, level)
    indices = [0, ALPHAS.index(1.0), int(best.sum(0).argmax())]
    own = best.sum(0) / oob.residual.numel()
    covered = [Coverage(ALPHAS[k], coverage(oob, ALPHAS[k], sigma[:, k], seed), float(own[k])) for k in indices]
    return Calibration(
        weight, source, reason, chunk, tuple(dimensions), level, safe, tuple(zip(tested, p_values)),
        tuple(zip(ALPHAS, own.tolist())), tuple(covered), _pit(oob, ALPHAS[indices[-1]], sigma[:, indices[-1]]), count,
        len(oob.residual),
    )  # fmt: skip


def peak(values: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) on an even grid -> where the parabola through the greatest and its neighbours is greatest, and its value there."""
    middle = values.argmax(-1, keepdim=True).clamp(1, values.shape[-1] - 2)
    left, centre, right = (values.gather(-1, middle + k)[..., 0] for k in (-1, 0, 1))
    bend = 2 * centre - left - right
    offset = ((right - left) / (2 * bend.clamp(min=1e-300))).clamp(-1, 1)
    return middle[..., 0] + offset, centre + offset * (right - left) / 2 - offset.square() * bend / 2


def profiles(table: Tensor) -> Tensor:
    """(G, A, alphas, sigmas) -> (1 + G, A, alphas): at the best σ, of all trajectories, then of all but each (if there are two)."""
    without = table.sum(0) - table if len(table) > 1 else table[:0]
    return peak(torch.cat([table.sum(0, keepdim=True), without]))[1]


def interval(profile: Tensor, confidence: float = 0.9) -> tuple[float, float, float]:
    """α of greatest likelihood, and the ends of its interval: the jackknife of log(α + 1/4) over trajectories, with Student's t.

    A ratio where α is large, a difference where it is near 0, whose logarithm says nothing.

    Args:
        profile: (1 + G, alphas), as of :func:`profiles` for one action dimension, or their sum.
    """
    first, step = math.log(ALPHAS[1]), math.log(ALPHAS[-1] / ALPHAS[1]) / (len(ALPHAS) - 2)
    alphas = torch.exp(first + step * peak(profile[:, 1:].double())[0]) * (profile.argmax(1) > 0)
    alpha, count = alphas[0].item(), len(alphas) - 1
    if count < 2:
        return alpha, 0.0, ALPHAS[-1]
    own, without = math.log(alpha + SAFE_FROM), np.log(alphas[1:].numpy() + SAFE_FROM)
    error = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    width = min(float(special.stdtrit(count - 1, (1 + confidence) / 2)) * error, 100.0)
    low, high = (math.exp(own + sign * width) - SAFE_FROM for sign in (-1, 1))
    return alpha, max(low, 0.0), min(high, ALPHAS[-1])


def against_bc(table: Tensor) -> np.ndarray:
    """(G, α from `SAFE_FROM` on): log-likelihood of each trajectory at α less that at 0, which is BC.

    Both have the σ of greatest likelihood on all *other* trajectories, so that BC is given the best noise that σ-BC could have.

    Args:
        table: (G, A, alphas, sigmas) of :func:`log_likelihoods` at `ALPHAS`.
    """
    others = (table.sum(0) - table).argmax(-1, keepdim=True)
    value = table.gather(-1, others)[..., 0].sum(1)  # (G, alphas)
    difference: np.ndarray = (value - value[:, :1]).numpy()
    return difference[:, ALPHAS.index(SAFE_FROM) :]


def sign_flips(difference: np.ndarray, seed: int = 0, exact_up_to: int = 12) -> np.ndarray:
    """(G, M) differences of G trajectories under M treatments -> (M,) one-sided p that the mean is above 0, for all M together.

    Under the hypothesis a trajectory's differences may as well have the other sign; p is the share of sign patterns under which the
    greatest of the M t-statistics reaches a treatment's own (Westfall and Young 1993), of all 2^G, or 4096 random ones.
    """
    count = len(difference)
    if count <= exact_up_to:
        signs = 1.0 - 2.0 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (4096, count))
        signs[0] = 1.0
    means = signs @ difference / count
    squares = (difference**2).sum(0) - count * means**2  # flipped, a difference has the same square
    t = means / np.sqrt(np.maximum(squares, 1e-300) / max(count - 1, 1) / count)
    p: np.ndarray = (t.max(1)[:, None] >= t[0] - 1e-9 * (1 + np.abs(t[0]))).mean(0)
    return p


def choose(
    chunk: Estimate, safe: float | None, trajectories: int, demonstrations: int, level: float
) -> tuple[float, Literal["calibrated", "no-regression", "fallback"], str]:
    """What `auto` takes, (α, its source, why): never more than `MOST`, nor than what is safe, where anything is shown to be."""
    shown = f"shown, at level {level:g}, to explain trajectories left out better than BC"
    few, wide = trajectories < FEWEST, chunk.high > WIDEST * max(chunk.low, SAFE_FROM)
    if few or wide:
        scarce = "demonstrations" if demonstrations < FEWEST else "members"
        cause = (
            f"too few {scarce}, {trajectories} of {demonstrations} trajectories can be left out, at least {FEWEST} are needed" if few
            else f"the 90 % interval of {trajectories} trajectories left out is [{chunk.low:.2f}, {chunk.high:.2f}]"
        )  # fmt: skip
        if safe is not None and safe < FALLBACK:
            return safe, "fallback", f"not told: {cause}; larger ones are not {shown}"
        return FALLBACK, "fallback", f"not told: {cause}"
    if chunk.alpha < SAFE_FROM:
        return 0.0, "no-regression", f"trajectories left out are explained best by α = {chunk.alpha:.2f}, all but BC"
    if safe is None:
        weight = min(FALLBACK, chunk.alpha)
        return weight, "fallback", f"α = {chunk.alpha:.2f} explains them best, but no α is {shown}"
    if min(chunk.alpha, safe) > MOST:
        return (
            MOST,
            "calibrated",
            f"{trajectories} trajectories left out are explained best by {chunk.alpha:.2f}; no more is taken",
        )
    if chunk.alpha <= safe:
        return chunk.alpha, "calibrated", f"{trajectories} trajectories left out are explained best by it"
    return safe, "no-regression", f"larger ones are not {shown}"


def coverage(oob: OutOfBag, alpha: float, sigma: Tensor, seed: int = 0, draws: int = 4) -> tuple[float, float, float]:
    """Shares of windows inside ellipsoids that hold `LEVELS` of what the model says, however few fits its covariance is of.

    How far away the model's own windows are depends on how C was estimated, so each limit is that of the fits themselves: one of m
    is left out, C and mean are those of the m − 1 others, and the fit's own difference from them, scaled to the model's covariance
    and with noise σ, stands in the residual's place. If the model is right, it is as far away as the residual is.

    Args:
        oob: of at least two degrees of freedom at each window.
        alpha: α.
        sigma: (A,) σ.
        seed: of the fit that is left out at each window, and of the noise.
        draws: times that this is done at each window.
    """
    generator = torch.Generator().manual_seed(seed)
    n, d = oob.residual.shape
    noise, nu = sigma.repeat(d // oob.action_dim), oob.freedom
    outer, others = oob.factor.covariance(), 1 / nu  # the mean of m − 1 = ν members errs by others·C
    share = torch.where(oob.share > 0, others, 0.0)
    real, own = [], []
    for _ in range(draws):
        which = (torch.rand(n, generator=generator, dtype=torch.float64) * (nu + 1)).long()
        x = oob.factor.rows[torch.arange(n), which] * nu.sqrt()[:, None]  # a fit less the mean of all m
        left = (nu[:, None, None] * outer - (1 + others)[:, None, None] * x[:, :, None] * x[:, None, :]) / (nu - 1)[
            :, None, None
        ]
        scale = alpha**2 + share
        covariance = scale[:, None, None] * left + torch.diag(noise.square())
        drawn = noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
        mine = ((scale * (1 + others)).sqrt())[:, None] * x + drawn  # x·(1 + others) is its difference from the others' mean
        residual = oob.residual + share[:, None] * x
        both = torch.stack((residual, mine), 2)
        distance = (both * torch.linalg.solve(covariance, both)).sum(1)
        real.append(distance[:, 0])
        own.append(distance[:, 1])
    limits = torch.quantile(torch.cat(own), torch.tensor(LEVELS, dtype=torch.float64))
    first, second, third = (float((torch.cat(real) <= limit).double().mean()) for limit in limits)
    return first, second, third


def _pit(oob: OutOfBag, alpha: float, sigma: Tensor) -> tuple[float, ...]:
    of_posterior = (alpha**2 + oob.share[:, None]) * oob.factor.std().square()
    total = of_posterior + sigma.repeat(oob.residual.shape[1] // oob.action_dim).square()
    nu = welch(oob.freedom[:, None], of_posterior, total)
    u = special.stdtr(nu.numpy(), (oob.residual / total.sqrt()).numpy())
    return tuple((np.histogram(u, 10, (0, 1))[0] / u.size).tolist())
