"""α from trajectories left out: the likelihood against scipy's, α recovered where it is known, the level of the test, the stages."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

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
from postbc.posterior.calibration import ALPHAS, FALLBACK, SIGMAS, Estimate, against_bc, choose, log_likelihoods, sign_flips
from postbc.pretraining import Pretraining, PretrainingConfig
from postbc.schemas import read_json
from postbc.seeding import make_generator
from postbc.stages.pretrain import Pretrain, pretrain_policy
from test_pretraining import WINDOWS, factor, policy


def made(alpha, sigma=0.1, members=30, trajectories=40, windows=6, action_dim=2, chunk=2, seed=0, worthless=False) -> OutOfBag:
    """Residuals of N(0, α²C + σ²) where C is known only by `members` draws; `worthless`: C has nothing to do with them."""
    rng = np.random.default_rng(seed)
    n, d = trajectories * windows, chunk * action_dim
    scale = np.repeat(np.exp(rng.normal(0, 0.7, (trajectories, 1, 1))), windows, 0).reshape(n, 1)
    roots = (
        0.2 * scale[..., None] * (np.eye(d) + 0.5 * rng.normal(size=(d, d)))
    )  # C = rootᵀ·root, one shape, another size everywhere
    weights = np.broadcast_to(np.asarray(alpha, float), (action_dim,)) if np.ndim(alpha) else np.full(action_dim, alpha)
    truth = np.einsum("nd,nde->ne", rng.normal(size=(n, d)), roots) * np.tile(weights, chunk)
    if worthless:
        truth = 0.3 * rng.normal(size=(n, d))
    residual = truth + sigma * rng.normal(size=(n, d))
    draws = np.einsum("knd,nde->kne", rng.normal(size=(members, n, d)), roots)
    spread = Factor.from_predictions(torch.as_tensor(draws))
    which = torch.arange(trajectories).repeat_interleave(windows)
    return OutOfBag(torch.as_tensor(residual), spread, torch.full((n,), members - 1.0), which, action_dim)


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
                            total = alpha**2 * variance[n, number] + noise**2
                            nu = 29 * (total / (alpha**2 * variance[n, number])) ** 2
                            expected += stats.t.logpdf(oob.residual[n, number].item(), nu, 0, math.sqrt(total))
                    assert table[t, d, i, j] == pytest.approx(expected, abs=1e-8)


def test_without_a_posterior_it_is_the_normal_likelihood():
    oob = made(1.0, trajectories=2, windows=3)
    table = log_likelihoods(oob, (0.0,), (1.0,)).sum().item()
    assert table == pytest.approx(stats.norm.logpdf(oob.residual.numpy(), 0, oob.noise.numpy()).sum(), abs=1e-3)


# -- α -----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("members", [6, 40])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_is_found_where_it_is_known(alpha, members):
    """With few members, too: by the normal likelihood 6 of them give an α that is 30 % too large."""
    found = [calibrate(made(alpha, members=members, seed=seed), resamples=100) for seed in range(6)]
    assert np.mean([c.chunk.alpha for c in found]) == pytest.approx(alpha, rel=0.12)
    assert sum(c.chunk.low <= alpha <= c.chunk.high for c in found) >= 5
    assert sum(c.source == "calibrated" and c.posterior_weight == c.chunk.alpha <= c.safe for c in found) >= 4
    assert np.mean([c.chunk.moments - c.chunk.alpha for c in found]) > 0  # moments know no σ


def test_each_action_dimension_has_its_own():
    found = calibrate(made((0.5, 2.0), trajectories=150))
    first, second = (d.alpha for d in found.dimensions)
    assert first == pytest.approx(0.5, rel=0.3)
    assert second == pytest.approx(2.0, rel=0.3)
    assert first < found.chunk.alpha < second


def test_calibrated_it_covers_what_it_says():
    found = calibrate(made(2.0, members=300, trajectories=300))
    off, one, own = found.coverage
    assert own.shares == pytest.approx((0.5, 0.8, 0.95), abs=0.05)
    assert off.log_likelihood < one.log_likelihood < own.log_likelihood
    assert own.log_likelihood == pytest.approx(max(value for _, value in found.curve))
    assert found.pit == pytest.approx((0.1,) * 10, abs=0.02)


# -- no regression -----------------------------------------------------------------------------------------------------------------
def largest_safe(oob, level):
    p_values = sign_flips(against_bc(log_likelihoods(oob, ALPHAS, SIGMAS)))
    return max((a for a, p in zip(ALPHAS[-len(p_values) :], p_values) if p <= level), default=None)


@pytest.mark.parametrize("worthless", [True, False])
def test_the_level_of_the_test_holds(worthless):
    """Simulation: what is no better than BC (no α is, or none beyond where the likelihoods are equal) passes that often at most."""
    many = log_likelihoods(made(0.5, trajectories=1000, windows=2, seed=99), ALPHAS, SIGMAS).sum(0).amax(-1).sum(0)
    equal = max(a for a, value in zip(ALPHAS, many) if value > many[0])
    assert 1 < equal < 1.5
    drawn = [made(0.5, trajectories=12, windows=2, seed=s, worthless=worthless) for s in range(120)]
    safe = [largest_safe(oob, 0.1) for oob in drawn]
    wrong = np.mean([s is not None and (worthless or s > equal) for s in safe])
    assert wrong <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / 120)
    assert worthless or np.mean([s is not None for s in safe]) > 0.25  # it is not that nothing ever passes


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
    estimate = Estimate(2.0, 1.5, 2.5, 0.1, 3.0)
    assert choose(estimate, 3.0, False, 9, 0.05)[:2] == (2.0, "calibrated")
    assert choose(estimate, 0.5, False, 9, 0.05)[:2] == (0.5, "no-regression")
    assert choose(estimate, None, False, 9, 0.05)[:2] == (FALLBACK, "fallback")
    assert choose(estimate, None, True, 9, 0.05)[:2] == (0.0, "no-regression")
    assert choose(estimate, 3.0, False, 4, 0.05)[1] == "fallback"
    assert choose(Estimate(2.0, 0.4, 2.5, 0.1, 3.0), 3.0, False, 9, 0.05)[1] == "fallback"


@pytest.mark.parametrize(("oob", "source"), [
    (made(1.0, trajectories=3), "fallback"), (made(1.0, trajectories=6, windows=2, seed=3), "fallback"),
    (made(1.0, trajectories=40, sigma=0.0, worthless=True), "no-regression"),
])  # fmt: skip
def test_too_few_to_tell(oob, source):
    found = calibrate(oob)
    assert found.source == source
    assert found.posterior_weight == (FALLBACK if source == "fallback" else 0)
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
