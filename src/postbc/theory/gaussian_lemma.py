"""Statement: regressing on noised targets samples the Gaussian posterior; and how close the bootstrap comes to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from postbc.theory.gaussian import (
    GaussianDemonstrator,
    bootstrap_limit,
    bootstrap_means,
    covariance_factor,
    ensemble_covariance,
    normality_p_values,
)
from postbc.theory.results import COLORS, Check, StatementResult, Track, tidy, untracked
from postbc.theory.tabular import Array

NOISE = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]])
"""Σ: correlated, of unequal scale."""
PRIOR = np.array([[1.0, -0.4, 0.2], [-0.4, 0.8, 0.0], [0.2, 0.0, 1.5]])
"""Λ_0, times the prior's width."""
WIDTHS = {"narrow": 0.1, "wide": 1.0, "flat": 100.0}
ENSEMBLES = {"noised targets": "#009E73", "bootstrap": COLORS["posterior"], "bootstrap, K → ∞": COLORS["uniform, same α"]}


@dataclass(frozen=True)
class GaussianLemma(StatementResult):
    """Quantities of the Gaussian lemma."""

    samples: Array
    """T, (n,)."""
    repetitions: int
    members: int
    """K."""
    variance_ratio: dict[str, dict[str, Array]]
    """Ensemble -> prior width -> mean over datasets of tr(ensemble covariance)/tr(Λ_post), (n,)."""
    predicted_ratio: dict[str, Array]
    """Prior width -> ((T−1)/T)·tr(Σ)/T/tr(Λ_post), what the bootstrap gives on average, (n,)."""
    covariance_error: dict[str, Array]
    """Ensemble -> mean of ‖C − Λ_post‖/‖Λ_post‖ (Frobenius) under the wide prior, (n,)."""
    mean_error: dict[str, Array]
    """Ensemble -> root mean square of the posterior-Mahalanobis distance between means, per dimension, (n,)."""
    p_values: dict[str, dict[str, float]]
    """Sampler -> mean, covariance, shape: p-values against the posterior (factor form: against the ensemble covariance)."""
    algebra: float
    """Largest entry of D⁺D⁺ᵀ − Λ_post, D the regression's whitened design: the argmin's covariance, without sampling."""
    picture: tuple[Array, Array, Array, Array]
    """One dataset: posterior mean and covariance, noised members, bootstrap members."""

    def checks(self) -> list[Check]:
        lowest = {name: min(values.values()) for name, values in self.p_values.items()}
        flat = self.variance_ratio["bootstrap"]["flat"]
        off = [np.abs(self.variance_ratio["bootstrap"][w] / self.predicted_ratio[w] - 1) for w in WIDTHS]
        allowed = 4 * np.sqrt(2 / ((self.samples - 1) * self.repetitions))  # the trace of a Wishart matrix varies by less
        return [
            Check("the argmin's covariance is Λ_post", f"largest difference {self.algebra:.1e}", self.algebra < 1e-12, "exact"),
            Check("noised-target regressions are distributed as the posterior",
                  "p = " + ", ".join(f"{value:.3f} ({key})" for key, value in self.p_values["noised targets"].items()),
                  lowest["noised targets"] > 1e-4, "simulated"),
            Check("the factor form Fᵀg samples the ensemble's covariance",
                  "p = " + ", ".join(f"{value:.3f} ({key})" for key, value in self.p_values["factor form"].items()),
                  lowest["factor form"] > 1e-4, "simulated"),
            Check("bootstrap: variance ((T−1)/T)·tr(Σ)/T on average", f"within {100 * np.max(off):.1f} % of that",
                  bool((np.array(off) <= allowed).all()), "simulated"),
            Check("bootstrap under a flat prior: (T−1)/T of the posterior variance",
                  f"{flat[0]:.2f} at T = {self.samples[0]:.0f}, {flat[-1]:.3f} at T = {self.samples[-1]:.0f}",
                  bool(abs(flat[-1] - 1) < 0.05 and flat[0] < 0.7), "simulated"),
        ]  # fmt: skip

    def rows(self) -> list[dict[str, float | int | str]]:
        return [
            {
                "T": int(t),
                **{f"variance ratio, bootstrap, {w} prior": float(self.variance_ratio["bootstrap"][w][i]) for w in WIDTHS},
                "the same, noised targets": float(self.variance_ratio["noised targets"]["wide"][i]),
                **{f"covariance error, {e}": float(self.covariance_error[e][i]) for e in ENSEMBLES},
                "mean error, bootstrap": float(self.mean_error["bootstrap"][i]),
            }
            for i, t in enumerate(self.samples)
        ]

    def plot(self, figure: Figure) -> None:
        left, middle, right = figure.subplots(1, 3)
        mean, covariance, noised, bootstrapped = self.picture
        left.plot(*noised.T, "o", ms=2.5, color=ENSEMBLES["noised targets"], alpha=0.6, label="noised targets")
        left.plot(*bootstrapped.T, "o", ms=2.5, color=ENSEMBLES["bootstrap"], alpha=0.6, label="bootstrap")
        lengths, directions = np.linalg.eigh(covariance)
        angle = float(np.degrees(np.arctan2(directions[1, 1], directions[0, 1])))
        axes = 2 * np.sqrt(5.991 * lengths[::-1])
        left.add_patch(Ellipse(tuple(mean), *axes, angle=angle, fill=False, lw=1.5, label="95 % of the posterior"))
        tidy(left, "One dataset, T = 8, flat prior", "$\\mu_1$", "$\\mu_2$")
        left.legend(fontsize=8, frameon=False, loc="lower right")
        for width, style in zip(WIDTHS, (":", "-", "--")):
            label = f"bootstrap, {width} prior"
            ratio = self.variance_ratio["bootstrap"][width]
            middle.semilogx(self.samples, ratio, style, marker="o", ms=3.5, color=ENSEMBLES["bootstrap"], label=label)
        middle.semilogx(
            self.samples,
            self.variance_ratio["noised targets"]["wide"],
            color=ENSEMBLES["noised targets"],
            label="noised targets",
        )
        middle.axhline(1, color=COLORS["bound"], ls="--", lw=1)
        tidy(middle, "Ensemble variance / posterior variance", "demonstrations T", "ratio of traces")
        for ensemble, color in ENSEMBLES.items():
            right.loglog(self.samples, self.covariance_error[ensemble], "o-", ms=3.5, color=color, label=ensemble)
        tidy(right, f"Error of the covariance (wide prior, K = {self.members})", "demonstrations T", "relative error")


def gaussian_lemma(seed: int = 0, repetitions: int = 200, track: Track = untracked, *, members: int = 100) -> GaussianLemma:
    """The Gaussian lemma.

    For a demonstrator N(μ, Σ) with prior μ ~ N(0, Λ_0), regressing on noised targets,
    argmin_μ Σ_t ‖μ − (x_t + w_t)‖²_{Σ^{-1}} + ‖μ − μ̃‖²_{Λ_0^{-1}} with w_t ~ N(0, Σ) and μ̃ ~ N(0, Λ_0), is distributed exactly
    as the posterior N(Λ_post Σ^{-1} Σ_t x_t, Λ_post), Λ_post^{-1} = Λ_0^{-1} + TΣ^{-1}.

    Algorithm 1 bootstraps instead: how close that is to the posterior, by T and by how informative the prior is.

    Args:
        members: K, the size of the ensembles.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([2, 4, 8, 16, 32, 64, 128, 256])
    ratios: dict[str, dict[str, list[float]]] = {e: {w: [] for w in WIDTHS} for e in ENSEMBLES}
    errors: dict[str, list[float]] = {e: [] for e in ENSEMBLES}
    means: dict[str, list[float]] = {"noised targets": [], "bootstrap": []}
    predicted: dict[str, list[float]] = {w: [] for w in WIDTHS}
    for size, width in track([(size, width) for size in sizes for width in WIDTHS], "ensembles"):
        demonstrator = GaussianDemonstrator(NOISE, WIDTHS[width] * PRIOR)
        data = demonstrator.demonstrate(int(size), repetitions, rng)
        mean, covariance = demonstrator.posterior(data)
        ensembles = {
            "noised targets": demonstrator.regress_noised_targets(data, members, rng),
            "bootstrap": bootstrap_means(data, members, rng),
        }
        covariances = {name: ensemble_covariance(predictions) for name, predictions in ensembles.items()}
        covariances["bootstrap, K → ∞"] = bootstrap_limit(data)
        predicted[width].append((size - 1) / size**2 * np.trace(NOISE) / np.trace(covariance))
        for name, estimate in covariances.items():
            ratios[name][width].append(float(np.trace(estimate, axis1=-2, axis2=-1).mean() / np.trace(covariance)))
            if width == "wide":
                distance = np.linalg.norm(estimate - covariance, axis=(-2, -1))
                errors[name].append(float(distance.mean() / np.linalg.norm(covariance)))
        for name, predictions in ensembles.items():
            if width == "wide":
                shift = np.linalg.solve(np.linalg.cholesky(covariance), (predictions.mean(-2) - mean).T)
                means[name].append(float(np.sqrt((shift**2).mean())))

    demonstrator = GaussianDemonstrator(NOISE, PRIOR)
    data = demonstrator.demonstrate(5, 1, rng)
    mean, covariance = demonstrator.posterior(data)
    inverse = np.linalg.pinv(demonstrator.regression_design(5))
    many = demonstrator.regress_noised_targets(data, 20_000, rng)[0]
    ensemble = demonstrator.regress_noised_targets(data, members, rng)[0]
    factor = covariance_factor(ensemble)
    factored = rng.standard_normal((20_000, members)) @ factor
    p_values = {
        "noised targets": normality_p_values(many, mean[0], covariance),
        "factor form": normality_p_values(factored, np.zeros(3), np.cov(ensemble.T)),
    }
    flat = GaussianDemonstrator(NOISE, WIDTHS["flat"] * PRIOR)
    shown = flat.demonstrate(8, 1, rng)
    centre, spread = flat.posterior(shown)
    clouds = flat.regress_noised_targets(shown, 300, rng), bootstrap_means(shown, 300, rng)
    return GaussianLemma(
        samples=sizes.astype(np.float64),
        repetitions=repetitions,
        members=members,
        variance_ratio={e: {w: np.array(values) for w, values in by.items()} for e, by in ratios.items()},
        predicted_ratio={w: np.array(values) for w, values in predicted.items()},
        covariance_error={e: np.array(values) for e, values in errors.items()},
        mean_error={e: np.array(values) for e, values in means.items()},
        p_values=p_values,
        algebra=float(np.abs(inverse @ inverse.T - covariance).max()),
        picture=(centre[0, :2], spread[:2, :2], clouds[0][0, :, :2], clouds[1][0, :, :2]),
    )
