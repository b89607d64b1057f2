"""Best-of-N: rollouts (order, files, resuming), chunk transitions by hand, the choice among samples, the whole stage on the toy."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from kills import in_a_process, kill_and_resume
from postbc.demonstrations import Demonstrations, Trajectory, write_robomimic
from postbc.errors import InputError
from postbc.evaluation import PolicyActor
from postbc.finetuning.best_of_n import BestOfNActor, BestOfNConfig, finetune_best_of_n
from postbc.finetuning.iql import IQLConfig
from postbc.finetuning.networks import Critics
from postbc.finetuning.rollouts import TransitionConfig, collect_rollouts, member_batch, read_rollouts, transitions
from postbc.nn import make_generators, randn
from toy import PointReach, ToyPolicy


def make_env(n: int) -> PointReach:
    return PointReach(n, chunk=1, reward="sparse", terminate_on="never", autoreset="disabled")


def make_evaluation_env(n: int) -> PointReach:
    return PointReach(n, terminate_on="chunk_success", autoreset="disabled")


def trajectory(rewards: list[float], last_done: bool = False) -> Trajectory:
    """Step t observes t, t and plays 10 t."""
    n = len(rewards)
    t = np.arange(n, dtype=np.float32)
    dones = np.zeros(n, bool)
    dones[-1] = last_done
    return Trajectory(np.stack([t, t], 1), 10 * t[:, None], np.array(rewards), dones)


# -- transitions ---------------------------------------------------------------------------------------------------------------
def test_transitions_of_a_success() -> None:
    rows = transitions(trajectory([0, 0, 0, 0, 0, 1, 1, 1]), 4, 0.9, TransitionConfig())
    assert rows["observation"][:, 0].tolist() == [0, 4]
    assert rows["action"][:, :, 0].tolist() == [[0, 10, 20, 30], [40, 50, 60, 70]]
    assert rows["reward"].tolist() == [0, 1]  # the steps after the first success do not count
    np.testing.assert_allclose(rows["discount"], [0.9, 0])
    assert rows["next_observation"][0, 0] == 4


def test_transitions_with_negative_rewards_and_discounts_within_the_chunk() -> None:
    episode = trajectory([0, 0, 0, 0, 0, 0, 1, 1])
    rows = transitions(episode, 4, 0.5, TransitionConfig(reward="negative"))
    assert rows["reward"].tolist() == [-4, -2]
    config = TransitionConfig(reward="negative", chunk_reward="discounted", chunk_discount="per_step")
    rows = transitions(episode, 4, 0.5, config)
    assert rows["reward"].tolist() == [-1.875, -1.5]
    assert rows["discount"].tolist() == [0.5**4, 0]


def test_a_time_limit_is_not_an_end() -> None:
    rows = transitions(trajectory([0] * 9, last_done=True), 4, 0.9, TransitionConfig())
    assert rows["observation"][:, 0].tolist() == [0, 4]
    np.testing.assert_allclose(rows["discount"], [0.9, 0.9])
    rows = transitions(
        trajectory([0] * 8), 4, 0.9, TransitionConfig()
    )  # the last chunk would need an observation after the end
    assert rows["observation"][:, 0].tolist() == [0]
    rows = transitions(trajectory([0] * 8, last_done=True), 4, 0.9, TransitionConfig(termination="dones"))
    np.testing.assert_allclose(rows["discount"], [0.9, 0])


@pytest.mark.parametrize(("tail", "start", "last"), [("align", [0, 2], [20, 30, 40, 50]), ("pad", [0, 4], [40, 50, 50, 50])])
def test_a_last_chunk_that_does_not_fit(tail: Any, start: list[int], last: list[int]) -> None:
    rows = transitions(trajectory([0, 0, 0, 0, 0, 1]), 4, 0.9, TransitionConfig(tail=tail))
    assert rows["observation"][:, 0].tolist() == start
    assert rows["action"][-1, :, 0].tolist() == last
    assert rows["reward"].tolist() == [0, 1]
    assert rows["discount"][-1] == 0


def test_every_window_with_stride_one() -> None:
    rows = transitions(trajectory([0, 0, 0, 0, 0, 1, 0, 0, 0]), 3, 0.9, TransitionConfig(stride=1))
    assert rows["observation"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]  # none begins after the success
    assert rows["reward"].tolist() == [0, 0, 0, 1, 1, 1]
    assert (rows["discount"] == 0).tolist() == [False, False, False, True, True, True]
    assert len(transitions(trajectory([0, 0]), 4, 0.9, TransitionConfig())["reward"]) == 0


# -- rollouts ------------------------------------------------------------------------------------------------------------------
def test_rollouts_are_written_as_robomimic_files(tmp_path: Path) -> None:
    policy = ToyPolicy((2, 5))
    paths = collect_rollouts(policy, make_env, 23, tmp_path, envs_per_member=6)
    assert [p.name for p in paths] == ["rollouts_seed_2.hdf5", "rollouts_seed_5.hdf5"]
    for path in paths:
        data = read_rollouts(path)
        assert data.names == tuple(f"demo_{i}" for i in range(23))
        assert set(data.filters) == {"success", "failure"}
        assert len(data.filters["success"]) + len(data.filters["failure"]) == 23
        for t in data:
            solved = t.name in data.filters["success"]
            assert solved == bool(t.rewards.any()) == bool(t.dones[-1])
            assert len(t) == 30 if not solved else len(t) % 2 == 0  # whole chunks
            assert set(np.unique(t.rewards)) <= {0.0, 1.0}
            assert t.states is not None
            moved = t.observations[:-1, :2] + 0.1 * t.actions[:-1]  # the recorded action led to the next observation
            np.testing.assert_allclose(t.observations[1:, :2], moved, atol=1e-5)
            np.testing.assert_allclose(t.states[:, 1:], t.observations, atol=1e-6)
    assert len({read_rollouts(paths[0])[i].observations[0].tobytes() for i in range(23)}) == 23
    written = paths[0].read_bytes()
    assert collect_rollouts(policy, make_env, 23, tmp_path, envs_per_member=6) == paths  # nothing left to do
    assert paths[0].read_bytes() == written


def test_a_members_rollouts_do_not_depend_on_the_others(tmp_path: Path) -> None:
    together = collect_rollouts(ToyPolicy((2, 5)), make_env, 9, tmp_path / "a", envs_per_member=4)[1]
    alone = collect_rollouts(ToyPolicy((5,)), make_env, 9, tmp_path / "b", envs_per_member=4)[0]
    for a, b in zip(read_rollouts(together), read_rollouts(alone), strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)


class Interrupted(RuntimeError):
    pass


def test_collection_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = collect_rollouts(ToyPolicy((1, 2)), make_env, 20, tmp_path / "a", envs_per_member=4)
    steps = {"left": 0}
    original = PointReach.step

    def failing(self: PointReach, actions: np.ndarray) -> Any:
        steps["left"] -= 1
        if steps["left"] < 0:
            raise Interrupted
        return original(self, actions)

    monkeypatch.setattr(PointReach, "step", failing)
    attempts = 0
    while attempts < 100:
        steps["left"], attempts = 37, attempts + 1
        try:
            paths = collect_rollouts(ToyPolicy((1, 2)), make_env, 20, tmp_path / "b", envs_per_member=4, checkpoint_seconds=0)
            break
        except Interrupted:
            continue
    assert 3 < attempts < 100
    for a, b in zip(reference, paths, strict=True):
        assert a.read_bytes() == b.read_bytes()


# -- the choice ----------------------------------------------------------------------------------------------------------------
class Linear(Critics):
    """Q_i = the sum of the chunk, plus or minus something that only the mean forgives."""

    def __init__(self, members: int) -> None:
        super().__init__(members, 4, 4, (), make_generators(range(members)))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        total = action.sum(-1)
        return torch.stack((total, 2 * action[..., 0] - total), 1)


def test_one_sample_is_the_pretrained_policy() -> None:
    policy, observation = ToyPolicy((0, 1)), randn(make_generators([3, 4]), 7, 4)
    for _ in range(3):
        chunk = BestOfNActor(policy, Linear(2), samples=1).act(observation, make_generators([5, 6]))
        assert torch.equal(chunk, PolicyActor(policy).act(observation, make_generators([5, 6])))


@pytest.mark.parametrize("aggregate", ["min", "mean"])
def test_the_best_of_the_samples_is_played(aggregate: Any) -> None:
    policy, observation = ToyPolicy((0, 1)), randn(make_generators([3, 4]), 7, 4)
    chunk = BestOfNActor(policy, Linear(2), samples=16, aggregate=aggregate).act(observation, make_generators([5, 6]))
    assert chunk.shape == (2, 7, 2, 2)
    # the same draws, one state at a time
    noise = policy.seen[-1].view(2, 16, 7, 2, 2)
    for m in range(2):
        for j in range(7):
            single = ToyPolicy((0,)).sample(observation[m, j].expand(1, 16, 4), noise=noise[m, :, j][None])
            q = Linear(1)(observation[m, j].expand(1, 16, 4), single.flatten(2))[0]
            q = q.min(0).values if aggregate == "min" else q.mean(0)
            torch.testing.assert_close(chunk[m, j], single[0, q.argmax()])


# -- the whole stage -----------------------------------------------------------------------------------------------------------
SMALL = BestOfNConfig(episodes=150, samples=16, eval_episodes=60, checkpoint_seconds=0.0, log_every=200)
IQL_SMALL = IQLConfig(steps=800, hidden=(64, 64), expectile=0.7, discount=0.97, lr=3e-3, tau=0.02, layer_norm=False)
NEGATIVE = TransitionConfig(reward="negative")


def test_best_of_n_improves_the_toy_and_writes_its_results(tmp_path: Path) -> None:
    policy = ToyPolicy((0, 3), drift=0.6)
    makers: dict[str, Any] = {"make_env": make_env, "make_evaluation_env": make_evaluation_env, "task": "PointReach"}
    finetune_best_of_n(policy, tmp_path / "run", SMALL, IQL_SMALL, NEGATIVE, **makers)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [r["seed"] for r in results] == [0, 3]
    for m, r in enumerate(results):
        assert r["finetuner"] == "best-of-n"
        assert r["pretraining"] == "bc"
        assert r["task"] == "PointReach"
        assert r["success_after"] > r["success_before"] + 0.25
        data = read_rollouts(tmp_path / f"run/rollouts_seed_{r['seed']}.hdf5")
        assert r["budget_env_steps"] == data.num_steps
        assert r["curve"] == [[0, r["success_before"]], [data.num_steps, r["success_after"]]]
        assert r["episodes"] == 60
        assert r["rollout_episodes"] == 150
        del m
    loaded = BestOfNActor.load(tmp_path / "run", policy)
    observation = randn(make_generators([3, 4]), 5, 4)
    assert loaded.samples == 16
    assert loaded.act(observation, make_generators([1, 2])).shape == (2, 5, 2, 2)
    with pytest.raises(InputError, match="already holds a run"):
        finetune_best_of_n(policy, tmp_path / "run", SMALL, IQL_SMALL, NEGATIVE, **makers)
    # another critic from the same collection, alone, gives the same as beside the other seed
    files = [tmp_path / "run/rollouts_seed_3.hdf5"]
    finetune_best_of_n(policy, tmp_path / "again", SMALL, IQL_SMALL, NEGATIVE, rollouts=files, seeds=[3], **makers)
    again = json.loads((tmp_path / "again/results.json").read_text())
    assert len(again) == 1
    assert again[0]["seed"] == 3
    assert abs(again[0]["success_after"] - results[1]["success_after"]) < 0.15
    assert again[0]["success_before"] == results[1]["success_before"]


def test_a_stage_that_is_interrupted_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BestOfNConfig(episodes=6, samples=4, eval_episodes=5, checkpoint_seconds=0.0, log_every=10, envs_per_member=3)
    iql = IQLConfig(steps=60, hidden=(8,), batch_size=16)

    def run(directory: Path) -> None:
        makers: dict[str, Any] = {"make_env": make_env, "make_evaluation_env": make_evaluation_env, "task": "PointReach"}
        finetune_best_of_n(ToyPolicy((0, 3)), directory, config, iql, resume=True, **makers)

    run(tmp_path / "a")
    from postbc.finetuning.iql import IQL

    original, calls = IQL.train, {"n": 0}

    def failing(self: IQL, *args: Any) -> Any:
        calls["n"] += 1
        if calls["n"] % 2 == 0:
            raise Interrupted
        return original(self, *args)

    monkeypatch.setattr(IQL, "train", failing)
    for _ in range(20):
        try:
            run(tmp_path / "b")
            break
        except Interrupted:
            continue
    assert calls["n"] > 6
    for name in ("agent.safetensors", "metrics.csv", "rollouts_seed_0.hdf5"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def stage(directory: Path) -> None:
    config = BestOfNConfig(episodes=20, samples=4, eval_episodes=10, checkpoint_seconds=0.0, log_every=10, envs_per_member=5)
    makers: dict[str, Any] = {"make_env": make_env, "make_evaluation_env": make_evaluation_env, "task": "PointReach"}
    finetune_best_of_n(
        ToyPolicy((0, 3)), directory, config, IQLConfig(steps=400, hidden=(16,), batch_size=32), resume=True, **makers
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    in_a_process(__file__, tmp_path)
    files = ("agent.safetensors", "metrics.csv", "rollouts_seed_0.hdf5", "rollouts_seed_3.hdf5", "episodes_after.jsonl")
    for name in files:
        assert (tmp_path / "reference" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_rollouts_of_a_real_robot_need_no_simulator(tmp_path: Path) -> None:
    path = tmp_path / "robot.hdf5"
    rng = np.random.default_rng(0)
    episodes = [Trajectory(rng.normal(size=(9, 4)), rng.normal(size=(9, 2)), np.eye(9)[8] * (i % 2), np.eye(9)[8] > 0, name=f"demo_{i}")
                for i in range(6)]  # fmt: skip
    write_robomimic(path, Demonstrations(tuple(episodes), ("observation",)))
    with h5py.File(path, "a") as file:
        del file["data"].attrs["env_args"]
    config = BestOfNConfig(eval_episodes=0, log_every=5)
    finetune_best_of_n(ToyPolicy((0, 1)), tmp_path / "run", config, IQLConfig(steps=10), rollouts=[path])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert len(results) == 2
    assert results[0]["success_after"] is None
    assert results[0]["rollout_success"] == 0.5


@pytest.mark.parametrize(("width", "actions", "message"), [(5, 2, "observations"), (4, 3, "actions")])
def test_rollouts_of_another_robot_are_refused_and_nothing_is_written(
    tmp_path: Path, width: int, actions: int, message: str
) -> None:
    path = tmp_path / "other.hdf5"
    other = Trajectory(np.zeros((9, width)), np.zeros((9, actions)), np.zeros(9), np.zeros(9, bool))
    write_robomimic(path, Demonstrations((other,), ("observation",)))
    with pytest.raises(InputError, match=message):
        finetune_best_of_n(
            ToyPolicy((0,)), tmp_path / "run", BestOfNConfig(eval_episodes=0), IQLConfig(steps=5), rollouts=[path]
        )
    assert not (tmp_path / "run").exists()


def test_a_member_uses_its_own_normalisation() -> None:
    from postbc.demonstrations import Normalization
    from postbc.policies.base import NormalizationTensors

    policy = ToyPolicy((0, 1))
    second = Normalization(np.zeros(4), np.full(4, 2.0), np.zeros(2), np.full(2, 4.0))
    policy.normalization = NormalizationTensors([Normalization.identity(4, 2), second], 2)
    data = Demonstrations((Trajectory(np.ones((5, 4)), np.ones((5, 2)), np.eye(5)[4], np.eye(5)[4] > 0),), ("observation",))
    batches = [member_batch(data, policy, m, 0.9, TransitionConfig())[0] for m in range(2)]
    torch.testing.assert_close(batches[0].observation[0, 0], torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(batches[1].observation[0, 0], torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(batches[1].action[0, 0], torch.full((4,), -0.5), atol=1e-5, rtol=0)


if __name__ == "__main__":
    kill_and_resume(stage, Path(sys.argv[1]), "best-of-n")
