"""The Gaussian lemma, against Bayes' rule on a grid, generic minimisation and many samples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from postbc.theory.gaussian import (
    GaussianDemonstrator,
    bootstrap_limit,
    bootstrap_means,
    covariance_factor,
    ensemble_covariance,
    normality_p_values,
)
from postbc.theory.gaussian_lemma import NOISE, PRIOR, gaussian_lemma

demonstrator = GaussianDemonstrator(NOISE, PRIOR)


def test_posterior_by_bayes_rule_on_a_grid() -> None:
    small = GaussianDemonstrator(NOISE[:2, :2], PRIOR[:2, :2])
    data = small.demonstrate(3, 1, np.random.default_rng(0))
    mean, covariance = small.posterior(data)
    axis = np.linspace(-6, 6, 401)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)

    def energy(differences: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        return np.einsum("ni,ij,nj->n", differences, np.linalg.inv(matrix), differences)

    log = -0.5 * (energy(points, small.prior) + sum(energy(points - x, small.noise) for x in data[0]))
    density = np.exp(log - log.max())
    density /= density.sum()
    centre = density @ points
    np.testing.assert_allclose(mean[0], centre, atol=1e-4)
    np.testing.assert_allclose(covariance, (points - centre).T @ (density[:, None] * (points - centre)), atol=1e-4)


def test_regression_is_the_argmin_of_the_printed_objective() -> None:
    data = demonstrator.demonstrate(4, 1, np.random.default_rng(0))
    found = demonstrator.regress_noised_targets(data, 2, np.random.default_rng(5))[0]
    rng = np.random.default_rng(5)  # the same draws, in the same order
    noised = data[0] + rng.standard_normal((1, 2, 4, 3))[0] @ np.linalg.cholesky(NOISE).T
    anchors = rng.standard_normal((1, 2, 3))[0] @ np.linalg.cholesky(PRIOR).T
    for member in range(2):

        def objective(mu: np.ndarray, member: int = member) -> float:
            residuals, gap = mu - noised[member], mu - anchors[member]
            return float((residuals @ np.linalg.inv(NOISE) * residuals).sum() + gap @ np.linalg.inv(PRIOR) @ gap)

        np.testing.assert_allclose(found[member], optimize.minimize(objective, np.zeros(3), tol=1e-12).x, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 6])
def test_noised_regressions_have_the_posterior_distribution(samples: int) -> None:
    data = demonstrator.demonstrate(samples, 1, np.random.default_rng(samples))
    mean, covariance = demonstrator.posterior(data)
    members = demonstrator.regress_noised_targets(data, 20_000, np.random.default_rng(1))[0]
    assert min(normality_p_values(members, mean[0], covariance).values()) > 1e-3


def test_the_test_can_fail() -> None:
    """Without the prior sample, or with half of the noise, the distribution is another one, and that shows."""
    data = demonstrator.demonstrate(6, 1, np.random.default_rng(0))
    mean, covariance = demonstrator.posterior(data)
    rng = np.random.default_rng(1)
    right = demonstrator.regress_noised_targets(data, 20_000, rng)[0]
    assert normality_p_values(mean[0] + 0.97 * (right - mean[0]), mean[0], covariance)["covariance"] < 1e-3
    assert normality_p_values(right + 0.05 * np.sqrt(np.diag(covariance)), mean[0], covariance)["mean"] < 1e-3
    plain = data[0].mean(0) + rng.standard_normal((20_000, 3)) @ np.linalg.cholesky(NOISE / 6).T
    assert min(normality_p_values(plain, mean[0], covariance).values()) < 1e-6


def test_bootstrap_limit_is_where_large_ensembles_go() -> None:
    data = demonstrator.demonstrate(7, 3, np.random.default_rng(0))
    members = bootstrap_means(data, 100_000, np.random.default_rng(1))
    np.testing.assert_allclose(members.mean(1), data.mean(1), atol=0.01)
    np.testing.assert_allclose(ensemble_covariance(members), bootstrap_limit(data), atol=0.01 * bootstrap_limit(data).max() * 3)


def test_factor_form_is_the_covariance() -> None:
    predictions = np.random.default_rng(0).standard_normal((2, 9, 4))
    factor = covariance_factor(predictions)
    for r in range(2):
        np.testing.assert_allclose(factor[r].T @ factor[r], np.cov(predictions[r].T), atol=1e-12)
        np.testing.assert_allclose(ensemble_covariance(predictions)[r], np.cov(predictions[r].T), atol=1e-12)


def test_gaussian_lemma_holds() -> None:
    result = gaussian_lemma(seed=1, repetitions=60, members=50)
    assert [check.claim for check in result.checks() if not check.holds] == []
    # the bootstrap forgets the prior: too wide under an informative one, vanishing with T
    narrow = result.variance_ratio["bootstrap"]["narrow"]
    assert narrow[0] > 2
    assert 1 < narrow[-1] < 1.2
