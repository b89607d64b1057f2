"""A Gaussian demonstrator: its posterior, and three ensembles of regressors that are meant to sample it.

Shapes: R repetitions (datasets), T samples, K ensemble members, d dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from postbc.theory.tabular import Array


@dataclass(frozen=True)
class GaussianDemonstrator:
    """x_t ~ N(μ, Σ) with prior μ ~ N(0, Λ_0)."""

    noise: Array
    """Σ, (d, d)."""
    prior: Array
    """Λ_0, (d, d)."""

    def demonstrate(self, samples: int, repetitions: int, rng: np.random.Generator) -> Array:
        """Datasets, each with its own μ from the prior: (R, T, d)."""
        mean = self._normal(self.prior, (repetitions, 1), rng)
        return mean + self._normal(self.noise, (repetitions, samples), rng)

    def posterior(self, data: Array) -> tuple[Array, Array]:
        """N(Λ_post Σ^{-1} Σ_t x_t, Λ_post) with Λ_post^{-1} = Λ_0^{-1} + TΣ^{-1}.

        Args:
            data: (R, T, d).

        Returns:
            mean (R, d) and covariance (d, d).
        """
        precision = np.linalg.inv(self.noise)
        covariance = np.linalg.inv(np.linalg.inv(self.prior) + data.shape[-2] * precision)
        return data.sum(-2) @ (covariance @ precision).T, covariance

    def regression_design(self, samples: int) -> Array:
        """The whitened design of argmin_μ Σ_t ‖μ − (x_t + w_t)‖²_{Σ^{-1}} + ‖μ − μ̃‖²_{Λ_0^{-1}}: ((T + 1)·d, d).

        Rows: Σ^{-1/2} once a sample, then Λ_0^{-1/2}.
        """
        return np.vstack([np.tile(self._whitening(self.noise), (samples, 1)), self._whitening(self.prior)])

    def regress_noised_targets(self, data: Array, members: int, rng: np.random.Generator) -> Array:
        """K minimisers of that least-squares problem, by least squares: (R, T, d) -> (R, K, d).

        Every member draws its own target noise w_t ~ N(0, Σ) and its own prior sample μ̃ ~ N(0, Λ_0).
        """
        repetitions, samples, dimensions = data.shape
        noised = data[:, None] + self._normal(self.noise, (repetitions, members, samples), rng)
        anchor = self._normal(self.prior, (repetitions, members), rng)
        targets = np.concatenate(
            [
                (noised @ self._whitening(self.noise).T).reshape(repetitions, members, samples * dimensions),
                anchor @ self._whitening(self.prior).T,
            ],
            axis=-1,
        )
        flat = targets.reshape(repetitions * members, -1).T
        solution = np.linalg.lstsq(self.regression_design(samples), flat, rcond=None)[0]
        return solution.T.reshape(repetitions, members, dimensions)

    @staticmethod
    def _normal(covariance: Array, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        return rng.standard_normal((*shape, len(covariance))) @ np.linalg.cholesky(covariance).T

    @staticmethod
    def _whitening(covariance: Array) -> Array:
        return np.linalg.inv(np.linalg.cholesky(covariance))


def bootstrap_means(data: Array, members: int, rng: np.random.Generator) -> Array:
    """Least squares on K bootstraps of the samples (their means): (R, T, d) -> (R, K, d)."""
    repetitions, samples = data.shape[:2]
    drawn = rng.multinomial(samples, np.full(samples, 1 / samples), size=(repetitions, members))
    return drawn @ data / samples


def bootstrap_limit(data: Array) -> Array:
    """Covariance of infinitely many bootstrap members: (1/T)·Σ_t (x_t − x̄)(x_t − x̄)ᵀ/T, (R, d, d)."""
    centred = data - data.mean(-2, keepdims=True)
    return np.swapaxes(centred, -1, -2) @ centred / data.shape[-2] ** 2


def ensemble_covariance(predictions: Array) -> Array:
    """Covariance over the members, dividing by K − 1: (R, K, d) -> (R, d, d)."""
    factor = covariance_factor(predictions)
    return np.swapaxes(factor, -1, -2) @ factor


def covariance_factor(predictions: Array) -> Array:
    """F = (predictions − mean)/√(K − 1), with FᵀF the covariance: Fᵀg, g ~ N(0, I_K), samples it without Cholesky."""
    return (predictions - predictions.mean(-2, keepdims=True)) / np.sqrt(predictions.shape[-2] - 1)


def normality_p_values(samples: Array, mean: Array, covariance: Array) -> dict[str, float]:
    """Tests of samples (N, d) against N(mean, covariance), both known.

    mean: N·(x̄ − m)ᵀC^{-1}(x̄ − m) ~ χ²_d. covariance: likelihood ratio, χ² with d(d+1)/2 degrees of freedom (large N).
    shape: Kolmogorov-Smirnov of the squared Mahalanobis distances against χ²_d.
    """
    count, dimensions = samples.shape
    whitened = (samples - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    centre = whitened.mean(0)
    spread = whitened.T @ whitened / count
    ratio = count * (np.trace(spread) - np.linalg.slogdet(spread)[1] - dimensions)
    return {
        "mean": float(stats.chi2.sf(count * centre @ centre, dimensions)),
        "covariance": float(stats.chi2.sf(ratio, dimensions * (dimensions + 1) // 2)),
        "shape": float(stats.kstest((whitened**2).sum(-1), stats.chi2(dimensions).cdf).pvalue),
    }
