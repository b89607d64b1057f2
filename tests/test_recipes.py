"""A whole experiment by name, on the real simulator at a tiny size: demonstrations to report, resumed, reported on."""

import json
from dataclasses import replace

import pytest
import yaml

from postbc import cli
from postbc.errors import InputError
from postbc.experiments import recipes
from postbc.experiments.jobs import run_jobs
from postbc.experiments.recipes import RECIPES, run_recipe
from postbc.finetuning.best_of_n import BestOfNConfig
from postbc.finetuning.dsrl import DSRLConfig
from postbc.finetuning.dsrl_training import DSRLTraining
from postbc.finetuning.iql import IQLConfig
from postbc.policies.diffusion import DiffusionConfig
from postbc.posterior import EnsembleConfig
from postbc.pretraining import PretrainingConfig


def tiny(output, **values):
    base = recipes.Recipe(
        output, collect_num=6, num_trajectories=3, seeds=(0, 1), ensemble=EnsembleConfig(3, 16, steps=10, batch_size=16),
        policy=DiffusionConfig(hidden=16, denoising_steps=10, inference_steps=2),
        pretraining=PretrainingConfig(steps=20, batch_size=16, posterior_weight=0.5),
        dsrl=DSRLConfig("sac", hidden=16, utd=1, batch_size=16),
        dsrl_training=DSRLTraining(
            budget_env_steps=240, num_envs=1, initial_steps=80, eval_every=10_000
        ),
        best_of_n=BestOfNConfig(episodes=2, samples=3), iql=IQLConfig(steps=20), episodes=2, horizon=40, envs_per_member=2,
    )  # fmt: skip
    return replace(base, **values)


@pytest.mark.simulator
def test_from_demonstrations_to_report_and_again(tmp_path, capsys):
    report = run_recipe(tiny(tmp_path / "x", jobs=2))
    entries = json.loads((report / "summary.json").read_text())
    assert {(e["pretraining"], e["finetuner"]) for e in entries} == {
        (m, f) for m in ("bc", "sigma-bc", "postbc") for f in ("dsrl-sac", "best-of-n")
    }
    assert len(entries) == 12
    required = {
        "task", "data", "finetuner", "pretraining", "seed", "demonstrations", "posterior_weight", "sigma", "budget_env_steps",
        "episodes", "success_before", "success_after", "curve", "wall_clock_s", "command", "commit",
    }  # fmt: skip
    for entry in entries:
        assert required <= set(entry)
        assert entry["task"] == "Lift"
        assert entry["demonstrations"] == 3
        assert entry["curve"][0] == [0, entry["success_before"]]
        assert (entry["posterior_weight"] is not None) == (entry["pretraining"] == "postbc")
    # the same pretrained policy on the same episodes is the same score, whoever finetunes it
    before = {(e["pretraining"], e["seed"]): e["success_before"] for e in entries}
    assert all(before[e["pretraining"], e["seed"]] == e["success_before"] for e in entries)
    assert "<html" in (report / "report.html").read_text()
    stamp = (tmp_path / "x/dsrl/postbc/results.json").stat().st_mtime_ns
    run_recipe(tiny(tmp_path / "x", jobs=1))  # all is done: nothing is run again
    assert (tmp_path / "x/dsrl/postbc/results.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="another configuration"):
        run_recipe(tiny(tmp_path / "x", num_trajectories=4))


def test_square_needs_a_file(tmp_path):
    with pytest.raises(InputError, match="no scripted operators"):
        run_recipe(tiny(tmp_path / "x", task="Square"))


def test_the_papers_numbers():
    lift = RECIPES["paper-lift-dsrl"]
    assert (lift.num_trajectories, lift.ensemble.ensemble_size, lift.ensemble_epochs, lift.pretraining_epochs) == (
        5,
        100,
        10_000,
        3000,
    )
    assert (lift.policy.hidden, lift.policy.chunk, lift.policy.inference_steps, lift.policy.sampler) == (512, 4, 8, "ddim")
    assert (lift.dsrl.hidden, lift.dsrl.utd, lift.sigma_bc_utd, lift.dsrl.noise_critic_steps) == (2048, 20, 10, 20)
    assert (lift.dsrl.discount, lift.dsrl.action_magnitude, lift.dsrl_training.initial_steps) == (0.99, 1.5, 24_000)
    square = RECIPES["paper-square-dsrl"]
    assert (square.num_trajectories, square.policy.hidden, square.dsrl.discount) == (30, 1024, 0.999)
    assert (square.pretraining.sigma, square.dsrl.noise_critic_steps, square.dsrl_training.initial_steps) == (0.05, 10, 32_000)
    can = RECIPES["paper-can-dsrl"]
    assert (can.num_trajectories, can.pretraining.posterior_weight, can.ensemble_epochs) == (10, 0.5, 6000)
    best = RECIPES["paper-lift-best-of-n"]
    assert (best.num_trajectories, best.policy.chunk, best.policy.sampler, best.iql.steps) == (20, 1, "ddpm", 2_000_000)
    assert (best.iql.discount, best.iql.expectile, best.sigma_bc_expectile, best.iql.layer_norm) == (0.999, 0.5, 0.7, True)
    assert RECIPES["paper-lift-best-of-n-2000"].pretraining.posterior_weight == 2
    assert RECIPES["paper-can-best-of-n"].pretraining.sigma == 0.025
    assert not RECIPES["paper-square-best-of-n"].iql.layer_norm


def test_recipes_are_overridden_on_the_command_line():
    recipe = cli.parse("run", ["lift-laptop", "--output", "o", "--seeds", "3", "4", "--dsrl.utd", "2"])
    assert (str(recipe.output), recipe.seeds, recipe.dsrl.utd) == ("o", (3, 4), 2)
    assert recipe.iql == RECIPES["lift-laptop"].iql


def fine(path):
    path.write_text("done")


def wrong(path):
    raise InputError("This is wrong.", file=path)


def broken(path):
    raise RuntimeError("bug")


def test_jobs_run_apart_and_their_errors_come_back(tmp_path):
    run_jobs({"a": (fine, (tmp_path / "a",)), "b": (fine, (tmp_path / "b",))}, 2, tmp_path / "logs")
    assert (tmp_path / "b").read_text() == "done"
    with pytest.raises(InputError, match="This is wrong"):
        run_jobs({"a": (fine, (tmp_path / "c",)), "b": (wrong, (tmp_path / "b",))}, 2, tmp_path / "logs")
    assert (tmp_path / "c").exists()
    with pytest.raises(RuntimeError, match=r"exit status 1.*b\.log"):
        run_jobs({"a": (fine, (tmp_path / "c",)), "b": (broken, (tmp_path / "b",))}, 2, tmp_path / "logs")
    assert "RuntimeError: bug" in (tmp_path / "logs/b.log").read_text()


def test_the_recorded_recipe_is_readable(tmp_path):
    with pytest.raises(InputError):
        run_recipe(tiny(tmp_path / "x", demonstrations=tmp_path / "none.hdf5"))
    assert yaml.safe_load((tmp_path / "x/config.yaml").read_text())["num_trajectories"] == 3
