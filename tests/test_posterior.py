"""Algorithm 1: bootstrap, ensemble, factor; the Gaussian lemma reproduced by the noised-target regressor."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postbc.demonstrations import Normalization, Windows
from postbc.errors import InputError
from postbc.nn import make_generators
from postbc.posterior import Ensemble, EnsembleConfig, Factor, Posterior, bootstrap_counts, fit_ensemble
from postbc.posterior.bootstrap import BootstrapSampler
from postbc.posterior.ensemble import EnsembleTraining
from postbc.runs import Run


def windows(trajectories=4, length=10, observation_dim=3, chunk=2, action_dim=2, seed=0):
    rng = np.random.default_rng(seed)
    n = trajectories * length
    observations = rng.uniform(-1, 1, (n, observation_dim)).astype(np.float32)
    chunks = np.tanh(observations[:, :1, None] + 0.1 * rng.normal(size=(n, chunk, action_dim))).astype(np.float32)
    return Windows(observations, chunks, np.repeat(np.arange(trajectories), length), np.tile(np.arange(length), trajectories))


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
    with pytest.raises(InputError, match="two members"):
        EnsembleConfig(ensemble_size=1)


def test_noised_targets_reproduce_the_gaussian_posterior():
    """Lemma (paper.md section 2): argmin Σ‖μ − (x_t + w_t)‖²/σ² + ‖μ − μ̃‖²/λ₀² over w ~ N(0, σ²), μ̃ ~ N(0, λ₀²) is the posterior."""
    sigma, prior, count, members = 0.5, 0.8, 6, 3000
    x = np.random.default_rng(0).normal(0.3, sigma, count).astype(np.float32)
    data = Windows(np.zeros((count, 1), np.float32), x.reshape(count, 1, 1), np.arange(count), np.zeros(count, np.int64))
    # the mean μ is the output's bias (the observation is 0 and there is no hidden layer); prior_weight = σ²/λ₀²
    config = EnsembleConfig(
        ensemble_size=members, layers=0, steps=400, batch_size=count, learning_rate=0.05, bootstrap="none", target_noise=sigma,
        prior_weight=sigma**2 / prior**2, bound="none",
    )  # fmt: skip
    ensemble = Ensemble(config, 1, 1, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ensemble.network[0].bias.copy_(prior * torch.randn(members, 1, 1, generator=torch.Generator().manual_seed(1)))
        ensemble.network[0].weight.zero_()
    training = EnsembleTraining(ensemble, data, seed=0)
    every = torch.arange(count).expand(members, -1)
    training.sampler.draw = lambda batch, generator: every  # full batches: the argmin itself, not SGD around it
    for step in range(config.steps):
        training.optimiser.lr = 0.05 * (1 - step / config.steps)
        training.train(1)
    mu = ensemble.predict(torch.zeros(1, 1))[:, 0, 0].numpy()
    variance = 1 / (1 / prior**2 + count / sigma**2)
    mean = variance * x.sum() / sigma**2
    assert mu.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / members))
    assert mu.var(ddof=1) == pytest.approx(variance, rel=4 * np.sqrt(2 / members))


def test_predictions_stay_in_the_action_range_unless_told_otherwise():
    far = 100 * torch.randn(20, 3)
    for bound, limit in (("clamp", 1.0), ("none", float("inf"))):
        ensemble = Ensemble(EnsembleConfig(ensemble_size=3, hidden=16, bound=bound), 3, 2, 2, torch.Generator().manual_seed(0))
        worst = ensemble.predict(far).abs().max().item()
        assert worst <= limit
        assert (worst > 1) == (bound == "none")


def test_gaussian_likelihood_is_torchs():
    config = EnsembleConfig(ensemble_size=3, hidden=8, likelihood="gaussian")
    ensemble = Ensemble(config, 3, 2, 2, torch.Generator().manual_seed(0))
    s, y = torch.randn(3, 9, 3), torch.randn(3, 9, 4)
    mean, log_std = ensemble.network(s).split(4, -1)
    expected = -torch.distributions.Normal(mean, log_std.exp()).log_prob(y).mean((1, 2)) - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(ensemble.loss(s, y), expected)


@pytest.mark.parametrize("likelihood", ["mse", "gaussian"])
@pytest.mark.parametrize("threads", [1, 2])
def test_members_alone_equal_torchs_networks_and_adam(monkeypatch, likelihood, threads):
    monkeypatch.setattr("postbc.members.WIDE", 0)
    data, steps = windows(), 25
    config = EnsembleConfig(
        ensemble_size=3, hidden=16, layers=2, batch_size=8, learning_rate=1e-2, likelihood=likelihood, target_noise=0.1,
        prior_weight=0.3, precision="float32",
    )  # fmt: skip
    ensemble = Ensemble(config, 3, 2, 2, torch.Generator().manual_seed(0))
    training = EnsembleTraining(ensemble, data, seed=1)
    assert len(training.parts) == 3
    networks = []
    for m in range(3):
        layers = []
        for layer in ensemble.network:
            layers.append(torch.nn.ReLU())
            if hasattr(layer, "weight"):
                layers[-1] = torch.nn.Linear(*layer.weight.shape[1:])
                layers[-1].weight.data, layers[-1].bias.data = (
                    layer.weight[m].detach().T.clone(),
                    layer.bias[m, 0].detach().clone(),
                )
        networks.append(torch.nn.Sequential(*layers))
    first = [[p.detach().clone() for p in network.parameters()] for network in networks]
    generator, before = training.data[0].clone_state(), torch.get_num_threads()
    torch.set_num_threads(threads)
    training.train(steps)
    torch.set_num_threads(before)
    index = torch.stack([training.sampler.draw(8, generator) for _ in range(steps)])
    for m, network in enumerate(networks):
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
        for rows in index[:, m]:
            target = training.targets[rows] + training.noise[m, rows]
            loss = ensemble.loss_of(network(training.observations[rows])[None], target[None]).sum()
            for p, anchor in zip(network.parameters(), first[m]):
                loss = loss + 0.3 / training.targets.numel() * (p - anchor).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        for layer, linear in zip(list(ensemble.network)[::2], list(network)[::2]):
            torch.testing.assert_close(layer.weight[m], linear.weight.T, atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(layer.bias[m, 0], linear.bias, atol=2e-4, rtol=1e-3)


def test_wide_members_resume_to_the_bit_on_any_number_of_threads():
    data, config = windows(), EnsembleConfig(ensemble_size=3, hidden=64, layers=2, batch_size=256)
    before, found = torch.get_num_threads(), []
    for threads, blocks in ((1, (7,)), (2, (7,)), (2, (3, 4))):
        torch.set_num_threads(threads)
        ensemble = Ensemble(config, 3, 2, 2, torch.Generator().manual_seed(0))
        training = EnsembleTraining(ensemble, data, seed=1)
        for block in blocks:
            state = {k: v for k, v in training.state().items()}
            training = EnsembleTraining(ensemble, data, seed=1)
            training.load_state(state)
            training.train(block)
        found.append(torch.cat([p.detach().flatten() for p in ensemble.parameters()]))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_uncertain_where_there_are_no_data():
    data = windows(6, 30)
    config = EnsembleConfig(ensemble_size=12, hidden=32, steps=500, batch_size=64, learning_rate=3e-3)
    ensemble = fit_ensemble(data, config, seed=0)
    inside = ensemble.factor(torch.as_tensor(data.observations)).std().mean()
    assert ensemble.factor(3 * torch.as_tensor(data.observations)).std().mean() > 2 * inside


def test_resuming_gives_the_same_ensemble_to_the_bit(tmp_path):
    data = windows()
    config = EnsembleConfig(ensemble_size=3, hidden=8, steps=30, batch_size=16, target_noise=0.1, prior_weight=0.5)
    whole = fit_ensemble(data, config, seed=5)

    class Stop(Exception):
        pass

    run = Run(tmp_path / "r", config)
    save = run.save

    def save_and_stop(step, state):
        save(step, state)
        raise Stop

    run.save = save_and_stop
    with pytest.raises(Stop):
        fit_ensemble(data, config, 5, run, checkpoint_every=10)
    resumed = fit_ensemble(data, config, 5, Run(tmp_path / "r", config, resume=True), checkpoint_every=10)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_file_round_trip_and_wrong_files(tmp_path):
    config = EnsembleConfig(ensemble_size=3, hidden=8)
    ensemble = Ensemble(config, 3, 2, 2, make_generators([0])[0])
    normalization = Normalization(np.zeros(3), np.ones(3), np.zeros(2), np.ones(2))
    Posterior([4], [ensemble], [normalization], ["abc"]).save(tmp_path)
    loaded = Posterior.load(tmp_path)
    s = torch.randn(5, 3)
    assert torch.equal(loaded.of(4).predict(s), ensemble.predict(s))
    assert (loaded.seeds, loaded.fingerprints, loaded.normalizations) == ((4,), ["abc"], [normalization])
    with pytest.raises(InputError, match="No posterior was fitted"):
        loaded.of(1)
    with pytest.raises(InputError, match="no posterior here"):
        Posterior.load(tmp_path / "elsewhere")
