"""α from the data: trajectories that the posterior has not seen say by how much its spread must be multiplied to explain its errors.

Every trajectory is predicted by what was fitted without it (*out of bag*): residuals e (D,) with an estimated covariance C of ν degrees
of freedom. The model is e ~ N(0, α²C + σ²), one σ an action dimension; as C is an estimate, each number's likelihood is Student's with
the degrees of freedom of α²C + σ² (Welch 1947): ν·((α²C + σ²)/α²C)². Without that, few members would make α too large. Windows of a
trajectory are not independent: what is resampled and tested is the trajectory.
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
FALLBACK = 1.0
"""α where the trajectories are too few to tell: the paper's for most tasks."""
SAFE_FROM = 0.25
"""The smallest α that is held against BC."""
FEWEST, WIDEST = 5, 4.0
"""Too few to tell: fewer trajectories, or an interval whose ends differ by a larger factor."""
LEVELS = (0.5, 0.8, 0.95)


@dataclass(frozen=True)
class OutOfBag:
    """Windows of trajectories, each predicted by what was fitted without its trajectory; normalised units."""

    residual: Tensor
    """(N, D) chunk less prediction."""
    factor: Factor
    """Of the covariance C that the same fits estimate, (N, R, D)."""
    freedom: Tensor
    """(N,) its degrees of freedom."""
    trajectory: Tensor
    """(N,)."""
    action_dim: int
    """A."""

    def thinned(self, most: int = WINDOWS) -> OutOfBag:
        """At most so many of the windows, evenly spaced."""
        keep = torch.linspace(0, len(self.residual) - 1, min(most, len(self.residual))).round().long()
        return OutOfBag(
            self.residual[keep].double(), Factor(self.factor.rows[keep].double()), self.freedom[keep].double(),
            self.trajectory[keep], self.action_dim,
        )  # fmt: skip

    @property
    def noise(self) -> Tensor:
        """(D,) root mean square residual of each number's action dimension."""
        by_dimension = self.residual.unflatten(1, (-1, self.action_dim)).square().mean((0, 1)).sqrt().clamp(min=1e-3)
        return by_dimension.repeat(self.residual.shape[1] // self.action_dim)


@schema
class Estimate:
    """α of an action dimension, or of the whole chunk."""

    alpha: NonNegative
    """Of greatest likelihood."""
    low: NonNegative
    """Lower end of the 90 % interval: percentiles of a bootstrap over trajectories."""
    high: NonNegative
    """Upper end."""
    sigma: NonNegative
    """σ that goes with it, normalised units (whole chunk: mean over the dimensions)."""
    moments: NonNegative
    """√(mean e² / mean C): α if there were no σ, an upper bound."""


@schema
class Coverage:
    """Shares of windows inside the ellipsoids of N(mean, α²C + σ²) that should hold 50, 80 and 95 % of them."""

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
    """The likelihood's α; the largest that is shown to be no worse than BC; or too few trajectories to tell."""
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
    variance, noise = oob.factor.std().square(), oob.noise[:, None] * torch.tensor(sigmas, dtype=torch.float64)
    square, freedom = oob.residual.square()[..., None], oob.freedom[:, None, None]
    names, which = torch.unique(oob.trajectory, return_inverse=True)
    table = []
    for alpha in alphas:
        of_posterior = alpha**2 * variance[..., None]
        total = of_posterior + noise.square()  # (N, D, sigmas)
        nu = (freedom * (total / of_posterior.clamp(min=1e-12)).square()).clamp(max=1e6)
        each = (
            torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * torch.log(nu * math.pi * total)
            - (nu + 1) / 2 * torch.log1p(square / (nu * total))
        )  # fmt: skip
        steps = each.unflatten(1, (-1, oob.action_dim)).sum(1)  # (N, A, sigmas)
        table.append(torch.zeros(len(names), *steps.shape[1:], dtype=torch.float64).index_add_(0, which, steps))
    return torch.stack(table, 2)


def best_likelihood(oob: OutOfBag, windows: int = 400) -> float:
    """The greatest likelihood of left-out trajectories over α and σ, nats a number: the criterion by which a posterior is chosen."""
    oob = oob.thinned(windows)
    table = log_likelihoods(oob, (0.0, *np.geomspace(1 / 8, 16, 8).tolist()), SIGMAS[::6]).sum(0)
    return table.amax(-1).sum(0).max().item() / oob.residual.numel()


def calibrate(oob: OutOfBag, level: float = 0.05, resamples: int = 1000, seed: int = 0) -> Calibration:
    """α, its uncertainty, how well N(mean, α²C + σ²) fits with it, and how large it may be without doing worse than BC.

    Args:
        oob: of :meth:`postbc.posterior.ensemble.Ensemble.out_of_bag` or that of a closed form.
        level: of the test against BC.
        resamples: of the bootstrap over trajectories.
        seed: of that bootstrap.
    """
    oob = oob.thinned()
    table = log_likelihoods(oob, ALPHAS, SIGMAS)  # (G, A, alphas, sigmas)
    count, alphas = len(table), np.array(ALPHAS)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    weights = torch.from_numpy(drawn).double()
    profile = torch.stack([torch.einsum("bg,gjs->bjs", weights, table[:, d]).amax(-1) for d in range(oob.action_dim)])
    best = table.sum(0).amax(-1)  # (A, alphas)
    squares = (oob.residual.square(), oob.factor.std().square())
    moments = [each.unflatten(1, (-1, oob.action_dim)).mean((0, 1)) for each in squares]  # (A,) each
    at_best = table.sum(0).argmax(-1)  # (A, alphas)
    sigma = oob.noise[: oob.action_dim, None] * torch.tensor(SIGMAS, dtype=torch.float64)[at_best]

    def estimate(curve: Tensor, resampled: Tensor, sigmas: Tensor, square: Tensor, variance: Tensor) -> Estimate:
        low, high = np.quantile(alphas[resampled.argmax(-1)], (0.05, 0.95)).tolist()
        index = int(curve.argmax())
        moment = math.sqrt(float(square) / max(float(variance), 1e-12))
        return Estimate(ALPHAS[index], low, high, float(sigmas[index]), moment)

    dimensions = [estimate(best[d], profile[d], sigma[d], moments[0][d], moments[1][d]) for d in range(oob.action_dim)]
    chunk = estimate(best.sum(0), profile.sum(0), sigma.mean(0), moments[0].mean(), moments[1].mean())
    difference = against_bc(table)
    tested = ALPHAS[ALPHAS.index(SAFE_FROM) :]
    p_values = sign_flips(difference, seed).tolist()
    safe = max((a for a, p in zip(tested, p_values) if p <= level), default=None)
    at = tested.index(FALLBACK)
    worse = float(sign_flips(-difference[:, at : at + 1], seed)[0]) <= level
    weight, source, reason = choose(chunk, safe, worse, count, level)
    indices = [min(range(len(ALPHAS)), key=lambda k: abs(ALPHAS[k] - a)) for a in (0.0, 1.0, chunk.alpha)]
    own = best.sum(0) / oob.residual.numel()
    covered = [Coverage(ALPHAS[k], _coverage(oob, ALPHAS[k], sigma[:, k]), float(own[k])) for k in indices]
    return Calibration(
        weight, source, reason, chunk, tuple(dimensions), level, safe, tuple(zip(tested, p_values)),
        tuple(zip(ALPHAS, own.tolist())), tuple(covered), _pit(oob, chunk.alpha, sigma[:, indices[-1]]), count,
        len(oob.residual),
    )  # fmt: skip


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
    chunk: Estimate, safe: float | None, worse: bool, trajectories: int, level: float
) -> tuple[float, Literal["calibrated", "no-regression", "fallback"], str]:
    """What `auto` takes: (α, its source, why); `worse`: the fallback is shown to be worse than BC."""
    wide = chunk.high > WIDEST * chunk.low
    if trajectories >= FEWEST and not wide and safe is not None:
        if chunk.alpha <= safe:
            return chunk.alpha, "calibrated", f"{trajectories} trajectories left out are explained best by it"
        shown = f"larger ones are not shown, at level {level:g}, to explain trajectories left out better than BC"
        return safe, "no-regression", shown
    if worse and trajectories >= FEWEST:
        return 0.0, "no-regression", "the posterior explains trajectories left out worse than BC does"
    cause = (
        f"{trajectories} trajectories can be left out, at least {FEWEST} are needed" if trajectories < FEWEST
        else f"the 90 % interval is [{chunk.low:.2f}, {chunk.high:.2f}]" if wide
        else f"no α is shown, at level {level:g}, to explain trajectories left out better than BC"
    )  # fmt: skip
    return FALLBACK, "fallback", f"too few demonstrations to tell: {cause}"


def _coverage(oob: OutOfBag, alpha: float, sigma: Tensor) -> tuple[float, float, float]:
    covariance = alpha**2 * oob.factor.covariance() + torch.diag(sigma.repeat(oob.residual.shape[1] // oob.action_dim).square())
    distance = (oob.residual * torch.linalg.solve(covariance, oob.residual)).sum(1)
    limits = special.chdtri(oob.residual.shape[1], 1 - np.array(LEVELS))
    first, second, third = (float((distance <= limit).double().mean()) for limit in limits)
    return first, second, third


def _pit(oob: OutOfBag, alpha: float, sigma: Tensor) -> tuple[float, ...]:
    of_posterior = alpha**2 * oob.factor.std().square()
    total = of_posterior + sigma.repeat(oob.residual.shape[1] // oob.action_dim).square()
    nu = (oob.freedom[:, None] * (total / of_posterior.clamp(min=1e-12)).square()).clamp(max=1e6)
    u = special.stdtr(nu.numpy(), (oob.residual / total.sqrt()).numpy())
    return tuple((np.histogram(u, 10, (0, 1))[0] / u.size).tolist())
