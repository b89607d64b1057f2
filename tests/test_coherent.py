"""Coherent PostBC: directions that mean the same everywhere, a policy that plays them, coordinates that an episode keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made import write_demonstrations
from postbc.agents.base import PolicyAgent, load_agent
from postbc.agents.best_of_n import BestOfNConfig
from postbc.agents.dsrl import DSRLConfig
from postbc.agents.iql import IQLConfig
from postbc.data.normalization import Normalization
from postbc.data.training_set import TrainingSetConfig, load_training_set
from postbc.environments.coordinates import CoordinatesEnv, coordinates_of_episode
from postbc.environments.stacked import make_stacked
from postbc.errors import InputError
from postbc.evaluation import evaluate
from postbc.experiments.action_distribution import action_distribution
from postbc.policies import DiffusionConfig, DiffusionPolicy, load_policy
from postbc.posterior import ClosedFormConfig, EnsembleConfig, Factor, Posterior
from postbc.pretraining import Pretraining, PretrainingConfig, pretrain
from postbc.seeding import make_generator
from postbc.stages.evaluate import Covered
from postbc.stages.posterior import PosteriorFit, fit_posterior
from postbc.stages.pretrain import Pretrain, pretrain_policy
from postbc.training.best_of_n import finetune_best_of_n
from postbc.training.dsrl import finetune_dsrl
from postbc.training.online import OnlineConfig
from postbc.training.results import read_result
from postbc.training.rollouts import collect_rollouts, read_rollouts
from test_posterior import make
from test_pretraining import DATA, WINDOWS, Regressor
from toy import PointReach, environment

R = 2


class CoherentRegressor(Regressor):
    """Linear in state and coordinates."""

    shapes, feature_dim = {**DATA.shapes, "posterior": (R,)}, 3 + R

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 + R, 4)

    def encode(self, observation: Any) -> torch.Tensor:
        return torch.cat((observation["state"], observation["posterior"]), 1)


# -- directions ----------------------------------------------------------------------------------------------------------------
def posterior(members: int = 6) -> Posterior:
    ensemble = make(EnsembleConfig(ensemble_size=members, hidden=8, bound="none")).requires_grad_(False)
    return Posterior(ensemble, Normalization(np.zeros(3), np.ones(3), np.zeros(2), np.ones(2)), "abc", 4)


def test_directions_are_the_principal_ones_of_all_states_together():
    p, features = posterior(), torch.randn(50, 3)
    rows = p.model.factor(features).rows.double().numpy()  # (N, K, D)
    stacked = rows.transpose(0, 2, 1).reshape(-1, 6)
    _, singular, directions = np.linalg.svd(stacked, full_matrices=False)
    leading, share = p.leading(features, 2, batch=7)
    assert share == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum(), rel=1e-5)
    for r in range(2):
        expected = np.einsum("nkd,k->nd", rows, directions[r])
        sign = np.sign((expected * leading.rows[:, r].numpy()).sum())
        np.testing.assert_allclose(leading.rows[:, r].numpy(), sign * expected, atol=1e-5)
    whole, share = p.leading(features, 5)  # centred: the sixth holds nothing
    assert share == pytest.approx(1)
    torch.testing.assert_close(whole.covariance(), p.model.factor(features).covariance(), atol=1e-6, rtol=1e-4)
    with pytest.raises(InputError, match="not so many directions"):
        p.leading(features, 6)


# -- the policy ----------------------------------------------------------------------------------------------------------------
def test_the_policy_learns_what_its_coordinates_imply():
    """The same directions at every state: a linear policy's answer to g is α·gᵀ·rows, and g = 0 is the regression of BC."""
    rows = torch.tensor([[0.3, 0.0, -0.1, 0.2], [0.0, 0.2, 0.1, 0.0]])
    factor = Factor(rows.expand(len(WINDOWS), R, 4))
    torch.manual_seed(0)
    settings = PretrainingConfig(coherent=R, posterior_weight=0.5, steps=1500, batch_size=30, learning_rate=1e-2)
    trained = pretrain(CoherentRegressor(), WINDOWS, settings, 0, factor)
    torch.testing.assert_close(trained.linear.weight[:, 3:].T, 0.5 * rows, atol=0.02, rtol=0)
    every = torch.arange(len(WINDOWS))
    state, chunks = WINDOWS.observation(every)["state"].numpy(), WINDOWS.chunk(every).flatten(1).numpy()
    s = np.c_[state, np.ones(len(state))]
    least_squares = s @ np.linalg.lstsq(s, chunks, rcond=None)[0]
    mean = trained.sample(torch.cat((torch.as_tensor(state), torch.zeros(len(state), R)), 1)).flatten(1).numpy()
    assert np.abs(mean - least_squares).max() < 0.1


def test_what_does_not_fit_together_is_refused():
    factor = Factor(torch.zeros(len(WINDOWS), R, 4))
    with pytest.raises(InputError, match="does not read the coordinates"):
        Pretraining(Regressor(), WINDOWS, PretrainingConfig(coherent=R), 0, factor)
    with pytest.raises(InputError, match="does not read the coordinates"):
        Pretraining(CoherentRegressor(), WINDOWS, PretrainingConfig(method="bc"), 0)
    with pytest.raises(InputError, match="other directions"):
        Pretraining(CoherentRegressor(), WINDOWS, PretrainingConfig(coherent=R), 0, Factor(torch.zeros(len(WINDOWS), 3, 4)))
    for wrong in ({"method": "bc"}, {"resample": False}, {"diagonal": True}):
        with pytest.raises(InputError, match="coherent"):
            PretrainingConfig(coherent=R, **wrong)


# -- episodes ------------------------------------------------------------------------------------------------------------------
def test_an_episode_keeps_its_coordinates_and_its_seed_decides_them():
    env = make_stacked(
        environment().make, 3, shapes={"state": (4,), "posterior": (R,)}, observation_steps=2, chunk=2, horizon=6, terminate_on="never"
    )  # fmt: skip
    assert env.shapes["posterior"] == (R,)
    g = np.stack([coordinates_of_episode(seed, R) for seed in (5, 6, 7)])
    observation = env.reset([5, 6, 7])
    for _ in range(3):
        np.testing.assert_array_equal(observation["posterior"], np.repeat(g[:, None], 2, 1))
        step = env.step(np.zeros((3, 2, 2)))
        observation = step.observation
    assert step.truncated.all()
    state = env.get_state()
    again = env.reset([9, 9, 7], np.array([True, True, False]))["posterior"]
    assert np.array_equal(again[0], again[1])
    assert np.array_equal(again[2, -1], g[2])
    env.set_state(state)
    np.testing.assert_array_equal(env.step(np.zeros((3, 2, 2))).observation["posterior"][:, -1], g)
    many = np.stack([coordinates_of_episode(seed, R) for seed in range(2000)])
    np.testing.assert_allclose(np.cov(many.T), np.eye(R), atol=0.1)
    assert CoordinatesEnv(PointReach(2), R).num_envs == 2


def coherent_policy(seed: int = 0) -> DiffusionPolicy:
    """Of the toy, with random weights."""
    config = DiffusionConfig(hidden=16, denoising_steps=8, inference_steps=2)
    made = DiffusionPolicy(config, {"state": (4,), "posterior": (R,)}, 2, 2, Normalization.identity(4, 2),
                           make_generator(seed, "policy/initialisation"))  # fmt: skip
    return made.eval().requires_grad_(False)


def test_evaluation_is_repeatable_and_coordinates_can_be_covered():
    agent = PolicyAgent(coherent_policy())
    found = [evaluate(a, environment(), episodes=6, num_envs=3, progress=False, record_actions=True)
             for a in (agent, agent, Covered(agent, ["posterior"]))]  # fmt: skip
    first, second, covered = ({k: v.tolist() for k, v in f.actions.items()} for f in found)
    assert first == second
    assert first != covered
    with pytest.raises(InputError, match="no such camera"):
        Covered(agent, ["state"])


def test_rollouts_are_learnt_from_with_the_coordinates_that_they_were_played_with(tmp_path: Path):
    policy = coherent_policy()
    seen: list[np.ndarray] = []
    encode = policy.encode

    def recording(observation: Any, *more: Any) -> torch.Tensor:
        seen.append(observation["posterior"].numpy().copy())
        return encode(observation, *more)

    policy.encode = recording  # type: ignore[method-assign]
    path = collect_rollouts(policy, environment(), 5, tmp_path, seed=1, num_envs=5)
    del policy.encode
    rollouts = read_rollouts(path, policy, ours=True)
    assert dict(rollouts.shapes) == {"state": (4,), "posterior": (R,)}
    for number, episode in enumerate(rollouts):
        g = np.asarray(episode.observations["posterior"])
        np.testing.assert_array_equal(g, np.repeat(g[:1], len(episode), 0))
        np.testing.assert_array_equal(g[0], seen[1][number])
    others = read_rollouts(path, policy)  # of whom nobody says that it was this policy
    assert not any(np.asarray(episode.observations["posterior"]).any() for episode in others)


def test_best_of_n_and_dsrl_take_it_as_any_policy(tmp_path: Path):
    policy = coherent_policy()
    best = BestOfNConfig(episodes=6, samples=4, eval_episodes=4, num_envs=2)
    finetune_best_of_n(policy, environment(), tmp_path / "best", best, IQLConfig(steps=5, hidden=(8,)))
    training = OnlineConfig(budget_env_steps=240, num_envs=2, initial_steps=80, eval_every=200, eval_episodes=4, eval_envs=2)
    dsrl = DSRLConfig(variant="sac", hidden=8, layers=1, utd=1, batch_size=8, noise_critic_grad_steps=0)
    finetune_dsrl(policy, environment(), tmp_path / "dsrl", dsrl, training)
    for name in ("best", "dsrl"):
        result = read_result(tmp_path / name)
        assert result.success_after is not None
        agent, _ = load_agent(tmp_path / name)
        assert agent.shapes["posterior"] == (R,)
        assert evaluate(agent, environment(), episodes=4, num_envs=2, progress=False).success_rate == result.success_after


# -- stage ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ensemble", "closed-form"])
def test_the_stages(tmp_path: Path, kind: Any, capsys: pytest.CaptureFixture[str]):
    file = write_demonstrations(tmp_path / "d.hdf5")
    data = TrainingSetConfig(file, observation_steps=2)
    small = EnsembleConfig(ensemble_size=4, hidden=8, steps=20, batch_size=8)
    options = {"closed_form": ClosedFormConfig(layer=1)} if kind == "closed-form" else {}
    fit_posterior(PosteriorFit(data, tmp_path / "p", kind=kind, ensemble=small, **options), 0)
    config = Pretrain(data, tmp_path / "c", DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2), tmp_path / "p",
                      pretraining=PretrainingConfig(coherent=R, steps=12, batch_size=8))  # fmt: skip
    trained = pretrain_policy(config, 0)
    assert "2 coordinates hold" in capsys.readouterr().out
    loaded = load_policy(tmp_path / "c/seed_0")
    assert loaded.shapes == trained.shapes == {"state": (19,), "posterior": (R,)}
    windows = load_training_set(data, 0).windows
    pictured = action_distribution({"coherent": loaded}, windows, samples=20, states=3)
    assert pictured.spread["dense"]["coherent"] > 0
    with pytest.raises(InputError, match="not so many directions"):
        pretrain_policy(
            dataclasses.replace(
                config, output=tmp_path / "x", pretraining=dataclasses.replace(config.pretraining, coherent=99)
            ),
            0,
        )
    assert not (tmp_path / "x").exists()
