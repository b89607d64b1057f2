"""Residual RL: its losses by hand, its start at the base policy, its n-step memory, the loop on the toy, kills, files, bad input."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kills import in_a_process, kill_and_resume, kill_at_every_operation
from postbc.agents.base import Batch, load_agent
from postbc.agents.networks import adam, descend
from postbc.agents.replay import NStepReplay
from postbc.agents.residual import Residual, ResidualAgent, ResidualConfig, actor_loss, critic_loss, with_proposals
from postbc.data.episodes import Episode
from postbc.data.readers import list_dataset
from postbc.data.transitions import TransitionConfig, n_step, transitions
from postbc.devices import Compute
from postbc.errors import InputError
from postbc.policies.base import About
from postbc.runs import digest
from postbc.schemas import plain
from postbc.seeding import make_generator
from postbc.training.online import Online, OnlineConfig
from postbc.training.residual import ResidualTraining, finetune_residual, of_demonstrations
from postbc.training.results import Result, read_result
from postbc.training.rollouts import collect_rollouts
from toy import PointReach, ToyPolicy, environment, stopped

F, D = 4, 4
CONFIG = ResidualConfig(
    hidden=32,
    critics=4,
    batch_size=32,
    utd=4,
    critic_warmup=20,
    ramp=20,
    lr=1e-3,
    scale=0.5,
    proposals=3,
    n_step=3,
    discount=0.9,
)
TRAINING = OnlineConfig(
    budget_env_steps=600, initial_steps=200, eval_every=250, eval_episodes=20, num_envs=3, log_every=20, checkpoint_seconds=1e9,
    reward="sparse",
)  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learner(config: ResidualConfig = CONFIG, seed: int = 0, **options: Any) -> Residual:
    made = Residual(config, ToyPolicy(), make_generator(seed, "online/initialisation"), **options)
    with torch.no_grad():  # an actor that has learnt something
        made.networks.actor[-1].weight.copy_(normal(*made.networks.actor[-1].weight.shape, seed=5) * 0.1)  # type: ignore[union-attr, arg-type]
    return made


def batch(rows: int = 8, m: int = 3) -> Batch:
    wide = F + m * D
    return Batch(normal(rows, wide, seed=1), normal(rows, D, seed=2), normal(rows, wide, seed=3), normal(rows, seed=4),
                 torch.linspace(0, 1, rows))  # fmt: skip


# -- losses --------------------------------------------------------------------------------------------------------------------
def test_the_critics_loss_is_the_one_written_out_row_by_row() -> None:
    made, rows, scale, subset = learner(), batch(), torch.tensor(0.4), torch.tensor([2, 0])
    with torch.no_grad():
        made.networks.target_critics.net[0].weight.mul_(1.1)  # type: ignore[union-attr, operator]
    loss, info = critic_loss(made.networks, rows, scale, subset)
    expected = 0.0
    for i in range(8):
        s, b = rows.next_features[i, :F], rows.next_features[i, F:].view(3, D)
        chunks = torch.stack([(c + 0.4 * torch.tanh(made.networks.actor(torch.cat((s, c))))).clamp(-1, 1) for c in b])
        q = made.networks.target_critics(s.expand(3, -1), chunks)  # (E, M)
        best = int(q.mean(0).argmax())
        y = rows.reward[i] + rows.discount[i] * min(q[2, best], q[0, best])
        now = made.networks.critics(rows.features[i : i + 1, :F], rows.action[i : i + 1])[:, 0]
        expected += float(((now - y) ** 2).sum().detach()) / 8
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert set(info) == {"critic/loss", "critic/q", "critic/target"}


def test_the_actors_loss_is_the_one_written_out_row_by_row() -> None:
    made, state = learner(), batch().features
    loss, _ = actor_loss(made.networks, state, torch.tensor(0.4), 0.3)
    values = []
    for row in state:
        for b in row[F:].view(3, D):
            u = torch.tanh(made.networks.actor(torch.cat((row[:F], b))))
            q = made.networks.critics(row[None, :F], (b + 0.4 * u).clamp(-1, 1)[None]).mean()
            values.append(float((-q + 0.3 * u.square().mean()).detach()))
    assert float(loss.detach()) == pytest.approx(np.mean(values), rel=1e-5)


def test_one_proposal_is_the_plain_residual_and_an_untrained_one_the_policy() -> None:
    made = Residual(replace(CONFIG, proposals=1, exploration=0.0), ToyPolicy(), make_generator(0, "online/initialisation"))
    features = normal(6, F).clamp(-1, 1)
    state = made.state(features, torch.Generator().manual_seed(1))
    made.scale.fill_(0.5)
    chunk, flat = made.act(state, torch.Generator().manual_seed(2))
    torch.testing.assert_close(flat, state[:, F:])  # a zero last layer: no residual yet
    agent, policy = made.agent(), ToyPolicy()
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    torch.testing.assert_close(agent.act({"state": features}, first), policy.sample(features, generator=second))
    base, stored = made.act_base(state, torch.Generator())
    assert torch.equal(stored, state[:, F:])
    assert base.shape == chunk.shape == (6, 2, 2)


def test_the_residual_is_bounded_and_the_best_proposal_is_played() -> None:
    made = learner(replace(CONFIG, exploration=0.0))
    made.scale.fill_(0.2)
    state = made.state(normal(5, F), torch.Generator().manual_seed(3))
    _, flat = made.act(state, torch.Generator())
    proposals = state[:, F:].view(5, 3, D)
    assert ((flat[:, None] - proposals).abs().amax(-1).amin(1) <= 0.2 + 1e-6).all()
    s = state[:, :F]
    for i in range(5):
        chunks = (
            proposals[i] + 0.2 * torch.tanh(made.networks.actor(torch.cat((s[i].expand(3, -1), proposals[i]), -1)))
        ).clamp(-1, 1)
        q = made.networks.critics(s[i].expand(3, -1), chunks).mean(0)
        torch.testing.assert_close(flat[i], chunks[q.argmax()])


def test_the_ramp_the_warm_up_and_the_shares() -> None:
    demonstrations = batch(50)._replace(reward=torch.full((50,), 77.0))
    made = learner(replace(CONFIG, demonstration_share=0.25), demonstrations=demonstrations)
    memory = made.memory(100, 3)
    memory.add(batch(40))
    seen = made.batch(memory, torch.Generator().manual_seed(0))
    assert int((seen.reward == 77).sum()) == 8
    assert len(seen.reward) == 32
    before = [p.clone() for p in made.networks.actor.parameters()]
    made.learn(memory, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))
    assert made.gradient_steps == 20 + 4
    assert made.actor_steps == 2
    assert float(made.scale) == pytest.approx(0.5 * 2 / 20)
    assert not all(torch.equal(a, b) for a, b in zip(before, made.networks.actor.parameters(), strict=True))
    made.learn(memory, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))
    assert made.gradient_steps == 20 + 8  # the warm-up comes once


# -- devices -------------------------------------------------------------------------------------------------------------------
def same_learning(device: str, compiled: bool) -> None:
    """A few updates of critics and actor: as plain ones on the CPU, from the same weights."""
    config, first, learners = replace(CONFIG, lr=3e-4), learner(replace(CONFIG, lr=3e-4)), []
    for where, how in (("cpu", False), (device, compiled)):
        compute = Compute(device=where, compile=how)  # type: ignore[arg-type]
        made = Residual(config, ToyPolicy(), make_generator(0, "online/initialisation", where), compute)
        made.load_state_dict(first.state_dict())  # a checkpoint goes to another device
        for k in range(8):
            rows = Batch(*(part.roll(k, 0).to(where) for part in batch(32)))
            made.update(rows, torch.tensor([k % 4, (k + 1) % 4], device=where), actor=True)
        learners.append(made)
    before, here, there = (list(made.networks.parameters()) for made in (first, *learners))
    assert not any(torch.equal(a, b) for a, b in zip(before, here, strict=True))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-4, rtol=1e-3)
    assert float(learners[0].scale) == float(learners[1].scale) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_learns_the_same(compiled: bool) -> None:
    same_learning("cuda", compiled)


@pytest.mark.slow
def test_a_compiled_update_gives_the_same_numbers() -> None:
    same_learning("cpu", True)


# -- n steps -------------------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(data=st.data(), steps=st.integers(1, 4), envs=st.integers(1, 3))
def test_n_step_rows_are_the_sums_of_what_follows(data: st.DataObject, steps: int, envs: int) -> None:
    """Against a plain record of every environment's episode, also across a checkpoint in the middle."""
    replay: NStepReplay = NStepReplay(1000, 1, 1, steps=steps, num_envs=envs)
    episodes: list[list[list[tuple[float, float, float]]]] = [[[]] for _ in range(envs)]  # (identity, reward, discount)
    identity = 0.0
    for t in range(data.draw(st.integers(1, 12))):
        ended = np.array([data.draw(st.booleans()) for _ in range(envs)])
        over = np.array([bool(e) and data.draw(st.booleans()) for e in ended])
        reward = np.array([float(data.draw(st.integers(0, 3))) for _ in range(envs)])
        ids = identity + np.arange(envs)
        identity += envs
        for j in range(envs):
            episodes[j][-1].append((ids[j], reward[j], 0.0 if over[j] else 0.5))
            if ended[j]:
                episodes[j].append([])
        column = lambda v: torch.as_tensor(v, dtype=torch.float32)[:, None]  # noqa: E731
        discount = torch.as_tensor(np.where(over, 0.0, 0.5), dtype=torch.float32)
        rows = Batch(column(ids), column(ids), column(ids + 0.25), torch.as_tensor(reward, dtype=torch.float32), discount)
        replay.remember(rows, torch.ones(envs, dtype=torch.bool), torch.as_tensor(ended))
        if t == 4:
            other = NStepReplay(1000, 1, 1, steps=steps, num_envs=envs)
            other.load_state_dict(replay.state_dict())
            replay = other
    expected = {}
    for j in range(envs):
        for number, episode in enumerate(episodes[j]):
            whole = number + 1 < len(episodes[j])  # it has ended
            for k in range(len(episode)):
                if not whole and k + steps > len(episode):
                    continue
                total, factor, last = 0.0, 1.0, k
                for i in range(k, min(k + steps, len(episode))):
                    total, factor, last = total + factor * episode[i][1], factor * episode[i][2], i
                expected[episode[k][0]] = (total, factor, episode[last][0] + 0.25)
    stored = replay.batch(torch.arange(len(replay)))
    found = {
        float(a): (float(r), float(d), float(n))
        for a, r, d, n in zip(stored.action[:, 0], stored.reward, stored.discount, stored.next_features[:, 0], strict=True)
    }
    assert found == expected


def test_n_step_transitions_of_an_episode_by_hand() -> None:
    rewards = np.zeros(10)
    rewards[9] = 1
    episode = Episode({"state": np.zeros((10, 1), np.float32)}, np.zeros((10, 1), np.float32), rewards, None, None, "demo_0")
    one = transitions(episode, rewards.astype(bool), 2, 0.5, TransitionConfig(stride=1))
    three = n_step(one, 3)
    assert three.row.tolist() == one.row.tolist() == list(range(9))
    first, late = 0, one.row.tolist().index(4)
    assert (three.next_row[first], three.reward[first], three.discount[first]) == (6, 0, 0.125)
    assert (three.reward[late], three.discount[late]) == (0.25, 0.0)  # 4 → 6 → 8, whose chunk ends in success
    assert n_step(one, 1).reward.tolist() == one.reward.tolist()


# -- the loop ------------------------------------------------------------------------------------------------------------------
def finetune(directory: Path, policy: Any = None, config: ResidualConfig = CONFIG, **options: Any) -> Result:
    changes = {k: options.pop(k) for k in list(options) if k in OnlineConfig.__dataclass_fields__}
    finetune_residual(
        policy or ToyPolicy(3), environment(), directory, config, replace(TRAINING, **changes), seed=3, resume=True, **options
    )
    return read_result(directory)


def demonstrations(directory: Path) -> Path:
    return collect_rollouts(ToyPolicy(drift=1.0, noise=0.1), environment(), 8, directory, seed=9)


def test_it_learns_the_toy_from_rollouts_and_demonstrations(tmp_path: Path) -> None:
    result = finetune(
        tmp_path / "run", demonstrations=demonstrations(tmp_path / "demos"), budget_env_steps=6000, eval_every=3000, eval_episodes=100,
        config=replace(CONFIG, scale=1.0, hidden=64),
    )  # fmt: skip
    assert result.success_after is not None
    assert result.success_before is not None
    assert result.success_after > max(0.9, result.success_before + 0.3)
    assert result.finetuner == "residual"
    assert result.gradient_steps is not None
    assert result.gradient_steps > 1000
    assert ResidualAgent.load(tmp_path / "run", ToyPolicy(3)).networks.config.scale == 1.0


def test_the_memory_holds_what_was_played(tmp_path: Path) -> None:
    made = Residual(replace(CONFIG, n_step=1), ToyPolicy(), make_generator(0, "online/initialisation"))
    online = Online(made, PointReach(3), replace(TRAINING, initial_steps=10**6, budget_env_steps=10**7), 0)
    for _ in range(20):
        online.step()
    rows = online.memory.batch(torch.arange(len(online.memory)))
    torch.testing.assert_close(rows.action, rows.features[:, F : F + D])  # the base policy's first proposal
    moved = rows.features[:, :2] + 0.1 * rows.action.view(-1, 2, 2).sum(1)
    whole = rows.reward == 0
    torch.testing.assert_close(rows.next_features[whole][:, :2], moved[whole], atol=1e-5, rtol=0)


def test_a_resumed_run_ends_bit_for_bit(tmp_path: Path) -> None:
    whole = finetune(tmp_path / "whole")
    with stopped(Online, "step", 60, RuntimeError("stop")):
        finetune(tmp_path / "cut", checkpoint_seconds=0.0)
    again = finetune(tmp_path / "cut", checkpoint_seconds=0.0)
    assert (again.curve, again.success_best, again.gradient_steps) == (whole.curve, whole.success_best, whole.gradient_steps)
    for name in ("agent.safetensors", "best/agent.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def stage(directory: Path) -> None:
    config = replace(CONFIG, utd=2, batch_size=8, hidden=8, critic_warmup=3)
    finetune(
        directory, config=config, checkpoint_seconds=0.0, eval_episodes=3, budget_env_steps=240, initial_steps=100, eval_every=60,
        log_every=5, demonstrations=directory.parent / "demos/rollouts.hdf5",
    )  # fmt: skip


IGNORED = ("results.json:wall_clock_s", "results.json:commit", "results.json:command")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["at random", "at every operation"])
def test_kills_change_nothing(tmp_path: Path, when: str) -> None:
    demonstrations(tmp_path / "demos")
    in_a_process(__file__, tmp_path, when)


# -- bad input -----------------------------------------------------------------------------------------------------------------
def test_which_demonstrations_are_learnt_from_is_decided_by_the_files_content_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the policy, whatever its file is called now; all of another file, even of one with the same name."""
    path, policy = demonstrations(tmp_path / "demos"), ToyPolicy()
    names = tuple(list_dataset(path).names)
    renamed, other = tmp_path / "renamed.hdf5", tmp_path / path.name
    renamed.write_bytes(path.read_bytes())
    other.write_bytes(path.read_bytes())
    with h5py.File(other, "r+") as file:
        file["data"].attrs["note"] = "another"

    def count(file: Path, about: About) -> int:
        policy.about = about  # type: ignore[attr-defined]
        return len(of_demonstrations(file, digest(file), policy, CONFIG, TRAINING, torch.Generator().manual_seed(0)).reward)

    about = About(data=path.name, data_digest=digest(path), trajectories=names[:2])
    some = count(path, about)
    assert f"2 of the {len(names)} demonstrations" in capsys.readouterr().out
    every = count(other, about)
    assert "not known to be the policy's own" in " ".join(capsys.readouterr().out.split())
    assert (count(renamed, about), count(path, replace(about, data_digest=None))) == (
        some,
        some,
    )  # before there was a digest: by name
    assert every == count(path, About()) > some
    with pytest.raises(InputError, match="never be learnt from"):
        finetune(tmp_path / "run", config=replace(CONFIG, demonstration_share=0.0), demonstrations=path)


def test_demonstrations_that_cannot_be_used(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "demos")
    with pytest.raises(InputError, match="environment's own reward"):
        finetune(tmp_path / "run", demonstrations=path, reward="environment")
    for rule in ("never", "chunk_success"):  # rollouts would earn more than the demonstrations' one success
        with pytest.raises(InputError, match=rf"(?s)end at their first success.*terminate_on.*{rule}"):
            finetune(tmp_path / "run", demonstrations=path, terminate_on=rule)
    with pytest.raises(InputError, match="missing"):
        finetune(tmp_path / "run", demonstrations=tmp_path / "missing.hdf5")
    failures = collect_rollouts(ToyPolicy(drift=0.0, noise=1e-3), environment(), 3, tmp_path / "bad", seed=1)
    with pytest.raises(InputError, match="success"):
        finetune(tmp_path / "run", demonstrations=failures)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reward", ["sparse", "negative"])
def test_a_demonstration_is_rewarded_as_the_same_episode_is_when_it_is_played(tmp_path: Path, reward: Any) -> None:
    """The policy records an episode and plays it again in training: every transition that both have has one reward and discount."""
    policy, training = ToyPolicy(drift=5.0, noise=0.0), replace(TRAINING, reward=reward, num_envs=1, initial_steps=10**6)
    config = replace(CONFIG, n_step=1, proposals=1)
    online = Online(Residual(config, policy, make_generator(0, "online/initialisation")), PointReach(1), training, 0)
    made = environment()
    start = int(online.env.seeds[0])
    with pytest.MonkeyPatch.context() as patch:  # the very episode
        patch.setattr("postbc.training.rollouts.episode_seed", lambda *_: start)
        path = collect_rollouts(policy, made, 1, tmp_path / "demos", seed=0)
    while int(online.begun[0]) == 1:
        online.step()
    played = online.memory.batch(torch.arange(len(online.memory)))
    recorded = of_demonstrations(path, digest(path), policy, config, training, torch.Generator().manual_seed(0))
    assert float(played.discount[-1]) == 0
    for k in range(len(played.reward)):
        (row,) = torch.nonzero((recorded.features[:, :F] - played.features[k, :F]).abs().amax(1) < 1e-6)[0]
        assert float(recorded.reward[row]) == float(played.reward[k])
        assert float(recorded.discount[row]) == pytest.approx(float(played.discount[k]))


def test_the_defaults_are_what_was_measured() -> None:
    """results/lift-finetuners, on which the claims about the steps that it needs rest."""
    measured = yaml.safe_load((Path(__file__).parent.parent / "results/lift-finetuners/config.yaml").read_text())
    assert measured["residual"] == plain(ResidualConfig())
    names = ("budget_env_steps", "num_envs", "initial_steps", "eval_every", "reward", "terminate_on", "time_limit")
    assert {name: measured["residual_training"][name] for name in names} == {
        name: plain(ResidualTraining())[name] for name in names
    }


@pytest.mark.parametrize(
    "values",
    [{"target_critics": 5, "critics": 4}, {"utd": 1}, {"scale": 0.0}, {"n_step": 0}, {"proposals": 0}, {"scale": np.nan}],
)
def test_numbers_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ResidualConfig(**values)


def test_a_damaged_or_foreign_agent_is_refused(tmp_path: Path) -> None:
    finetune(tmp_path / "run", budget_env_steps=300)
    with pytest.raises(InputError, match="another base policy"):
        ResidualAgent.load(tmp_path / "run", ToyPolicy(4))
    with pytest.raises(InputError, match="base policy"):
        load_agent(tmp_path / "run")  # a class of one's own lies in no file
    content = bytearray((tmp_path / "run/agent.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "run/agent.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        ResidualAgent.load(tmp_path / "run", ToyPolicy(3))
    with pytest.raises(InputError, match=r"(?s)has finished.*damaged.*run the same command again"):
        finetune(tmp_path / "run", budget_env_steps=300)


def test_proposals_are_the_policys_samples() -> None:
    policy, features = ToyPolicy(), normal(4, F)
    state = with_proposals(policy, features, 2, torch.Generator().manual_seed(0))
    direct = policy.sample(features.repeat_interleave(2, 0), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(state, torch.cat((features, direct.reshape(4, -1)), -1))


if __name__ == "__main__":
    weight = torch.zeros(1, requires_grad=True)
    descend(adam([weight], 1e-3), weight.sum())  # imports much at its first step, which the forks then have already
    if sys.argv[2] == "at random":
        kill_and_resume(stage, Path(sys.argv[1]), sys.argv[2], IGNORED)
    else:
        kill_at_every_operation(stage, Path(sys.argv[1]), IGNORED, stride=29)
