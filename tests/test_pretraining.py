"""Algorithm 2: the methods differ in the target alone; nothing is lost; from states, and from pixels alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import postbc.pretraining as pretraining_module
import postbc.stages.pretrain as pretrain_stage
from kills import in_a_process, kill_and_resume, kill_at_every_operation
from made import write_demonstrations
from postbc.agents.base import PolicyAgent, load_agent
from postbc.cli import main
from postbc.data.episodes import Dataset
from postbc.data.normalization import Normalization, fit_normalization
from postbc.data.training_set import TrainingSetConfig
from postbc.data.windows import Windows
from postbc.devices import Compute
from postbc.errors import InputError, NotFiniteError
from postbc.files import save_tree
from postbc.policies import DiffusionConfig, DiffusionPolicy, FlowConfig, load_policy
from postbc.policies.networks.encoders import EncoderConfig
from postbc.posterior import EnsembleConfig, Factor, fit_ensemble, window_features
from postbc.pretraining import Pretraining, PretrainingConfig, pretrain
from postbc.runs import Run, versions
from postbc.seeding import make_generator
from postbc.stages.posterior import PosteriorFit, fit_posterior
from postbc.stages.pretrain import Pretrain, pretrain_policy
from toy import SPEED, PointReach

SMALL = DiffusionConfig(hidden=16, denoising_steps=10, inference_steps=2)
FAST = {"steps": 30, "batch_size": 8, "learning_rate": 1e-3, "ema_every": 2}


def demonstrations():
    rng = np.random.default_rng(0)
    states = [rng.uniform(-1, 1, (12, 3)).astype(np.float32) for _ in range(4)]
    return Dataset.from_arrays(states, [np.tanh(s[:, :2]).astype(np.float32) for s in states])


DATA = demonstrations()
WINDOWS = Windows(DATA, 2)


def policy(seed=7, config=SMALL):
    return DiffusionPolicy(
        config, DATA.shapes, 2, 2, fit_normalization(DATA, DATA), make_generator(seed, "policy/initialisation")
    )


def factor():
    return Factor.from_predictions(torch.rand(5, len(WINDOWS), 4, generator=torch.Generator().manual_seed(0)))


def train(method, compute=None, **config):
    settings = PretrainingConfig(method=method, **{**FAST, **config})
    return pretrain(policy(), WINDOWS, settings, 7, factor() if method == "postbc" else None, compute)


def parameters(trained):
    return torch.cat([p.flatten() for p in trained.parameters()])


# -- the method --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("resample", [True, False])
def test_zero_weight_is_bc_to_the_bit(resample):
    bc = parameters(train("bc"))
    assert torch.equal(bc, parameters(train("postbc", posterior_weight=0.0, resample=resample)))
    assert torch.equal(bc, parameters(train("sigma-bc", sigma=0.0, resample=resample)))
    assert not torch.equal(bc, parameters(train("postbc", posterior_weight=0.1, resample=resample)))


#: Losses at steps 1, 10 and 30, and then a chunk at the first window, of the first house with one seed.
GOLDEN = {
    "bc": ((1.6171362, 0.8501803, 0.7802174), (1.0, 0.7640490, -1.0, -1.0)),
    "sigma-bc": ((1.6140301, 0.8496043, 0.7835235), (1.0, 0.7640670, -1.0, -1.0)),
    "postbc": ((1.6124938, 0.8495647, 0.7901772), (1.0, 0.7659639, -1.0, -1.0)),
}


@pytest.mark.parametrize("method", GOLDEN)
def test_numbers_are_those_of_the_first_house(method):
    settings = PretrainingConfig(method=method, **FAST)
    training = Pretraining(policy(), WINDOWS, settings, 7, factor() if method == "postbc" else None)
    losses = [training.step().item() for _ in range(30)]
    training.finish()
    trained = training.policy
    chunk = trained.sample(
        trained.encode(WINDOWS.observation(torch.tensor([0]))), generator=make_generator(7, "pretraining/loss")
    )
    assert [losses[0], losses[9], losses[29]] == pytest.approx(GOLDEN[method][0], abs=1e-5)
    assert chunk.flatten().tolist() == pytest.approx(GOLDEN[method][1], abs=1e-5)


@pytest.mark.parametrize("resample", [True, False])
def test_the_target_is_the_action_and_a_perturbation_of_the_posteriors_width(resample):
    config = PretrainingConfig(method="postbc", posterior_weight=0.5, resample=resample)
    cov = factor()
    target = pretraining_module.Target(config, torch.Size((len(WINDOWS), 2, 2)), cov, torch.Generator().manual_seed(0))
    rows = torch.arange(len(WINDOWS)).repeat(400)
    noise = target(torch.zeros(len(rows), 2, 2), rows).flatten(1).view(400, -1, 4)
    if resample:
        torch.testing.assert_close(noise.std(0), 0.5 * cov.std(), rtol=0.2, atol=0)
    else:
        assert torch.equal(noise[0], noise[1])
    clipped = pretraining_module.Target(
        dataclasses.replace(config, clip_targets=True, posterior_weight=9.0),
        torch.Size((len(WINDOWS), 2, 2)),
        cov,
        torch.Generator(),
    )
    assert clipped(torch.zeros(len(rows), 2, 2), rows).abs().max() == 1


def test_a_posterior_that_is_missing_or_of_other_windows_is_refused():
    with pytest.raises(InputError, match="needs a posterior"):
        Pretraining(policy(), WINDOWS, PretrainingConfig(method="postbc"), 0)
    with pytest.raises(InputError, match="other windows"):
        Pretraining(policy(), WINDOWS, PretrainingConfig(method="postbc"), 0, Factor(torch.zeros(3, 2, 4)))


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    training = Pretraining(policy(), WINDOWS, PretrainingConfig(method="bc", steps=3000), 0)
    rates = [training.learning_rate(i) for i in range(3001)]
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) == pytest.approx(1e-4)
    assert rates.index(max(rates)) in (99, 100)
    assert rates[-1] == pytest.approx(1e-5)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


@pytest.mark.parametrize("steps", [1, 7])
def test_a_short_training_saves_trained_weights(steps):
    trained = train("bc", steps=steps, ema_every=10)
    assert not torch.equal(parameters(trained), parameters(policy()))


class Regressor(torch.nn.Module):
    """The smallest third-party policy: a deterministic linear regressor."""

    chunk, action_dim, feature_dim, observation_steps, shapes = 2, 2, 3, 1, DATA.shapes

    def __init__(self):
        super().__init__()
        self.normalization = Normalization.identity(3, 2)
        self.linear = torch.nn.Linear(3, 4)

    def encode(self, observation):
        return observation["state"]

    def loss(self, features, chunk, generator, weight=None):
        return (self.linear(features) - chunk.flatten(1)).square().mean(1)

    def sample(self, features, noise=None, generator=None):
        return self.linear(features).unflatten(-1, (2, 2))


def test_any_policy_of_the_protocol_can_be_pretrained():
    torch.manual_seed(0)
    settings = PretrainingConfig(method="postbc", steps=1500, learning_rate=1e-2, batch_size=30, posterior_weight=0.5)
    trained = pretrain(Regressor(), WINDOWS, settings, 0, factor())
    every = torch.arange(len(WINDOWS))
    state, chunks = WINDOWS.observation(every)["state"].numpy(), WINDOWS.chunk(every).flatten(1).numpy()
    s = np.c_[state, np.ones(len(state))]
    least_squares = s @ np.linalg.lstsq(s, chunks, rcond=None)[0]
    ours = trained.sample(torch.as_tensor(state)).flatten(1).numpy()
    assert np.abs(ours - least_squares).max() < 0.15  # the noise has mean zero, so the regression line stays BC's


def test_numbers_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(NotFiniteError, match="step 30"):
        train("bc", learning_rate=1e11, final_learning_rate=1e11, ema_every=2)
    settings = PretrainingConfig(method="bc", **{**FAST, "learning_rate": 1e11, "steps": 40})
    with Run(tmp_path / "r", {}) as run, pytest.raises(NotFiniteError):
        pretrain(policy(), WINDOWS, settings, 7, run=run)
    assert not list((tmp_path / "r").glob("checkpoints/*"))
    for field in ("learning_rate", "sigma", "posterior_weight"):
        with pytest.raises(InputError, match=field):
            PretrainingConfig(**{field: math.nan})


def test_bfloat16_trains_about_the_same():
    exact, rounded = train("bc"), train("bc", Compute(device="cpu", precision="bfloat16"))
    difference = (parameters(exact) - parameters(rounded)).abs()
    assert 0 < difference.max() < 0.05
    assert parameters(rounded).dtype == torch.float32


@pytest.mark.slow
def test_compiled_it_trains_the_same():
    exact, compiled = train("sigma-bc"), train("sigma-bc", Compute(device="cpu", compile=True))
    torch.testing.assert_close(parameters(compiled), parameters(exact), atol=1e-5, rtol=1e-5)


def test_what_is_no_policy_is_refused():
    with pytest.raises(InputError, match="not a policy that can be trained"):
        pretrain(torch.nn.Linear(3, 4), WINDOWS, PretrainingConfig(method="bc"), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("compute", [Compute(), Compute(compile=True), Compute(precision="bfloat16")], ids=str)
def test_a_gpu_trains_a_policy_that_the_cpu_plays(compute, tmp_path):
    windows = Windows(DATA, 2, device="cuda")
    settings = PretrainingConfig(method="postbc", **{**FAST, "steps": 300})
    trained = pretrain(policy(), windows, settings, 7, factor(), compute)
    losses = trained.cpu().loss(torch.rand(400, 3), torch.zeros(400, 2, 2), torch.Generator().manual_seed(0))
    assert losses.isfinite().all()


@pytest.mark.gpu
def test_padding_is_left_out_on_a_gpu_whose_windows_are_not():
    """Windows may stay in the machine's memory; what of their chunks counts is looked up on the device."""
    found = []
    for device in ("cpu", "cuda"):
        settings = PretrainingConfig(method="bc", **{**FAST, "steps": 3})
        training = Pretraining(policy(), Windows(DATA, 2, tail="mask"), settings, 7, None, Compute(device=device))
        found.append([float(training.step()) for _ in range(3)])
    assert all(np.isfinite(found).ravel())


@pytest.mark.gpu
def test_the_command_line_trains_on_a_gpu(tmp_path):
    file = write_demonstrations(tmp_path / "d.hdf5")
    line = f"pretrain --data.demonstrations {file} --pretraining.method bc --pretraining.steps 20 --device cuda".split()
    assert main([*line, "--output", str(tmp_path / "bc")]) == 0
    assert yaml.safe_load((tmp_path / "bc/seed_0/config.yaml").read_text())["compute"]["device"] == "cuda"
    assert all(p.isfinite().all() for p in load_policy(tmp_path / "bc/seed_0").parameters())


# -- pixels ------------------------------------------------------------------------------------------------------------------------
def pixel_demonstrations(count, noise=0.1):
    env, rng = PointReach(count, chunk=1, pixels=True), np.random.default_rng(0)
    seen = env.reset(np.arange(count))
    frames, actions = ([[] for _ in range(count)] for _ in range(2))
    while not env.over.all():
        action = (env.at[:, 2:] - env.at[:, :2]) / SPEED + noise * rng.normal(size=(count, 2))
        for i in np.flatnonzero(~env.over):
            frames[i].append(seen["image.top"][i])
            actions[i].append(np.clip(action[i], -1, 1).astype(np.float32))
        seen = env.step(action[:, None]).observation
    long = [i for i in range(count) if len(frames[i]) > 1]
    return Dataset.from_arrays([{"image.top": np.stack(frames[i])} for i in long], [np.stack(actions[i]) for i in long])


def success(agent, episodes=60):
    env, generator, won = PointReach(episodes, pixels=True), torch.Generator().manual_seed(0), np.zeros(episodes, bool)
    seen = env.reset(10**6 + np.arange(episodes))
    while not env.over.all():
        step = env.step(agent.act({name: torch.as_tensor(x) for name, x in seen.items()}, generator).numpy())
        won, seen = won | step.success, step.observation
    return won.mean()


def test_pixels_alone_give_a_posterior_and_a_policy_that_plays():
    data = pixel_demonstrations(40)
    windows, normalization = Windows(data, 2, tail="pad"), fit_normalization(data, data)
    config = DiffusionConfig(
        hidden=64, denoising_steps=20, inference_steps=4, encoder=EncoderConfig(keypoints=16, channels=(16, 16))
    )

    def make():
        generator = make_generator(0, "policy/initialisation")
        return DiffusionPolicy(config, data.shapes, 2, 2, normalization, generator)

    settings = {"steps": 200, "batch_size": 64, "learning_rate": 2e-3}
    bc = pretrain(make(), windows, PretrainingConfig(method="bc", **settings), 0)
    before, after = make().state_dict(), bc.state_dict()
    assert all(
        not torch.equal(before[k], after[k]) for k in before if k.startswith("encoder.") and "places" not in k
    )  # it is trained
    features = window_features(windows, bc.encode)
    chunks = normalization.normalize_action(windows.chunk(torch.arange(len(windows))))
    small = EnsembleConfig(ensemble_size=5, hidden=32, layers=2, steps=200, batch_size=64, learning_rate=1e-3)
    ensemble = fit_ensemble(features, chunks, windows.episode, small, 0)
    postbc = pretrain(
        make(), windows, PretrainingConfig(method="postbc", posterior_weight=0.5, **settings), 0, ensemble.factor(features)
    )
    untrained, ours = success(PolicyAgent(make())), success(PolicyAgent(postbc))
    assert ours > 0.45, (untrained, ours)
    assert ours > untrained + 0.3


# -- stage -------------------------------------------------------------------------------------------------------------------------
def stage(directory, file, **more):
    wanted = {
        "policy": DiffusionConfig(hidden=16, denoising_steps=10, inference_steps=2), "resume": True,
        "pretraining": PretrainingConfig(method="bc", steps=50, batch_size=8), **more,
    }  # fmt: skip
    return Pretrain(TrainingSetConfig(file, num_trajectories=3), directory, **wanted)


def test_the_stages_end_to_end(tmp_path):
    file = write_demonstrations(tmp_path / "d.hdf5")
    fit = PosteriorFit(TrainingSetConfig(file, num_trajectories=3), tmp_path / "posterior", seeds=(0, 1),
                       ensemble=EnsembleConfig(ensemble_size=3, hidden=8, steps=20, batch_size=8))  # fmt: skip
    for seed in fit.seeds:
        fit_posterior(fit, seed)
    postbc = {"posterior": tmp_path / "posterior", "pretraining": PretrainingConfig(batch_size=8), "epochs": 3, "resume": False}
    config = stage(tmp_path / "postbc", file, **postbc)
    trained = pretrain_policy(config, 1)
    loaded = load_policy(tmp_path / "postbc/seed_1")
    assert torch.equal(parameters(trained), parameters(loaded))
    about = loaded.about
    assert (about.method, about.task, about.demonstrations, about.seed, about.posterior_weight) == ("postbc", "Lift", 3, 1, 1.0)
    assert about.steps == 3 * 4  # ⌈27 windows / 8⌉ = 4
    assert about.facts["environment"] == "Lift"
    assert about.compute["device"] in ("cpu", "cuda", "mps")
    assert json.loads((tmp_path / "postbc/seed_1/policy.json").read_text())["about"]["method"] == "postbc"
    flow = pretrain_policy(stage(tmp_path / "flow", file, **{**postbc, "policy": FlowConfig(hidden=16)}), 0)
    assert load_policy(tmp_path / "flow/seed_0").config == flow.config
    # refusals say the reason, and nothing is written
    with pytest.raises(InputError, match="already holds a run"):
        pretrain_policy(config, 1)
    (tmp_path / "other").mkdir()
    for more, words in (
        ({"posterior": None}, "needs a posterior"), ({"posterior": tmp_path / "other"}, "There is no posterior.safetensors of seed 1"),
        ({"data": TrainingSetConfig(file, num_trajectories=3, chunk=2)}, "other windows"),
        ({"data": TrainingSetConfig(file, num_trajectories=2)}, "other windows"),
        ({"policy": DiffusionConfig(hidden=2**20)}, "do not fit into memory"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            pretrain_policy(dataclasses.replace(config, output=tmp_path / "a", **more), 1)
    with pytest.raises(InputError, match="--seeds 2 too"):
        pretrain_policy(dataclasses.replace(config, output=tmp_path / "a"), 2)
    assert not (tmp_path / "a").exists()
    # a finished run resumed stays as it is; another posterior than the one it began with is refused
    resumed = dataclasses.replace(config, resume=True)
    assert torch.equal(parameters(pretrain_policy(resumed, 1)), parameters(loaded))
    again = dataclasses.replace(fit, output=tmp_path / "again", ensemble=dataclasses.replace(fit.ensemble, steps=21))
    fit_posterior(again, 1)
    (tmp_path / "again/seed_1/posterior.safetensors").replace(tmp_path / "posterior/seed_1/posterior.safetensors")
    with pytest.raises(InputError, match=r"inputs\.posterior"):
        pretrain_policy(resumed, 1)


def test_a_training_that_was_stopped_plays_from_its_newest_checkpoint(tmp_path):
    settings = PretrainingConfig(method="bc", **FAST)
    with Run(tmp_path / "bc/seed_7", settings) as run:
        training = Pretraining(policy(), WINDOWS, settings, 7)
        for _ in range(20):
            training.step()
        run.save(training.done, training.state())
    with pytest.raises(InputError, match=r"newest checkpoint: .*latest"):
        load_policy(tmp_path / "bc/seed_7")
    with pytest.raises(InputError, match=r"newest checkpoint plays, too: .*latest"):
        load_agent(tmp_path / "bc/seed_7")
    agent, about = load_agent(tmp_path / "bc/seed_7/latest")
    assert about.steps == 20
    training.finish()  # its averaged weights, not the newest
    assert torch.equal(parameters(agent.policy), parameters(training.policy))
    save_tree(tmp_path / "other.safetensors", {"kind": "checkpoint", "step": 1, "elapsed": 0.0, "state": {"done": 1}})
    with pytest.raises(InputError, match="of no pretraining"):
        load_policy(tmp_path / "other.safetensors")


def test_the_stages_from_images(tmp_path):
    file = write_demonstrations(tmp_path / "d.hdf5", images={"top_image": (16, 16, 3)})
    data = TrainingSetConfig(file, image_keys=("top_image",), observation_steps=2)
    images = {"policy": DiffusionConfig(hidden=16, denoising_steps=10, inference_steps=2, encoder=EncoderConfig(4, (4,))),
              "pretraining": PretrainingConfig(method="bc", steps=4, batch_size=8), "data": data}  # fmt: skip
    pretrain_policy(dataclasses.replace(stage(tmp_path / "bc", file), **images), 0)
    small = EnsembleConfig(ensemble_size=3, hidden=8, steps=20, batch_size=8)
    fit_posterior(PosteriorFit(data, tmp_path / "posterior", encoder=tmp_path / "bc", ensemble=small), 0)
    assert (tmp_path / "posterior/seed_0/encoder.safetensors").exists()
    images["pretraining"] = PretrainingConfig(method="postbc", steps=4, batch_size=8)
    config = dataclasses.replace(stage(tmp_path / "postbc", file), posterior=tmp_path / "posterior", **images)
    trained = pretrain_policy(config, 0)
    assert trained.shapes.keys() == {"state", "image.top"}
    assert trained.observation_steps == 2
    with pytest.raises(InputError, match="other observations"):
        fit_posterior(PosteriorFit(TrainingSetConfig(file), tmp_path / "c", encoder=tmp_path / "bc", ensemble=small), 0)
    (tmp_path / "postbc/seed_0/policy.safetensors").replace(tmp_path / "posterior/seed_0/encoder.safetensors")
    with pytest.raises(InputError, match="not the encoder that the posterior was fitted with"):
        pretrain_policy(dataclasses.replace(config, output=tmp_path / "b"), 0)
    assert not (tmp_path / "b").exists()


def killed_stage(directory):
    pretraining_module.Checkpoints.due = property(lambda self: self.run is not None and next(ticks) % 20 == 0)
    pretrain_stage.pretrain = functools.partial(pretrain, log_every=7)
    ticks = itertools.count(1)
    config = stage(directory, Path(sys.argv[2]) / "d.hdf5")
    pretrain_policy(dataclasses.replace(config, pretraining=PretrainingConfig(method="sigma-bc", steps=70, batch_size=8)), 0)


@pytest.mark.parametrize("how", ["operations", "moments"])
def test_kills_leave_nothing_but_the_same_files(tmp_path, how):
    write_demonstrations(tmp_path / "d.hdf5")
    in_a_process(__file__, how, tmp_path)


if __name__ == "__main__":
    import torch._dynamo

    versions()  # the commit may change while the test runs
    if sys.argv[1] == "operations":
        kill_at_every_operation(killed_stage, Path(sys.argv[2]), ["*/versions.json"], stride=29)
    else:
        kill_and_resume(killed_stage, Path(sys.argv[2]), "pretraining", ["*/versions.json"])


def test_padding_is_neither_perturbed_nor_learnt():
    """tail="mask": LeRobot's windows. What the policy is asked to predict beyond an episode's end costs nothing."""
    windows = Windows(DATA, 2, tail="mask")
    training = Pretraining(policy(), windows, PretrainingConfig("sigma-bc", sigma=1.0, **FAST), 0)
    seen, plain = [], training.policy.loss

    def loss(features, target, generator, weight):
        seen.append((target, weight))
        return plain(features, target, generator, weight)

    training.policy.loss = loss
    for _ in range(20):
        training.step()
    target, weight = (torch.cat(parts) for parts in zip(*seen))
    assert 0 < (weight == 0).sum() < len(weight)
    assert set(weight[:, 0].tolist()) == {1.0}
    last = windows.chunk(torch.nonzero(~windows.inside(torch.arange(len(windows)))[:, 1])[:, 0])[:, 1]
    clean = training.policy.normalization.normalize_action(last.repeat_interleave(2, 0).view(-1, 2, 2))[:, 0]
    assert all(any(torch.equal(t, c) for c in clean) for t in target[weight == 0])
    everything = [
        Pretraining(policy(), Windows(DATA, 2, tail=tail), PretrainingConfig("bc", **FAST), 0) for tail in ("pad", "mask")
    ]
    first, second = ([t.step() for _ in range(20)] for t in everything)
    assert first != second
