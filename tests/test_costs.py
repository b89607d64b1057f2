"""What recipes cost: counted as it is done, timed on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from postbc import cli
from postbc.experiments.costs import Estimate, Stopwatch, duration
from postbc.experiments.sweep import run_recipe
from postbc.schemas import plain
from test_recipes import tiny

FINETUNERS = ["best-of-n", "dsrl", "residual", "dppo"]


def test_what_is_counted_is_what_is_done(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, methods=["postbc"], seeds=[0], finetuners=FINETUNERS)
    costs = {cost.stage: cost for cost in Estimate(recipe, Stopwatch(0.01))()}
    assert set(costs) == {"posterior", "pretraining", "evaluation", *FINETUNERS}
    assert all(cost.seconds > 0 for cost in costs.values())
    run_recipe(recipe, tmp_path / "x")
    assert (costs["posterior"].gradient_steps, costs["pretraining"].gradient_steps) == (10, 20)
    for finetuner in FINETUNERS:
        result = json.loads((tmp_path / "x" / finetuner / "postbc/seed_0/results.json").read_text())
        done, counted = result["gradient_steps"], costs[finetuner].gradient_steps
        # a vector step of which an environment waits, or is at its episode's end, takes less than its whole budget
        assert counted <= done <= 1.5 * counted, finetuner
        assert costs[finetuner].env_steps >= max(point[0] for point in result["curve"]), finetuner


def test_methods_places_and_seeds_are_counted(tmp_path: Path) -> None:
    watch = Stopwatch(0.01)
    one = Estimate(tiny(tmp_path, methods=["bc"], finetuners=["dsrl"]), watch)()
    assert [cost.stage for cost in one] == ["pretraining", "evaluation", "dsrl"]
    two = Estimate(tiny(tmp_path, methods=["bc", "sigma-bc"], finetuners=["dsrl"]), watch)()
    assert two[:3] == one  # what has been timed is not timed again
    assert two[5].gradient_steps == 2 * one[2].gradient_steps  # `per_method` counts
    there = Estimate(tiny(tmp_path, methods=["bc"], finetuners=["dsrl"], finetune_in=["gymnasium:reach:Reach-v0"]), watch)()
    assert there == one
    large = {"ensemble_size": 50, "hidden": 64, "batch_size": 256}
    closed, ensemble = (
        tiny(tmp_path, methods=["postbc"], finetuners=[], posterior_kind=kind, ensemble=large)
        for kind in ("closed-form", "ensemble")
    )
    assert Estimate(closed, watch)()[0].seconds < Estimate(ensemble, watch)()[0].seconds


@pytest.mark.parametrize(
    "values",
    [
        {"methods": ["value-dice"], "value_dice": {"steps": 7, "hidden": 8}},
        {"policy": {"kind": "flow"}, "finetuners": ["dppo"]},
    ],
)
def test_other_policies(tmp_path: Path, values: dict[str, object]) -> None:
    costs = Estimate(tiny(tmp_path, **{"methods": ["bc"], "finetuners": ["best-of-n"], **values}), Stopwatch(0.01))()
    assert costs[0].gradient_steps == (7 if "methods" in values else 20)
    assert all(cost.seconds > 0 for cost in costs)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(tmp_path: Path, compiled: bool) -> None:
    """Every stage is timed where the recipe computes; DSRL-NA asks its policy for chunks there."""
    where = {"device": "cuda", "compile": compiled}
    for method in ("postbc", "value-dice"):
        recipe = tiny(
            tmp_path, methods=[method], finetuners=FINETUNERS if method == "postbc" else ["dsrl"], compute=where,
            per_method={method: {"dsrl.variant": "na"}}, value_dice={"steps": 7, "hidden": 8},
        )  # fmt: skip
        assert all(cost.seconds > 0 for cost in Estimate(recipe, Stopwatch(0.01))())


def test_a_call_is_timed_by_its_quickest_and_once() -> None:
    watch, made = Stopwatch(0.2), []
    assert 0.01 <= watch.seconds("nap", lambda: lambda: time.sleep(0.01)) < 0.1
    assert watch.seconds("nap", lambda: made.append(1) or (lambda: None)) >= 0.01
    assert not made


def test_durations() -> None:
    said = [duration(s) for s in (0.4, 80, 95, 5000, 6000, 3 * 86_400, 86_400 * 607.4)]
    assert said == ["0 seconds", "80 seconds", "1.58 minutes", "83 minutes", "1.67 hours", "3 days", "607 days"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(plain(tiny(tmp_path, methods=["bc"], finetuners=["best-of-n"]))))
    cli.main(["recipes", str(file), "paper-widowx-corn"])
    out = " ".join(capsys.readouterr().out.split())
    assert "best-of-n" in out
    assert "2 seeds" in out
    assert "paper-widowx-corn: unknown. On a robot" in out
    assert cli.main(["recipes", "nowhere"]) == 2
    assert "There is no such recipe." in capsys.readouterr().err
