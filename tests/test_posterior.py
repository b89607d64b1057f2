"""Algorithm 1: bootstrap, ensemble, factor; the Gaussian lemma reproduced by the noised-target regressor; files and the stage."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import postbc.posterior.ensemble as ensemble_module
import postbc.stages.posterior as posterior_stage
from kills import in_a_process, kill_and_resume, kill_at_every_operation
from made import write_demonstrations
from mutations import mutate
from postbc.data.normalization import Normalization
from postbc.data.training_set import TrainingSetConfig
from postbc.errors import InputError, NotFiniteError
from postbc.files import load_tree, save_tree, write_text
from postbc.posterior import Ensemble, EnsembleConfig, Factor, Posterior, bootstrap_counts, fit_ensemble
from postbc.posterior.bootstrap import BootstrapSampler
from postbc.posterior.ensemble import EnsembleTraining
from postbc.runs import Run, versions
from postbc.stages.posterior import PosteriorFit, fit_posterior


def data(trajectories=6, length=10, feature_dim=3, chunk=2, action_dim=2, seed=0):
    """Features (N, F), chunks (N, T, A), episodes (N,)."""
    rng = np.random.default_rng(seed)
    n = trajectories * length
    features = rng.uniform(-1, 1, (n, feature_dim)).astype(np.float32)
    chunks = np.tanh(features[:, :1, None] + 0.1 * rng.normal(size=(n, chunk, action_dim))).astype(np.float32)
    return torch.as_tensor(features), torch.as_tensor(chunks), torch.arange(trajectories).repeat_interleave(length)


def make(config, seed=0):
    return Ensemble(config, 3, 2, 2, torch.Generator().manual_seed(seed))


# -- bootstrap and factor ----------------------------------------------------------------------------------------------------------
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_bootstrap_by_trajectory_takes_whole_trajectories(trajectories, length, seed):
    which = torch.arange(trajectories).repeat_interleave(length)
    counts = bootstrap_counts(which, 5, "trajectory", torch.Generator().manual_seed(seed))
    by_trajectory = counts.view(5, trajectories, length)
    assert (by_trajectory == by_trajectory[..., :1]).all()
    assert (by_trajectory[..., 0].sum(1) == trajectories).all()


def test_bootstrap_by_pair_and_none():
    counts = bootstrap_counts(torch.arange(2000) // 50, 6, "pair", torch.Generator().manual_seed(0))
    assert (counts.sum(1) == 2000).all()
    left_out = (counts == 0).float().mean().item()
    assert left_out == pytest.approx(np.exp(-1), abs=0.02)  # each pair is missing from a sample with probability 1/e
    assert (bootstrap_counts(torch.zeros(7), 3, "none", torch.Generator()) == 1).all()


def test_sampler_draws_in_proportion_to_the_counts():
    counts = torch.tensor([[0, 1, 3, 0], [1, 0, 0, 0]])
    drawn = BootstrapSampler(counts).draw(20000, torch.Generator().manual_seed(0))
    share = torch.stack([(drawn == i).float().mean(1) for i in range(4)], 1)
    torch.testing.assert_close(share, torch.tensor([[0, 0.25, 0.75, 0], [1.0, 0, 0, 0]]), atol=0.01, rtol=0)


@pytest.mark.parametrize(("members", "dim"), [(3, 5), (40, 5)])
def test_factor_is_the_ensembles_covariance(members, dim):
    predictions = torch.randn(members, 6, dim, dtype=torch.float64) @ torch.randn(dim, dim, dtype=torch.float64)
    factor = Factor.from_predictions(predictions)
    for n in range(6):
        expected = np.cov(predictions[:, n].numpy(), rowvar=False)
        np.testing.assert_allclose(factor.covariance()[n].numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(factor.compact().covariance()[n].numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(factor.diagonal().covariance()[n].numpy(), np.diag(np.diag(expected)), atol=1e-12)
        biased = Factor.from_predictions(predictions, ddof=0).covariance()[n].numpy()
        np.testing.assert_allclose(biased, np.cov(predictions[:, n].numpy(), rowvar=False, ddof=0), atol=1e-12)
    assert factor.compact().rows.shape[1] == min(members, dim)


def test_samples_have_the_ensembles_covariance():
    factor = Factor.from_predictions(torch.randn(8, 2, 4) * torch.tensor([1.0, 2.0, 0.5, 0.0]))
    index = torch.ones(200_000, dtype=torch.int64)
    for version in (factor, factor.compact(), factor.diagonal()):
        drawn = version.sample(torch.Generator().manual_seed(0), index)
        covariance = version.covariance()[1]
        torch.testing.assert_close(torch.cov(drawn.T), covariance, atol=0.02 * covariance.max().item(), rtol=0)
        assert drawn.mean(0).abs().max() < 0.02 * covariance.max().sqrt()


def test_one_member_has_no_covariance():
    with pytest.raises(ValueError, match="two members"):
        Factor.from_predictions(torch.zeros(1, 3, 2))
    with pytest.raises(InputError, match="ensemble_size"):
        EnsembleConfig(ensemble_size=1)


# -- the ensemble ------------------------------------------------------------------------------------------------------------------
def test_noised_targets_reproduce_the_gaussian_posterior():
    """Lemma (paper.md section 2): argmin Σ‖μ − (x_t + w_t)‖²/σ² + ‖μ − μ̃‖²/λ₀² over w ~ N(0, σ²), μ̃ ~ N(0, λ₀²) is the posterior."""
    sigma, prior, count, members = 0.5, 0.8, 6, 3000
    x = np.random.default_rng(0).normal(0.3, sigma, count).astype(np.float32)
    # the mean μ is the output's bias (the observation is 0 and there is no hidden layer); prior_weight = σ²/λ₀²
    config = EnsembleConfig(
        ensemble_size=members, layers=0, steps=400, batch_size=count, learning_rate=0.05, bootstrap="none", target_noise=sigma,
        prior_weight=sigma**2 / prior**2, bound="none",
    )  # fmt: skip
    ensemble = Ensemble(config, 1, 1, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ensemble.network[0].bias.copy_(prior * torch.randn(members, 1, 1, generator=torch.Generator().manual_seed(1)))
        ensemble.network[0].weight.zero_()
    training = EnsembleTraining(
        ensemble, torch.zeros(count, 1), torch.as_tensor(x).view(count, 1, 1), torch.arange(count), seed=0
    )
    every = torch.arange(count).expand(members, -1)
    training.sampler.draw = lambda batch, generator: every  # full batches: the argmin itself, not SGD around it
    for step in range(config.steps):
        training.lr = 0.05 * (1 - step / config.steps)
        training.train(1)
    mu = ensemble.predict(torch.zeros(1, 1))[:, 0, 0].numpy()
    variance = 1 / (1 / prior**2 + count / sigma**2)
    mean = variance * x.sum() / sigma**2
    assert mu.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / members))
    assert mu.var(ddof=1) == pytest.approx(variance, rel=4 * np.sqrt(2 / members))


def test_predictions_stay_in_the_action_range_unless_told_otherwise():
    far = 100 * torch.randn(20, 3)
    for bound, limit in (("clamp", 1.0), ("none", float("inf"))):
        worst = make(EnsembleConfig(ensemble_size=3, hidden=16, bound=bound)).predict(far).abs().max().item()
        assert worst <= limit
        assert (worst > 1) == (bound == "none")


def test_gaussian_likelihood_is_torchs():
    ensemble = make(EnsembleConfig(ensemble_size=3, hidden=8, likelihood="gaussian"))
    s, y = torch.randn(3, 9, 3), torch.randn(3, 9, 4)
    mean, log_std = ensemble.network(s).split(4, -1)
    expected = -torch.distributions.Normal(mean, log_std.exp()).log_prob(y).mean((1, 2)) - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(ensemble.loss(s, y), expected)


#: Posterior std at the first state, of the first house (which fitted wide members in TorchScript), 50 steps at 1e-3, seed 3.
GOLDEN = {
    "narrow": ({"hidden": 16, "batch_size": 32}, (0.07552414, 0.03271029, 0.05961292, 0.0844411)),
    "wide": ({"hidden": 256, "batch_size": 64}, (0.04577214, 0.0826464, 0.02585624, 0.02924313)),
    "narrow, gaussian, noised": ({"hidden": 16, "batch_size": 32}, (0.07810225, 0.11648123, 0.03171918, 0.06346624)),
    "wide, gaussian, noised": ({"hidden": 256, "batch_size": 64}, (0.04653839, 0.09100846, 0.05130277, 0.05245283)),
}


@pytest.mark.parametrize("which", GOLDEN)
def test_numbers_are_those_of_the_first_house(which):
    sizes, expected = GOLDEN[which]
    more = {"likelihood": "gaussian", "target_noise": 0.1, "prior_weight": 0.5} if "noised" in which else {}
    features, chunks, episode = data()
    config = EnsembleConfig(ensemble_size=4, steps=50, learning_rate=1e-3, **sizes, **more)
    std = fit_ensemble(features, chunks, episode, config, seed=3).factor(features).std()
    assert std.flatten()[:4].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("likelihood", ["mse", "gaussian"])
def test_members_alone_equal_torchs_networks_and_adam(monkeypatch, likelihood):
    monkeypatch.setattr(ensemble_module, "WIDE", 0)
    steps = 25
    config = EnsembleConfig(
        ensemble_size=3, hidden=16, layers=2, batch_size=8, learning_rate=1e-2, likelihood=likelihood, target_noise=0.1,
        prior_weight=0.3,
    )  # fmt: skip
    ensemble = make(config)
    training = EnsembleTraining(ensemble, *data(), seed=1)
    assert len(training.members) == 3
    networks = []
    for m in range(3):
        layers = []
        for layer in ensemble.network:
            layers.append(torch.nn.ReLU())
            if hasattr(layer, "weight"):
                layers[-1] = torch.nn.Linear(*layer.weight.shape[1:])
                layers[-1].weight.data = layer.weight[m].detach().T.clone()
                layers[-1].bias.data = layer.bias[m, 0].detach().clone()
        networks.append(torch.nn.Sequential(*layers))
    first = [[p.detach().clone() for p in network.parameters()] for network in networks]
    generator = training.data.clone_state()
    training.train(steps)
    index = torch.stack([training.sampler.draw(8, generator) for _ in range(steps)])
    for m, network in enumerate(networks):
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
        for rows in index[:, m]:
            target = training.targets[rows] + training.noise[m, rows]
            loss = ensemble.loss_of(network(training.features[rows])[None], target[None]).sum()
            for p, anchor in zip(network.parameters(), first[m]):
                loss = loss + 0.3 / training.targets.numel() * (p - anchor).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        for layer, linear in zip(list(ensemble.network)[::2], list(network)[::2]):
            torch.testing.assert_close(layer.weight[m], linear.weight.T, atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(layer.bias[m, 0], linear.bias, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("hidden", [8, 64])
def test_training_resumes_to_the_bit_wherever_it_is_cut(hidden):
    config, found = EnsembleConfig(ensemble_size=3, hidden=hidden, layers=2, target_noise=0.1, prior_weight=0.5), []
    for blocks in ((7,), (3, 4)):
        ensemble = make(config)
        training = EnsembleTraining(ensemble, *data(), seed=1)
        for block in blocks:
            state = {k: v for k, v in training.state().items()}
            anchors, training = training.anchors, EnsembleTraining(ensemble, *data(), seed=1)
            training.anchors = anchors
            training.load_state(state)
            training.train(block)
        found.append(torch.cat([p.detach().flatten() for p in ensemble.parameters()]))
    assert torch.equal(*found)


def test_uncertain_where_there_are_no_data():
    features, chunks, episode = data(6, 30)
    config = EnsembleConfig(ensemble_size=12, hidden=32, steps=500, batch_size=64, learning_rate=3e-3)
    ensemble = fit_ensemble(features, chunks, episode, config, seed=0)
    assert ensemble.factor(3 * features).std().mean() > 2 * ensemble.factor(features).std().mean()


def test_a_fit_that_was_stopped_goes_on_to_the_same_ensemble_to_the_bit(tmp_path):
    config = EnsembleConfig(ensemble_size=3, hidden=8, steps=90, batch_size=16, target_noise=0.1, prior_weight=0.5)
    whole = fit_ensemble(*data(), config, seed=5)

    class Stop(Exception):
        pass

    with Run(tmp_path / "r", config) as run:
        save = run.save

        def save_and_stop(step, state):
            save(step, state)
            raise Stop

        run.save = save_and_stop
        with pytest.raises(Stop):
            fit_ensemble(*data(), config, 5, run=run, checkpoint_seconds=0)
    with Run(tmp_path / "r", config, resume=True) as run:
        resumed = fit_ensemble(*data(), config, 5, run=run)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_numbers_that_are_not_finite_end_a_fit(tmp_path):
    features, chunks, episode = data()
    with pytest.raises(InputError, match="finite"):
        fit_ensemble(features.clone().index_fill_(0, torch.tensor([3]), math.nan), chunks, episode, EnsembleConfig(), 0)
    wild = EnsembleConfig(ensemble_size=2, hidden=8, steps=60, learning_rate=1e11, bound="none")
    with pytest.raises(NotFiniteError, match="step 60"):
        fit_ensemble(features, chunks, episode, wild, 0)
    with pytest.raises(InputError, match="do not fit into memory"):
        fit_ensemble(features, chunks, episode, EnsembleConfig(ensemble_size=100_000, hidden=2**20), 0)


def test_bfloat16_stays_near():
    compute = dataclasses.replace(ensemble_module.Compute(device="cpu"), precision="bfloat16")
    for hidden in (16, 512):  # as a stack, and one by one
        config = EnsembleConfig(ensemble_size=2, hidden=hidden, layers=2, steps=10, batch_size=32, learning_rate=1e-3)
        exact, rounded = (fit_ensemble(*data(), config, 0, c).predict(data()[0]) for c in (None, compute))
        torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0)
        assert not torch.equal(rounded, exact)


@pytest.mark.slow
def test_compiled_it_fits_the_same():
    config = EnsembleConfig(ensemble_size=3, hidden=16, steps=40, batch_size=64, learning_rate=1e-3, prior_weight=0.1)
    compute = ensemble_module.Compute(device="cpu", compile=True)
    exact, compiled = (fit_ensemble(*data(), config, 0, c).predict(data()[0]) for c in (None, compute))
    torch.testing.assert_close(compiled, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_fits_the_same_ensemble(compiled):
    config = EnsembleConfig(ensemble_size=5, hidden=256, steps=40, batch_size=64, learning_rate=1e-3, target_noise=0.1)
    compute = ensemble_module.Compute(device="cuda", compile=compiled)
    here = fit_ensemble(*data(), config, 0, ensemble_module.Compute(device="cpu")).predict(data()[0])
    there = fit_ensemble(*data(), config, 0, compute).predict(data()[0].cuda()).cpu()
    torch.testing.assert_close(there, here, atol=5e-3, rtol=0)


# -- file --------------------------------------------------------------------------------------------------------------------------
def saved(directory: Path, **config) -> Posterior:
    ensemble = make(EnsembleConfig(ensemble_size=3, hidden=8, **config)).requires_grad_(False)
    posterior = Posterior(ensemble, Normalization(np.zeros(3), np.ones(3), np.zeros(2), np.ones(2)), "abc", 4)
    posterior.save(directory)
    return posterior


def test_file_round_trip_and_wrong_files(tmp_path):
    posterior = saved(tmp_path)
    loaded, s = Posterior.load(tmp_path), torch.randn(5, 3)
    assert torch.equal(loaded.model.predict(s), posterior.model.predict(s))
    torch.testing.assert_close(loaded.factor(s, batch=2).covariance(), posterior.model.factor(s).covariance())
    assert (loaded.seed, loaded.fingerprint, loaded.encoder) == (4, "abc", None)
    assert loaded.normalization.to_dict() == posterior.normalization.to_dict()
    with pytest.raises(InputError, match="no posterior here"):
        Posterior.load(tmp_path / "elsewhere")
    with torch.no_grad():
        posterior.model.network[0].bias[0, 0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="not saved"):
        posterior.save(tmp_path / "nan")
    assert not (tmp_path / "nan").exists()


@given(found=st.data())
@settings(max_examples=30, deadline=None)
def test_a_mutated_file_is_refused_or_is_a_posterior(tmp_path_factory, found):
    path = tmp_path_factory.getbasetemp() / "posterior.safetensors"
    saved(path.parent)
    tree = load_tree(path)
    mutate(tree, found)
    save_tree(path, tree)
    try:
        posterior = Posterior.load(path)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert posterior.factor(torch.randn(5, 3)).rows.isfinite().all()


# -- stage -------------------------------------------------------------------------------------------------------------------------
def stage(directory: Path, file: Path, **more) -> PosteriorFit:
    small = EnsembleConfig(ensemble_size=3, hidden=8, steps=60, batch_size=8)
    wanted = {"ensemble": small, "resume": True, **more}
    return PosteriorFit(TrainingSetConfig(file, num_trajectories=3), directory, **wanted)


def test_the_stage_writes_a_complete_directory_a_seed(tmp_path, monkeypatch, capsys):
    file = write_demonstrations(tmp_path / "d.hdf5")
    config = stage(tmp_path / "p", file, epochs=2, seeds=(0, 5))
    fit_posterior(config, 5)
    assert "the 60 steps that are given, too, are not looked at" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(posterior_stage, "plot", lambda found, data, path, title: write_text(path, title))
    fit_posterior(config, 0)
    names = {p.name for p in (tmp_path / "p/seed_5").iterdir()}
    assert names == {"config.yaml", "versions.json", "metrics.csv", "tensorboard", "posterior.safetensors", "posterior.png",
                     "diagnostics.json"}  # fmt: skip
    assert set(json.loads((tmp_path / "p/seed_0/diagnostics.json").read_text())) == {"on", "between", "beyond"}
    assert (tmp_path / "p/seed_5/posterior.png").stat().st_size > 10_000
    before = load_tree(tmp_path / "p/seed_0/posterior.safetensors")["parameters"]["network.0.weight"]
    again = fit_posterior(config, 0)  # finished: nothing is trained again
    assert torch.equal(again.model.network[0].weight, before)
    with pytest.raises(InputError, match="already holds a run"):
        fit_posterior(dataclasses.replace(config, resume=False), 0)
    with pytest.raises(InputError, match="another configuration"):
        fit_posterior(dataclasses.replace(config, epochs=3), 0)
    moved = dataclasses.replace(config.data, demonstrations=file.rename(tmp_path / "elsewhere.hdf5"))
    assert torch.equal(fit_posterior(dataclasses.replace(config, data=moved), 0).model.network[0].weight, before)


def test_images_without_an_encoder_are_refused_with_the_remedy(tmp_path):
    file = write_demonstrations(tmp_path / "d.hdf5", images={"top_image": (16, 16, 3)})
    config = PosteriorFit(TrainingSetConfig(file, image_keys=("top_image",)), tmp_path / "p")
    with pytest.raises(InputError, match=r"pretraining.method bc.* first, then give --encoder"):
        fit_posterior(config, 0)
    assert not (tmp_path / "p").exists()


def killed_stage(directory: Path) -> None:
    ensemble_module.Checkpoints.due = property(lambda self: self.run is not None)  # after every block
    posterior_stage.plot = lambda found, data, path, title: write_text(path, title)  # drawing takes a second
    fit_posterior(stage(directory, Path(sys.argv[2]) / "d.hdf5"), 0)


@pytest.mark.parametrize("how", ["operations", "moments"])
def test_kills_leave_nothing_but_the_same_files(tmp_path, how):
    write_demonstrations(tmp_path / "d.hdf5")
    in_a_process(__file__, how, tmp_path)


if __name__ == "__main__":
    import torch._dynamo

    versions()  # the commit may change while the test runs
    if sys.argv[1] == "operations":
        kill_at_every_operation(killed_stage, Path(sys.argv[2]), ["*/versions.json"], stride=23)
    else:
        kill_and_resume(killed_stage, Path(sys.argv[2]), "posterior", ["*/versions.json"])
