"""Evaluation against a toy environment whose episodes can be computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from postbc.demonstrations import Normalization
from postbc.errors import InputError
from postbc.evaluation import EVALUATION_SEED, Evaluation, PolicyActor, evaluate, evaluation_seeds
from postbc.nn import Generators, make_generators, randn
from postbc.policies import DiffusionConfig, DiffusionPolicy, NormalizationTensors

S, T, A = 3, 4, 2


class Toy(VectorEnv):
    """A point on a plane: x += action, successful within 0.5 of the origin. The seed decides where it starts."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012
    task = "Toy"

    def __init__(self, num_envs: int, horizon: int = 18, observation_dim: int = S, log: list[Any] | None = None) -> None:
        self.num_envs, self.horizon, self.log = num_envs, horizon, log
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32)
        self.single_action_space = spaces.Box(-1, 1, (T, A), np.float32)
        self.x, self.t = np.zeros((num_envs, A)), np.zeros(num_envs, int)
        self.live, self.over = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        self.closed_once = False

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        assert options is not None
        for i in np.flatnonzero(options["reset_mask"]):
            self.x[i] = np.random.default_rng(int(options["seeds"][i])).uniform(-3, 3, A)
            self.t[i], self.live[i], self.over[i] = 0, True, False
            if self.log is not None:
                self.log.append((int(i), int(options["seeds"][i])))
        return self.observation(), {}

    def observation(self) -> np.ndarray:
        return np.column_stack([self.x, self.t]).astype(np.float32)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        assert actions.shape == (self.num_envs, T, A)
        was = self.live.copy()  # an ended environment waits
        taken = np.where(was, np.minimum(T, self.horizon - self.t), 0)
        hits = np.zeros((self.num_envs, T), bool)
        for k in range(T):
            on = k < taken
            self.x[on] += actions[on, k]
            hits[:, k] = on & (np.linalg.norm(self.x, axis=1) < 0.5)
        self.t += taken
        whole = hits.all(1)
        self.over = np.where(was, whole, self.over)
        truncated = (self.t >= self.horizon) & ~self.over
        self.live = ~(self.over | truncated)
        info = {
            "success": hits.any(1), "chunk_success": whole, "num_steps": taken, "step_rewards": hits.astype(np.float32),
            "diverged": np.zeros(self.num_envs, bool),
        }  # fmt: skip
        return self.observation(), hits.sum(1).astype(np.float32), self.over, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        self.closed_once = True


class Homing:
    """Goes to the origin over a chunk, with noise; member m is `clumsiness[m]` noisy. Raw units."""

    observation_dim, chunk, action_dim = S, T, A

    def __init__(self, clumsiness: Sequence[float]) -> None:
        self.clumsiness, self.members = clumsiness, len(clumsiness)

    def act(self, observation: Tensor, generators: Generators) -> Tensor:
        assert observation.shape[0] == self.members
        assert torch.is_inference_mode_enabled()
        noise = randn(generators, observation.shape[1], T, A) * torch.tensor(self.clumsiness).view(-1, 1, 1, 1)
        return -observation[:, :, None, :2] / torch.tensor([2.0, 2.0, 1e9, 1e9]).view(T, 1) + noise


def by_hand(clumsiness: float, seed: int, episodes: int, n: int, horizon: int = 18) -> list[tuple[bool, bool, int, int | None]]:
    """One environment after another, with the draws that `evaluate` documents."""
    found: dict[int, tuple[bool, bool, int, int | None]] = {}
    generators = make_generators([seed], 7_000)
    index, t = list(range(n)), [0] * n
    seeds = evaluation_seeds(episodes)
    x = [np.random.default_rng(int(seeds[i])).uniform(-3, 3, A) for i in range(n)]
    first: list[int | None] = [None] * n
    while len(found) < episodes:
        noise = randn(generators, n, T, A)[0].double().numpy() * clumsiness
        for j in range(n):
            start = np.float32(x[j])
            plan = (-start[None] / np.array([[2.0], [2.0], [1e9], [1e9]], np.float32)) + np.float32(noise[j])
            hits = []
            for k in range(min(T, horizon - t[j])):
                x[j] = x[j] + plan[k]
                t[j] += 1
                hits.append(bool(np.linalg.norm(x[j]) < 0.5))
                if hits[-1] and first[j] is None:
                    first[j] = t[j]
            whole = len(hits) == T and all(hits)
            if whole or t[j] >= horizon:
                if index[j] < episodes:
                    found[index[j]] = (first[j] is not None, whole, t[j], first[j])
                index[j] += n
                x[j] = np.random.default_rng(int(seeds[min(index[j], episodes - 1)])).uniform(-3, 3, A)
                t[j], first[j] = 0, None
    return [found[i] for i in range(episodes)]


def run(clumsiness: Sequence[float], **options: Any) -> Evaluation:
    return evaluate(Homing(clumsiness), Toy, progress=False, **{"episodes": 23, "envs_per_member": 5, **options})


def test_episodes_equal_those_computed_by_hand() -> None:
    result = run([0.02, 0.4], policy_seeds=[3, 11])
    assert result.members == 2
    for m, (clumsiness, seed) in enumerate([(0.02, 3), (0.4, 11)]):
        mine = [e for e in result.episodes if e.member == m]
        assert [e.episode_seed for e in mine] == evaluation_seeds(23).tolist()
        assert {e.seed for e in mine} == {seed}
        found = [(e.success, e.chunk_success, e.steps, e.first_success_step) for e in mine]
        assert found == by_hand(clumsiness, seed, 23, 5)
    assert 0 < result.chunk_success_rate[1] < result.success_rate[1]  # the two definitions differ here
    assert result.success_rate[0] == 1


def test_a_member_alone_and_beside_others() -> None:
    together, alone = run([0.02, 0.4, 0.8], policy_seeds=[5, 6, 7]), run([0.4], policy_seeds=[6])
    mine = [e for e in together.episodes if e.member == 1]
    assert [(e.episode_seed, e.steps, e.success, e.total_reward) for e in mine] == [
        (e.episode_seed, e.steps, e.success, e.total_reward) for e in alone.episodes
    ]
    assert run([0.4], policy_seeds=[6]) == alone  # and again
    assert run([0.4], policy_seeds=[8]) != alone


def test_a_diffusion_policy_alone_and_beside_others() -> None:
    low = np.array([-3.0, -3.0, 0.0])
    normalization = Normalization(low, np.array([3.0, 3.0, 18.0]), np.array([-1.0, -2.0]), np.array([1.0, 0.0]))
    config = DiffusionConfig(chunk=T, hidden=16, denoising_steps=10, inference_steps=3)
    policy = DiffusionPolicy(config, S, A, [1, 2, 3], make_generators([1, 2, 3]), [normalization])
    options: dict[str, Any] = {"episodes": 7, "envs_per_member": 3, "progress": False, "record_actions": True}
    together = evaluate(PolicyActor(policy), Toy, **options)
    alone = evaluate(PolicyActor(policy.select([2])), Toy, **options)
    assert {e.seed for e in alone.episodes} == {3}
    for seed in evaluation_seeds(7).tolist():
        # the bound of the clamp in raw units shows that actions were un-normalised: [-1, 1] and [-2, 0]
        np.testing.assert_allclose(together.actions[2, seed], alone.actions[0, seed], atol=1e-5)
        assert together.actions[2, seed][:, 1].max() <= 1e-5
        assert together.actions[2, seed].min() >= -2.00001


def test_policy_actor_normalises_both_ways() -> None:
    class Echo:
        members, observation_dim, chunk, action_dim = 1, 2, 1, 2

        def loss(self, observation: Tensor, chunk: Tensor, generators: Generators) -> Tensor:
            raise NotImplementedError

        def sample(self, observation: Tensor, noise: Tensor | None = None, generators: Generators | None = None) -> Tensor:
            assert generators is not None
            return observation[:, :, None]

    normalization = Normalization(np.array([0.0, 10.0]), np.array([2.0, 20.0]), np.array([-1.0, 0.0]), np.array([1.0, 5.0]))
    actor = PolicyActor(Echo(), NormalizationTensors([normalization], 1))
    out = actor.act(torch.tensor([[[1.0, 20.0]]]), make_generators([0]))
    torch.testing.assert_close(out, torch.tensor([[[[0.0, 5.0]]]]), atol=1e-4, rtol=0)


def test_recorded_actions_replay_the_episode() -> None:
    result = run([0.4], record_actions=True)
    for e in result.episodes:
        actions = result.actions[0, e.episode_seed]
        assert actions.shape == (e.steps, A)
        x = np.random.default_rng(e.episode_seed).uniform(-3, 3, A) + np.cumsum(actions.astype(float), 0)
        hits = np.flatnonzero(np.linalg.norm(x, axis=1) < 0.5)
        assert (hits[0] + 1 if len(hits) else None) == e.first_success_step


def test_seeds_are_shared_disjoint_from_training_and_checked() -> None:
    log: list[Any] = []
    evaluate(Homing([0.1, 0.1]), lambda n: Toy(n, log=log), episodes=6, envs_per_member=4, progress=False)
    for m in (0, 1):
        mine = {seed for i, seed in log if i // 4 == m}
        assert mine == set(range(EVALUATION_SEED, EVALUATION_SEED + 6))
    with pytest.raises(ValueError, match="evaluation seeds"):
        evaluation_seeds(10, seed=5)
    with pytest.raises(InputError, match="at least one episode"):
        evaluation_seeds(0)
    assert run([0.4], seed=EVALUATION_SEED + 1000) != run([0.4])


def test_fewer_episodes_than_environments_and_closing() -> None:
    made: list[Toy] = []

    def make(n: int) -> Toy:
        made.append(Toy(n))
        return made[-1]

    assert len(evaluate(Homing([0.1]), make, episodes=3, envs_per_member=10, progress=False).episodes) == 3
    assert made[0].num_envs == 3
    assert made[0].closed_once


def test_wrong_sizes_are_input_errors() -> None:
    with pytest.raises(InputError, match="observation size"):
        evaluate(Homing([0.1]), lambda n: Toy(n, observation_dim=23), episodes=2, progress=False)
    same_step = Toy(2)
    same_step.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    with pytest.raises(ValueError, match="autoreset"):
        evaluate(Homing([0.1]), lambda n: same_step, episodes=2, progress=False)


def test_file_round_trip(tmp_path: Path) -> None:
    result = run([0.02, 0.4])
    result.save(tmp_path / "episodes.jsonl")
    loaded = Evaluation.load(tmp_path / "episodes.jsonl")
    assert loaded == result
    table = loaded.summary()
    assert [row["episodes"] for row in table] == [23, 23]
    assert table[1]["success"] == pytest.approx(np.mean([e[0] for e in by_hand(0.4, 1, 23, 5)]))
    assert table[1]["success_interval"][0] <= table[1]["success"] <= table[1]["success_interval"][1]
    (tmp_path / "broken.jsonl").write_text('{"member": 0}\n')
    with pytest.raises(InputError, match="line 1"):
        Evaluation.load(tmp_path / "broken.jsonl")
    with pytest.raises(InputError, match="no such file"):
        Evaluation.load(tmp_path / "none.jsonl")
