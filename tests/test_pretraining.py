"""Algorithm 2: the methods differ in the target alone; seeds keep to themselves; nothing is lost."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from postbc.cli import main
from postbc.demonstrations import Demonstrations, Normalization, Windows, write_robomimic
from postbc.nn import make_generators
from postbc.policies import DiffusionConfig, DiffusionPolicy
from postbc.posterior import Factor
from postbc.pretraining import Pretraining, PretrainingConfig, pretrain

SMALL = DiffusionConfig(chunk=2, hidden=16, denoising_steps=10, inference_steps=2)
FAST = {"steps": 12, "batch_size": 8, "learning_rate": 1e-3, "ema_every": 2}


def windows(seed=0, n=30):
    rng = np.random.default_rng(seed)
    return Windows(
        rng.uniform(-1, 1, (n, 3)).astype(np.float32), rng.uniform(-1, 1, (n, 2, 2)).astype(np.float32),
        np.repeat(np.arange(3), n // 3), np.tile(np.arange(n // 3), 3),
    )  # fmt: skip


def policy(seeds):
    identity = Normalization(-np.ones(3), np.ones(3), -np.ones(2), np.ones(2))
    return DiffusionPolicy(SMALL, 3, 2, seeds, make_generators(seeds, 3), [identity])


def factor(n=30):
    return Factor.from_predictions(torch.rand(5, n, 4, generator=torch.Generator().manual_seed(0)))


def train(method, seeds=(0, 1), data=None, **config):
    settings = PretrainingConfig(method=method, **{**FAST, **config})
    data = [windows()] if data is None else data
    cov = factor(sum(len(w) for w in data)) if method == "postbc" else None
    return pretrain(policy(seeds), data, settings, seeds, cov)


def parameters(trained):
    return torch.cat([p.flatten() for p in trained.parameters()])


@pytest.mark.parametrize("resample", [True, False])
def test_zero_weight_is_bc_to_the_bit(resample):
    bc = parameters(train("bc"))
    assert torch.equal(bc, parameters(train("postbc", posterior_weight=0.0, resample=resample)))
    assert torch.equal(bc, parameters(train("sigma-bc", sigma=0.0, resample=resample)))
    assert not torch.equal(bc, parameters(train("postbc", posterior_weight=0.1, resample=resample)))


@pytest.mark.parametrize("method", ["bc", "sigma-bc", "postbc"])
def test_a_seed_gives_the_same_policy_alone_and_beside_others(method):
    together = train(method, seeds=(4, 7)).select([1])
    alone = train(method, seeds=(7,))
    for a, b in zip(together.parameters(), alone.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_members_may_have_their_own_demonstrations():
    a, b = windows(0), windows(1, n=21)
    together = train("bc", seeds=(4, 7), data=[a, b]).select([1])
    alone = train("bc", seeds=(7,), data=[b])
    for x, y in zip(together.parameters(), alone.parameters()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "expected"), [("sigma-bc", "sigma"), ("postbc", "factor")])
@pytest.mark.parametrize("diagonal", [False, True])
def test_targets_have_the_covariance_that_they_should(method, expected, diagonal):
    config = PretrainingConfig(method=method, sigma=0.3, posterior_weight=2.0, diagonal=diagonal, **FAST)
    cov = factor()
    training = Pretraining(policy((0,)), [windows()], config, (0,), cov)
    rows = torch.full((1, 100_000), 3)
    noise = training.target(torch.zeros(1, 100_000, 2, 2), rows)[0].flatten(1)
    wanted = 0.09 * torch.eye(4)
    if expected == "factor":
        wanted = 4 * cov.covariance()[3]
        wanted = torch.diag(torch.diag(wanted)) if diagonal else wanted
    torch.testing.assert_close(torch.cov(noise.T), wanted, atol=0.02 * wanted.max().item(), rtol=0)


def test_drawn_once_means_once_and_clipping_clips():
    once = Pretraining(policy((0,)), [windows()], PretrainingConfig(method="sigma-bc", resample=False, **FAST), (0,))
    rows, zero = torch.arange(30)[None], torch.zeros(1, 30, 2, 2)
    assert torch.equal(once.target(zero, rows), once.target(zero, rows))
    fresh = Pretraining(
        policy((0,)), [windows()], PretrainingConfig(method="sigma-bc", clip_targets=True, sigma=2.0, **FAST), (0,)
    )
    first, second = fresh.target(zero, rows), fresh.target(zero, rows)
    assert not torch.equal(first, second)
    assert first.abs().max() == 1


def test_learning_rate_warms_up_and_ends_at_its_floor():
    training = Pretraining(policy((0,)), [windows()], PretrainingConfig(method="bc", steps=3000), (0,))
    rates = [training.learning_rate(i) for i in range(3001)]
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) == pytest.approx(1e-4)
    assert rates.index(max(rates)) in (99, 100)
    assert rates[-1] == pytest.approx(1e-5)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


class Regressor(torch.nn.Module):
    """The smallest third-party policy: a deterministic linear regressor, one member."""

    members, observation_dim, chunk, action_dim = 1, 3, 2, 2

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def loss(self, observation, chunk, generators):
        return (self.linear(observation) - chunk.flatten(2)).square().mean((1, 2))

    def sample(self, observation, noise=None, generators=None):
        return self.linear(observation).unflatten(-1, (2, 2))


def test_any_policy_of_the_protocol_can_be_pretrained():
    torch.manual_seed(0)
    data = windows()
    trained = pretrain(
        Regressor(),
        [data],
        PretrainingConfig("postbc", steps=1500, learning_rate=1e-2, batch_size=30, posterior_weight=0.5),
        (0,),
        factor(),
    )
    s = np.c_[data.observations, np.ones(30)]
    least_squares = s @ np.linalg.lstsq(s, data.chunks.reshape(30, 4), rcond=None)[0]
    ours = trained.sample(torch.as_tensor(data.observations)[None])[0].flatten(1).numpy()
    assert np.abs(ours - least_squares).max() < 0.15  # the noise has mean zero, so the regression line stays BC's


def write_demonstrations(path, trajectories=4, length=12):
    rng = np.random.default_rng(0)
    dims = (3, 4, 2, 10)
    keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    observations = [rng.uniform(-1, 1, (length, 19)).astype(np.float32) for _ in range(trajectories)]
    actions = [rng.uniform(-1, 1, (length, 7)).astype(np.float32) for _ in range(trajectories)]
    environment = {"env_name": "Lift", "env_version": "1.4.0", "type": 1, "env_kwargs": {}}
    data = Demonstrations.from_arrays(
        observations, actions, observation_keys=keys, observation_dims=dims, environment=environment
    )
    write_robomimic(path, data)


def pretrain_arguments(data, output, *more):
    return [
        "pretrain", "--data.demonstrations", str(data), "--data.num-trajectories", "3", "--output", str(output), "--seeds", "0", "1",
        "--policy.hidden", "16", "--pretraining.batch-size", "8", *more,
    ]  # fmt: skip


def test_commands_end_to_end(tmp_path, capsys):
    data = tmp_path / "demos.hdf5"
    write_demonstrations(data)
    ensemble = ["--ensemble.ensemble-size", "3", "--ensemble.hidden", "8", "--ensemble.batch-size", "8", "--epochs", "2"]
    fit = ["posterior", "fit", "--data.demonstrations", str(data), "--data.num-trajectories", "3", "--seeds", "0", "1"]
    assert main([*fit, "--output", str(tmp_path / "posterior"), *ensemble]) == 0
    assert set(json.loads((tmp_path / "posterior/diagnostics.json").read_text())) == {"0", "1"}
    assert (tmp_path / "posterior/posterior_seed_1.png").stat().st_size > 10_000
    postbc = ["--posterior", str(tmp_path / "posterior"), "--epochs", "3"]
    assert main(pretrain_arguments(data, tmp_path / "postbc", *postbc)) == 0
    policy = DiffusionPolicy.load(tmp_path / "postbc")
    assert policy.seeds == (0, 1)
    assert policy.about["method"] == "postbc"
    assert policy.about["task"] == "Lift"
    assert policy.about["demonstrations"] == 3
    assert policy.about["steps"] == 3 * 4  # ⌈27 windows / 8⌉ = 4
    # refusals: status 2, the reason, and nothing written
    assert main(pretrain_arguments(data, tmp_path / "postbc", *postbc)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(pretrain_arguments(data, tmp_path / "a")) == 2
    assert "needs a posterior" in capsys.readouterr().err
    other = ["--posterior", str(tmp_path / "posterior"), "--data.chunk", "2", "--policy.chunk", "2"]
    assert main(pretrain_arguments(data, tmp_path / "a", *other)) == 2
    assert "other windows" in capsys.readouterr().err
    assert main(pretrain_arguments(data, tmp_path / "a", "--data.chunk", "2")) == 2
    assert "chunk" in capsys.readouterr().err
    assert main(pretrain_arguments(data, tmp_path / "a", "--posterior", str(tmp_path), "--seeds", "5")) == 2
    assert main(pretrain_arguments(data, tmp_path / "a", "--pretraining.method", "bc", "--seeds", "3", "3")) == 2
    assert "distinct" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


KILLS = """
import os, random, signal, sys, time
from functools import partial
import h5py, tyro, rich.progress, torch._dynamo, torch.utils.tensorboard
import postbc.pretraining_command as command, postbc.pretraining as pretraining
from postbc.cli import main
command.pretrain = partial(pretraining.pretrain, checkpoint_every=7)
arguments, metrics, kills, rng = sys.argv[2:], sys.argv[1], 0, random.Random(0)
for attempt in range(25):  # children are forked before any tensor is touched, so each is a fresh process without the imports' time
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(arguments))
    if kills < 20:
        before = os.stat(metrics).st_mtime_ns if os.path.exists(metrics) else 0
        while not os.waitpid(child, os.WNOHANG)[0] and before == (os.stat(metrics).st_mtime_ns if os.path.exists(metrics) else 0):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        try:
            os.kill(child, signal.SIGKILL)
            kills += 1
        except ProcessLookupError:
            break
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(kills)
"""


def test_killed_twenty_times_and_resumed_it_ends_the_same(tmp_path):
    data = tmp_path / "demos.hdf5"
    write_demonstrations(data)

    def arguments(output):
        return pretrain_arguments(data, output, "--pretraining.method", "sigma-bc", "--pretraining.steps", "400", "--resume")

    metrics = tmp_path / "killed/metrics.csv"
    command = [sys.executable, "-W", "ignore", "-c", KILLS, str(metrics), *arguments(tmp_path / "killed")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20
    assert main(arguments(tmp_path / "whole")) == 0
    assert main(arguments(tmp_path / "killed")) == 0
    a, b = (DiffusionPolicy.load(tmp_path / name) for name in ("whole", "killed"))
    assert torch.equal(parameters(a), parameters(b))
    steps = [line.split(",")[0] for line in metrics.read_text().splitlines()[1:]]
    assert steps == [str(s) for s in (*range(7, 400, 7), 400)]
