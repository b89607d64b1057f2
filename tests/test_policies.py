"""Schedules and samplers against diffusers; diffusion and flow policies of one protocol, and their files."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mutations import mutated_policy
from postbc.data.normalization import Normalization
from postbc.errors import InputError, NotFiniteError
from postbc.files import load_tree, save_tree
from postbc.policies import DiffusionPolicy, FlowPolicy, load_policy, policy_fingerprint, save_policy
from postbc.policies.base import POLICIES, About, lacking
from postbc.policies.networks.mlp import DiffusionMLP, mish
from postbc.policies.schedules import Schedule, add_noise, cosine_betas, ddim, ddpm
from postbc.seeding import make_generator

KINDS = {"diffusion": DiffusionPolicy, "flow": FlowPolicy}
PIXELS = {"image.top": (3, 17, 20), "state": (5,)}


def normalization(state_dim: int = 5, action_dim: int = 3) -> Normalization:
    return Normalization(-np.ones(state_dim), 2 * np.ones(state_dim), -np.ones(action_dim), 0.5 * np.ones(action_dim))


def make_policy(kind: str = "diffusion", shapes: Any = None, seed: int = 7, observation_steps: int = 1, **config: Any) -> Any:
    small = {"diffusion": {"hidden": 32, "denoising_steps": 20, "inference_steps": 4}, "flow": {"hidden": 32}}[kind]
    made = KINDS[kind]
    return made(
        made.Config(**{**small, **config}), shapes or {"state": (5,)}, 3, 2, normalization(),
        make_generator(seed, "policy/initialisation"), observation_steps, About(method="bc", seed=seed),
    )  # fmt: skip


def observation(shapes: Any, n: int = 6, observation_steps: int = 1) -> dict[str, torch.Tensor]:
    g, time = torch.Generator().manual_seed(0), (observation_steps,) if observation_steps > 1 else ()
    return {
        name: torch.randint(256, (n, *time, *shape), generator=g, dtype=torch.uint8) if len(shape) == 3
        else torch.randn(n, *time, *shape, generator=g) for name, shape in shapes.items()
    }  # fmt: skip


# -- schedules and samplers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [20, 100])
def test_schedule_equals_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(steps, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(cosine_betas(steps).float(), theirs.betas, rtol=1e-6, atol=1e-8)
    x, noise, t = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 3, 7, 11, 15, steps - 1])
    ours = add_noise(Schedule.cosine(steps).scales, x, noise, t)
    torch.testing.assert_close(ours, theirs.add_noise(x, noise, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("steps", "inference"), [(100, 8), (20, 8), (100, 100), (100, 1)])
@pytest.mark.parametrize("clip", [1.0, None])
def test_ddim_equals_diffusers(steps, inference, clip):
    diffusers = pytest.importorskip("diffusers")

    def network(x, t):  # any function of x and t: large enough outputs to make the clamp bite
        return torch.sin(3 * x) + 0.01 * t

    theirs = diffusers.DDIMScheduler(
        steps, beta_schedule="squaredcos_cap_v2", clip_sample=clip is not None, clip_sample_range=clip or 1.0,
        timestep_spacing="leading",
    )  # fmt: skip
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
    diffusers = pytest.importorskip("diffusers")

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
    huge = lambda: torch.full((1, 1), 1e6)  # noqa: E731
    x = ddpm(lambda y, i: y, Schedule.cosine(10), torch.zeros(1, 1), huge, None, minimum_std=0.0, noise_clip=3.0)
    assert x.abs().max() < 1e3


# -- networks --------------------------------------------------------------------------------------------------------------------
def test_split_first_layer_equals_forward():
    network = DiffusionMLP(5, 6, torch.Generator().manual_seed(0), 32, condition_hidden=(16, 4))
    x, s, times = torch.randn(6, 6), torch.randn(6, 5), torch.tensor([15, 10, 5, 0])
    predict = network.predictor(s, times)
    for i, t in enumerate(times):
        torch.testing.assert_close(predict(x, i), network(x, t.expand(6), s), rtol=1e-5, atol=1e-5)


def test_mish_in_few_passes_is_torchs():
    x = torch.cat((torch.linspace(-50, 50, 10001), torch.tensor([0.0, 200.0, -200.0])))
    torch.testing.assert_close(mish(x), torch.nn.functional.mish(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_encoders_put_named_features_side_by_side(steps):
    policy = make_policy(shapes=PIXELS, observation_steps=steps)
    seen = observation(PIXELS, observation_steps=steps)
    features = policy.encode(seen)
    assert features.shape == (6, policy.feature_dim)
    assert policy.feature_dim == steps * (64 + 5)
    state = policy.normalization.normalize_state(seen["state"]).flatten(1)
    torch.testing.assert_close(features[:, -steps * 5 :], state)  # the newest last
    assert features[:, : steps * 64].abs().max() <= 1
    features.sum().backward()
    assert all(p.grad is not None for p in policy.encoder.parameters())


def test_what_a_policy_cannot_read_is_said():
    policy = make_policy()
    with pytest.raises(InputError, match="lacks"):
        policy.encode({"image.top": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(InputError, match="another shape"):
        policy.encode({"state": torch.zeros(2, 4)})
    with pytest.raises(InputError, match="cannot be encoded"):
        make_policy(shapes={"image.top": (3, 8)})
    for wrong in ({"layers": 2}, {"inference_steps": 21}, {"hidden": 0}, {"time_dim": 3}, {"denoised_clip": math.nan}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            make_policy(**wrong)


# -- the protocol ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_follows_the_protocol_and_is_deterministic_given_noise(kind):
    policy = make_policy(kind)
    assert lacking(policy) == []
    assert lacking(object()) == [
        "chunk", "action_dim", "feature_dim", "observation_steps", "shapes", "normalization", "encode", "loss", "sample"
    ]  # fmt: skip
    s, w = policy.encode(observation(policy.shapes)), torch.randn(6, 2, 3)
    a = policy.sample(s, w)
    assert a.shape == (6, 2, 3)
    assert torch.equal(a, policy.sample(s, w))
    assert a.abs().max() <= 1
    drawn = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).view(6, 2, 3)
    assert torch.equal(policy.sample(s, generator=torch.Generator().manual_seed(3)), policy.sample(s, drawn))
    with pytest.raises(ValueError, match="noise"):
        policy.sample(s)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_error_of_its_target(kind):
    policy = make_policy(kind)
    with torch.no_grad():
        for p in policy.network.output.parameters():
            p.zero_()
    chunk = torch.randn(8000, 2, 3)
    losses = policy.loss(torch.randn(8000, 5), chunk, torch.Generator().manual_seed(0))
    assert losses.shape == (8000,)
    # predicting 0 costs E ε² = 1, or E (chunk − noise)² = 2
    assert losses.mean().item() == pytest.approx({"diffusion": 1, "flow": 2}[kind], abs=0.05)
    weight = torch.rand(8000)
    again = policy.loss(torch.randn(8000, 5), chunk, torch.Generator().manual_seed(0), weight)
    torch.testing.assert_close(again, losses * weight)
    each = policy.loss(torch.randn(8000, 5), chunk, torch.Generator().manual_seed(0), weight[:, None].expand(-1, 2))
    torch.testing.assert_close(each, losses * weight)
    halves = [policy.loss(torch.randn(8000, 5), chunk, torch.Generator().manual_seed(0), torch.tensor([w]).expand(8000, 2))
              for w in ((1.0, 0.0), (0.0, 1.0))]  # fmt: skip
    torch.testing.assert_close(halves[0] + halves[1], losses)
    assert (halves[0] - halves[1]).abs().max() > 0


def test_a_flow_of_constant_velocity_arrives():
    policy = make_policy("flow", sample_clip=None)
    with torch.no_grad():
        for p in policy.network.output.parameters():
            p.zero_()
        policy.network.output.bias.fill_(0.25)
    noise = torch.randn(4, 2, 3)
    torch.testing.assert_close(policy.sample(torch.randn(4, 5), noise), noise + 0.25)


#: What the first house (seeds as a tensor axis) gave for one seed: hidden 64 and 32 with condition_hidden (16, 4).
GOLDEN = {
    64: ((), 1.5167235, (-1.0, -0.9820737, 1.0, 1.0, -1.0, -1.0), (0.7077806, -0.9875121, -0.0612206, -0.1098981, 1.0, -0.8746076)),
    32: ((16, 4), 1.5109604, (-1.0, -0.0471022, 1.0, 1.0, -1.0, -1.0),
         (-0.3762432, -0.5605786, 0.9877591, -0.8826542, 1.0, -0.9004956)),
}  # fmt: skip


@pytest.mark.parametrize("hidden", GOLDEN)
def test_numbers_are_those_of_the_first_house(hidden):
    condition, loss, by_ddim, by_ddpm = GOLDEN[hidden]
    sizes = {"hidden": hidden, "condition_hidden": condition, "denoising_steps": 100, "inference_steps": 8}
    policy, g = make_policy(**sizes), make_generator(7, "pretraining/loss")
    s, chunk = torch.linspace(-1, 1, 20).view(4, 5), torch.linspace(-1, 1, 24).view(4, 2, 3)
    assert policy.loss(s, chunk, g).mean().item() == pytest.approx(loss, abs=1e-5)
    assert policy.sample(s, generator=g).flatten()[:6].tolist() == pytest.approx(by_ddim, abs=1e-5)
    policy.config = dataclasses.replace(policy.config, sampler="ddpm")
    assert policy.sample(s, generator=g).flatten()[:6].tolist() == pytest.approx(by_ddpm, abs=1e-5)


# -- files -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shapes", [{"state": (5,)}, PIXELS], ids=["state", "pixels"])
def test_file_round_trip_and_overrides(tmp_path, kind, shapes):
    policy = make_policy(kind, shapes).eval().requires_grad_(False)
    save_policy(tmp_path / "policy.safetensors", policy)
    loaded = load_policy(tmp_path)
    seen, w = observation(shapes), torch.randn(6, 2, 3)
    assert torch.equal(loaded.sample(loaded.encode(seen), w), policy.sample(policy.encode(seen), w))
    assert (loaded.about, loaded.config, loaded.shapes) == (policy.about, policy.config, policy.shapes)
    assert loaded.normalization.to_dict() == policy.normalization.to_dict()
    assert policy_fingerprint(loaded) == policy_fingerprint(policy)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    assert json.loads((tmp_path / "policy.json").read_text())["policy"] == kind
    few = load_policy(tmp_path, inference_steps=2)
    assert few.config.inference_steps == 2
    assert policy_fingerprint(few) != policy_fingerprint(policy)  # it decides other actions
    for wrong, words in (
        ({"inference_step": 50}, "no such setting"), ({"hidden": 33}, "another shape"), ({"inference_steps": 0}, "inference_steps"),
        ({"kind": "flow"}, "no such setting"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            load_policy(tmp_path, **wrong)


def test_the_fingerprint_covers_weights_and_normalisation():
    seen = {policy_fingerprint(make_policy(seed=s)) for s in (1, 1, 2)}
    assert len(seen) == 2
    policy = make_policy()
    policy.normalization = Normalization(np.zeros(5), np.ones(5), np.zeros(3), np.ones(3))
    assert policy_fingerprint(policy) != policy_fingerprint(make_policy())


def test_a_directory_of_seeds_is_said_to_be_one(tmp_path):
    with pytest.raises(InputError, match="wait until it has finished"):
        load_policy(tmp_path)
    (tmp_path / "seed_3").mkdir()
    save_policy(tmp_path / "seed_3/policy.safetensors", make_policy())
    with pytest.raises(InputError, match=r"give one of its seeds: .*seed_3"):
        load_policy(tmp_path)


def test_offering_a_pickle_is_refused(tmp_path):
    path = tmp_path / "policy.safetensors"
    torch.save(make_policy().state_dict(), path)
    with pytest.raises(InputError, match="pickle"):
        load_policy(path)


def test_weights_that_are_not_finite_are_neither_saved_nor_used(tmp_path):
    policy, path = make_policy(), tmp_path / "policy.safetensors"
    save_policy(path, policy)
    tree = load_tree(path)
    with torch.no_grad():
        policy.network.output.bias[0] = math.nan
    with pytest.raises(NotFiniteError, match=r"output\.bias"):
        save_policy(tmp_path / "nan.safetensors", policy)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["policy.json", "policy.safetensors"]
    tree["parameters"]["network.output.bias"][0] = math.inf
    save_tree(path, tree)
    with pytest.raises(InputError, match="not finite"):
        load_policy(path)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_mutated_file_is_refused_or_is_a_policy(kind, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"{kind}.safetensors"
    save_policy(path, make_policy(kind, {"state": (5,), "image.a": (1, 4, 4)}, hidden=8))
    policy = mutated_policy(path, data)
    if policy is not None:
        with torch.no_grad():
            features = policy.encode(observation(policy.shapes, 2, policy.observation_steps))
            assert policy.sample(features, generator=torch.Generator()).isfinite().all()


def test_a_kind_of_ones_own_is_found_by_name(tmp_path, monkeypatch):
    save_policy(tmp_path / "policy.safetensors", make_policy())
    tree = load_tree(tmp_path / "policy.safetensors")
    save_tree(tmp_path / "policy.safetensors", {**tree, "policy": "mine"})
    with pytest.raises(InputError, match="import the package"):
        load_policy(tmp_path)
    monkeypatch.setitem(POLICIES, "mine", "postbc.policies.diffusion:DiffusionPolicy")
    assert load_policy(tmp_path).chunk == 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_acts_on_a_gpu_as_on_the_cpu(kind, tmp_path):
    save_policy(tmp_path / "policy.safetensors", make_policy(kind, PIXELS))
    policy, other = load_policy(tmp_path), load_policy(tmp_path, "cuda")
    seen, w = observation(PIXELS), torch.randn(6, 2, 3)
    there = other.sample(other.encode({k: v.cuda() for k, v in seen.items()}), w.cuda())
    torch.testing.assert_close(there.cpu(), policy.sample(policy.encode(seen), w), atol=1e-3, rtol=1e-3)
