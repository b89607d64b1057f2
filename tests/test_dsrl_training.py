"""DSRL's loop on the toy: it learns, counts, evaluates, stores the right next states, resumes bit for bit, refuses what cannot work."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kills import in_a_process, kill_and_resume, kill_at_every_operation
from mutations import mutate
from postbc.agents.base import PolicyAgent
from postbc.agents.dppo import DPPO
from postbc.agents.dsrl import DSRL, DSRLAgent, DSRLConfig
from postbc.agents.networks import adam, descend
from postbc.agents.residual import Residual
from postbc.environments.chunk import ChunkStep
from postbc.errors import InputError, NotFiniteError
from postbc.evaluation import Evaluation, evaluate
from postbc.files import first_not_finite, load_tree, save_tree
from postbc.policies.base import About
from postbc.runs import Checkpoints
from postbc.schemas import parse
from postbc.seeding import BEST_SEED, EVALUATION_SEED, make_generator
from postbc.stages.dppo import FinetuneDPPO
from postbc.stages.dsrl import FinetuneDSRL
from postbc.stages.residual import FinetuneResidual
from postbc.training import online as module
from postbc.training.dsrl import finetune_dsrl
from postbc.training.online import Online, OnlineConfig, chunk_returns
from postbc.training.results import Result, read_result
from toy import PointReach, ToyPolicy, environment, stopped

CONFIG = DSRLConfig(
    variant="sac", hidden=16, layers=2, lr=1e-3, batch_size=32, utd=2, init_temperature=0.02, noise_critic_grad_steps=2, discount=0.97
)  # fmt: skip
TRAINING = OnlineConfig(
    budget_env_steps=600, initial_steps=200, eval_every=250, eval_episodes=20, num_envs=3, log_every=20, checkpoint_seconds=1e9
)


def finetune(
    directory: Path, policy: Any = None, config: DSRLConfig = CONFIG, where: Any = None, seed: int = 3, **changes: Any
) -> Result:
    finetune_dsrl(
        policy or ToyPolicy(seed),
        where or environment(),
        directory,
        config,
        replace(TRAINING, **changes),
        seed=seed,
        resume=True,
    )
    return read_result(directory)


def online(policy: Any = None, env: Any = None, config: DSRLConfig = CONFIG, seed: int = 0, **changes: Any) -> Online:
    training = replace(TRAINING, **changes)
    learner = DSRL(config, policy or ToyPolicy(), make_generator(seed, "online/initialisation"))
    return Online(learner, env or PointReach(training.num_envs), training, seed)


# -- pieces --------------------------------------------------------------------------------------------------------------------
def test_chunk_rewards_and_discounts_by_hand() -> None:
    successes = np.array([[False] * 4, [False, True, False, False]])
    none = np.zeros(2, bool)
    step = ChunkStep({}, np.array([[1.0, 2, 3, 4], [5, 6, 0, 0]]), successes, np.array([4, 2]), none, none, none)

    def returns(**rules: Any) -> list[list[float]]:
        return [x.tolist() for x in chunk_returns(step, 0.5, replace(TRAINING, **rules))]

    assert returns() == [[-4, -1], [0.5, 0.5]]
    assert returns(chunk_reward="discounted") == [[-1.875, -1], [0.5, 0.5]]
    assert returns(chunk_discount="per_step") == [[-4, -1], [0.5**4, 0.25]]
    assert returns(reward="sparse") == [[0, 1], [0.5, 0.5]]
    assert returns(reward="environment") == [[10, 11], [0.5, 0.5]]


@pytest.mark.parametrize("time_limit", ["bootstrap", "terminal"])
def test_truncation_is_not_termination(time_limit: Any) -> None:
    """Every transition of the replay is checked against what the environment must have done."""
    env = PointReach(10, horizon=12)
    trainer = online(
        ToyPolicy(drift=1.0), env, replace(CONFIG, variant="na"), num_envs=10, time_limit=time_limit, initial_steps=10**6,
        budget_env_steps=10**7,
    )  # fmt: skip
    kept, stopped, truncated = 0, 0, 0
    for _ in range(60):
        age = env.steps.copy()
        trainer.step()
        rows = trainer.memory.batch(torch.arange(len(trainer.memory) - 10, len(trainer.memory)))
        for i in range(10):
            s, chunk, after = rows.features[i], rows.action[i].view(2, 2), rows.next_features[i]
            torch.testing.assert_close(s[2:], after[2:])  # the goal is the same: never the next episode's observation
            kept += 1
            path = s[:2] + 0.1 * chunk.cumsum(0)
            reached = (path - s[2:]).norm(dim=1) < 0.12
            at_limit = age[i] + 2 >= 12 and not reached.any()
            expected = path[int(reached.int().argmax())] if reached.any() else path[-1]
            torch.testing.assert_close(after[:2], expected, atol=1e-5, rtol=0)
            over = bool(reached.any()) or (at_limit and time_limit == "terminal")
            assert (float(rows.discount[i]) == 0.0) == over
            assert float(rows.reward[i]) == (-2.0 if not reached.any() else -float(reached.int().argmax()))
            stopped, truncated = stopped + int(reached.any()), truncated + int(at_limit)
        torch.testing.assert_close(trainer.state, torch.as_tensor(env.observation()["state"]), atol=1e-5, rtol=0)
    assert kept == 600
    assert stopped > 5
    assert truncated > 20


class CountingEnv(PointReach):
    """Counts executed actions by itself, and keeps the seeds of its episodes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.executed, self.asked = 0, []  # type: ignore[var-annotated]

    def reset(self, seeds: Any, mask: np.ndarray | None = None) -> Any:
        self.asked += [int(s) for s, on in zip(seeds, np.ones(self.num_envs, bool) if mask is None else mask) if on]
        return super().reset(seeds, mask)

    def step(self, chunks: np.ndarray) -> Any:
        before = self.steps.copy()
        result = super().step(chunks)
        self.executed += int((self.steps - before).sum())
        return result


def test_environment_steps_are_counted_as_they_are_executed() -> None:
    env = CountingEnv(6)
    trainer = online(ToyPolicy(drift=2.0), env, num_envs=6, budget_env_steps=10**6, initial_steps=10**5)
    for _ in range(50):
        trainer.step()
    assert trainer.env_steps == env.executed
    assert env.executed < 50 * 6 * 2  # successes cut chunks short
    assert online().initial_vector_steps == 34  # 200 / (3·2), rounded up
    assert len(set(env.asked)) == len(env.asked) > 20  # no episode twice
    assert max(env.asked) < EVALUATION_SEED  # and none that an evaluation could have


def test_updates_begin_after_the_initial_rollouts_and_until_then_the_agent_is_the_base_policy() -> None:
    trainer = online()
    first = {k: v.clone() for k, v in trainer.learner.networks.state_dict().items()}
    while not trainer.learning:
        assert isinstance(trainer.agent(), PolicyAgent)
        assert not isinstance(trainer.agent(), DSRLAgent)
        assert trainer.step() == {}
    assert all(torch.equal(v, first[k]) for k, v in trainer.learner.networks.state_dict().items())
    assert not isinstance(trainer.agent(), DSRLAgent)  # the initial rollouts are over, but nothing has been learnt
    info = trainer.step()
    assert {"critic/loss", "actor/loss", "temperature/value"} <= set(info)
    assert isinstance(trainer.agent(), DSRLAgent)


class EncodingPolicy(ToyPolicy):
    """Features are a third number each; counts the frames that it encodes."""

    feature_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.frames = 0

    def encode(self, observation: Any) -> Tensor:
        self.frames += len(observation["state"])
        return torch.cat((observation["state"], torch.zeros(len(observation["state"]), 2)), 1)

    def sample(self, features: Tensor, noise: Tensor | None = None, generator: Any = None) -> Tensor:
        return super().sample(features[:, :4], noise, generator)


def test_a_frame_is_encoded_once_and_the_replay_holds_features() -> None:
    policy, env = EncodingPolicy(), CountingEnv(3, horizon=10)
    trainer = online(policy, env, budget_env_steps=10**6)
    for _ in range(60):
        trainer.step()
    assert policy.frames == 60 * 3 + len(env.asked)  # after each chunk, and at each episode's beginning
    assert trainer.memory.rows.shape[1] == 6 + 4 + 6 + 2


# -- runs ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["sac", pytest.param("na", marks=pytest.mark.slow)])
def test_dsrl_learns_the_toy(tmp_path: Path, variant: Any) -> None:
    options = {
        "sac": dict(lr=3e-3, tau=0.02, discount=0.9), "na": dict(lr=2e-3, tau=0.01, discount=0.95, noise_critic_grad_steps=8)
    }[variant]  # fmt: skip
    config = replace(CONFIG, variant=variant, hidden=32, batch_size=64, utd=8, **options)
    policy = ToyPolicy(drift=0.2, noise=1.0) if variant == "sac" else ToyPolicy()
    budget = {"sac": 2000, "na": 4000}[variant]
    result = finetune(
        tmp_path, policy, config, seed=0, budget_env_steps=budget, initial_steps=budget // 5, eval_every=1000, eval_episodes=60,
        num_envs=4, curve_episodes=10,
    )  # fmt: skip
    assert result.finetuner == f"dsrl-{variant}"
    assert result.success_before is not None
    assert result.success_after is not None
    assert result.success_before < 0.3
    assert result.success_after > result.success_before + 0.3
    assert [round(step, -3) for step, _ in result.curve] == list(range(0, budget + 1, 1000))
    assert result.curve[0][1] == result.success_before
    assert result.curve[-1][1] == result.success_after
    agent = DSRLAgent.load(tmp_path, policy)
    assert agent.act({"state": torch.zeros(3, 4)}, make_generator(0, "online/acting")).shape == (3, 2, 2)


#: variant -> curve, success of whole chunks, sizes of the actor's parameters: of postbc 0.1 with this seed
GOLDEN: dict[str, Any] = {
    "sac": (
        [[0, 0.2], [251, 0.2], [502, 0.2], [603, 0.2]],
        [0.15, 0.15],
        [15.526747, 4.825172, 15.943994, 0.826340, 28.840210, 2.614737, 16.049880, 0.769046, 16.541756, 0.890208],
    ),
    "na": (
        [[0, 0.2], [251, 0.15], [502, 0.25], [604, 0.25]],
        [0.15, 0.15],
        [15.705914, 4.653419, 15.871414, 0.471849, 28.896142, 2.693028, 15.898462, 0.529273, 15.705234, 0.923304],
    ),
}


@pytest.mark.parametrize("variant", ["sac", "na"])
def test_a_runs_numbers_are_those_of_the_first_house(tmp_path: Path, variant: Any) -> None:
    result = finetune(tmp_path, config=replace(CONFIG, variant=variant))
    curve, chunks, sizes = GOLDEN[variant]
    assert [list(point) for point in result.curve] == curve
    assert [result.chunk_success_before, result.chunk_success_after] == chunks
    for when, success in (("before", result.success_before), ("after", result.success_after)):
        kept = Evaluation.load(tmp_path / f"episodes_{when}.jsonl")
        assert (len(kept.episodes), kept.success_rate) == (result.episodes, success)
    actor = load_tree(tmp_path / "agent.safetensors")["parameters"]
    assert [float(p.double().abs().sum()) for p in actor.values()] == pytest.approx(sizes, abs=1e-4)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "config.yaml",
        "versions.json",
        "metrics.csv",
        "results.json",
        "agent.safetensors",
    }
    assert not list(tmp_path.glob("**/*.tmp"))
    assert not (tmp_path / "checkpoints").exists()


def test_what_is_evaluated_before_learning_is_the_base_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose evaluations fall into the initial rollouts repeats the base policy's score, and does not play it again."""
    played: list[type] = []

    def counting(agent: Any, *args: Any, **options: Any) -> Any:
        played.append(type(agent))
        return evaluate(agent, *args, **options)

    monkeypatch.setattr(module, "evaluate", counting)
    result = finetune(tmp_path, initial_steps=540, eval_every=100)
    assert len(result.curve) == 7
    assert {rate for _, rate in result.curve[:-1]} == {result.success_before}
    assert played == [PolicyAgent, DSRLAgent, DSRLAgent]  # the last: the best milestone on episodes of its own


@pytest.mark.parametrize("initial", [594, 595, 600, 10**6])
def test_a_budget_that_leaves_no_learning_is_refused(tmp_path: Path, initial: int) -> None:
    if initial == 594:  # 99 vector steps of 6; one is left
        OnlineConfig(budget_env_steps=600, initial_steps=594, num_envs=3).require_learning(2)
        return
    with pytest.raises(InputError, match=r"before learning begins[\s\S]*initial"):
        finetune(tmp_path / "run", initial_steps=initial)
    assert not (tmp_path / "run").exists()


def test_more_environments_than_evaluation_episodes(tmp_path: Path) -> None:
    result = finetune(tmp_path, eval_episodes=2, eval_envs=10)
    assert result.episodes == 2
    assert result.success_after in (0.0, 0.5, 1.0)


def test_a_finished_run_is_only_loaded_and_another_is_refused(tmp_path: Path) -> None:
    finetune(tmp_path, budget_env_steps=300, eval_episodes=3)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    finetune(tmp_path, budget_env_steps=300, eval_episodes=3)
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="another configuration"):
        finetune(tmp_path, budget_env_steps=301, eval_episodes=3)
    with pytest.raises(InputError, match="already holds a run"):
        finetune_dsrl(ToyPolicy(3), environment(), tmp_path, CONFIG, TRAINING, seed=3)
    for other in (ToyPolicy(3, drift=0.31), ToyPolicy(3, noise=0.5)):
        with pytest.raises(InputError, match=r"input of this run[\s\S]*policy"):
            finetune(tmp_path, other, budget_env_steps=300, eval_episodes=3)


class OtherEnv(PointReach):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.shapes = {"state": (9,)}


class OfCan(ToyPolicy):
    about = About(task="PickPlaceCan", facts={"environment": "PickPlaceCan"})


class Stochastic(ToyPolicy):
    def sample(self, features: Tensor, noise: Tensor | None = None, generator: Any = None) -> Tensor:
        return super().sample(features, noise) + 1e-4 * torch.randn(len(features), 2, 2)


class NeedsGenerator(ToyPolicy):
    def sample(self, features: Tensor, noise: Tensor | None = None, generator: Any = None) -> Tensor:
        if generator is None:
            raise ValueError("DDPM needs a generator")
        return super().sample(features, noise)


def other_environment() -> Any:
    return replace(environment(), make=lambda n, **options: OtherEnv(n, **options))


@pytest.mark.parametrize(
    ("policy", "where", "words"),
    [
        (ToyPolicy(), other_environment(), ("state", "policy (4,)", "environment (9,)")),
        (Stochastic(), None, ("deterministic", "differ", "ddim")),
        (NeedsGenerator(), None, ("deterministic", "DDPM needs a generator")),
        (OfCan(), None, ("does not belong", "environment", "PickPlaceCan", "PointReach")),
    ],
)
def test_what_cannot_be_finetuned_is_refused_and_nothing_is_written(
    tmp_path: Path, policy: Any, where: Any, words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as error:
        finetune(tmp_path / "run", policy, where=where)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run").exists()


# -- numbers that are not finite -------------------------------------------------------------------------------------------------
def test_a_diverging_critic_ends_the_run_with_step_and_cause_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"not finite[\s\S]*step \d+"):
        finetune(tmp_path, config=replace(CONFIG, lr=1e11, layer_norm=False, activation="relu"), log_every=1)
    assert not (tmp_path / "agent.safetensors").exists()
    assert not (tmp_path / "results.json").exists()
    for row in (tmp_path / "metrics.csv").read_text().splitlines()[1:]:
        assert "nan" not in row
        assert "inf" not in row


def test_an_agent_of_nan_is_not_played_on_and_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between rows of metrics too: the next action, checkpoint or evaluation says it."""
    trainer = online(log_every=10**6)
    while not trainer.has_learnt:
        trainer.step()
    trainer.learner.networks.actor.net[0].weight.data.fill_(math.nan)
    with pytest.raises(NotFiniteError, match=r"actions are not finite[\s\S]*environment step"):
        trainer.step()

    def poisoned(self: DSRL, *args: Any) -> Any:
        self.networks.critics.net[0].weight.data.fill_(math.inf)
        self.gradient_steps += 1
        return {}

    monkeypatch.setattr(DSRL, "learn", poisoned)
    with pytest.raises(NotFiniteError, match="diverged by environment step"):
        finetune(tmp_path)
    assert not (tmp_path / "agent.safetensors").exists()


# -- milestones ----------------------------------------------------------------------------------------------------------------
def scripted(monkeypatch: pytest.MonkeyPatch, *rates: float) -> list[int]:
    """Evaluations that say `rates` one after the other; the first episode seeds that were asked for."""
    said, asked = list(rates), list[int]()

    def evaluation(*args: Any, seed: int, **options: Any) -> Evaluation:
        asked.append(seed)
        rate = said.pop(0)
        fixed: type[Evaluation] = type("Fixed", (Evaluation,), {"success_rate": rate, "chunk_success_rate": rate})
        return fixed(())

    monkeypatch.setattr(module, "evaluate", evaluation)
    return asked


def test_the_best_milestone_is_kept_and_reported_on_episodes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(monkeypatch, 0.4, 0.5, 0.9, 0.9, 0.6, 0.8)
    result = finetune(tmp_path, initial_steps=60, eval_every=150)
    assert [rate for _, rate in result.curve] == [0.4, 0.5, 0.9, 0.9, 0.6]
    assert (result.success_before, result.success_after, result.success_best) == (0.4, 0.6, 0.8)
    assert result.best_env_steps == result.curve[2][0]  # the first of the two
    assert set(asked[:-1]) == {EVALUATION_SEED}
    assert asked[-1] == BEST_SEED
    last, best = (load_tree(tmp_path / name / "agent.safetensors")["parameters"] for name in (".", "best"))
    assert not all(torch.equal(last[name], best[name]) for name in last)


TARGET: dict[str, Any] = {"initial_steps": 60, "eval_every": 100, "eval_episodes": 40, "curve_episodes": 20, "stop_at": 0.75}


def test_a_target_stops_the_run_when_it_is_surely_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """18 of 20 is not surely above 0.75; 19 of 20 is (Wilson: 0.764), but counts only if all 40 episodes say so: 34 do not."""
    scripted(monkeypatch, 0.4, 0.9, 0.95, 0.85, 0.95, 0.95, 0.9)
    result = finetune(tmp_path, **TARGET)
    assert [rate for _, rate in result.curve] == [0.4, 0.9, 0.85, 0.95]
    assert result.success_after == 0.95
    assert (result.success_best, result.best_env_steps) == (0.9, result.curve[-1][0])
    assert result.stopped
    assert result.curve[-1][0] < result.budget_env_steps == 600
    assert "lower bound 0.835 above 0.75" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_was_killed_at_its_target_goes_on_to_its_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 0.4, 0.9, 0.95, 0.95)  # and then it dies
    with pytest.raises(IndexError):
        finetune(tmp_path, **TARGET)
    asked = scripted(monkeypatch, 0.8)
    result = finetune(tmp_path, **TARGET)
    assert asked == [BEST_SEED]
    assert len(result.curve) == 3
    assert result.stopped


def test_a_target_that_so_few_episodes_cannot_show_is_refused() -> None:
    with pytest.raises(InputError, match=r"(?s)can never show.*0\.722.*eval-episodes"):
        OnlineConfig(eval_episodes=10, stop_at=0.9)
    assert OnlineConfig(eval_episodes=40, stop_at=0.9).stop_at == 0.9


@pytest.mark.parametrize("damage", ["gone", "another"])
def test_a_lost_best_milestone_is_forgotten_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    options: dict[str, Any] = {"initial_steps": 60, "eval_every": 100, "checkpoint_seconds": 0.0}
    scripted(monkeypatch, 0.4, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    with stopped(Online, "step", 70, RuntimeError("stop")):
        finetune(tmp_path, **options)
    file = tmp_path / "best/agent.safetensors"
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-9])
    scripted(monkeypatch, *[0.6] * 7)
    result = finetune(tmp_path, **options)
    assert "is forgotten" in capsys.readouterr().err
    assert max(rate for _, rate in result.curve) == 0.9
    assert dict(result.curve)[result.best_env_steps] == 0.6  # type: ignore[index]


def test_a_fall_below_the_pretrained_policy_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, 0.8, 0.7, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    finetune(tmp_path, initial_steps=60, eval_every=100, eval_episodes=50)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("significantly less") == 1
    assert "0.20" in said
    assert "0.80" in said
    assert "Usual causes: learning from too few initial rollouts (training.initial_steps); exploration" in said
    assert "dsrl.init_temperature" in said
    assert "residual" not in said


@pytest.mark.parametrize(("learner", "options"), [(DSRL, FinetuneDSRL), (DPPO, FinetuneDPPO), (Residual, FinetuneResidual)])
def test_the_causes_of_a_fall_name_options_that_the_finetuner_has(learner: Any, options: Any, tmp_path: Path) -> None:
    made = options(tmp_path, tmp_path)
    names = [name for of_cause in learner.causes.values() for name in of_cause]
    assert names
    for name in names:
        group, option = name.split(".")
        assert hasattr(getattr(made, group), option), name
    if learner is DPPO:
        assert "training.initial_steps" not in names  # which has to be 0
    if learner is Residual:
        assert {"residual.penalty", "residual.ramp", "residual.critic_warmup"} < set(names)


# -- resuming --------------------------------------------------------------------------------------------------------------------
class Interrupted(RuntimeError):
    pass


def interrupted_after(steps: int, directory: Path, **options: Any) -> None:
    with stopped(Online, "step", steps, Interrupted("stop")):
        finetune(directory, checkpoint_seconds=0.0, **options)


def test_resuming_with_another_policy_is_refused(tmp_path: Path) -> None:
    interrupted_after(70, tmp_path)
    with pytest.raises(InputError, match=r"input of this run[\s\S]*policy"):
        finetune(tmp_path, ToyPolicy(3, drift=0.31), checkpoint_seconds=0.0)


def test_an_environment_without_states_goes_on_with_fresh_episodes_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs: list[CountingEnv] = []

    def make(n: int, **options: Any) -> CountingEnv:
        envs.append(CountingEnv(n, saves_state=False, **options))
        return envs[-1]

    where = replace(environment(), make=make)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "due", property(lambda self: True))
        interrupted_after(70, tmp_path, where=where)
    seen = {s for env in envs for s in env.asked if s < EVALUATION_SEED}
    envs.clear()
    with pytest.warns(UserWarning, match="fresh episodes"):
        result = finetune(tmp_path, where=where, checkpoint_seconds=0.0)
    assert result.success_after is not None
    fresh = [s for env in envs for s in env.asked if s < EVALUATION_SEED]
    assert len(seen) > 3
    assert not seen & set(fresh[3:])  # the first three were begun before the checkpoint was read, and abandoned


def stage(directory: Path) -> None:
    config = replace(CONFIG, variant="na", utd=1, noise_critic_grad_steps=1, batch_size=8, hidden=8)
    finetune(
        directory, config=config, checkpoint_seconds=0.0, eval_episodes=3, budget_env_steps=240, initial_steps=100, eval_every=120,
        log_every=5,
    )  # fmt: skip


IGNORED = ("results.json:wall_clock_s", "results.json:commit", "results.json:command")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["at random", "at every operation"])
def test_kills_change_nothing(tmp_path: Path, when: str) -> None:
    in_a_process(__file__, tmp_path, when)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_checkpoint_is_refused_or_ends_finite(interrupted: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    """Whoever can write a checkpoint can also write its checksum: what is inside is still not believed."""
    directory = tmp_path_factory.mktemp("changed") / "run"
    shutil.copytree(interrupted, directory)
    newest = max(directory.glob("checkpoints/*"))
    tree = load_tree(newest)
    mutate(tree["state"], data)
    for file in directory.glob("checkpoints/*"):
        file.unlink()
    save_tree(newest, tree)
    refused = ""
    try:
        stage(directory)
    except InputError as error:  # NotFiniteError too
        refused = str(error)
    assert refused == "" or not (directory / "results.json").exists()
    if not refused:
        assert first_not_finite(load_tree(directory / "agent.safetensors")) is None


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "due", property(lambda self: True))
        original = Online.step
        patch.setattr(Online, "step", lambda self: original(self) if self.vector_steps < 25 else pytest.fail("enough"))
        with pytest.raises(pytest.fail.Exception):
            stage(directory)
    return directory


def test_checkpoints_of_another_width_and_damaged_ones(interrupted: Path, tmp_path: Path) -> None:
    newest, before = sorted(interrupted.glob("checkpoints/*"), reverse=True)
    shutil.copytree(interrupted, tmp_path / "flipped")
    content = bytearray(newest.read_bytes())
    content[-9] ^= 4
    (tmp_path / "flipped/checkpoints" / newest.name).write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        stage(tmp_path / "flipped")
    shutil.copytree(interrupted, tmp_path / "whole")
    stage(tmp_path / "whole")
    a, b = (load_tree(tmp_path / d / "agent.safetensors")["parameters"] for d in ("flipped", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)  # the one before it, and then the same
    shutil.copytree(interrupted, tmp_path / "wide")
    tree = load_tree(newest)
    tree["state"]["online"]["learner"]["networks"]["log_temperature"] = torch.zeros(3)
    (tmp_path / "wide/checkpoints" / before.name).unlink()
    save_tree(tmp_path / "wide/checkpoints" / newest.name, tree)
    with pytest.raises(InputError, match=newest.name):
        stage(tmp_path / "wide")


# -- results.json ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change",
    [{"success_after": 1.5}, {"success_after": "0.5"}, {"seed": -1}, {"curve": [[0]]}, {"format": 1}, {"extra": 1},
     {"wall_clock_s": None}],
)  # fmt: skip
def test_results_are_checked_where_they_enter(tmp_path: Path, change: dict[str, Any]) -> None:
    good = dict(
        task="t", finetuner="dsrl-na", pretraining="bc", seed=0, budget_env_steps=1, episodes=1, success_before=0.0, success_after=1.0,
        chunk_success_before=0.0, chunk_success_after=1.0, curve=[[0, 0.0], [1, 1.0]], wall_clock_s=1.0, format=2,
    )  # fmt: skip
    assert parse(Result, good).curve == ((0, 0.0), (1, 1.0))
    (tmp_path / "results.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(InputError, match=next(iter(change))):
        read_result(tmp_path)


if __name__ == "__main__":
    weight = torch.zeros(1, requires_grad=True)
    descend(adam([weight], 1e-3), weight.sum())  # imports much at its first step, which the forks then have already
    if sys.argv[2] == "at random":
        kill_and_resume(stage, Path(sys.argv[1]), sys.argv[2], IGNORED)
    else:
        kill_at_every_operation(stage, Path(sys.argv[1]), IGNORED, stride=19)
