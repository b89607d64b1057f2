"""results/posterior-calibration: which arms are compared with which, and tries whose coordinates are the episode's and the try's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from postbc.data.episodes import COORDINATES
from postbc.environments.coordinates import coordinates_of_episode
from postbc.statistics import mean_interval

STUDY = Path(__file__).parents[1] / "results/posterior-calibration"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"study_{name}", STUDY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_auto_is_held_against_the_best_fixed_alpha_and_the_closed_forms_against_it():
    study = script("summarise")
    before = {"bc": (0.5, 0.6, 0.7), "alpha-0.5": (0.8, 0.8, 0.9), "alpha-2": (0.1, 0.9, 0.9), "auto": (0.7, 0.8, 0.8),
              "closed-form-auto": (0.7, 0.7, 0.9), "alpha-1": (0.4, 0.6, 0.5)}  # fmt: skip
    steps = {arm: tuple(1000 * (1 - v) for v in values) for arm, values in before.items()}
    rows = [{"setting": "mixed", "arm": arm, "seed": seed, "before": before[arm][seed], study.STEPS: steps[arm][seed]}
            for arm in before for seed in range(3)]  # fmt: skip
    found = {(d["measure"], d["arm"], d["against"]): d for d in study.differences(rows)}
    against = [(arm, other) for measure, arm, other in found if measure == "before"]
    fixed = [("alpha-0.5", "bc"), ("alpha-0.5", "alpha-1"), ("alpha-2", "bc"), ("alpha-2", "alpha-1"), ("alpha-1", "bc")]
    told = [("auto", "bc"), ("auto", "alpha-1"), ("auto", "best α (alpha-0.5)"),
            *(("closed-form-auto", other) for other in ("bc", "alpha-1", "auto"))]  # fmt: skip
    assert sorted(against) == sorted(fixed + told)
    own = found["before", "auto", "best α (alpha-0.5)"]
    mean, low, high = mean_interval(np.array([-0.1, 0.0, -0.1]))
    assert (own["difference"], own["low"], own["high"]) == pytest.approx((mean, low, high))
    assert found[study.STEPS, "auto", "best α (alpha-0.5)"]["difference"] == pytest.approx(200 / 3)  # fewer steps are better
    few = study.differences([row for row in rows if row["arm"] != "alpha-0.5" or row["seed"] < 2])
    assert not [d for d in few if d["against"].startswith("best") and d["seeds"] < 3]
    assert "alpha-0.5" in study.tables(rows, list(found.values()))


def test_steps_that_were_never_reached_are_the_budget():
    study = script("summarise")
    curve = SimpleNamespace(curve=((0, 0.4), (100, 0.8), (200, 1.0)))
    assert study.steps_to(curve) == 150
    assert study.steps_to(SimpleNamespace(curve=curve.curve[:2])) == 100


def test_a_try_has_coordinates_of_its_own():
    seen = []
    agent = SimpleNamespace(
        shapes={COORDINATES: (4,)}, act=lambda observation, generator: seen.append(observation[COORDINATES])
    )
    own = torch.as_tensor(np.stack([coordinates_of_episode(seed, 4) for seed in range(500)]))
    redrawn, generator = script("tries").Redrawn, torch.Generator()
    for number in (0, 1, 2, 1):
        redrawn(agent, number).act({COORDINATES: own}, generator)
    first, second, third, again = seen
    assert torch.equal(first, own)
    assert torch.equal(second, again)
    lengths = np.stack([g.norm(dim=1).numpy() for g in (first, second, third)])
    assert np.abs(np.corrcoef(lengths) - np.eye(3)).max() < 0.15  # a rotation would leave them what they are
    for g in (second, third):
        assert g.mean() == pytest.approx(0, abs=0.08)
        assert g.std() == pytest.approx(1, abs=0.08)
    order = torch.randperm(500, generator=generator)
    redrawn(agent, 1).act({COORDINATES: own[order, None].expand(-1, 3, -1)}, generator)  # of three time steps
    assert torch.equal(seen[-1], second[order, None].expand(-1, 3, -1))
    assert redrawn(agent, 1).shapes == agent.shapes
