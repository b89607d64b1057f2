"""α from trajectories left out: the likelihood against scipy's, α recovered where it is known, the level of the test, the stages."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from made import write_demonstrations
from postbc import cli
from postbc.data.training_set import TrainingSetConfig
from postbc.errors import InputError
from postbc.files import load_tree
from postbc.policies import DiffusionConfig, load_policy
from postbc.posterior import Calibration, EnsembleConfig, Factor, OutOfBag, bootstrap_counts, calibrate, fit_ensemble
from postbc.posterior.calibration import (
    ALPHAS,
    FALLBACK,
    LEVELS,
    MOST,
    SIGMAS,
    Estimate,
    against_bc,
    choose,
    coverage,
    interval,
    log_likelihoods,
    peak,
    profiles,
    sign_flips,
)
from postbc.pretraining import Pretraining, PretrainingConfig
from postbc.schemas import read_json
from postbc.seeding import make_generator
from postbc.stages.pretrain import Pretrain, pretrain_policy
from test_pretraining import WINDOWS, factor, policy


def made(
    alpha,
    sigma=0.1,
    members=30,
    trajectories=40,
    windows=6,
    action_dim=2,
    chunk=2,
    seed=0,
    worthless=False,
    episodic=False,
    amplitude=0.0,
) -> OutOfBag:
    """Residuals of N(0, α²C + σ²) less the mean of `members` draws of N(0, C), by which alone C is known.

    Args:
        worthless: C has nothing to do with them.
        episodic: all windows of a trajectory differ by the same coordinates.
        amplitude: trajectories differ by lognormal factors of this deviation.
    """
    rng = np.random.default_rng(seed)
    n, d = trajectories * windows, chunk * action_dim
    scale = np.repeat(np.exp(rng.normal(0, 0.7, (trajectories, 1, 1))), windows, 0).reshape(n, 1)
    shape = np.eye(d) + rng.normal(size=(d, d)) / math.sqrt(d)
    roots = 0.2 * scale[..., None] * shape  # C = rootᵀ·root, one shape, another size everywhere
    weights = np.broadcast_to(np.asarray(alpha, float), (action_dim,)) if np.ndim(alpha) else np.full(action_dim, alpha)
    g = np.repeat(rng.normal(size=(trajectories, d)), windows, 0) if episodic else rng.normal(size=(n, d))
    factors = np.repeat(np.exp(rng.normal(0, amplitude, (trajectories, 1))), windows, 0)
    truth = factors * np.einsum("nd,nde->ne", g, roots) * np.tile(weights, chunk)
    if worthless:
        truth = 0.3 * g
    draws = scale * np.einsum("knd,de->kne", rng.normal(size=(members, n, d)), 0.2 * shape)
    residual = truth + sigma * rng.normal(size=(n, d)) - draws.mean(0)
    spread = Factor.from_predictions(torch.as_tensor(draws))
    which = torch.arange(trajectories).repeat_interleave(windows)
    freedom = torch.full((n,), members - 1.0, dtype=torch.float64)
    return OutOfBag(torch.as_tensor(residual), spread, freedom, 1 / (freedom + 1), which, action_dim, trajectories)


# -- likelihood --------------------------------------------------------------------------------------------------------------------
def test_the_likelihood_is_students_with_welchs_degrees_of_freedom():
    oob = made(1.0, trajectories=3, windows=2)
    alphas, sigmas = (0.5, 2.0), (0.3, 1.0)
    table = log_likelihoods(oob, alphas, sigmas).numpy()
    variance = np.stack([np.diag(c) for c in oob.factor.covariance().numpy()])
    for t in range(3):
        for d in range(2):
            for i, alpha in enumerate(alphas):
                for j, sigma in enumerate(sigmas):
                    expected = 0.0
                    for n in (2 * t, 2 * t + 1):
                        for number in (d, d + 2):
                            noise = sigma * math.sqrt((oob.residual[:, [d, d + 2]] ** 2).mean())
                            estimated = (alpha**2 + 1 / 30) * variance[n, number]  # the mean of 30 errs by C / 30
                            total = estimated + noise**2
                            nu = 29 * (total / estimated) ** 2
                            expected += stats.t.logpdf(oob.residual[n, number].item(), nu, 0, math.sqrt(total))
                    assert table[t, d, i, j] == pytest.approx(expected, abs=1e-8)


def test_without_a_posterior_it_is_the_normal_likelihood():
    oob = made(1.0, trajectories=2, windows=3)
    exact = dataclasses.replace(oob, share=torch.zeros(6))
    table = log_likelihoods(exact, (0.0,), (1.0,)).sum().item()
    assert table == pytest.approx(stats.norm.logpdf(oob.residual.numpy(), 0, oob.noise.numpy()).sum(), abs=1e-3)


# -- α -----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("members", [6, 40])
@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0])
def test_alpha_is_found_where_it_is_known(alpha, members):
    """With few members, too: 6 give an α 30 % too large by the normal likelihood, and √(α² + 1/6) without their mean's own error."""
    oobs = [made(alpha, 0.02, members, seed=seed) for seed in range(6)]
    found = [calibrate(oob) for oob in oobs]
    mean = np.mean([c.chunk.alpha for c in found])  # of 6 a tenth too small: Welch's is an approximation
    assert (mean == pytest.approx(alpha, rel=0.12)) if members == 40 else (alpha - 0.15 < mean < 1.12 * alpha)
    assert sum(c.chunk.low <= alpha <= c.chunk.high for c in found) >= 4
    if members == 40 and alpha >= 1:
        assert sum(c.source == "calibrated" and c.posterior_weight == min(c.chunk.alpha, MOST) <= c.safe for c in found) >= 4
    own = [(oob.residual.square().mean(), oob.factor.std().square().mean()) for oob in oobs]
    assert [c.chunk.moments for c in found] == pytest.approx([math.sqrt(max(e / c - 1 / members, 0)) for e, c in own])


def test_each_action_dimension_has_its_own():
    found = calibrate(made((0.5, 2.0), trajectories=150))
    first, second = (d.alpha for d in found.dimensions)
    assert first == pytest.approx(0.5, rel=0.3)
    assert second == pytest.approx(2.0, rel=0.3)
    assert first < found.chunk.alpha < second


@pytest.mark.parametrize("many", [{}, {"episodic": True}, {"amplitude": 0.3, "episodic": True}])
def test_the_interval_holds_what_it_says(many):
    """Simulation: 90 % of the intervals of few trajectories hold the α of six hundred (percentiles of a bootstrap of 5: 75 %)."""
    table = log_likelihoods(made(1.0, trajectories=600, windows=4, **many), ALPHAS, SIGMAS)
    alpha, low, high = interval(profiles(table).sum(1))
    assert low < alpha < high < 1.2 * low
    rng, runs = np.random.default_rng(0), 300
    for count in (5, 10, 20):
        drawn = (table[torch.as_tensor(rng.choice(len(table), count, replace=False))] for _ in range(runs))
        inside = np.mean([low <= alpha <= high for _, low, high in (interval(profiles(few).sum(1)) for few in drawn)])
        assert inside >= 0.9 - 2.6 * math.sqrt(0.9 * 0.1 / runs) - 0.02


def test_the_interval_is_the_jackknifes():
    at, grid = np.array((0.2, 0.1, 0.4, 0.3)), torch.tensor(ALPHAS, dtype=torch.float64).clamp(min=1e-9).log()
    profile = torch.stack([-(grid - where).square() for where in at])
    alpha, low, high = interval(profile)
    assert alpha == pytest.approx(math.exp(0.2), rel=1e-3)
    own, *without = np.log(np.exp(at) + 0.25)
    width = stats.t.ppf(0.95, 2) * math.sqrt(2 / 3 * ((without - np.mean(without)) ** 2).sum())
    assert (low, high) == pytest.approx((math.exp(own - width) - 0.25, math.exp(own + width) - 0.25), rel=5e-3)
    nothing = interval(-grid[None].exp().repeat(5, 1))
    assert nothing == (0.0, 0.0, pytest.approx(0, abs=1e-9))
    assert interval(profile[:1])[1:] == (0.0, ALPHAS[-1])


def test_a_parabola_is_greatest_where_it_is():
    at, value = peak(-(torch.arange(9.0, dtype=torch.float64) - torch.tensor([[2.3], [5.0], [-3.0]])).square() + 7)
    torch.testing.assert_close(at, torch.tensor([2.3, 5.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(value, torch.tensor([7.0, 7.0, -2.0], dtype=torch.float64))


@pytest.mark.parametrize("members", [20, 50, 100])
def test_calibrated_ellipsoids_cover_what_they_say(members):
    """28 numbers, whose covariance 20 members know in 19 directions alone; too narrow and too wide ones do not."""
    oob = made(1.0, members=members, trajectories=100, windows=4, action_dim=7, chunk=4, seed=members)
    sigma = torch.full((7,), 0.1, dtype=torch.float64)
    bound = 2.6 * np.sqrt(np.array(LEVELS) * (1 - np.array(LEVELS)) / 400)
    assert (np.abs(np.array(coverage(oob, 1.0, sigma)) - LEVELS) < bound + 0.01).all()
    assert coverage(oob, 0.7, sigma)[0] < 0.5 - bound[0]
    assert coverage(oob, 1.4, sigma)[0] > 0.5 + bound[0]
    single = dataclasses.replace(oob, share=torch.zeros(400), residual=oob.residual + 1.0)
    exact = coverage(single, 0.0, sigma)  # without a posterior: the normal distribution's own ellipsoids
    inside = single.residual.square().sum(1).numpy() / 0.1**2 <= stats.chi2.ppf(LEVELS, 28)[:, None]
    assert exact == pytest.approx(inside.mean(1), abs=0.02)


def test_calibrated_it_covers_what_it_says():
    found = calibrate(made(2.0, members=300, trajectories=300))
    off, one, own = found.coverage
    assert own.shares == pytest.approx((0.5, 0.8, 0.95), abs=0.05)
    assert off.log_likelihood < one.log_likelihood < own.log_likelihood
    assert own.log_likelihood == pytest.approx(max(value for _, value in found.curve))
    assert found.pit == pytest.approx((0.1,) * 10, abs=0.02)


# -- no regression -----------------------------------------------------------------------------------------------------------------
def largest_safe(table, level):
    p_values = sign_flips(against_bc(table))
    return max((a for a, p in zip(ALPHAS[-len(p_values) :], p_values) if p <= level), default=None)


@pytest.mark.parametrize("many", [{"worthless": True}, {}, {"episodic": True}, {"amplitude": 0.7, "episodic": True}])
@pytest.mark.parametrize("count", [8, 12])
def test_the_level_of_the_test_holds(many, count):
    """Simulation: what is no better than BC for new trajectories (no α, or none beyond where both are equal) passes that often."""
    table = log_likelihoods(made(0.5, trajectories=500, windows=2, seed=99, **many), ALPHAS, SIGMAS)
    mean = against_bc(table).mean(0)
    equal = max((a for a, value in zip(ALPHAS[-len(mean) :], mean) if value > 0), default=0.0)
    assert (equal == 0) if "worthless" in many else (0.25 < equal < 4)
    rng, runs = np.random.default_rng(0), 400
    safe = [largest_safe(table[torch.as_tensor(rng.choice(500, count, replace=False))], 0.1) for _ in range(runs)]
    assert np.mean([s is not None and s > equal for s in safe]) <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / runs)
    assert equal == 0 or np.mean([s is not None for s in safe]) > 0.15  # it is not that nothing ever passes


@pytest.mark.parametrize("count", [8, 12, 20])
@pytest.mark.parametrize("many", [{}, {"amplitude": 0.7}])
def test_bc_is_not_said_to_be_better_where_it_is_not(count, many):
    """Few trajectories of large gain make up for many of small loss: a t-test of few says "worse" in a quarter of the runs."""
    table = log_likelihoods(made(0.5, trajectories=500, windows=6, seed=7, **many), ALPHAS, SIGMAS)
    at_half = against_bc(table).mean(0)[ALPHAS.index(0.5) - ALPHAS.index(0.25)]
    assert at_half > 0
    rng, runs, said = np.random.default_rng(0), 200, 0
    for _ in range(runs):
        few = table[torch.as_tensor(rng.choice(500, count, replace=False))]
        alpha, low, high = interval(profiles(few).sum(1))
        said += choose(Estimate(alpha, low, high, 0.1, 1.0), largest_safe(few, 0.05), count, count, 0.05)[0] == 0
    assert said / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_sign_flips_is_the_permutation_test_of_the_greatest_t():
    difference = np.random.default_rng(0).normal((0.2, 0.8, -0.5), 0.6, (6, 3))

    def t(values):
        return stats.ttest_1samp(values, 0).statistic

    greatest = [t(np.array(signs)[:, None] * difference).max() for signs in itertools.product((1, -1), repeat=6)]
    expected = [np.mean(np.array(greatest) >= own - 1e-9) for own in t(difference)]
    assert sign_flips(difference) == pytest.approx(expected)
    assert sign_flips(difference, exact_up_to=1) == pytest.approx(expected, abs=0.02)
    assert sign_flips(np.ones((1, 2))).tolist() == [0.5, 0.5]


def test_a_larger_alpha_than_is_shown_to_be_safe_is_not_taken():
    estimate, wide = Estimate(2.0, 1.5, 2.5, 0.1, 3.0), Estimate(2.0, 0.4, 2.5, 0.1, 3.0)
    assert choose(estimate, 3.0, 9, 9, 0.05)[:2] == (MOST, "calibrated")
    assert choose(estimate, 1.5, 9, 9, 0.05)[:2] == (MOST, "calibrated")
    assert choose(Estimate(0.9, 0.8, 1.1, 0.1, 3.0), 3.0, 9, 9, 0.05)[:2] == (0.9, "calibrated")
    assert choose(estimate, 0.5, 9, 9, 0.05)[:2] == (0.5, "no-regression")
    assert choose(wide, 3.0, 9, 9, 0.05)[:2] == (FALLBACK, "fallback")
    assert choose(wide, 0.3, 9, 9, 0.05)[:2] == (0.3, "fallback")
    assert choose(estimate, 0.3, 4, 4, 0.05)[:2] == (0.3, "fallback")
    assert choose(estimate, None, 9, 9, 0.05)[:2] == (FALLBACK, "fallback")
    assert choose(Estimate(0.6, 0.5, 0.7, 0.1, 3.0), None, 9, 9, 0.05)[:2] == (0.6, "fallback")
    assert choose(Estimate(0.1, 0.0, 0.5, 0.1, 3.0), None, 9, 9, 0.05)[:2] == (0.0, "no-regression")


def test_it_says_why_it_cannot_tell():
    estimate, wide = Estimate(2.0, 1.5, 2.5, 0.1, 3.0), Estimate(2.0, 0.4, 2.5, 0.1, 3.0)
    for arguments, words in (
        ((estimate, 3.0, 4, 4), "too few demonstrations, 4 of 4 trajectories"),
        ((estimate, 3.0, 4, 20), "too few members, 4 of 20 trajectories"),
        ((wide, 3.0, 9, 9), r"interval of 9 trajectories left out is \[0.40, 2.50\]$"),
        ((wide, 0.5, 9, 9), r"\[0.40, 2.50\]; larger ones are not shown, at level 0.05, to explain"),
        ((estimate, 3.0, 9, 9), "9 trajectories left out are explained best by 2.00; no more is taken"),
        ((estimate, None, 9, 9), "but no α is shown, at level 0.05, to explain"),
    ):
        assert re.search(words, choose(*arguments, 0.05)[2])


@pytest.mark.parametrize(("oob", "weight", "source"), [
    (made(1.0, trajectories=3), FALLBACK, "fallback"), (made(1.0, trajectories=6, windows=2, seed=3), FALLBACK, "fallback"),
    (made(1.0, trajectories=40, sigma=0.0, worthless=True), 0.0, "no-regression"),
])  # fmt: skip
def test_too_few_to_tell(oob, weight, source):
    found = calibrate(oob)
    assert (found.posterior_weight, found.source) == (weight, source)
    assert found.safe is None


# -- the ensemble ------------------------------------------------------------------------------------------------------------------
def test_out_of_bag_are_the_members_that_never_saw_the_trajectory():
    rng = np.random.default_rng(0)
    features, episode = torch.as_tensor(rng.uniform(-1, 1, (30, 3)), dtype=torch.float32), torch.arange(6).repeat_interleave(5)
    chunks = torch.tanh(features[:, :1, None].expand(-1, 2, 2))
    ensemble = fit_ensemble(
        features, chunks, episode, EnsembleConfig(ensemble_size=9, hidden=8, steps=20, batch_size=8), seed=4
    )
    counts = bootstrap_counts(episode, 9, "trajectory", make_generator(4, "ensemble/bootstrap"))
    oob, predictions = ensemble.out_of_bag(features, chunks, episode, 4), ensemble.predict(features).double().numpy()
    left = {t: [k for k in range(9) if counts[k, 5 * t] == 0] for t in range(6)}
    kept = [t for t in range(6) if len(left[t]) >= 3]
    assert 0 < len(kept) < 6
    assert oob.trajectory.tolist() == np.repeat(kept, 5).tolist()
    for i, t in enumerate(kept):
        for j in range(5):
            own = predictions[left[t], 5 * t + j]
            np.testing.assert_allclose(oob.residual[5 * i + j], chunks[5 * t + j].flatten() - own.mean(0), atol=1e-6)
            np.testing.assert_allclose(oob.factor.covariance()[5 * i + j], np.cov(own, rowvar=False), atol=1e-9)
            assert oob.freedom[5 * i + j] == len(left[t]) - 1
            assert oob.share[5 * i + j] == pytest.approx(1 / len(left[t]))
    assert oob.demonstrations == 6
    for wrong, words in (({"bootstrap": "pair"}, "whole trajectories"), ({"ensemble_size": 2}, "three members")):
        config = EnsembleConfig(**{"ensemble_size": 4, "hidden": 8, "steps": 1, **wrong})
        with pytest.raises(InputError, match=words):
            fit_ensemble(features, chunks, episode, config, seed=0).out_of_bag(features, chunks, episode, 0)


# -- stages ------------------------------------------------------------------------------------------------------------------------
def test_the_command_and_auto_take_the_same_alpha_and_record_why(tmp_path, capsys):
    file = write_demonstrations(tmp_path / "d.hdf5", trajectories=9)
    data = ["--data.demonstrations", str(file), "--seeds", "3"]
    small = ["--ensemble.hidden", "8", "--ensemble.steps", "40", "--ensemble.batch-size", "8"]
    network = DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2)
    for kind in ("ensemble", "closed-form"):
        posterior = str(tmp_path / kind)
        assert cli.main(["posterior", "fit", *data, "--output", posterior, "--kind", kind, *small]) == 0
        output = tmp_path / f"{kind}-calibration"
        assert cli.main(["posterior", "calibrate", *data, "--posterior", posterior, "--output", str(output)]) == 0
        found = read_json(output / "seed_3/calibration.json", Calibration)
        assert (output / "seed_3/calibration.png").stat().st_size > 10_000
        words = capsys.readouterr().out
        assert f"seed 3: α = {found.posterior_weight:.2f} ({found.source}" in words
        assert ("of seed 3 is a fallback" in words) == (found.source == "fallback")
        config = Pretrain(TrainingSetConfig(file), tmp_path / f"{kind}-policy", network, tmp_path / kind,
                          pretraining=PretrainingConfig(posterior_weight="auto", steps=10, batch_size=8))  # fmt: skip
        pretrain_policy(config, 3)
        words = capsys.readouterr().out
        said = (
            "of seed 3 is a fallback"
            if found.source == "fallback"
            else f"seed 3: α = {found.posterior_weight:.2f} ({found.source}"
        )
        assert said in words
        about = load_policy(tmp_path / f"{kind}-policy/seed_3").about
        assert about.posterior_weight == found.posterior_weight
        assert about.posterior_weight_source == f"{found.source}: {found.reason}"
        assert json.loads((tmp_path / f"{kind}-policy/seed_3/calibration.json").read_text()) == json.loads(
            (output / "seed_3/calibration.json").read_text()
        )
        number = dataclasses.replace(config.pretraining, posterior_weight=found.posterior_weight)
        pretrain_policy(dataclasses.replace(config, output=tmp_path / f"{kind}-number", pretraining=number), 3)
        same = [load_tree(tmp_path / f"{kind}-{name}/seed_3/policy.safetensors")["parameters"] for name in ("policy", "number")]
        assert all(torch.equal(same[0][key], same[1][key]) for key in same[0])
    fewer = TrainingSetConfig(file, num_trajectories=4)
    with pytest.raises(InputError, match="other windows"):
        pretrain_policy(dataclasses.replace(config, data=fewer, output=tmp_path / "x"), 3)
    assert not (tmp_path / "x").exists()


def test_auto_is_no_number_for_the_trainer():
    with pytest.raises(InputError, match="no number yet"):
        Pretraining(policy(), WINDOWS, PretrainingConfig(posterior_weight="auto"), 0, factor())
