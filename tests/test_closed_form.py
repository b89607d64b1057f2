"""The closed form: exact fits without trajectories, Bayesian linear regression, the jackknife, honest features; file and stage."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import postbc.posterior.ensemble as ensemble_module
import postbc.stages.posterior as posterior_stage
from kills import in_a_process, kill_and_resume, kill_at_every_operation
from made import write_demonstrations
from postbc.data.normalization import Normalization
from postbc.data.training_set import TrainingSetConfig, load_training_set
from postbc.errors import InputError
from postbc.files import load_tree, save_tree, write_text
from postbc.policies import DiffusionConfig
from postbc.posterior import ClosedFormConfig, EnsembleConfig, Posterior, closed_form, fit_closed_form, fit_ensemble
from postbc.posterior.closed_form import Ridge, groups_of, jackknife, left_out, scaled, with_constant
from postbc.pretraining import PretrainingConfig
from postbc.runs import versions
from postbc.stages.posterior import PosteriorFit, fit_posterior, posterior_at
from postbc.stages.pretrain import Pretrain, pretrain_policy

LINEAR = ClosedFormConfig(layer=0, ridge=0.1)
SMALL = EnsembleConfig(hidden=16, layers=2, steps=60, batch_size=16, learning_rate=3e-3)


def data(trajectories=6, length=9, feature_dim=3, noise=0.1, seed=0):
    """Features (N, 3), chunks (N, 2, 2) that are linear in them up to noise, episodes (N,)."""
    rng = np.random.default_rng(seed)
    n = trajectories * length
    features = rng.uniform(-1, 1, (n, feature_dim)).astype(np.float32)
    weights = np.random.default_rng(99).normal(0, 0.2, (feature_dim, 4))
    chunks = (features @ weights + noise * rng.normal(size=(n, 4))).astype(np.float32)
    return (
        torch.as_tensor(features),
        torch.as_tensor(chunks).view(n, 2, 2),
        torch.arange(trajectories).repeat_interleave(length),
    )


def refit(phi, y, ridge):
    """(P, D): penalised least squares, as an augmented ordinary one."""
    penalty = math.sqrt(ridge) * np.eye(phi.shape[1])
    return np.linalg.lstsq(np.r_[phi, penalty], np.r_[y, np.zeros((phi.shape[1], y.shape[1]))], rcond=None)[0]


# -- ridge regression --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [2, 9])  # fewer windows than weights, and more
def test_fits_without_some_windows_are_refits_without_them(length):
    features, chunks, episode = data(5, length)
    phi, y = with_constant(features).double(), chunks.flatten(1).double()
    ridge = Ridge(phi, y, episode, 7.0).at(0.3)
    for without in ((0,), (4, 1), (1, 4)):
        others = np.setdiff1d(np.arange(len(phi)), np.flatnonzero(np.isin(episode.numpy(), without)))
        weights = refit(phi.numpy()[others], y.numpy()[others], 0.3)
        np.testing.assert_allclose((ridge.basis @ ridge.without(*without)).numpy(), weights, atol=1e-10)
        own = torch.nonzero(episode == without[0])[:, 0]
        np.testing.assert_allclose(ridge.residuals(own, *without).numpy(), (y[own] - phi[own] @ weights).numpy(), atol=1e-10)


def test_the_fit_is_bayesian_linear_regression():
    """Prior N(0, σ²/λ) on the weights, noise N(0, σ²): the posterior mean by conditioning the joint Gaussian of targets and answers."""
    features, chunks, _ = data()
    phi, y, new = with_constant(features).double(), chunks.flatten(1).double(), torch.rand(7, 4, dtype=torch.float64)
    ridge, variance = 0.7, 0.09
    fitted = Ridge(phi, y, torch.zeros(len(phi)), ridge)
    ours = new @ fitted.basis @ fitted.whole
    prior = variance / ridge
    joint = prior * phi @ phi.T + variance * torch.eye(len(phi), dtype=torch.float64)
    expected = prior * new @ phi.T @ torch.linalg.solve(joint, y)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)


def test_the_jackknife_of_a_mean_is_the_means_standard_error():
    """With a constant alone and no penalty the fit is the mean, whose jackknife variance is s²/n exactly."""
    y = torch.as_tensor(np.random.default_rng(0).normal(size=(11, 3)))
    ridge = Ridge(torch.ones(11, 1), y, torch.arange(11), 1e-12)
    covariance = jackknife(torch.stack([ridge.basis @ ridge.without(i) for i in range(11)])).covariance()[0]
    np.testing.assert_allclose(covariance.numpy(), np.cov(y.numpy(), rowvar=False) / 11, rtol=1e-9)


@pytest.mark.parametrize("trained", [False, True])
def test_on_a_linear_problem_the_covariance_is_the_bayesian_posteriors(trained):
    """Independent windows, noise σ, flat prior: σ²·φᵀ(ΦᵀΦ)⁻¹φ at every state, the average of the jackknife over data sets.
    So it is at the scale that two trained linear networks of half of the windows each tell."""
    new = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    found, expected = [], []
    config = EnsembleConfig(hidden=4, layers=0, bound="none", steps=300, batch_size=300, learning_rate=0.015)
    chosen = ClosedFormConfig(ridge=1e-6, layer=None if trained else 0, blocks=60)
    for seed in range(30):
        features, chunks, _ = data(60, 1, noise=0.1, seed=seed)
        model = fit_closed_form(features, chunks, torch.arange(60), config, chosen)
        assert (model.inflation != 1) == trained
        found.append(model.factor(new).covariance())
        phi, at = with_constant(features).double(), with_constant(new).double()
        expected.append(0.1**2 * (at @ torch.linalg.inv(phi.T @ phi) * at).sum(1))
    found, expected = torch.stack(found).mean(0).double(), torch.stack(expected).mean(0)
    diagonal = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal / expected[:, None], torch.ones_like(diagonal), atol=0.2, rtol=0)
    off = found / expected[:, None, None] - torch.diag_embed(diagonal / expected[:, None])
    assert off.abs().max() < 0.2  # the noise of different numbers is independent


def test_it_is_as_wide_as_an_ensemble():
    """In the mean over data sets; and what is left out is at the same scale."""
    config = EnsembleConfig(ensemble_size=12, hidden=32, layers=2, steps=300, batch_size=48, learning_rate=3e-3)
    features, _, episode = data(8, 6)
    found = []
    for seed in range(8):
        person = np.random.default_rng(seed).normal(0, 0.2, (8, 4)).repeat(6, axis=0)  # differs for a whole trajectory
        chunks = torch.as_tensor(0.5 * np.sin(3 * features.numpy() @ np.ones((3, 4))) + person, dtype=torch.float32).view(
            48, 2, 2
        )
        model = fit_closed_form(features, chunks, episode, config, ClosedFormConfig(layer=2, ridge=0.1), seed=seed)
        ensemble = fit_ensemble(features, chunks, episode, config, seed)
        factors = (fitted.factor(features) for fitted in (ensemble, model))
        left_out = model.out_of_bag(features, chunks, episode, seed).factor
        found.append(torch.stack([factor.std().square().mean() for factor in (*factors, left_out)]))
    expected, *variances = torch.stack(found).mean(0).tolist()
    assert [v / expected for v in variances] == pytest.approx([1, 1], abs=0.5)


def test_leaving_out_two_is_the_jackknife_of_those_who_stay():
    features, chunks, episode = data(5, 4)
    phi, y = scaled(features).double(), chunks.flatten(1).double()
    ridge = Ridge(phi, y, episode, 0.2)
    residual, factor = left_out(ridge, (1, 3), 1.0, [ridge.rows[1], ridge.rows[3]])
    few = left_out(ridge, (1, 3), 1.0, [ridge.rows[1][1:3], ridge.rows[3][:1]])
    torch.testing.assert_close(few[0], residual[[1, 2, 4]])
    torch.testing.assert_close(few[1].rows, factor.rows[[1, 2, 4]])
    for k, b in enumerate((1, 3)):
        own = (episode == b).numpy()
        fits = [refit(phi.numpy()[~own & (episode != c).numpy()], y.numpy()[~own & (episode != c).numpy()], 0.2)
                for c in range(5) if c != b]  # fmt: skip
        predictions = np.clip(np.stack([phi.numpy()[own] @ fit for fit in fits]), -1, 1)
        mean = np.clip(phi.numpy()[own] @ refit(phi.numpy()[~own], y.numpy()[~own], 0.2), -1, 1)
        np.testing.assert_allclose(residual[4 * k : 4 * k + 4].numpy(), y.numpy()[own] - mean, atol=1e-9)
        for i in range(4):
            expected = np.cov(predictions[:, i], rowvar=False, ddof=0) * 3  # (G−1)/G·Σ, G = 4
            np.testing.assert_allclose(factor.covariance()[4 * k + i].numpy(), expected, atol=1e-9)


# -- the posterior -----------------------------------------------------------------------------------------------------------------
def test_predictions_are_the_fits_without_each_group():
    features, chunks, episode = data(7, 6)
    config = ClosedFormConfig(layer=2, ridge=0.05, blocks=4)
    model = fit_closed_form(features, chunks, episode, SMALL, config, seed=3)
    group = groups_of(episode, 4, 3)
    assert sorted(np.bincount(group.numpy())) == [6, 12, 12, 12]
    phi, y = scaled(model.regressor(features[None])[0]).double().numpy(), chunks.flatten(1).double().numpy()
    for g in range(4):
        others = (group != g).numpy()
        expected = np.clip(phi @ refit(phi[others], y[others], 0.05), -1, 1)
        np.testing.assert_allclose(model.predict(features, batch=10)[g].numpy(), expected, atol=2e-5)
    assert model.factor(features).rows.shape == (42, 4, 4)


def test_features_that_have_seen_a_trajectory_are_not_asked_about_it():
    """Targets that nothing can predict: whoever predicts a trajectory better than chance has seen it."""
    rng = np.random.default_rng(0)
    features = torch.as_tensor(rng.uniform(-1, 1, (48, 6)), dtype=torch.float32)
    chunks = torch.as_tensor(0.5 * rng.choice([-1, 1], (48, 2, 2)), dtype=torch.float32)
    episode = torch.arange(8).repeat_interleave(6)
    config = EnsembleConfig(hidden=128, layers=2, steps=400, batch_size=48, learning_rate=3e-3)
    model = fit_closed_form(features, chunks, episode, config, ClosedFormConfig(layer=2, ridge=0.1))
    honest = model.out_of_bag(features, chunks, episode, 0)
    own = Ridge(scaled(model.regressor(features[None])[0]), chunks.flatten(1), episode, 0.1)
    seen = left_out(own, range(8), 1.0, own.rows)
    assert seen[0].square().mean() < 0.6 * 0.25
    assert honest.residual.square().mean() > 0.9 * 0.25
    assert model.inflation > 1.2
    assert honest.trajectory.unique().tolist() == list(range(8))
    assert (honest.freedom == 6).all()


def test_few_windows_are_those_of_all():
    """Asked about 7 of 48 windows, what is left out answers as it does about all; nothing else is predicted."""
    features, chunks, episode = data(8, 6)
    model = fit_closed_form(features, chunks, episode, SMALL, ClosedFormConfig(layer=1, ridge=0.1))
    ridges = [Ridge(scaled(half), chunks.flatten(1), episode, 0.1) for half in model.halves(features.expand(2, -1, -1))]
    every, few = (closed_form._out_of_bag(ridges, episode, 2, 1.0, most) for most in (None, 7))
    assert (len(every.residual), len(few.residual)) == (48, 7)
    expected = every.thinned(7)
    assert few.trajectory.tolist() == expected.trajectory.tolist()
    torch.testing.assert_close(few.residual, expected.residual)
    torch.testing.assert_close(few.factor.rows, expected.factor.rows)
    assert (few.share == 0).all()  # a fit, not the mean of several
    assert few.demonstrations == 8


def test_ridge_and_layer_are_chosen_by_what_is_left_out():
    features, chunks, episode = data(8, 10, noise=0.02)  # linear: no hidden layer is needed, nor much of a penalty
    chosen = fit_closed_form(features, chunks, episode, dataclasses.replace(SMALL, steps=20)).choice
    assert (chosen.layer, chosen.groups) == (0, 8)
    assert chosen.ridge <= 0.1
    generator = torch.Generator().manual_seed(0)
    wide, noise = torch.randn(80, 60, generator=generator), 0.3 * torch.randn(chunks.shape, generator=generator)
    assert fit_closed_form(wide, noise, episode, SMALL, ClosedFormConfig(layer=0)).choice.ridge == 10.0


def test_what_cannot_be_left_out_is_refused():
    features, chunks, episode = data(3)
    with pytest.raises(InputError, match="at least 4"):
        fit_closed_form(features, chunks, episode, SMALL)
    assert fit_closed_form(features, chunks, episode, SMALL, LINEAR).inflation == 1
    with pytest.raises(InputError, match="there is but one"):
        fit_closed_form(features, chunks, 0 * episode, SMALL, LINEAR)
    with pytest.raises(InputError, match="no such hidden layer"):
        fit_closed_form(features, chunks, episode, SMALL, ClosedFormConfig(layer=3, ridge=1.0))


# -- file and stage ----------------------------------------------------------------------------------------------------------------
def test_file_round_trip_and_a_header_that_does_not_fit(tmp_path):
    features, chunks, episode = data()
    for config in (LINEAR, ClosedFormConfig(layer=1, ridge=0.1)):
        model = fit_closed_form(features, chunks, episode, SMALL, config)
        Posterior(model, Normalization(np.zeros(3), np.ones(3), np.zeros(2), np.ones(2)), "abc", 4).save(tmp_path)
        loaded = Posterior.load(tmp_path)
        torch.testing.assert_close(loaded.model.factor(features).rows, model.factor(features).rows, atol=0, rtol=0)
        torch.testing.assert_close(loaded.factor(features).covariance(), model.factor(features).covariance())
        assert loaded.model.choice == model.choice
    tree = load_tree(tmp_path / "posterior.safetensors")
    tree["closed_form"]["groups"] = 7
    save_tree(tmp_path / "posterior.safetensors", tree)
    with pytest.raises(InputError, match="another shape"):
        Posterior.load(tmp_path)


def stage(directory: Path, file: Path, **more) -> PosteriorFit:
    wanted = {"ensemble": dataclasses.replace(SMALL, hidden=8, batch_size=8), "resume": True, **more}
    return PosteriorFit(TrainingSetConfig(file, num_trajectories=5), directory, kind="closed-form", **wanted)


def test_the_stage_and_a_policy_from_it(tmp_path):
    file = write_demonstrations(tmp_path / "d.hdf5")
    config = stage(tmp_path / "p", file, epochs=2)
    model = fit_posterior(config, 0).model
    assert model.choice.groups == 5
    assert (tmp_path / "p/seed_0/posterior.png").stat().st_size > 10_000
    training_set = load_training_set(config.data, 0)
    factor = posterior_at(tmp_path / "p", training_set, 0).factor()
    assert factor.rows.shape == (len(training_set.windows), 5, 28)
    pretrain = Pretrain(config.data, tmp_path / "postbc", DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2),
                        tmp_path / "p", pretraining=PretrainingConfig(steps=5, batch_size=8))  # fmt: skip
    assert pretrain_policy(pretrain, 0).about.method == "postbc"
    for wrong, words in (({"closed_form": ClosedFormConfig(layer=9)}, "no such hidden layer"),
                         ({"data": dataclasses.replace(config.data, num_trajectories=3)}, "too few trajectories")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            fit_posterior(dataclasses.replace(config, output=tmp_path / "x", **wrong), 0)
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="another configuration"):
        fit_posterior(dataclasses.replace(config, kind="ensemble", closed_form=ClosedFormConfig()), 0)
    with pytest.raises(InputError, match="options of the closed form"):
        PosteriorFit(config.data, tmp_path / "x", closed_form=ClosedFormConfig(layer=1))


def killed_stage(directory: Path) -> None:
    ensemble_module.Checkpoints.due = property(lambda self: self.run is not None)  # after every block
    posterior_stage.plot = lambda found, data, path, title: write_text(path, title)
    fit_posterior(stage(directory, Path(sys.argv[2]) / "d.hdf5"), 0)


@pytest.mark.parametrize("how", ["operations", "moments"])
def test_kills_leave_nothing_but_the_same_files(tmp_path, how):
    write_demonstrations(tmp_path / "d.hdf5")
    in_a_process(__file__, how, tmp_path)


if __name__ == "__main__":
    import torch._dynamo

    versions()
    if sys.argv[1] == "operations":
        kill_at_every_operation(killed_stage, Path(sys.argv[2]), ["*/versions.json"], stride=29)
    else:
        kill_and_resume(killed_stage, Path(sys.argv[2]), "posterior", ["*/versions.json"])
