"""Schedules and samplers against diffusers; the diffusion policy, its members and its file."""

import diffusers
import numpy as np
import pytest
import torch

from postbc.demonstrations import Normalization
from postbc.errors import InputError
from postbc.nn import make_generators
from postbc.policies import DiffusionConfig, DiffusionPolicy, Policy
from postbc.policies.schedules import Schedule, add_noise, cosine_betas, ddim, ddpm


def normalization(observation_dim=5, action_dim=3):
    rng = np.random.default_rng(0)
    low, action_low = -rng.random(observation_dim), -rng.random(action_dim)
    return Normalization(low, low + 1.5, action_low, action_low + 2)


def make_policy(seeds=(0, 1), **config):
    config = DiffusionConfig(**{"hidden": 32, "denoising_steps": 20, "inference_steps": 4, "chunk": 2, **config})
    return DiffusionPolicy(config, 5, 3, seeds, make_generators(seeds, 3), [normalization()], {"method": "bc"})


@pytest.mark.parametrize("steps", [20, 100])
def test_schedule_equals_diffusers(steps):
    theirs = diffusers.DDPMScheduler(steps, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(cosine_betas(steps).float(), theirs.betas, rtol=1e-6, atol=1e-8)
    x, noise, t = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 3, 7, 11, 15, steps - 1])
    ours = add_noise(Schedule.cosine(steps), x, noise, t)
    torch.testing.assert_close(ours, theirs.add_noise(x, noise, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("steps", "inference"), [(100, 8), (20, 8), (100, 100), (100, 1)])
@pytest.mark.parametrize("clip", [1.0, None])
def test_ddim_equals_diffusers(steps, inference, clip):
    def network(x, t):  # any function of x and t: large enough outputs to make the clamp bite
        return torch.sin(3 * x) + 0.01 * t

    theirs = diffusers.DDIMScheduler(
        steps,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing="leading",
    )
    theirs.set_timesteps(inference)
    x = start = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    for t in theirs.timesteps:
        x = theirs.step(network(x, int(t)), int(t), x, eta=0.0, use_clipped_model_output=True).prev_sample
    schedule = Schedule.cosine(steps)
    timesteps = schedule.ddim_timesteps(inference)
    assert timesteps == theirs.timesteps.tolist()
    ours = ddim(lambda y, i: network(y, timesteps[i]), schedule, start, inference, clip)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4 if clip else 1e-3)  # diffusers keeps ᾱ in float32


def test_ddpm_equals_diffusers():
    def network(x, t):
        return torch.sin(3 * x) + 0.01 * t

    theirs = diffusers.DDPMScheduler(50, beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", clip_sample=True)
    x = start = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for t in reversed(range(50)):
        x = theirs.step(network(x, t), t, x, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(1)
    ours = ddpm(
        lambda y, i: network(y, 49 - i), Schedule.cosine(50), start,
        lambda: torch.randn(5, 12, dtype=torch.float64, generator=generator), 1.0, minimum_std=0.0, noise_clip=None,
    )  # fmt: skip
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_noise_clip_and_floor_of_dppo():
    schedule = Schedule.cosine(10)
    huge = lambda: torch.full((1, 1), 1e6)  # noqa: E731
    x = ddpm(lambda y, i: y, schedule, torch.zeros(1, 1), huge, None, minimum_std=0.0, noise_clip=3.0)
    assert x.abs().max() < 1e3


def test_split_first_layer_equals_forward():
    policy = make_policy(condition_hidden=(16, 4))
    x, s = torch.randn(2, 6, 6), torch.randn(2, 6, 5)
    denoise = policy.network.denoiser(s, [15, 10, 5, 0])
    for i, t in enumerate([15, 10, 5, 0]):
        direct = policy.network(x, torch.full((2, 6), t), s)
        torch.testing.assert_close(denoise(x, i), direct, rtol=1e-5, atol=1e-5)


def test_follows_the_protocol_and_is_deterministic_given_noise():
    policy = make_policy()
    assert isinstance(policy, Policy)
    s, w = torch.randn(2, 6, 5), torch.randn(2, 6, 2, 3)
    a = policy.sample(s, w)
    assert a.shape == (2, 6, 2, 3)
    assert torch.equal(a, policy.sample(s, w))
    assert a.abs().max() <= 1
    with pytest.raises(ValueError, match="noise or generators"):
        policy.sample(s)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_member_samples_the_same_alone(sampler):
    policy = make_policy((3, 9), sampler=sampler)
    s = torch.randn(2, 6, 5)
    together = policy.sample(s, generators=make_generators([3, 9]))
    alone = policy.select([1]).sample(s[1:], generators=make_generators([9]))
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)


def test_loss_is_the_denoising_error():
    policy = make_policy()
    with torch.no_grad():
        for p in policy.network.output.parameters():
            p.zero_()  # predicts ε = 0, so the loss is E ε² = 1
    losses = policy.loss(torch.randn(2, 4000, 5), torch.randn(2, 4000, 2, 3), make_generators([0, 1]))
    assert losses.shape == (2,)
    assert losses.tolist() == pytest.approx([1, 1], abs=0.05)


def test_file_round_trip_and_overrides(tmp_path):
    policy = make_policy()
    policy.save(tmp_path / "policy.safetensors")
    loaded = DiffusionPolicy.load(tmp_path)
    s, w = torch.randn(2, 6, 5), torch.randn(2, 6, 2, 3)
    assert torch.equal(loaded.sample(s, w), policy.sample(s, w))
    assert loaded.about == {"method": "bc"}
    assert loaded.seeds == (0, 1)
    assert loaded.normalizations == policy.normalizations
    assert (tmp_path / "policy.json").exists()
    assert DiffusionPolicy.load(tmp_path, inference_steps=2).config.inference_steps == 2


def test_offering_a_pickle_is_refused(tmp_path):
    path = tmp_path / "policy.safetensors"
    torch.save(make_policy().state_dict(), path)
    with pytest.raises(InputError, match="pickle"):
        DiffusionPolicy.load(path)
    torch.save(make_policy().state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="pickle"):
        DiffusionPolicy.load(path)


def test_normalization_round_trip_matches_the_data_package():
    policy, n = make_policy(), normalization()
    s, a = torch.randn(2, 4, 5), torch.rand(2, 4, 2, 3)
    torch.testing.assert_close(policy.normalization.normalize_observation(s), n.normalize_observation(s), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy.normalization.unnormalize_chunk(a), n.unnormalize_action(a), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        policy.normalization.normalize_chunk(policy.normalization.unnormalize_chunk(a)), a, rtol=1e-5, atol=1e-5
    )
