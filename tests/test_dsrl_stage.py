"""`finetune dsrl` and `finetune best-of-n`: seeds in their directories, any policy, an environment by name, resuming, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from made import save_policy
from postbc.agents.base import load_agent
from postbc.agents.best_of_n import BestOfNAgent, BestOfNConfig
from postbc.agents.dsrl import DSRLConfig
from postbc.agents.iql import IQLConfig
from postbc.errors import InputError
from postbc.schemas import plain
from postbc.stages.best_of_n import FinetuneBestOfN
from postbc.stages.best_of_n import run_seed as best_of_n
from postbc.stages.dsrl import FinetuneDSRL
from postbc.stages.dsrl import run_seed as dsrl
from postbc.stages.evaluate import Evaluate, evaluate_stage
from postbc.stages.finetuning import load_base, table
from postbc.stages.seeds import seeds_of
from postbc.training.online import OnlineConfig
from postbc.training.results import read_result

REACH = "gymnasium:reach:Reach-v0"


def pretrained(directory: Path, kind: str = "diffusion", seeds: tuple[int, ...] = (0, 2), **config: Any) -> Path:
    for seed in seeds:
        save_policy(directory / f"seed_{seed}", 4, 2, chunk=2, task="Reach-v0", kind=kind, seed=seed, **config)
    return directory


def of_dsrl(policy: Path, output: Path, **more: Any) -> FinetuneDSRL:
    return FinetuneDSRL(
        policy, output, environment=REACH,
        dsrl=DSRLConfig(variant="sac", hidden=8, layers=1, utd=1, batch_size=8),
        training=OnlineConfig(budget_env_steps=80, initial_steps=30, eval_every=40, eval_episodes=3, num_envs=2, checkpoint_seconds=0),
        **more,
    )  # fmt: skip


def of_best_of_n(policy: Path, output: Path, **more: Any) -> FinetuneBestOfN:
    return FinetuneBestOfN(
        policy, output, environment=REACH, best_of_n=BestOfNConfig(episodes=20, samples=4, eval_episodes=3, log_every=10),
        iql=IQLConfig(steps=20, hidden=(8,), batch_size=8), **more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_both_stages_with_any_policy(tmp_path: Path, kind: str) -> None:
    policy = pretrained(tmp_path / "bc", kind)
    config = of_dsrl(policy, tmp_path / "dsrl")
    assert seeds_of(config) == [0, 2]
    result = dsrl(config, 2)
    assert (result.task, result.seed, result.finetuner, result.pretraining) == (REACH, 2, "dsrl-sac", "bc")
    assert [p.name for p in (tmp_path / "dsrl").iterdir()] == ["seed_2"]
    dsrl(config, 0)  # seeds can be added later
    assert table(tmp_path / "dsrl", [0, 2]).row_count == 2
    first = best_of_n(of_best_of_n(policy, tmp_path / "n"), 0)
    assert first.rollout_episodes == 20
    again = best_of_n(
        of_best_of_n(policy, tmp_path / "again", rollouts=(tmp_path / "n",)), 0
    )  # another stage's rollouts, by seed
    assert again.rollout_success == first.rollout_success
    assert plain(again)["curve"] == plain(first)["curve"]
    for directory in ("dsrl/seed_0", "n/seed_0"):
        agent, about = load_agent(tmp_path / directory)
        assert about.seed == 0
        assert agent.act({"state": torch.zeros(3, 4)}, torch.Generator()).shape == (3, 2, 2)


def test_other_numbers_of_samples_and_another_encoder(tmp_path: Path) -> None:
    """`evaluate --samples N` plays what an agent of that N plays; `finetune best-of-n --encoder` gives the critics other features."""
    policy, other = pretrained(tmp_path / "bc", seeds=(0,)), tmp_path / "eyes"
    save_policy(other, 4, 2, chunk=2, task="Reach-v0", seed=5)
    config = of_best_of_n(policy, tmp_path / "n", encoder=other)
    best_of_n(config, 0)
    wanted = BestOfNAgent.load(tmp_path / "n/seed_0", samples=2)
    assert wanted.encoder is not None
    wanted.save(tmp_path / "two")
    for path in (tmp_path / "n", tmp_path / "two"):
        more = {"samples": 2} if path.name == "n" else {}
        evaluate_stage(Evaluate(path, tmp_path / f"of-{path.name}", environment=REACH, episodes=5, videos=0, **more), 0)
    first, second = ((tmp_path / f"of-{name}/seed_0/episodes.jsonl").read_text() for name in ("n", "two"))
    assert first == second
    with pytest.raises(InputError, match="Only a Best-of-N agent"):
        evaluate_stage(Evaluate(policy, tmp_path / "no", environment=REACH, episodes=5, videos=0, samples=2), 0)
    assert not (tmp_path / "no").exists()


def test_a_single_policy_has_its_own_seed(tmp_path: Path) -> None:
    policy = pretrained(tmp_path / "bc") / "seed_2"
    for path in (policy, policy / "policy.safetensors"):
        assert seeds_of(of_dsrl(path, tmp_path)) == [2]


def test_dsrl_samples_by_ddim_whatever_was_saved(tmp_path: Path) -> None:
    policy = pretrained(tmp_path / "bc", sampler="ddpm")
    assert load_base(policy / "seed_0").config.sampler == "ddpm"
    assert dsrl(of_dsrl(policy, tmp_path / "dsrl"), 0).success_after is not None
    agent, _ = load_agent(tmp_path / "dsrl/seed_0")
    assert agent.policy.config.sampler == "ddim"  # type: ignore[attr-defined]


def test_resuming_with_other_sampling_is_refused(tmp_path: Path) -> None:
    policy = pretrained(tmp_path / "bc")
    config = of_dsrl(policy, tmp_path / "dsrl", seeds=(0,))
    dsrl(config, 0)
    dsrl(replace(config, resume=True), 0)
    with pytest.raises(InputError, match=r"input of this run[\s\S]*policy"):
        dsrl(replace(config, resume=True, inference_steps=4), 0)
    save_policy(policy / "seed_0", 4, 2, chunk=2, task="Reach-v0", seed=0, hidden=16)  # another one under the same name
    with pytest.raises(InputError, match=r"input of this run[\s\S]*policy"):
        dsrl(replace(config, resume=True), 0)
    assert read_result(tmp_path / "dsrl/seed_0").seed == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": (7,)}, "found: 7[\\s\\S]*0, 2"),
        ({"seeds": (0, 0)}, "seeds"),
        ({"seeds": ()}, "seeds"),
        ({"environment": "gymnasium:Nowhere-v3"}, "does not know"),
        ({"environment": None}, "no such environment"),
        ({"inference_steps": 99}, "inference_steps"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    policy = pretrained(tmp_path / "bc")

    def run() -> None:
        config = replace(of_dsrl(policy, tmp_path / "dsrl"), **change)
        dsrl(config, seeds_of(config)[0])

    with pytest.raises(InputError, match=words):
        run()
    assert not (tmp_path / "dsrl").exists()


def test_the_number_of_rollout_files(tmp_path: Path) -> None:
    policy = pretrained(tmp_path / "bc")
    config = of_best_of_n(policy, tmp_path / "n", rollouts=(Path("a"), Path("b"), Path("c")))
    with pytest.raises(InputError, match=r"number of rollout files[\s\S]*1 or 2"):
        best_of_n(config, 0)
    with pytest.raises(InputError, match="no such"):
        best_of_n(replace(config, rollouts=(Path("a"), Path("b"))), 0)
    assert not (tmp_path / "n").exists()
