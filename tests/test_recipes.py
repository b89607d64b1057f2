"""Recipes: the paper's numbers, differences between methods, the command line; and a whole tiny experiment, stopped and resumed."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import made
from kills import in_a_process, kill_and_resume
from postbc.cli.run import parse_recipe as parse
from postbc.errors import InputError
from postbc.experiments import steps as recipe_steps
from postbc.experiments.checks import check as check_recipe
from postbc.experiments.layout import Layout
from postbc.experiments.recipe import Recipe, load_recipe, load_recipes, names, parse_recipe
from postbc.experiments.running import table
from postbc.experiments.summary import collect, compare_groups, group
from postbc.experiments.sweep import run_recipe
from postbc.jobs import JobError
from postbc.policies.flow import FlowConfig
from postbc.robot.labels import Labels
from postbc.robot.rollout import Control, Person
from postbc.schemas import plain
from postbc.stages.robot_rollout import RobotRollout, roll_out

REACH = {"env_name": "Reach-v0", "type": 2, "env_kwargs": {}}
TINY: dict[str, Any] = {
    "environment": "gymnasium:reach:Reach-v0", "data": {"num_trajectories": 3, "chunk": 2, "observation_keys": ["state"]},
    "seeds": [0, 1], "policy": {"hidden": 16, "denoising_steps": 10, "inference_steps": 2},
    "ensemble": {"ensemble_size": 3, "hidden": 16, "steps": 10, "batch_size": 16},
    "pretraining": {"steps": 20, "batch_size": 16, "posterior_weight": 0.5},
    "dsrl": {"variant": "sac", "hidden": 16, "layers": 1, "utd": 1, "batch_size": 16},
    "training": {"budget_env_steps": 120, "num_envs": 2, "initial_steps": 48, "eval_every": 10_000},
    "dppo": {"ft_denoising_steps": 2, "n_steps": 5, "epochs": 1, "critic_hidden": 8},
    "dppo_training": {"budget_env_steps": 40, "num_envs": 2, "eval_every": 1000},
    "residual": {"hidden": 8, "critics": 2, "utd": 2, "batch_size": 8, "critic_warmup": 2, "proposals": 2},
    "residual_training": {"budget_env_steps": 100, "num_envs": 2, "initial_steps": 20, "eval_every": 50},
    "best_of_n": {"episodes": 6, "samples": 3}, "iql": {"steps": 20, "hidden": [16], "batch_size": 16},
    "per_method": {"sigma-bc": {"dsrl.utd": 2, "iql.expectile": 0.7}}, "episodes": 4, "num_envs": 2,
}  # fmt: skip


def tiny(folder: Path, **values: Any) -> Recipe[Any]:
    data = folder / "data.hdf5"
    if not data.exists():
        made.write_demonstrations(data, environment=REACH, widths={"state": 4}, action_dim=2)
    return parse_recipe({**TINY, "demonstrations": str(data), **values})


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files, by name; what must differ between two runs left out."""
    return {
        str(p.relative_to(folder)): b""
        if p.name in ("report.html", "progress.html", "versions.json")
        or {"tensorboard", "tables"} & {*p.parts}  # tables say how long runs took
        else p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_pretraining_alone_and_then_the_rest_of_the_methods(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, finetuners=[], methods=["bc"])
    report = run_recipe(recipe, tmp_path / "x")
    assert "<html" in (report / "report.html").read_text()
    stamp = (tmp_path / "x/pretraining/bc/seed_1/policy.safetensors").stat().st_mtime_ns
    run_recipe(tiny(tmp_path, finetuners=[], methods=["bc", "postbc"], seeds=[1]), tmp_path / "x")
    assert (tmp_path / "x/pretraining/bc/seed_1/policy.safetensors").stat().st_mtime_ns == stamp
    assert not (tmp_path / "x/pretraining/postbc/seed_0").exists()
    text = (report / "report.html").read_text()
    assert "PostBC (α=0.5)" in text  # its actions are pictured
    assert "posterior standard deviation of the first action" in text
    with pytest.raises(InputError, match="another configuration"):
        run_recipe(tiny(tmp_path, finetuners=[], methods=["bc"], data={**TINY["data"], "num_trajectories": 4}), tmp_path / "x")


def test_a_whole_experiment_by_two_processes_and_again_by_one(tmp_path: Path) -> None:
    both = {
        "methods": ["postbc"], "seeds": [0], "per_method": {"postbc": {"dsrl.utd": 2}},
        "finetuners": ["best-of-n", "dsrl", "residual", "dppo"],
    }  # fmt: skip
    report = run_recipe(tiny(tmp_path, jobs=2, **both), tmp_path / "x")
    entries = json.loads((report / "summary.json").read_text())
    assert {(e["pretraining"], e["finetuner"]) for e in entries} == {
        ("postbc", f) for f in ("dsrl-sac", "best-of-n", "residual", "dppo")
    }
    for e in entries:
        assert (e["task"], e["demonstrations"], e["episodes"]) == ("gymnasium:reach:Reach-v0", 3, 4)
        assert e["curve"][0] == [0, e["success_before"]]
        same = e["success_before"] == entries[0]["success_before"]  # of the same policy on the same episodes, whoever finetunes
        assert same or e["finetuner"] == "dppo"  # which samples it by DDPM
    recorded = yaml.safe_load((tmp_path / "x/dsrl/postbc/seed_0/config.yaml").read_text())
    assert recorded["dsrl"]["utd"] == 2
    assert not (tmp_path / "x/logs").exists()
    # stopped anywhere and run again, by one process: the same files, and nothing that is done is done again
    once = files(tmp_path / "x")
    shutil.rmtree(tmp_path / "x/dsrl/postbc/seed_0")
    (tmp_path / "x/best-of-n/postbc/seed_0/results.json").unlink()
    stamp = (tmp_path / "x/pretraining/postbc/seed_0/policy.safetensors").stat().st_mtime_ns
    run_recipe(tiny(tmp_path, jobs=1, **both), tmp_path / "x")
    assert (tmp_path / "x/pretraining/postbc/seed_0/policy.safetensors").stat().st_mtime_ns == stamp
    again = files(tmp_path / "x")
    assert sorted(again) == sorted(once)
    differing = [name for name in once if again[name] != once[name]]
    assert all(Path(name).name in ("results.json", "summary.json", "results.csv") for name in differing), differing  # seconds


def test_a_closed_form_with_an_alpha_of_its_own_and_coherent_play(tmp_path: Path) -> None:
    recipe = tiny(
        tmp_path, posterior_kind="closed-form", closed_form={"layer": 1}, methods=["bc", "postbc"], seeds=[0],
        data={**TINY["data"], "num_trajectories": 5}, finetuners=["best-of-n", "dsrl", "residual", "dppo"],
        pretraining={**TINY["pretraining"], "posterior_weight": "auto"}, per_method={"postbc": {"pretraining.coherent": 2}},
    )  # fmt: skip
    report = run_recipe(recipe, tmp_path / "x")
    entries = json.loads((report / "summary.json").read_text())
    assert {(e["pretraining"], e["finetuner"]) for e in entries} == {
        (m, f) for m in ("bc", "postbc") for f in ("dsrl-sac", "best-of-n", "residual", "dppo")
    }
    where = tmp_path / "x/pretraining/postbc/seed_0"
    calibration = json.loads((where / "calibration.json").read_text())
    assert {e["posterior_weight"] for e in entries} == {None, calibration["posterior_weight"]}
    head = json.loads((where / "policy.json").read_text())
    assert head["shapes"] == {"state": [4], "posterior": [2]}
    assert calibration["reason"] in head["about"]["posterior_weight_source"]
    assert {e.get("variant") for e in entries} == {None, "closed form, coherent 2, auto"}
    page = (report / "report.html").read_text()
    assert "PostBC (closed form, coherent 2, auto)" in page
    assert "not pictured" not in page


def test_value_dice_beside_postbc(tmp_path: Path) -> None:
    """Its policy is a Gaussian one, whatever the recipe's is; the report compares it as a baseline, on the same episodes."""
    both = {"methods": ["value-dice", "postbc"], "seeds": [0], "finetuners": ["dsrl", "best-of-n"]}
    report = run_recipe(tiny(tmp_path, value_dice={"steps": 10, "hidden": 8, "batch_size": 8}, **both), tmp_path / "x")
    entries = json.loads((report / "summary.json").read_text())
    assert {(e["pretraining"], e["policy"]) for e in entries} == {("value-dice", "gaussian"), ("postbc", "diffusion")}
    pairs = compare_groups(group(collect([report])[0])[0], "success_after")
    assert {(p.setting.finetuner, p.ours.label, p.baseline.label) for p in pairs} == {
        (finetuner, "PostBC (α=0.5)", "ValueDICE") for finetuner in ("dsrl-sac", "best-of-n")
    }
    assert all(p.p_episodes is not None and p.setting.horizon == 12 for p in pairs)
    assert "PostBC (α=0.5) − ValueDICE" in (report / "report.html").read_text()
    with pytest.raises(InputError, match="sampled by a chain"):
        run_recipe(tiny(tmp_path, methods=["value-dice"], seeds=[0], finetuners=["dppo"]), tmp_path / "y")
    assert not (tmp_path / "y").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_of_the_whole_experiment_change_nothing(tmp_path: Path) -> None:
    tiny(tmp_path)  # the demonstrations
    in_a_process(__file__, tmp_path)


def killed_experiment(folder: Path, directory: Path) -> None:
    """All stages as jobs of two processes, which must die with the one that is killed: another begins where they worked."""
    directory.mkdir(exist_ok=True)
    os.chdir(directory)  # records name the stages' directories
    run_recipe(tiny(folder, jobs=2, methods=["postbc"], seeds=[0]), Path("x"))


def test_postbc_from_images_takes_the_encoder_of_bc_or_trains_its_own(tmp_path: Path) -> None:
    data, env = tmp_path / "pixels.hdf5", {**REACH, "env_name": "ReachPixels-v0"}
    made.write_demonstrations(data, environment=env, widths={"state": 4}, action_dim=2, images={"top_image": (8, 8, 3)})
    keys = {"observation_keys": [], "image_keys": ["top_image"]}
    values = {
        **TINY, "demonstrations": str(data), "environment": "gymnasium:reach:ReachPixels-v0", "data": {**TINY["data"], **keys},
        "policy": {**TINY["policy"], "encoder": {"keypoints": 4, "channels": [4]}}, "seeds": [0], "finetuners": ["best-of-n"],
    }  # fmt: skip
    report = run_recipe(parse_recipe({**values, "methods": ["postbc", "bc"]}), tmp_path / "x")
    assert (tmp_path / "x/posterior/seed_0/encoder.safetensors").exists()
    assert len(json.loads((report / "summary.json").read_text())) == 2
    with pytest.raises(InputError, match=r"(?s)by bc too.*encoder own"):
        run_recipe(parse_recipe({**values, "methods": ["postbc"]}), tmp_path / "y")
    own = {**TINY["ensemble"], "encoder": "own", "vision": {"keypoints": 4, "channels": [4]}}
    run_recipe(parse_recipe({**values, "methods": ["postbc"], "ensemble": own, "finetuners": []}), tmp_path / "z")
    assert not (tmp_path / "z/posterior/seed_0/encoder.safetensors").exists()
    assert (tmp_path / "z/evaluation/postbc/seed_0/evaluation.json").exists()


def test_a_job_that_fails_stops_no_other_and_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, real = tiny(tmp_path, methods=["bc", "sigma-bc"], seeds=[0], finetuners=["best-of-n"]), recipe_steps.pretrain_policy

    def fails(config: Any, seed: int) -> Any:
        if config.pretraining.method == "bc":
            raise RuntimeError("bug")
        return real(config, seed)

    monkeypatch.setattr(recipe_steps, "pretrain_policy", fails)
    with pytest.raises(JobError, match="bc-seed_0"):
        run_recipe(recipe, tmp_path / "x")
    assert (tmp_path / "x/best-of-n/sigma-bc/seed_0/results.json").exists()
    assert not (tmp_path / "x/best-of-n/bc").exists()
    assert "σ-BC (σ=0.1)" in (tmp_path / "x/report/report.html").read_text()
    monkeypatch.undo()
    report = run_recipe(recipe, tmp_path / "x")
    assert len(json.loads((report / "summary.json").read_text())) == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"demonstrations": "none.hdf5"}, "none.hdf5"),
        ({"demonstrations": None}, "no scripted operators"),
        ({"demonstrations": None, "environment": "postbc/PushT"}, "no scripted operators"),
        ({"demonstrations": None, "environment": "postbc/Lift", "collect_num": 2}, "collect_num"),
        ({"demonstrations": None, "environment": "postbc/Lift", "collect_operators": ["[/red]"]}, "red"),
        ({"environment": "gymnasium:Nobody-v0"}, "Nobody"),
        ({"environment": "postbc/Lift"}, "belong|environment"),
        ({"policy": {"sampler": "ddpm"}}, "sampler"),
        ({"training": {"budget_env_steps": 10}}, "before learning"),
        ({"data": {"num_trajectories": 99}}, "99"),
        ({"per_method": {"bc": {"policy.sampler": "ddpm"}}}, "sampler"),
        ({"ensemble": {"encoder": "own"}}, "no images for encoders"),
        ({"demonstrations": "images.hdf5", "data": {"image_keys": ["top_image"]}}, "image.top"),
        (
            {
                "demonstrations": "images.hdf5", "data": {"image_keys": ["top_image"]}, "ensemble": {"encoder": "own"},
                "posterior_kind": "closed-form",
            },
            "regresses from features",
        ),
        ({"posterior_kind": "closed-form"}, "too few trajectories"),
        ({"ensemble": {"bootstrap": "pair"}, "pretraining": {"posterior_weight": "auto"}}, "leave whole trajectories out"),
        ({"per_method": {"postbc": {"pretraining.coherent": 3}}}, "not so many directions"),
    ],
)  # fmt: skip
def test_inputs_are_checked_before_anything_is_written(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    merged = {k: {**TINY.get(k, {}), **v} if isinstance(v, dict) else v for k, v in values.items()}
    if merged.get("environment") == "postbc/Lift":
        pytest.importorskip("robosuite")
    if merged.get("demonstrations") == "images.hdf5":  # of an environment that has no camera
        merged["demonstrations"] = str(tmp_path / "images.hdf5")
        made.write_demonstrations(
            tmp_path / "images.hdf5", environment=REACH, widths={"state": 4}, action_dim=2, images={"top_image": (8, 8, 3)}
        )
    with pytest.raises(InputError, match=words):
        run_recipe(tiny(tmp_path, **merged), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.simulator
def test_scripted_demonstrations_of_lift(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    values = {
        "environment": "postbc/Lift",
        "demonstrations": None,
        "collect_num": 6,
        "data": {"num_trajectories": 3},
        "horizon": 40,
    }
    recipe = parse_recipe({**TINY, **values, "methods": ["bc"], "finetuners": [], "seeds": [0], "episodes": 2})
    run_recipe(recipe, tmp_path / "x")
    made_by = tmp_path / "x/demonstrations.hdf5"
    stamp = made_by.stat().st_mtime_ns
    run_recipe(replace(recipe, seeds=(1,)), tmp_path / "x")
    assert made_by.stat().st_mtime_ns == stamp
    assert (tmp_path / "x/evaluation/bc/seed_1/evaluation.json").exists()


# -- recipes as data -----------------------------------------------------------------------------------------------------------
def table_of(name: str) -> tuple[Any, ...]:
    """A row of the paper's tables (paper.md section 6)."""
    r = load_recipe(name)
    return (
        r.data.num_trajectories, r.data.chunk, r.policy.hidden, r.ensemble.ensemble_size, r.ensemble_epochs,
        r.pretraining.posterior_weight, r.pretraining.sigma,
    )  # fmt: skip


def test_the_papers_pretraining() -> None:
    assert table_of("paper-lift-dsrl") == (5, 4, 512, 100, 10_000, 1.0, 0.1)
    assert table_of("paper-can-dsrl") == (10, 4, 1024, 100, 6000, 0.5, 0.1)
    assert table_of("paper-square-dsrl") == (30, 4, 1024, 100, 3000, 1.0, 0.05)
    assert table_of("paper-lift-best-of-n") == (20, 1, 512, 100, 3000, 1.0, 0.1)
    assert table_of("paper-lift-best-of-n-2000") == (20, 1, 512, 10, 3000, 2.0, 0.1)
    assert table_of("paper-can-best-of-n") == (300, 1, 1024, 10, 500, 1.0, 0.025)
    assert table_of("paper-square-best-of-n") == (300, 1, 1024, 10, 500, 1.0, 0.025)
    assert table_of("paper-square-best-of-n-2000") == (300, 1, 1024, 10, 500, 2.0, 0.025)
    assert table_of("paper-lift-dppo") == (5, 4, 512, 100, 3000, 0.5, 0.1)
    assert table_of("paper-can-dppo") == (10, 4, 1024, 100, 6000, 0.25, 0.05)
    assert table_of("paper-square-dppo") == (30, 4, 1024, 10, 3000, 1.0, 0.05)
    for name in (n for n in names() if re.match("paper-(lift|can|square)(?!.*laptop)", n)):
        r, dsrl, finetuner = load_recipe(name), name.endswith("dsrl"), "-".join(name.removesuffix("-2000").split("-")[2:])
        assert (r.pretraining_epochs, r.policy.denoising_steps, r.policy.layers, r.ensemble.layers) == (3000, 100, 3, 3)
        assert (r.policy.sampler, r.policy.inference_steps) == (("ddim", 8) if dsrl else ("ddpm", 8))
        assert (r.ensemble.bootstrap, r.ensemble.hidden, r.episodes, len(r.seeds)) == ("trajectory", r.policy.hidden, 200, 5)
        assert r.finetuners == (finetuner,)
        assert (r.demonstrations, r.collect_num) == (None, None)  # multi-human files: nothing stands in for them
        assert name.split("-")[1] in r.environment.lower()


def test_each_row_of_the_papers_has_a_laptop_preset_of_its_structure() -> None:
    rows = [n for n in names() if re.match("paper-(lift|can|square)", n) and not n.endswith("laptop")]
    assert len(rows) == 11
    for name in rows:
        large, small = load_recipe(name), load_recipe(f"{name}-laptop")
        for part in ("environment", "methods", "finetuners", "data", "episodes", "transitions"):
            assert getattr(large, part) == getattr(small, part), (name, part)
        assert large.policy.sampler == small.policy.sampler
        for part in ("posterior_weight", "sigma", "diagonal"):
            assert getattr(large.pretraining, part) == getattr(small.pretraining, part)
        for part in ("variant", "discount", "critics", "activation", "action_magnitude", "target_entropy", "lr", "layers"):
            assert getattr(large.dsrl, part) == getattr(small.dsrl, part), (name, part)
        assert small.dsrl.noise_critic_grad_steps * large.dsrl.utd == large.dsrl.noise_critic_grad_steps * small.dsrl.utd
        for part in ("discount", "expectile", "layer_norm", "critics"):
            assert getattr(large.iql, part) == getattr(small.iql, part), (name, part)
        assert small.dppo.discount == large.dppo.discount
        differing = {m: {**fields} for m, fields in large.per_method.items()}
        differing["sigma-bc"]["dsrl.utd"] = differing["sigma-bc"]["dsrl.utd"] * small.dsrl.utd // large.dsrl.utd
        assert small.per_method == differing, name
        assert small.ensemble.bootstrap == large.ensemble.bootstrap
        assert 1 < small.ensemble.ensemble_size <= large.ensemble.ensemble_size
        assert small.dsrl.hidden < large.dsrl.hidden
        assert small.policy.hidden < large.policy.hidden
        assert small.ensemble_epochs is small.pretraining_epochs is None
        assert small.collect_num >= small.data.num_trajectories
        assert small.demonstrations is None
    twice, once = (load_recipe(f"paper-lift-best-of-n{more}-laptop").best_of_n.episodes for more in ("-2000", ""))
    assert twice == 2 * once


@pytest.mark.parametrize("name", ["paper-lift-dsrl", "paper-can-dppo", "paper-square-best-of-n-2000"])
def test_a_row_of_the_papers_wants_the_papers_demonstrations(name: str, tmp_path: Path) -> None:
    """Scripted ones do not stand in for them without a word; the message says how to get them, and how to ask for scripted ones."""
    pytest.importorskip("robosuite")
    recipe, task = load_recipe(name), name.split("-")[1]
    with pytest.raises(InputError) as error:
        run_recipe(recipe, tmp_path / "x")
    assert f"postbc demos download --task {task} --dataset mh --version v1.4.1" in str(error.value)
    assert f"data/v1.4.1/{task}/mh/low_dim_v141.hdf5" in str(error.value)
    asked = re.search(r"--collect-num (\d+)", str(error.value))
    assert asked is not None
    assert int(asked[1]) >= recipe.data.num_trajectories
    assert not (tmp_path / "x").exists()
    chosen = parse(name, ["--output", str(tmp_path / "x"), "--collect-num", asked[1]])
    check_recipe(chosen.recipe, Layout(tmp_path / "x"))  # raises nothing
    check_recipe(load_recipe(f"{name}-laptop"), Layout(tmp_path / "x"))


def test_a_file_recorded_before_does_not_stand_in_either(tmp_path: Path) -> None:
    recipe = replace(load_recipe("paper-lift-dsrl"), environment="gymnasium:reach:Reach-v0")
    made.write_demonstrations(tmp_path / "demonstrations.hdf5", environment=REACH, widths={"state": 4}, action_dim=2)
    with pytest.raises(InputError, match=r"(?s)recorded demonstrations.*give --demonstrations FILE"):
        check_recipe(recipe, Layout(tmp_path))


def test_an_ablation_is_variants_of_one_recipe(tmp_path: Path) -> None:
    alphas = load_recipes("ablation-alpha")
    assert [r.pretraining.posterior_weight for r in alphas.values()][1:] == [0.25, 0.5, 1.0, 2.0, "auto"]
    assert alphas["ablation-alpha-0"].methods == ("bc",)
    for name in ("demonstrations", "ensemble-size", "bootstrap", "covariance"):
        variants = load_recipes(f"ablation-{name}")
        assert len({json.dumps(plain(r)) for r in variants.values()}) == len(variants) >= 2
        assert {(r.environment, r.finetuners) for r in variants.values()} == {("postbc/Can", ("best-of-n",))}
    with pytest.raises(InputError, match=r"several variants(.|\n)*postbc sweep ablation-alpha"):
        load_recipe("ablation-alpha")
    (tmp_path / "mine.yaml").write_text("base: ablation-alpha\n")
    with pytest.raises(InputError, match="A base is one recipe"):
        load_recipes(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("base: lift-laptop\nvariants: [1, 2]\n")
    with pytest.raises(InputError, match="Variants are named differences"):
        load_recipes(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("base: lift-laptop\nvariants:\n  a: {seeds: [1], nothing: 2}\n")
    with pytest.raises(InputError, match="nothing"):
        load_recipes(tmp_path / "mine.yaml")


def test_later_bases_are_over_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: demo\nseeds: [1]\nepisodes: 5\n")
    (tmp_path / "b.yaml").write_text("seeds: [2]\n")
    (tmp_path / "c.yaml").write_text("base: [a.yaml, b.yaml]\nnum_envs: 3\n")
    recipe = load_recipe(tmp_path / "c.yaml")
    assert (recipe.seeds, recipe.episodes, recipe.num_envs) == ((2,), 5, 3)


def test_the_papers_dsrl() -> None:
    rows = {"lift": (20, 0.99, 24_000), "can": (10, 0.99, 24_000), "square": (10, 0.999, 32_000)}
    for task, row in rows.items():
        r = load_recipe(f"paper-{task}-dsrl")
        d = r.dsrl
        assert (d.noise_critic_grad_steps, d.discount, r.training.initial_steps) == row
        assert (d.variant, d.hidden, d.layers, d.activation, d.critics, d.action_magnitude) == ("na", 2048, 3, "tanh", 2, 1.5)
        assert (d.lr, d.batch_size, d.target_entropy, d.tau, r.training.num_envs) == (3e-4, 256, 0.0, 0.005, 4)
        assert r.training.reward == "negative"
        assert {m: r.of_method(m).dsrl.utd for m in r.methods} == {"bc": 20, "sigma-bc": 10, "postbc": 20}


def test_the_papers_libero() -> None:
    """One policy of sixteen tasks, finetuned in each (paper.md section 6)."""
    for name, weight, seeds in (("paper-libero-dsrl", 2.0, 3), ("paper-libero-best-of-n", 4.0, 2)):
        r = load_recipe(name)
        assert (r.ensemble.encoder, r.ensemble.vision.kind) == ("own", "resnet18")
        assert r.finetune_in == tuple(f"libero/kitchen/{k}-pixels" for k in range(16))
        assert (r.data.num_trajectories, r.data.chunk, r.data.language, r.episodes, len(r.seeds)) == (
            400,
            4,
            "one-hot",
            100,
            seeds,
        )
        p, t = r.policy, r.policy.transformer
        assert (p.network, p.encoder.kind, p.denoising_steps, p.inference_steps) == ("transformer", "resnet18", 100, 8)
        assert (t.hidden, t.heads, t.layers, t.feed_forward) == (256, 8, 4, 512)
        pre = r.pretraining
        assert (pre.steps, pre.batch_size, pre.learning_rate, pre.steps * pre.warmup) == (50_000, 150, 3e-4, 2000)
        assert (pre.posterior_weight, pre.sigma, pre.diagonal) == (weight, 0.05, "best" in name)
        e = r.ensemble
        assert (e.ensemble_size, e.hidden, e.layers, e.steps, e.bootstrap) == (5, 512, 3, 25_000, "pair")
    d, training = load_recipe("paper-libero-dsrl").dsrl, load_recipe("paper-libero-dsrl").training
    assert (d.variant, d.hidden, d.layers, d.activation, d.critics, d.utd, d.discount) == ("sac", 1024, 3, "tanh", 2, 20, 0.99)
    assert (d.action_magnitude, d.lr, d.batch_size, d.target_entropy, d.tau) == (1.5, 3e-4, 256, 0.0, 0.005)
    assert (training.num_envs, training.initial_steps, training.reward) == (1, 20 * 600, "negative")  # 20 episodes
    r = load_recipe("paper-libero-best-of-n")
    assert (r.iql.steps, r.iql.hidden, r.iql.expectile, r.iql.discount, r.iql.lr) == (50_000, (256, 256), 0.9, 0.99, 3e-4)
    assert (r.iql.activation, r.iql.critics, r.iql.batch_size, r.iql.tau) == ("tanh", 2, 256, 0.005)
    assert (r.best_of_n.samples, r.transitions.reward) == (32, "negative")
    for name in ("libero-states-laptop", "libero-images-laptop"):
        r = load_recipe(name)
        tasks = 16 if "states" in name else 3
        assert r.data.num_trajectories == 25 * tasks <= r.collect_num


def test_the_papers_widowx() -> None:
    """Two tasks that differ in N and IQL's steps alone (paper.md section 6)."""
    for name, samples, steps in (
        ("corn", 4, {"bc": 400_000, "postbc": 700_000}),
        ("banana", 16, {"bc": 100_000, "postbc": 100_000}),
    ):
        r = load_recipe(f"paper-widowx-{name}")
        assert (r.data.num_trajectories, r.data.chunk, r.methods, r.finetuners) == (10, 1, ("bc", "postbc"), ("best-of-n",))
        p = r.policy
        assert (p.network, p.unet.channels, p.unet.kernel, p.encoder.kind) == ("unet", (256, 512, 1024), 5, "resnet18")
        assert (p.denoising_steps, p.inference_steps, r.pretraining_epochs, r.pretraining.posterior_weight) == (
            100,
            16,
            800,
            1.0,
        )
        e = r.ensemble
        assert (e.ensemble_size, r.ensemble_epochs, e.encoder, e.vision.kind) == (10, 300, "own", "resnet18")
        assert (e.hidden, e.layers) == (512, 3)
        assert (r.best_of_n.samples, r.best_of_n.episodes, r.transitions.reward) == (samples, 100, "sparse")
        assert (r.iql.expectile, r.iql.discount, r.iql.hidden, r.iql.lr, r.iql.batch_size) == (0.7, 0.97, (256, 256), 3e-4, 256)
        assert {m: r.of_method(m).iql.steps for m in r.methods} == steps


def test_a_robots_recipe_pretrains_says_how_to_roll_out_and_learns_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is evaluated, and nothing of the robot is installed here."""
    values = {"environment": "robot/widowx", "methods": ["bc"], "seeds": [0], "finetuners": ["best-of-n"]}
    data = tmp_path / "data.hdf5"
    made.write_demonstrations(data, environment={}, widths={"state": 4}, action_dim=2)
    recipe = tiny(tmp_path, **values)
    run_recipe(recipe, tmp_path / "x")
    said = capsys.readouterr().out
    assert f"postbc robot rollout --policy {tmp_path / 'x/pretraining/bc'} --robot widowx --episodes 6" in said.replace(
        "\n", " "
    )
    assert not (tmp_path / "x/evaluation").exists()
    rolled = RobotRollout(
        tmp_path / "x/pretraining/bc", "gymnasium:reach:Reach-v0", tmp_path / "x/rollouts/bc", episodes=6,
        control=Control(fast=True), person=Person(label="simulator"),
    )  # fmt: skip
    roll_out(rolled, 0)
    Labels(tmp_path / "x/rollouts/bc/seed_0").set(0, "success")
    report = run_recipe(recipe, tmp_path / "x")
    assert (report / "report.html").exists()
    result = json.loads((tmp_path / "x/best-of-n/bc/seed_0/results.json").read_text())
    assert (result["finetuner"], result["rollout_episodes"], result["success_after"]) == ("best-of-n", 6, None)
    assert "robot rollout" not in capsys.readouterr().out
    with pytest.raises(InputError, match="only Best-of-N learns"):
        run_recipe(tiny(tmp_path, **{**values, "finetuners": ["dsrl"]}), tmp_path / "y")
    with pytest.raises(InputError, match="no scripted operators"):
        run_recipe(parse_recipe({**TINY, **values}), tmp_path / "z")


def test_one_policy_is_finetuned_in_several_environments(tmp_path: Path) -> None:
    """Each in a directory of its own, compared by itself; what does not belong to the policy's environment is refused at once."""
    place = "gymnasium:reach:Reach-v0"
    recipe = tiny(tmp_path, methods=["bc"], seeds=[0], finetuners=["best-of-n"], finetune_in=[place])
    report = run_recipe(recipe, tmp_path / "x")
    assert (tmp_path / "x/best-of-n/bc/gymnasium:reach:Reach-v0/seed_0/results.json").exists()
    (entry,) = json.loads((report / "summary.json").read_text())
    assert (entry["task"], entry["episodes"]) == (place, 4)
    whole = run_recipe(tiny(tmp_path, methods=["bc"], seeds=[0], finetuners=["best-of-n"]), tmp_path / "x")  # and as ever
    assert len(json.loads((whole / "summary.json").read_text())) == 2
    with pytest.raises(InputError, match="finetune_in: postbc/PushT"):
        run_recipe(tiny(tmp_path, methods=["bc"], finetune_in=["postbc/PushT"]), tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_the_published_dppo() -> None:
    """DPPO's configuration files for robomimic: iterations, vector steps and batch of each task; evaluated every ten iterations."""
    published = {"lift": (81, 300, 7500), "can": (151, 300, 7500), "square": (201, 400, 10_000)}
    for task, (iterations, steps, batch) in published.items():
        r = load_recipe(f"paper-{task}-dppo")
        assert (r.dppo.n_steps, r.dppo.batch_size, r.dppo.ft_denoising_steps, r.dppo.sampling_steps) == (steps, batch, 10, None)
        iteration = steps * r.dppo_training.num_envs * r.data.chunk
        assert (r.dppo_training.num_envs, r.dppo_training.budget_env_steps) == (50, iterations * iteration)
        assert (r.dppo_training.eval_every, r.dppo_training.reward) == (10 * iteration, "sparse")


def test_the_papers_best_of_n() -> None:
    expectiles = {
        "paper-lift-best-of-n": (0.5, 0.7, 0.5, 0.9), "paper-lift-best-of-n-2000": (0.5, 0.7, 0.7, 0.9),
        "paper-can-best-of-n": (0.7,) * 4, "paper-square-best-of-n": (0.7,) * 4, "paper-square-best-of-n-2000": (0.7,) * 4,
    }  # fmt: skip
    for name, expected in expectiles.items():
        r = load_recipe(name)
        assert tuple(r.of_method(m).iql.expectile for m in ("bc", "sigma-bc", "postbc", "value-dice")) == expected
        assert (r.iql.steps, r.iql.discount, r.iql.layer_norm) == (2_000_000, 0.999, "lift" in name)
        assert r.best_of_n.episodes == (2000 if name.endswith("2000") else 1000)
        assert r.transitions.reward == "sparse"


def test_a_network_may_differ_between_methods() -> None:
    differences = {"bc": {"policy.network": "unet", "policy.unet.kernel": 3}, "postbc": {"policy.encoder.crop": 76}}
    recipe = parse_recipe({"policy": {"network": "transformer", "transformer": {"hidden": 64}}, "per_method": differences})
    assert (recipe.of_method("bc").policy.network, recipe.of_method("bc").policy.unet.kernel) == ("unet", 3)
    assert (recipe.of_method("postbc").policy.transformer.hidden, recipe.of_method("postbc").policy.encoder.crop) == (64, 76)


def test_value_dice_has_its_published_policy_whatever_the_recipes_is() -> None:
    """docs/pretraining.md, row 4: two layers of 256; unless it is told otherwise for itself."""
    for name in ("lift-finetuners", "paper-can-dsrl", "paper-square-best-of-n"):
        policy = load_recipe(name).of_method("value-dice").policy
        assert (policy.kind, policy.hidden, policy.layers) == ("gaussian", 256, 2), name
    own = parse_recipe({"policy": {"hidden": 1024, "layers": 3}, "per_method": {"value-dice": {"policy.hidden": 64}}})
    assert (own.of_method("value-dice").policy.hidden, own.of_method("bc").policy.hidden) == (64, 1024)
    gaussian = parse_recipe({"policy": {"kind": "gaussian", "hidden": 32}})
    assert gaussian.of_method("value-dice").policy.hidden == 32
    with pytest.raises(InputError, match="no such field"):
        parse_recipe({"per_method": {"value-dice": {"policy.sampler": "ddpm"}}})


def test_a_method_may_differ_in_any_field() -> None:
    differences = {"postbc": {"training.budget_env_steps": 9000, "pretraining.posterior_weight": 0.25, "pretraining_epochs": 7},
                   "bc": {"iql.hidden": [8, 8], "policy.inference_steps": 4, "transitions.reward": "negative"}}  # fmt: skip
    recipe = parse_recipe({"training": {"initial_steps": 100}, "per_method": differences})
    ours, theirs, other = (recipe.of_method(m) for m in ("postbc", "bc", "sigma-bc"))
    assert (ours.training.budget_env_steps, ours.pretraining.posterior_weight, ours.pretraining_epochs) == (9000, 0.25, 7)
    assert (theirs.iql.hidden, theirs.policy.inference_steps, theirs.transitions.reward) == ((8, 8), 4, "negative")
    assert replace(other, pretraining=recipe.pretraining) == replace(recipe, per_method={})
    assert [r.pretraining.method for r in (ours, theirs, other)] == ["postbc", "bc", "sigma-bc"]


def test_coordinates_are_postbcs_alone() -> None:
    recipe = parse_recipe({"pretraining": {"coherent": 3}})
    assert [recipe.of_method(m).pretraining.coherent for m in ("bc", "sigma-bc", "value-dice", "postbc")] == [0, 0, 0, 3]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seeds": [0, 0]}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"episodes": 0}, "episodes"),
        ({"methods": ["bc", "dagger"]}, "methods"),
        ({"per_method": {"dagger": {}}}, "per_method"),
        ({"per_method": {"bc": {"dsrl.utdd": 1}}}, "per_method: bc.dsrl.utdd"),
        ({"per_method": {"bc": {"dsrl.utd": 0}}}, "utd"),
        ({"per_method": {"bc": {"seeds": [1]}}}, "per_method: bc.seeds"),
        ({"per_method": {"bc": {"pretraining.method": "postbc"}}}, "pretraining.method"),
        ({"training": {"eval_episodes": 7}}, "give episodes"),
        ({"policy": {"kind": "evil"}}, "evil"),
        ({"policy": {"kind": ["x"]}}, "policy.kind"),
        ({"policy": 3}, "policy"),
        ({"seed": 1}, "seed"),
        ({"data": {"chunk": 0}}, "chunk"),
    ],
)
def test_recipes_that_cannot_be_used(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_recipe(values)


def test_recipes_of_ones_own(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs/recipes.md").read_text(encoding="utf-8")
    (tmp_path / "page.yaml").write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    assert load_recipe(tmp_path / "page.yaml").of_method("postbc").dsrl.utd == 8
    (tmp_path / "mine.yaml").write_text("base: lift-laptop\nabout: mine\ndsrl: {utd: 3}\nmethods: [bc]\n")
    mine, laptop = load_recipe(tmp_path / "mine.yaml"), load_recipe("lift-laptop")
    assert (mine.dsrl.utd, mine.dsrl.hidden, mine.methods) == (3, laptop.dsrl.hidden, ("bc",))
    (tmp_path / "other.yaml").write_text("base: mine.yaml\nseeds: [7]\n")
    assert load_recipe(tmp_path / "other.yaml") == replace(mine, seeds=(7,))
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    for name in (tmp_path / "loop.yaml", tmp_path / "none.yaml", "none", "../recipes/demo", "_robomimic/../demo", "", "demo\0"):
        with pytest.raises(InputError):
            load_recipe(name)
    (tmp_path / "mine.yaml").write_text("episodes: -1")
    with pytest.raises(InputError, match=r"mine\.yaml"):
        load_recipe(tmp_path / "mine.yaml")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_recipes_are_input_errors_or_recipes(tmp_path: Path, data: st.DataObject) -> None:
    values = {k: v for k, v in plain(load_recipe("demo")).items() if k not in ("data", "compute")}
    key = data.draw(st.sampled_from(sorted(values)))
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    drawn = data.draw(scalar | st.lists(scalar, max_size=3) | st.dictionaries(st.text(max_size=4), scalar, max_size=2))
    inner = values[key]
    if isinstance(inner, dict) and inner and data.draw(st.booleans()):
        values[key] = {**inner, data.draw(st.sampled_from(sorted(inner))): drawn}
    else:
        values[key] = drawn
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    try:
        recipe = load_recipe(tmp_path / "x.yaml")
    except InputError as error:
        assert str(error)  # noqa: PT017
    else:
        assert parse_recipe(plain(recipe)) == recipe


def test_every_recipe_is_written_and_read_again() -> None:
    for recipe in (recipe for name in names() for recipe in load_recipes(name).values()):
        assert parse_recipe(plain(recipe)) == recipe
        assert recipe.about
        assert recipe.source
        assert recipe.size
    assert {"demo", "lift-laptop", "pusht-laptop"} <= set(names())
    assert len(table().rows) == len(names())


# -- the command line ----------------------------------------------------------------------------------------------------------
def test_recipes_are_overridden_on_the_command_line() -> None:
    chosen = parse("lift-laptop", ["--output", "o", "--seeds", "3", "4", "--dsrl.utd", "2", "--jobs", "1", "--device", "cpu"])
    recipe, laptop = chosen.recipe, load_recipe("lift-laptop")
    assert (str(chosen.output), recipe.seeds, recipe.dsrl.utd, recipe.jobs, recipe.compute.device) == ("o", (3, 4), 2, 1, "cpu")
    assert recipe.iql == laptop.iql
    assert str(parse("demo", []).output) == "runs/demo"
    assert parse("paper-lift-dsrl", ["--demonstrations", "x.hdf5"]).recipe.per_method == {"sigma-bc": {"dsrl.utd": 10}}
    differing = parse("paper-lift-dsrl", ["--per-method", "sigma-bc.dsrl.utd=5", "postbc.iql.layer-norm=true"]).recipe
    assert differing.per_method == {"sigma-bc": {"dsrl.utd": 5}, "postbc": {"iql.layer_norm": True}}
    assert parse("paper-lift-dsrl", ["--per-method"]).recipe.per_method == {}


def test_another_kind_of_policy_keeps_what_it_shares() -> None:
    for args in (["--policy.kind", "flow", "--policy.layers", "5"], ["--policy.kind=flow", "--policy.layers=5"]):
        policy = parse("lift-laptop", args).recipe.policy
        assert isinstance(policy, FlowConfig)
        assert (policy.hidden, policy.layers, policy.inference_steps) == (256, 5, 8)


@pytest.mark.parametrize(
    "args",
    [["--seeds", "0", "0"], ["--episodes", "0"], ["--policy.kind", "evil"], ["--policy.kind"], ["--jobs", "0"], ["--methods"],
     ["--per-method", "bc"], ["--per-method", "bc.dsrl.utd=["], ["--dsrl.lr", "nan"], ["--data.demonstrations", "x"],
     ["--num-envs", "1000000000"], ["--nothing"]],
)  # fmt: skip
def test_bad_options(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((InputError, SystemExit)) as error:
        parse("demo", args)
    assert not isinstance(error.value, SystemExit) or error.value.code == 2


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("demo", ["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for option in ("--data.chunk", "--ensemble.hidden", "--policy.hidden", "--pretraining.steps", "--dsrl.utd", "--training.num-envs",
                   "--best-of-n.samples", "--iql.expectile", "--transitions.reward", "--device", "--per-method"):  # fmt: skip
        assert option in said, option
    assert "--data.demonstrations" not in said


if __name__ == "__main__":
    ignored = ["*results.json:wall_clock_s", "x/report/*", "x/progress.html", "*/versions.json"]
    kill_and_resume(functools.partial(killed_experiment, Path(sys.argv[1])), Path(sys.argv[1]), "experiment", ignored, number=6)
