"""DSRL's loop on the toy: it learns, counts, evaluates at milestones, does not mix seeds, and survives SIGKILL bit for bit."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kills import in_a_process, kill_and_resume
from postbc.errors import InputError
from postbc.finetuning.dsrl import DSRLActor, DSRLConfig
from postbc.finetuning.dsrl_training import DSRLTrainer, DSRLTraining, chunk_returns, finetune_dsrl, true_next
from postbc.nn import make_generators, randn
from postbc.runs import load_tree
from toy import PointReach, ToyPolicy

CONFIG = DSRLConfig(
    variant="sac",
    hidden=32,
    layers=2,
    lr=1e-3,
    batch_size=64,
    utd=4,
    first_temperature=0.02,
    noise_critic_steps=4,
    discount=0.97,
)
TRAINING = DSRLTraining(
    budget_env_steps=1200, initial_steps=200, eval_every=500, eval_episodes=20, num_envs=3, log_every=20, checkpoint_seconds=1e9
)


def make_evaluation_env(n: int) -> PointReach:
    return PointReach(n, terminate_on="chunk_success", autoreset="disabled")


def finetune(
    directory: Path, seeds: tuple[int, ...] = (0, 3), config: DSRLConfig = CONFIG, **changes: Any
) -> list[dict[str, Any]]:
    training = replace(TRAINING, **changes)
    finetune_dsrl(
        ToyPolicy(seeds), directory, config, training, task="PointReach", resume=True, make_env=PointReach,
        make_evaluation_env=make_evaluation_env,
    )  # fmt: skip
    return json.loads((directory / "results.json").read_text())  # type: ignore[no-any-return]


# -- pieces --------------------------------------------------------------------------------------------------------------------
def test_chunk_rewards_and_discounts_by_hand() -> None:
    info = {"num_steps": np.array([4, 2]), "step_rewards": np.array([[-1, -1, -1, -1], [-1, 0, 0, 0]])}
    reward = np.array([-4.0, -1.0])

    def returns(**rules: Any) -> list[list[float]]:
        return [np.asarray(x).tolist() for x in chunk_returns(reward, info, 4, 0.5, replace(TRAINING, **rules))]

    assert returns() == [[-4, -1], [0.5, 0.5], [4, 2]]
    assert returns(chunk_reward="discounted") == [[-1.875, -1], [0.5, 0.5], [4, 2]]
    assert returns(chunk_discount="per_step") == [[-4, -1], [0.5**4, 0.25], [4, 2]]


def test_the_next_observation_of_an_ended_episode_is_its_own_last() -> None:
    final = np.array([None, np.array([7.0, 7.0])], object)
    following = true_next(np.zeros((2, 2), np.float32), {"final_obs": final, "_final_obs": np.array([False, True])})
    assert following.tolist() == [[0, 0], [7, 7]]


@pytest.mark.parametrize("time_limit", ["bootstrap", "terminal"])
def test_truncation_is_not_termination(time_limit: Any) -> None:
    """Every transition of the replay is checked against what the environment must have done."""
    training = replace(TRAINING, time_limit=time_limit, num_envs=5, initial_steps=10**6)
    env = PointReach(10, horizon=12)
    trainer = DSRLTrainer(ToyPolicy((0, 1), drift=1.0), env, replace(CONFIG, variant="na"), training, (0, 1))
    goals_kept, stopped, truncated = 0, 0, 0
    for _ in range(60):
        age = env.steps.copy()
        trainer.step()
        rows = trainer.replay.batch(torch.arange(len(trainer.replay) - 5, len(trainer.replay)).expand(2, -1))
        for i in range(10):
            m, j = divmod(i, 5)
            s, chunk, after = rows.observation[m, j], rows.action[m, j].view(2, 2), rows.next_observation[m, j]
            torch.testing.assert_close(s[2:], after[2:])  # the goal is the same: never the next episode's observation
            goals_kept += 1
            path = s[:2] + 0.1 * chunk.cumsum(0)
            reached = (path - s[2:]).norm(dim=1) < 0.12
            at_limit = age[i] + 2 >= 12 and not reached.any()
            expected = path[int(reached.int().argmax())] if reached.any() else path[-1]
            torch.testing.assert_close(after[:2], expected, atol=1e-5, rtol=0)
            over = bool(reached.any()) or (at_limit and time_limit == "terminal")
            assert (float(rows.discount[m, j]) == 0.0) == over
            assert float(rows.reward[m, j]) == (-2.0 if not reached.any() else -float(reached.int().argmax()))
            stopped, truncated = stopped + int(reached.any()), truncated + int(at_limit)
    assert goals_kept == 600
    assert stopped > 5
    assert truncated > 20


class CountingEnv(PointReach):
    """Counts sub-steps by itself."""

    executed = 0

    def step(self, actions: np.ndarray) -> Any:
        before = self.steps.copy()
        result = super().step(actions)
        ended = result[2] | result[3]
        CountingEnv.executed += int(np.where(ended, 0, self.steps - before).sum() + result[4]["num_steps"][ended].sum())
        return result


def test_environment_steps_are_counted_from_the_first_rollout_on() -> None:
    CountingEnv.executed = 0
    trainer = DSRLTrainer(ToyPolicy((0, 1), drift=2.0), CountingEnv(6), CONFIG, TRAINING, (0, 1))
    for _ in range(50):
        trainer.step()
    assert trainer.counts["env_steps"].sum() == CountingEnv.executed
    assert CountingEnv.executed < 50 * 6 * 2  # successes cut chunks short
    assert trainer.initial_vector_steps == 34  # 200 / (3·2), rounded up


def test_updates_begin_after_the_initial_rollouts() -> None:
    trainer = DSRLTrainer(ToyPolicy((0,)), PointReach(3), CONFIG, TRAINING, (0,))
    first = {k: v.clone() for k, v in trainer.agent.networks.state_dict().items()}
    for _ in range(trainer.initial_vector_steps):
        assert trainer.step() == {}
    assert all(torch.equal(v, first[k]) for k, v in trainer.agent.networks.state_dict().items())
    info = trainer.step()
    assert {"critic/loss", "actor/loss", "temperature/value"} <= set(info)


# -- runs ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["sac", "na"])
def test_dsrl_learns_the_toy(tmp_path: Path, variant: Any) -> None:
    config = replace(CONFIG, variant=variant, hidden=64, batch_size=128)
    budget = {"sac": 6000, "na": 9000}[
        variant
    ]  # na must distil before its actor sees anything: it starts later, then is as quick
    results = finetune(
        tmp_path, (0,), config, budget_env_steps=budget, initial_steps=600, eval_every=3000, eval_episodes=60, num_envs=4
    )
    (result,) = results
    assert result["finetuner"] == f"dsrl-{variant}"
    assert result["success_before"] < 0.3
    assert result["success_after"] > result["success_before"] + 0.3
    assert [round(step, -3) for step, _ in result["curve"]] == list(range(0, budget + 1, 3000))
    assert result["curve"][0][1] == result["success_before"]
    assert result["curve"][-1][1] == result["success_after"]
    actor = DSRLActor.load(tmp_path, ToyPolicy((0,)))
    assert actor.act(randn(make_generators([0]), 3, 4), make_generators([1])).shape == (1, 3, 2, 2)


def test_a_seed_alone_equals_the_seed_beside_others(tmp_path: Path) -> None:
    """Parameters equal up to rounding (matrix products of another shape), which a short run does not amplify; episodes the same."""
    together = finetune(tmp_path / "a", (0, 3), budget_env_steps=400, eval_every=300)
    alone = finetune(tmp_path / "b", (3,), budget_env_steps=400, eval_every=300)
    assert [r["seed"] for r in together] == [0, 3]
    assert together[1]["curve"] == alone[0]["curve"]
    a, b = (load_tree(tmp_path / d / "agent.safetensors")["actor"] for d in "ab")
    for name, value in b.items():
        torch.testing.assert_close(a[name][1:], value, atol=1e-4, rtol=1e-3)


def test_a_finished_run_is_only_loaded_and_another_is_refused(tmp_path: Path) -> None:
    finetune(tmp_path, (0,), budget_env_steps=300, eval_episodes=3)
    stamp = (tmp_path / "agent.safetensors").stat().st_mtime_ns
    finetune(tmp_path, (0,), budget_env_steps=300, eval_episodes=3)
    assert (tmp_path / "agent.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="another configuration"):
        finetune(tmp_path, (0,), budget_env_steps=301, eval_episodes=3)


class OtherEnv(PointReach):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.single_observation_space = type(self.single_observation_space)(-1, 1, (9,))


class OfCan(ToyPolicy):
    def __init__(self) -> None:
        super().__init__()
        self.about = {"task": "PickPlaceCan"}


class Stochastic(ToyPolicy):
    class config:
        sampler = "ddpm"


def refusals() -> list[Any]:
    return [
        (
            lambda d: finetune_dsrl(ToyPolicy(), d, make_env=OtherEnv, make_evaluation_env=OtherEnv),
            ("observation_dim", "found: 4", "9"),
        ),
        (lambda d: finetune_dsrl(ToyPolicy((0, 1)), d, seeds=[7], make_env=PointReach), ("seeds", "found: 7", "0, 1")),
        (lambda d: finetune_dsrl(Stochastic(), d, make_env=PointReach), ("sampler", "found: ddpm", "ddim")),
        (lambda d: finetune_dsrl(OfCan(), d, task="Lift", source="p.safetensors"), ("p.safetensors", "Can", "Lift")),
    ]


@pytest.mark.parametrize("case", range(4))
def test_what_cannot_be_finetuned_is_refused_and_nothing_is_written(tmp_path: Path, case: int) -> None:
    call, words = refusals()[case]
    if case == 3:
        pytest.importorskip("robosuite")
    with pytest.raises(InputError) as error:
        call(tmp_path / "run")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run").exists()


# -- SIGKILL -------------------------------------------------------------------------------------------------------------------
def stage(directory: Path, variant: str) -> None:
    config = replace(CONFIG, variant=variant, utd=2, noise_critic_steps=2, hidden=16)  # type: ignore[arg-type]
    finetune(directory, (0, 3), config, checkpoint_seconds=0.0, eval_episodes=10, budget_env_steps=900)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("variant", ["sac", "na"])
def test_twenty_kills_change_nothing(tmp_path: Path, variant: str) -> None:
    in_a_process(__file__, tmp_path, variant)
    for name in ("agent.safetensors", "metrics.csv"):
        assert (tmp_path / "reference" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    curves = [[r["curve"] for r in json.loads((tmp_path / d / "results.json").read_text())] for d in ("reference", "killed")]
    assert curves[0] == curves[1]


if __name__ == "__main__":
    kill_and_resume(lambda directory: stage(directory, sys.argv[2]), Path(sys.argv[1]), sys.argv[2])
