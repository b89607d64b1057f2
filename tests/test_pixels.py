"""From pixels alone: a policy pretrained by PostBC on frames, no state among its observations, under every finetuner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from postbc.agents.base import PolicyAgent, load_agent
from postbc.agents.best_of_n import BestOfNConfig
from postbc.agents.dppo import DPPOConfig
from postbc.agents.dsrl import DSRLConfig
from postbc.agents.iql import IQLConfig
from postbc.agents.residual import ResidualConfig
from postbc.data.episodes import Dataset
from postbc.data.normalization import fit_normalization
from postbc.data.readers import read_dataset
from postbc.data.robomimic import write_robomimic
from postbc.data.transitions import TransitionConfig
from postbc.data.windows import Windows
from postbc.errors import InputError
from postbc.evaluation import evaluate
from postbc.policies.base import save_policy
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.policies.networks.encoders import EncoderConfig
from postbc.posterior import EnsembleConfig, fit_ensemble, window_features
from postbc.pretraining import PretrainingConfig, pretrain
from postbc.saliency import occlusion
from postbc.seeding import make_generator
from postbc.stages.evaluate import Covered
from postbc.training.best_of_n import finetune_best_of_n
from postbc.training.dppo import finetune_dppo
from postbc.training.dsrl import finetune_dsrl
from postbc.training.online import OnlineConfig
from postbc.training.residual import finetune_residual
from postbc.training.results import read_result
from test_pretraining import pixel_demonstrations
from toy import draw, environment


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    data = pixel_demonstrations(40, 0.2)
    windows, normalization = Windows(data, 2, tail="pad"), fit_normalization(data, data)
    encoder = EncoderConfig(keypoints=16, channels=(16, 16))
    config = DiffusionConfig(hidden=64, denoising_steps=20, inference_steps=4, encoder=encoder)

    def make() -> DiffusionPolicy:
        return DiffusionPolicy(config, data.shapes, 2, 2, normalization, make_generator(0, "policy/initialisation"))

    settings: dict[str, Any] = {"steps": 200, "batch_size": 64, "learning_rate": 2e-3}
    bc = pretrain(make(), windows, PretrainingConfig(method="bc", **settings), 0)
    features = window_features(windows, bc.encode)
    chunks = normalization.normalize_action(windows.chunk(torch.arange(len(windows))))
    small = EnsembleConfig(ensemble_size=5, hidden=32, layers=2, steps=100, batch_size=64, learning_rate=1e-3)
    factor = fit_ensemble(features, chunks, windows.episode, small, 0).factor(features)
    postbc = pretrain(make(), windows, PretrainingConfig(method="postbc", posterior_weight=0.5, **settings), 0, factor)
    assert set(postbc.shapes) == {"image.top"}
    return postbc.eval().requires_grad_(False)


def test_whose_camera_is_covered_does_worse(policy: DiffusionPolicy) -> None:
    """As well as an agent that is given black frames by hand; an unknown camera is refused."""
    agent, place = PolicyAgent(policy), environment(pixels=True)
    seen, blind = (evaluate(a, place, episodes=40, num_envs=8, progress=False) for a in (agent, Covered(agent, ["image.top"])))
    assert blind.success_rate < seen.success_rate - 0.2
    frames = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    played = Covered(agent, ["image.top"]).act({"image.top": frames}, make_generator(0, "online/acting"))
    black = agent.act({"image.top": torch.zeros_like(frames)}, make_generator(0, "online/acting"))
    torch.testing.assert_close(played, black, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"(?s)no such camera.*image.top"):
        Covered(agent, ["image.side"])


def test_it_looks_at_the_point_and_at_the_goal(policy: DiffusionPolicy) -> None:
    """Covering where they are moves the chunk further than covering the rest, at most of 20 places."""
    at = np.random.default_rng(0).uniform(-0.9, 0.9, (20, 4))
    shares = []
    for position, frame in zip(at, draw(at)):
        moved = occlusion(PolicyAgent(policy), {"image.top": torch.as_tensor(frame[None])}, "image.top")
        cells = np.clip(((position + 1.2) / 2.4 * 8).astype(int), 0, 7)
        there = np.zeros((8, 8), bool)
        there[cells[1], cells[0]] = there[cells[3], cells[2]] = True
        shares.append(moved[there].mean() / moved[~there].mean())
    assert np.median(shares) > 2


def check_plays_alone(directory: Path) -> None:
    agent, _ = load_agent(directory)
    frames = {"image.top": torch.zeros(5, 3, 32, 32, dtype=torch.uint8)}
    assert agent.act(frames, make_generator(0, "online/acting")).shape == (5, 2, 2)


def test_dsrl_finetunes_from_pixels(policy: DiffusionPolicy, tmp_path: Path) -> None:
    config = DSRLConfig(
        variant="sac", hidden=32, layers=2, init_temperature=0.02, lr=3e-3, tau=0.02, discount=0.9, utd=8, batch_size=64
    )
    training = OnlineConfig(budget_env_steps=2000, initial_steps=400, eval_every=2000, eval_episodes=60, num_envs=4)
    finetune_dsrl(policy, environment(pixels=True), tmp_path, config, training)
    result = read_result(tmp_path)
    assert result.success_before is not None
    assert result.success_after is not None
    assert result.success_after > result.success_before + 0.1
    check_plays_alone(tmp_path)


def test_best_of_n_finetunes_from_pixels(policy: DiffusionPolicy, tmp_path: Path) -> None:
    iql = IQLConfig(steps=400, hidden=(64, 64), expectile=0.7, discount=0.95, lr=3e-3, tau=0.02, batch_size=128)
    config = BestOfNConfig(episodes=150, samples=16, eval_episodes=60)
    finetune_best_of_n(policy, environment(pixels=True), tmp_path, config, iql, TransitionConfig(reward="negative"))
    result = read_result(tmp_path)
    assert result.success_before is not None
    assert result.success_after is not None
    assert result.success_after > result.success_before
    check_plays_alone(tmp_path)
    rollouts = read_dataset(tmp_path / "rollouts.hdf5", observation_keys=(), image_keys=["image.top"])
    assert rollouts.shapes == {"image.top": (3, 32, 32)}
    assert len(np.unique(np.asarray(rollouts[0].observations["image.top"][0]))) > 2


def eyes(seed: int, shapes: dict[str, tuple[int, ...]]) -> DiffusionPolicy:
    """A policy that only its encoder is used of, with features of another width than `policy`'s."""
    data = pixel_demonstrations(3, 0.2)
    encoder = EncoderConfig(keypoints=4, channels=(8, 8))
    generator = make_generator(seed, "policy/initialisation")
    return DiffusionPolicy(DiffusionConfig(hidden=8, encoder=encoder), shapes, 2, 2, fit_normalization(data, data), generator)


def test_the_critics_see_by_another_encoder_than_the_policy(policy: DiffusionPolicy, tmp_path: Path) -> None:
    """Q(encoder(o), a) of the same chunks, by hand; its file is part of the agent; another encoder's run and file are refused."""
    iql = IQLConfig(steps=10, hidden=(16,), batch_size=32)
    config = BestOfNConfig(episodes=20, samples=8, eval_episodes=0)
    other = eyes(1, dict(policy.shapes)).eval().requires_grad_(False)
    agent = finetune_best_of_n(policy, environment(pixels=True), tmp_path / "run", config, iql, encoder=other)
    check_plays_alone(tmp_path / "run")
    loaded, _ = load_agent(tmp_path / "run")
    frames = {"image.top": torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)}
    played = loaded.act(frames, make_generator(0, "online/acting"))
    torch.testing.assert_close(played, agent.act(frames, make_generator(0, "online/acting")), rtol=0, atol=0)
    chunks = policy.sample(policy.encode(frames).repeat(8, 1), generator=make_generator(0, "online/acting"))
    q = agent.critics(other.encode(frames).repeat(8, 1), chunks.flatten(1)).amin(0).view(8, 5)
    best = chunks.view(8, 5, 2, 2)[q.argmax(0), torch.arange(5)]
    torch.testing.assert_close(played, policy.normalization.unnormalize_action(best))

    again = {"environment": environment(pixels=True), "output": tmp_path / "run", "config": config, "iql": iql, "resume": True}
    with pytest.raises(InputError, match=r"(?s)input of this run.*encoder"):
        finetune_best_of_n(policy, **again, encoder=eyes(2, dict(policy.shapes)))
    with pytest.raises(InputError, match=r"(?s)reads other observations than the policy.*image.side"):
        finetune_best_of_n(policy, **{**again, "output": tmp_path / "side"}, encoder=eyes(1, {"image.side": (3, 32, 32)}))
    save_policy(tmp_path / "run/critic_encoder.safetensors", eyes(2, dict(policy.shapes)))
    with pytest.raises(InputError, match="not the eyes"):
        load_agent(tmp_path / "run")
    (tmp_path / "run/critic_encoder.safetensors").unlink()
    with pytest.raises(InputError, match="critic_encoder"):
        load_agent(tmp_path / "run")


def test_residual_rl_finetunes_from_pixels_with_their_demonstrations(policy: DiffusionPolicy, tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "demonstrations.hdf5", with_rewards(pixel_demonstrations(10, 0.2)))
    config = ResidualConfig(
        hidden=32, critics=3, scale=1.0, ramp=50, utd=8, critic_warmup=50, discount=0.9, lr=3e-3, tau=0.02, batch_size=64
    )
    training = OnlineConfig(
        budget_env_steps=2000, initial_steps=400, eval_every=2000, eval_episodes=60, num_envs=4, reward="sparse"
    )
    finetune_residual(policy, environment(pixels=True), tmp_path / "run", config, training, path)
    result = read_result(tmp_path / "run")
    assert result.success_before is not None
    assert result.success_after is not None
    assert result.success_after > result.success_before + 0.1
    check_plays_alone(tmp_path / "run")


def with_rewards(data: Dataset) -> Dataset:
    """The last step of each is the success."""
    return replace(data, episodes=tuple(replace(e, rewards=np.eye(len(e))[-1].astype(np.float32)) for e in data))


def test_dppo_finetunes_from_pixels(policy: DiffusionPolicy, tmp_path: Path) -> None:
    config = DPPOConfig(
        ft_denoising_steps=4, sampling_steps=4, n_steps=10, batch_size=200, epochs=5, critic_hidden=32, discount=0.95, actor_lr=5e-4,
        critic_warmup_iterations=2,
    )  # fmt: skip
    training = OnlineConfig(
        budget_env_steps=12_000, initial_steps=0, eval_every=12_000, eval_episodes=60, num_envs=20, reward="sparse"
    )
    finetune_dppo(policy, environment(pixels=True), tmp_path, config, training)
    result = read_result(tmp_path)
    assert result.success_before is not None
    assert result.success_after is not None
    assert result.success_after >= result.success_before
    check_plays_alone(tmp_path)
