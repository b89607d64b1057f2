"""The report: numbers equal those of statistics.py, the page is whole and self-contained, any subset of material is enough.

Whatever lies in a run directory is an InputError, a note, or in the page as text.
"""

from __future__ import annotations

import base64
import csv
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from made import save_policy
from postbc import statistics
from postbc.data.episodes import Dataset
from postbc.data.normalization import Normalization
from postbc.data.windows import Windows
from postbc.errors import InputError
from postbc.experiments import aggregates, formats, plots, tables
from postbc.experiments.action_distribution import action_distribution, switches, uncertainty
from postbc.experiments.material import Found, look, shared_and_differing, within
from postbc.experiments.report import Content, Picture, build
from postbc.experiments.reporting import Report
from postbc.experiments.summary import FIELDS, collect, compare_groups, group, verdict
from postbc.experiments.tables import Cell, Table
from postbc.posterior.factor import Factor
from postbc.schemas import plain
from postbc.training.results import Result

RATES = {"bc": [0.6, 0.62, 0.58, 0.64, 0.6], "sigma-bc": [0.7, 0.5, 0.66, 0.6, 0.62], "postbc": [0.8, 0.84, 0.79, 0.83, 0.82]}
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
MP4 = b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00"
EVALUATION = {
    "method": "bc", "agent_seed": 3, "episodes": 50, "success": 0.5, "success_interval": [0.4, 0.6], "chunk_success": 0.4,
    "chunk_success_interval": [0.3, 0.5],
}  # fmt: skip
VERSIONS = {
    "torch": "2",
    "commit": "abc+changes",
    "command": "postbc finetune dsrl --policy '<bc>'",
    "robosuite": None,
    "cpus": 2,
}


def result(pretraining: str, seed: int, **changes: Any) -> dict[str, Any]:
    after = RATES[pretraining][seed]
    return {
        "format": 2, "task": "Lift", "data": "lift.hdf5", "finetuner": "dsrl-sac", "pretraining": pretraining, "seed": seed,
        "demonstrations": 5, "posterior_weight": 0.5 if pretraining == "postbc" else None,
        "sigma": 0.1 if pretraining == "sigma-bc" else None, "budget_env_steps": 1000, "episodes": 200, "success_before": 0.5,
        "success_after": after, "chunk_success_before": 0.45, "chunk_success_after": after - 0.05,
        "curve": [[0, 0.5], [500, (0.5 + after) / 2], [1000, after]], "wall_clock_s": 60.0,
        "command": f"postbc finetune dsrl --policy <{pretraining}>", "commit": "abc",
    } | changes  # fmt: skip


def write(directory: Path, *results: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """Run directories seed_<s> below `directory`."""
    for one in results:
        folder = directory / f"seed_{one['seed']}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(one))
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            (folder / "versions.json").write_text(json.dumps(VERSIONS))
    return directory


def experiment(root: Path, **changes: Any) -> Path:
    for method in RATES:
        write(root / method, *(result(method, s, **changes) for s in range(5)), config={"utd": 8, "policy": method})
    return root


# -- numbers -------------------------------------------------------------------------------------------------------------------
def test_comparisons_are_those_of_statistics(tmp_path: Path) -> None:
    entries, notes = collect([experiment(tmp_path / "runs")])
    groups, more = group(entries)
    assert notes + more == []
    assert [g.label for g in groups] == ["BC", "σ-BC (σ=0.1)", "PostBC (α=0.5)"]
    pairs = compare_groups(groups, "success_after")
    assert [p.baseline.pretraining for p in pairs] == ["bc", "sigma-bc"]
    direct = [statistics.compare(np.array(RATES["postbc"]), np.array(RATES[b])) for b in ("bc", "sigma-bc")]
    assert [p.result for p in pairs] == direct
    assert [p.p_holm for p in pairs] == pytest.approx(statistics.holm([d.p for d in direct]))
    assert pairs[0].verdict == "PostBC higher"
    before = compare_groups(groups, "success_before")
    assert all(p.result.difference == 0 for p in before)
    area = compare_groups(groups, "area")[0]
    assert area.result.difference == pytest.approx(np.mean([(a - b) / 2 for a, b in zip(RATES["postbc"], RATES["bc"])]))


def test_pairs_use_shared_seeds_only_and_never_cross_settings(tmp_path: Path) -> None:
    write(tmp_path / "a", *(result("bc", s) for s in (0, 1, 2)))
    write(tmp_path / "b", *(result("postbc", s) for s in (1, 2, 3)))
    write(tmp_path / "c", *(result("bc", s, budget_env_steps=2000) for s in (0, 1)))
    write(tmp_path / "d", *(result("postbc", s, finetuner="best-of-n") for s in (0, 1)))
    (pair,) = compare_groups(group(collect([tmp_path])[0])[0], "success_after")
    assert pair.result.seeds == 2
    assert pair.mean(pair.baseline) == pytest.approx(np.mean(RATES["bc"][1:3]))
    assert pair.result.difference == pytest.approx(np.mean(np.subtract(RATES["postbc"][1:3], RATES["bc"][1:3])))


def test_the_same_policies_under_two_finetuners_are_one_comparison_before(tmp_path: Path) -> None:
    experiment(tmp_path / "one")
    experiment(tmp_path / "two", finetuner="best-of-n")
    groups = group(collect([tmp_path])[0])[0]
    assert len(compare_groups(groups, "success_after")) == 4
    assert len(compare_groups(groups, "success_before")) == 2


def test_best_of_n_is_one_setting_though_its_rollouts_take_different_steps(tmp_path: Path) -> None:
    for method in ("bc", "postbc"):
        runs = [result(method, s, finetuner="best-of-n", budget_env_steps=900 + 10 * s, rollout_episodes=300) for s in range(5)]
        write(tmp_path / method, *runs)
    groups = group(collect([tmp_path])[0])[0]
    assert [len(g.runs) for g in groups] == [5, 5]
    assert groups[0].setting.budget == "300 rollouts"
    assert compare_groups(groups, "success_after")[0].result.seeds == 5


@pytest.mark.parametrize(
    ("differences", "p", "expected"),
    [
        ([0.2, 0.21, 0.19], 0.01, "PostBC higher"),
        ([-0.2, -0.21, -0.19], 0.01, "PostBC lower"),
        ([0.2, 0.21, 0.19], 0.06, "not distinguishable"),
        ([0.3, -0.2, 0.1], 0.6, "not distinguishable"),
        ([0.01, -0.01, 0.0], 1.0, "equal within ±0.05"),
        ([0.5], 1.0, "too few seeds to tell"),
        ([0.2, 0.21], 0.01, "too few seeds to tell"),
    ],
)
def test_verdicts(differences: list[float], p: float, expected: str) -> None:
    d = np.array(differences)
    assert verdict(statistics.compare(d, np.zeros_like(d)), p) == expected


def test_two_seeds_are_too_few_to_tell_and_no_interval_is_shown(tmp_path: Path) -> None:
    for method in ("bc", "postbc"):
        write(tmp_path / "runs" / method, *(result(method, s, success_before=0.4 + 0.2 * s) for s in range(2)))
    page = build_at(tmp_path / "runs", tmp_path / "report").read_text()
    text = re.sub(r"<style.*?</style>|<svg.*?</svg>", "", page, flags=re.S)
    assert "PostBC (α=0.5) 0.82, BC 0.61: <b>too few seeds to tell</b> (+0.21, 2 seeds)" in text
    assert "Whether PostBC starts lower than the baselines: too few seeds to tell." in text
    assert not re.search(r"seeds \[|\[[−+]", text)  # intervals over seeds, and of differences
    assert "log-rank" not in text
    csv_text = (tmp_path / "report/tables/lift-5-demonstrations-dsrl-sac-improvement.csv").read_text()
    assert "–,too few seeds to tell" in csv_text


def test_interquartile_means_and_probabilities_of_improvement_are_those_of_statistics(tmp_path: Path) -> None:
    experiment(tmp_path / "lift")
    experiment(tmp_path / "can", task="Can", posterior_weight=None)
    content = build([tmp_path / "lift", tmp_path / "can"], tmp_path / "report")
    x, y = (np.array(RATES[m])[:, None] for m in ("postbc", "bc"))
    table = aggregates.improvement([g for g in content.groups if g.setting.task == "Lift"])
    assert table is not None
    rows = {row[0].value: row for row in table.rows}
    p, low, high = statistics.probability_of_improvement(x, y)
    assert rows["PostBC (α=0.5)"][3] == (f"{p:.2f}", (f"[{low:.2f}, {high:.2f}]",)) == ("1.00", ("[1.00, 1.00]",))
    value, low, high = statistics.stratified_bootstrap(x)
    assert rows["PostBC (α=0.5)"][2] == (f"{value:.3f}", (f"[{low:.2f}, {high:.2f}]",))
    (together,) = aggregates.together(content.groups)  # α is not the same in both, and the only one in each
    assert [row[0].value for row in together.rows] == ["BC", "σ-BC", "PostBC"]
    value, low, high = statistics.stratified_bootstrap(np.hstack([x, x]))
    assert together.rows[2][2] == (f"{value:.3f}", (f"[{low:.2f}, {high:.2f}]",))
    assert "All settings together" in (tmp_path / "report/report.html").read_text()
    assert (tmp_path / "report/tables/together-0.tex").exists()
    assert aggregates.together([g for g in content.groups if g.setting.task == "Lift"]) == []


def test_recipes_are_told_apart_where_their_methods_have_the_same_name(tmp_path: Path) -> None:
    """Two recipes differ in the ensemble's size: one BC of both, a PostBC of each. The same of runs of one recipe each."""
    root = tmp_path / "sweep"
    write(root / "dsrl/bc-1", *(result("bc", s) for s in range(3)))
    write(root / "dsrl/postbc-2", *(result("postbc", s) for s in range(3)))
    write(root / "dsrl/postbc-3", *(result("postbc", s, success_after=0.7) for s in range(3)))
    runs = {"dsrl/bc-1": ["k-10", "k-100"], "dsrl/postbc-2": ["k-10"], "dsrl/postbc-3": ["k-100"]}
    (root / "sweep.json").write_text(json.dumps({"runs": runs}))
    groups, notes = group(collect([root])[0])
    assert notes == []
    assert [g.label for g in groups] == ["BC", "k-10: PostBC (α=0.5)", "k-100: PostBC (α=0.5)"]
    assert [p.ours.recipe for p in compare_groups(groups, "success_after")] == ["k-10", "k-100"]
    # the report's own summary.json says it too
    build([root], tmp_path / "report")
    assert [g.label for g in group(collect([tmp_path / "report"])[0])[0]] == [g.label for g in groups]
    (root / "sweep.json").write_text("{}")  # damaged: the runs are there, and a note says why they are not told apart
    assert "sweep.json is left out" in str(build([root], tmp_path / "other").notes)

    def alone(name: str, size: int, *seeds: int) -> Path:
        where = tmp_path / "alone" / name
        write(where / "dsrl/bc", *(result("bc", s) for s in seeds))
        (where / "config.yaml").write_text(
            yaml.safe_dump({"methods": ["bc"], "seeds": [*seeds], "ensemble": {"ensemble_size": size}})
        )
        return where

    directories = [alone("a", 10, 0, 1, 2), alone("b", 100, 0, 1, 2), alone("more-of-a", 10, 3, 4)]
    groups, _ = group(collect(directories)[0])
    assert [(g.label, g.seeds) for g in groups] == [("a: BC", [0, 1, 2, 3, 4]), ("b: BC", [0, 1, 2])]


def test_tables_as_markdown_latex_and_csv() -> None:
    rows = [[Cell("a|b_%", ("x & y",)), Cell("−0.5")], [Cell("α ± <i>"), Cell("–", ("too few",))]]
    table = Table(["method", "gain $"], rows, "50 % <b>caption</b>")
    md = formats.markdown(table)
    assert md.splitlines()[:3] == ["| method | gain $ |", "| :-- | --: |", r"| a\|b\_% (x & y) | −0.5 |"]
    assert md.splitlines()[-1] == r"50 % \<b\>caption\</b\>"
    tex = formats.latex(table)
    assert r"a|b\_\% {\scriptsize x \& y} & $-$0.5 \\" in tex
    assert r"$\alpha$ $\pm$ \textless{}i\textgreater{} & -- {\scriptsize too few} \\" in tex
    assert tex.startswith(r"% 50 \%")
    assert list(csv.reader(formats.as_csv(table).splitlines())) == [
        ["method", "method: details", "gain $", "gain $: details"], ["a|b_%", "x & y", "-0.5", ""], ["α ± <i>", "", "–", "too few"],
    ]  # fmt: skip


def test_success_by_task(tmp_path: Path) -> None:
    """Two seeds' episodes of a task are one row, with Wilson's interval over both; other environments have no such table."""

    def rates(*successes: int) -> list[dict[str, Any]]:
        named = zip(("come <here>", "flee"), successes)
        return [
            {"task": t, "episodes": 20, "success": k / 20, "success_interval": list(statistics.wilson_interval(k, 20))}
            for t, k in named
        ]

    for seed, before, after in ((0, (4, 8), (10, 20)), (1, (6, 10), (15, 19))):
        write(tmp_path / "x", result("bc", seed, episodes=40, tasks_before=rates(*before), tasks_after=rates(*after)))
    content = build([tmp_path / "x"], tmp_path / "report")
    (of,) = content.groups
    pooled = of.by_task("tasks_after")["come <here>"]
    assert (pooled.episodes, pooled.success) == (40, 25 / 40)
    page = (tmp_path / "report/report.html").read_text()
    low, high = statistics.wilson_interval(25, 40)
    for words in ("come &lt;here&gt;", "0.25 → 0.62", f"after [{low:.2f}, {high:.2f}]", "mean of the tasks", "0.350 → 0.800"):
        assert words in page
    entries = json.loads((tmp_path / "report/summary.json").read_text())
    assert [e["tasks_after"][1]["success"] for e in entries] == [1.0, 0.95]
    assert "tasks" not in (tmp_path / "report/results.csv").read_text()
    again, _ = collect([tmp_path / "report"])
    assert again[0].tasks_after is not None
    assert again[0].tasks_after[1].success == 1
    plain_report = build([write(tmp_path / "y", result("bc", 0))], tmp_path / "other")
    assert plain_report.groups[0].by_task("tasks_after") == {}
    assert "mean of the tasks" not in (tmp_path / "other/report.html").read_text()


def test_repeated_seeds_are_averaged(tmp_path: Path) -> None:
    write(tmp_path / "a", result("bc", 0, success_after=0.4))
    write(tmp_path / "b", result("bc", 0, success_after=0.6, curve=[[0, 0.5], [1000, 0.6]]))
    entries, notes = collect([tmp_path, tmp_path / "a"])  # overlapping directories: a file counts once
    assert len(entries) == 2
    assert notes == []
    (only,), more = group(entries)
    assert only.values("success_after").tolist() == [0.5]
    assert "averaged" in more[0]


def test_what_a_finetuner_writes_is_what_is_read(tmp_path: Path) -> None:
    one = Result(**result("postbc", 2, finetuner="best-of-n", rollout_episodes=300, rollout_success=0.25))
    (tmp_path / "results.json").write_text(json.dumps(plain(one)))
    (entry,), notes = collect([tmp_path])
    assert notes == []
    assert {k: v for k, v in plain(entry).items() if k != "run"} == {k: v for k, v in plain(one).items() if k != "format"}


def test_results_without_an_evaluation_are_noted(tmp_path: Path) -> None:
    write(tmp_path / "a", result("bc", 0), result("bc", 1, success_before=None, success_after=None, episodes=0))
    entries, notes = collect([tmp_path])
    assert [e.seed for e in entries] == [0]
    assert "not evaluated" in notes[0]


def test_a_policy_of_unknown_pretraining_is_shown_and_not_compared(tmp_path: Path) -> None:
    write(tmp_path / "a", result("bc", 0) | {"pretraining": None}, result("postbc", 1))
    write(tmp_path / "b", result("postbc", 0))
    groups = group(collect([tmp_path])[0])[0]
    assert "given policy" in [g.label for g in groups]
    assert compare_groups(groups, "success_after") == []
    check(build_at(tmp_path, tmp_path / "report"))


def test_a_pretraining_of_ones_own_is_a_baseline_as_well(tmp_path: Path) -> None:
    for s in range(2):
        write(tmp_path / f"a{s}", result("bc", s) | {"pretraining": "<b>dagger"})
        write(tmp_path / f"b{s}", result("postbc", s))
    groups = group(collect([tmp_path])[0])[0]
    assert [p.baseline.pretraining for p in compare_groups(groups, "success_after")] == ["<b>dagger"]
    check(build_at(tmp_path, tmp_path / "report"))
    page = (tmp_path / "report/report.html").read_text()
    assert "<b>dagger" not in page
    assert "&lt;b&gt;dagger" in page


def test_policies_of_different_kinds_are_not_averaged(tmp_path: Path) -> None:
    write(tmp_path / "a", result("postbc", 0) | {"policy": "diffusion"})
    write(tmp_path / "b", result("postbc", 0) | {"policy": "flow"})
    groups, notes = group(collect([tmp_path])[0])
    assert notes == []
    assert [g.label for g in groups] == ["PostBC (α=0.5)", "PostBC (α=0.5, flow policy)"]


def test_a_baseline_has_the_same_kind_of_policy_unless_it_has_its_own(tmp_path: Path) -> None:
    """ValueDICE's is a Gaussian one whatever the others' is: it is compared with each, BC by flow with PostBC by flow alone."""
    runs = {
        "post": result("postbc", 0) | {"policy": "diffusion"}, "post-flow": result("postbc", 0) | {"policy": "flow"},
        "flow": result("bc", 0) | {"policy": "flow"}, "dice": result("bc", 0) | {"pretraining": "value-dice", "policy": "gaussian"},
    }  # fmt: skip
    for name, one in runs.items():
        write(tmp_path / name, one)
    groups = group(collect([tmp_path])[0])[0]
    assert sorted((p.ours.label, p.baseline.label) for p in compare_groups(groups, "success_after")) == [
        ("PostBC (α=0.5)", "ValueDICE"), ("PostBC (α=0.5, flow policy)", "BC (flow policy)"),
        ("PostBC (α=0.5, flow policy)", "ValueDICE"),
    ]  # fmt: skip


def test_runs_of_other_evaluations_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path / "a", result("bc", 0, episodes=60), result("bc", 1, horizon=300), result("bc", 2, horizon=400))
    write(tmp_path / "b", result("postbc", 0), result("postbc", 1, horizon=300), result("postbc", 2, horizon=300))
    groups = group(collect([tmp_path])[0])[0]
    (pair,) = compare_groups(groups, "success_after")
    assert pair.setting.evaluation == "200 evaluation episodes of up to 300 steps"
    assert (pair.ours.seeds, pair.baseline.seeds, pair.result.seeds) == ([1, 2], [1], 1)
    assert {g.setting.evaluation for g in groups} == {
        "60 evaluation episodes", "200 evaluation episodes", "200 evaluation episodes of up to 300 steps",
        "200 evaluation episodes of up to 400 steps",
    }  # fmt: skip
    page = build_at(tmp_path, tmp_path / "report").read_text()
    assert "60 evaluation episodes a run" in page


def episodes(folder: Path, seed: int, when: str, solved: str, first: float = 0.0) -> None:
    """The file of a run's evaluation episodes; `first` is the first number of their initial states."""
    lines = (
        {"seed": seed, "episode_seed": 1_000_000_000 + k, "success": s == "1", "chunk_success": False, "steps": 9,
         "first_success_step": None,
         "total_reward": 0.0, "diverged": False, "initial_observation": [first, 0.5 * k]}
        for k, s in enumerate(solved)
    )  # fmt: skip
    (folder / f"seed_{seed}/episodes_{when}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_methods_are_paired_on_the_same_evaluation_episodes(tmp_path: Path) -> None:
    rng, outcomes = np.random.default_rng(0), dict[str, np.ndarray]()
    for method, rate in (("bc", 0.4), ("postbc", 0.8)):
        outcomes[method] = rng.random((3, 20)) < rate
        for seed, row in enumerate(outcomes[method]):
            where = tmp_path / "runs" / method
            write(where, result(method, seed, episodes=20, success_before=0.5, success_after=float(row.mean())))
            episodes(where, seed, "after", "".join(str(int(v)) for v in row))
            episodes(where, seed, "before", "01" * 10, first=float(method == "bc"))  # of other initial states
    content = build([tmp_path / "runs"], tmp_path / "report")
    (pair,) = content.pairs["success_after"]
    a, b = outcomes["postbc"], outcomes["bc"]
    assert pair.result == statistics.compare(a, b)
    assert pair.p_episodes == pytest.approx(statistics.mcnemar(a.ravel(), b.ravel()))
    assert pair.result.difference == pytest.approx(a.mean() - b.mean())
    (before,) = content.pairs["success_before"]
    assert before.p_episodes is None
    page = (tmp_path / "report/report.html").read_text()
    assert f"solved by one alone: {(a & ~b).sum()} and {(b & ~a).sum()}" in page
    # the report's own summary.json says it too; a row of results.csv is numbers alone
    again = build([tmp_path / "report"], tmp_path / "again")
    assert again.pairs["success_after"][0].result == pair.result
    assert (tmp_path / "again/summary.json").read_text() == (tmp_path / "report/summary.json").read_text()
    assert "outcomes" not in (tmp_path / "report/results.csv").read_text()


@pytest.mark.parametrize("damage", ["", "{", "0110", "other result"])
def test_episodes_that_are_not_the_results_are_a_note_and_no_pairs(tmp_path: Path, damage: str) -> None:
    for method in ("bc", "postbc"):
        write(tmp_path / "runs" / method, result(method, 0, episodes=4, success_after=0.75))
        episodes(tmp_path / "runs" / method, 0, "after", "0111")
    file = tmp_path / "runs/bc/seed_0/episodes_after.jsonl"
    if damage == "0110":
        episodes(tmp_path / "runs/bc", 0, "after", damage)
    elif damage == "other result":
        episodes(tmp_path / "runs/bc", 0, "after", "01110111")
    else:
        file.write_text(damage)
    content = build([tmp_path / "runs"], tmp_path / "report")
    assert content.pairs["success_after"][0].p_episodes is None
    assert any("bc/seed_0/episodes_after.jsonl is left out" in note for note in content.notes)


def test_variants_of_a_method_are_compared_with_the_one_that_most_recipes_share(tmp_path: Path) -> None:
    """Two ablations in one sweep, which share K = 20; and its page says so where there is no other method."""
    root = tmp_path / "sweep"
    for number, rate in enumerate((0.3, 0.6, 0.6)):
        noise = [0.0, 0.01, -0.01]
        write(
            root / f"dsrl/postbc-{9 - number}",
            *(result("postbc", s, success_after=rate + noise[(s + number) % 3]) for s in range(3)),
        )
    runs = {"dsrl/postbc-9": ["k-5"], "dsrl/postbc-8": ["k-20", "full"], "dsrl/postbc-7": ["diagonal"]}
    (root / "sweep.json").write_text(json.dumps({"runs": runs}))
    content = build([root], tmp_path / "report")
    assert [g.recipe for g in content.groups] == ["k-5", "k-20, full", "diagonal"]  # as the sweep has them
    pairs = content.variants["success_after"]
    assert content.pairs["success_after"] == []
    assert [(p.ours.recipe, p.baseline.recipe) for p in pairs] == [("k-5", "k-20, full"), ("diagonal", "k-20, full")]
    unadjusted = [statistics.compare(p.ours.values("success_after"), p.baseline.values("success_after")).p for p in pairs]
    assert [p.p_holm for p in pairs] == pytest.approx(list(statistics.holm(unadjusted)))
    assert [p.verdict for p in pairs] == ["lower", "equal within ±0.05"]
    page = (tmp_path / "report/report.html").read_text()
    assert "k-5: PostBC (α=0.5) 0.30, k-20, full: PostBC (α=0.5) 0.60: <b>lower</b>" in page
    assert "nothing can be compared" not in page
    assert "nowhere lower" not in page  # nothing was said of baselines
    (root / "sweep.json").write_text(json.dumps({"runs": {k: [v[0]] for k, v in runs.items()}}))
    assert [p.baseline.recipe for p in build([root], tmp_path / "equals").variants["success_after"]] == [
        "k-5",
        "k-5",
    ]  # the first


def test_log_rank_tests_are_of_the_pairs_that_are_compared_and_adjusted(tmp_path: Path) -> None:
    """Two recipes have a BC and a PostBC each: two pairs, and two tests, not four."""
    for recipe, shift in (("one", 0), ("two", 300)):
        for method, step in (("bc", 2000), ("postbc", 1000)):
            runs = [
                result(method, s, budget_env_steps=4000, curve=[[0, 0.5], [step + shift + 10 * s, 0.95], [4000, 0.95]])
                for s in range(3)
            ]
            write(tmp_path / f"sweep/dsrl/{method}-{recipe}", *runs)
    named = {f"dsrl/{method}-{recipe}": [recipe] for recipe in ("one", "two") for method in ("bc", "postbc")}
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"runs": named}))
    groups = group(collect([tmp_path])[0])[0]
    found = tables.log_ranks(compare_groups(groups, "success_after"))
    assert [(pair.ours.recipe, pair.baseline.recipe) for pair, _, _ in found] == [("one", "one"), ("two", "two")]
    unadjusted = [p for _, p, _ in found]
    assert [p for _, _, p in found] == pytest.approx(list(statistics.holm(unadjusted)))
    assert found[0][2] > found[0][1]
    table = tables.efficiency(groups, compare_groups(groups, "success_after"))
    assert table is not None
    said = [line for row in table.rows for line in row[1].small if "log-rank" in line]
    assert said == [f"log-rank against {p.baseline.label}: p = {h:.2g} (unadjusted {v:.2g})" for p, v, h in found]


def test_steps_to_the_threshold_are_in_the_report(tmp_path: Path) -> None:
    def curve(*rates: float) -> list[list[float]]:
        return [[1000 * k, rate] for k, rate in enumerate(rates)]

    late, soon, never = (0.5, 0.8, 0.95), (0.5, 0.9, 0.9), (0.5, 0.7, 0.8)
    for seed, (bc, post) in enumerate([(never, late), (soon, soon), (never, never)]):
        write(tmp_path / "bc", result("bc", seed, curve=curve(*bc), gradient_steps=400))
        write(tmp_path / "post", result("postbc", seed, curve=curve(*post), gradient_steps=600))
    text, _ = check(build_at(tmp_path, tmp_path / "report"))
    section = text.split("How soon")[1].split("</section>")[0]
    assert "not reached" in section  # BC: the middle one of three
    assert "1 of 3 seeds" in section
    assert "1,667" in section  # PostBC: seeds at 1,000, 1,667 and never
    assert "log-rank against BC" in section
    assert "600" in section


def test_a_run_without_an_end_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "a", result("bc", 0), result("bc", 1), config={"training": {"num_envs": 2}})
    (tmp_path / "a/seed_1/results.json").unlink()
    text, _ = check(build_at(tmp_path / "a", tmp_path / "report"))
    assert "seed_1: finetuning has not finished" in text
    assert "seed_0: finetuning has not finished" not in text


def test_a_report_replaces_reports_alone(tmp_path: Path) -> None:
    write(tmp_path / "runs", result("bc", 0))
    for name in ("summary.json", "report.html", "plots/curve.png"):
        output = tmp_path / name.replace("/", "-")
        (output / name).parent.mkdir(parents=True)
        (output / name).write_text("mine")
        if name == "plots/curve.png":  # a picture of another name is no report's
            build([tmp_path / "runs"], output)
            continue
        with pytest.raises(InputError, match="would replace"):
            build([tmp_path / "runs"], output)
        assert [p.name for p in output.iterdir()] == [name]
    build([tmp_path / "runs"], tmp_path / "report")
    build([tmp_path / "runs"], tmp_path / "report")  # its own


# -- files ---------------------------------------------------------------------------------------------------------------------
def test_summary_and_csv(tmp_path: Path) -> None:
    build([experiment(tmp_path / "runs")], tmp_path / "report")
    summary = json.loads((tmp_path / "report/summary.json").read_text())
    assert len(summary) == 15
    assert all(list(e)[: len(FIELDS)] == list(FIELDS) for e in summary)
    assert summary[0]["curve"] == result("bc", 0)["curve"]
    assert summary[0]["run"] == "runs/bc/seed_0"
    rows = list(csv.DictReader((tmp_path / "report/results.csv").open()))
    assert [float(r["success_after"]) for r in rows] == [e["success_after"] for e in summary]
    build([tmp_path / "report"], tmp_path / "again")  # a former report is material too
    assert (tmp_path / "again/summary.json").read_text() == (tmp_path / "report/summary.json").read_text()


def test_a_former_report_of_the_first_version_is_read(tmp_path: Path) -> None:
    old = [{k: v for k, v in result("bc", s).items() if k != "format"} | {"mystery": 1} for s in range(2)]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/summary.json").write_text(json.dumps(old))
    text, _ = check(build_at(tmp_path / "old", tmp_path / "report"))
    assert "mystery" in text  # said in the notes


class Checker(HTMLParser):
    """Counts tags, and records everything that would be fetched."""

    VOID = ("meta", "img", "br", "link", "hr", "input", "path", "use", "rect", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        values = {k: v or "" for k, v in attrs}
        self.fetched += [v for k, v in values.items() if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        self.ids += [values["id"]] if "id" in values else []
        self.handlers += [k for k in values if k.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check(path: Path) -> tuple[str, Checker]:
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.handlers == []
    assert all(v.startswith("data:") for v in checker.fetched)
    assert "script" not in checker.seen
    assert text.startswith("<!DOCTYPE html>")
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    return text, checker


def build_at(runs: Path, output: Path, title: str = "t") -> Path:
    build([runs], output, title)
    return output / "report.html"


def test_page_is_whole_self_contained_and_follows_light_and_dark(tmp_path: Path) -> None:
    runs = experiment(tmp_path / "runs")
    (runs / "posterior").mkdir()
    (runs / "posterior/posterior.png").write_bytes(PNG)
    (runs / "evaluation/videos").mkdir(parents=True)
    (runs / "evaluation/videos/failure_seed0_1000000007.mp4").write_bytes(MP4)
    text, checker = check(build_at(runs, tmp_path / "report", title="A <b>bold</b> title"))
    assert "<b>bold</b>" not in text
    assert "<h2>Notes" not in text
    assert "&lt;bc&gt;" in text  # commands are shown, not interpreted
    assert checker.seen.count("svg") == 2
    assert sum(v.startswith("data:video/mp4") for v in checker.fetched) == 1
    assert sum(v.startswith("data:image/png") for v in checker.fetched) == 1
    body = text[text.index("<body>") :]
    for name, colours in plots.PALETTE.items():  # no fixed colour is left in a figure
        assert not any(colour in body for colour in colours), name
    assert "var(--post)" in body
    for mark in ("PostBC higher", "0.816", "DSRL-SAC", "least possible 0.062", "abc with changes"):
        assert mark in text
    assert (tmp_path / "report/plots/lift-5-demonstrations-dsrl-sac-curves.png").read_bytes()[:4] == b"\x89PNG"
    referred = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    assert referred
    assert all(checker.ids.count(name) == 1 for name in referred)  # two figures in one page must not share clips or markers


def test_wilson_intervals_of_a_group_are_pooled_over_episodes(tmp_path: Path) -> None:
    text, _ = check(build_at(experiment(tmp_path / "runs"), tmp_path / "report"))
    low, high = statistics.wilson_interval(round(sum(RATES["postbc"]) * 200), 1000)
    assert f"episodes [{low:.2f}, {high:.2f}]" in text
    _, low, high = statistics.mean_interval(np.array(RATES["postbc"]))
    assert f"seeds [{low:.2f}, {high:.2f}]" in text


def test_configurations_that_differ_are_shown(tmp_path: Path) -> None:
    write(tmp_path / "runs/a", result("bc", 0), config={"utd": 8, "policy": "a", "net": {"hidden": 3}})
    write(tmp_path / "runs/b", result("postbc", 0), config={"utd": 9, "policy": "b", "net": {"hidden": 3}})
    text, _ = check(build_at(tmp_path / "runs", tmp_path / "report"))
    assert "Fields in which these runs differ" in text
    assert "too few seeds to tell" in text
    assert shared_and_differing([{"a": 1, "b": None}, {"a": 1}]) == ({"a": 1}, ["b"])


@pytest.mark.parametrize("kept", ["bc", "postbc", "evaluation", "pretraining"])
def test_any_subset_is_enough(tmp_path: Path, kept: str) -> None:
    runs = tmp_path / "runs"
    if kept in RATES:
        write(runs, result(kept, 0, curve=[], data=None, demonstrations=None, wall_clock_s=None, command=None))
    elif kept == "evaluation":
        (runs / "x").mkdir(parents=True)
        (runs / "x/evaluation.json").write_text(json.dumps(EVALUATION))
    else:
        (runs / "x/seed_0").mkdir(parents=True)
        (runs / "x/seed_0/config.yaml").write_text("data:\n  demonstrations: gone.hdf5\n")
        (runs / "x/seed_0/policy.safetensors").write_bytes(b"")
    text, _ = check(build_at(runs, tmp_path / "report"))
    assert "nothing can be compared" in text
    assert ("not pictured" in text) == (kept == "pretraining")
    assert ("[0.40, 0.60]" in text) == (kept == "evaluation")


def test_files_that_are_too_large_stay_outside() -> None:
    found = [Found(f"{i}.mp4", Path(f"{i}.mp4"), size) for i, size in enumerate((400_000, 700_000, 300_000))]
    chosen, left = within(found, megabytes=1.0, number=5)
    assert [f.name for f in chosen] == ["0.mp4", "2.mp4"]
    assert left == 1
    assert within(found, 9, 2)[1] == 1


# -- what must not be trusted --------------------------------------------------------------------------------------------------
BAD: dict[str, tuple[Any, str]] = {
    "not json": ("{", "not JSON"),
    "a list, as the first version wrote it": ([result("bc", 0)], "earlier postbc"),
    "another format": (result("bc", 0, format=1), "earlier postbc"),
    "missing field": ({k: v for k, v in result("bc", 0).items() if k != "episodes"}, "episodes"),
    "null": (result("bc", 0, curve=None), "curve"),
    "rate above one": (result("bc", 0, success_after=1.2), "success_after"),
    "NaN": (result("bc", 0, success_after=float("nan")), "NaN"),
    "a method that is no name": (result("bc", 0) | {"pretraining": 5}, "pretraining"),
    "no episodes": (result("bc", 0, episodes=0), "episodes"),
    "backward curve": (result("bc", 0, curve=[[5, 0.1], [4, 0.2]]), "curve"),
    "short points": (result("bc", 0, curve=[[5]]), "curve"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_results_are_input_errors_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=words) as error:
        build([tmp_path / "runs"], tmp_path / "report")
    assert "results.json" in str(error.value)
    assert not (tmp_path / "report").exists()


def test_bad_directories(tmp_path: Path) -> None:
    for bad in (tmp_path / "none", tmp_path / ("x" * 300), Path("\0")):
        with pytest.raises(InputError):
            build([bad], tmp_path / "report")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing to report"):
        build([tmp_path / "empty"], tmp_path / "report")
    runs = experiment(tmp_path / "runs")
    with pytest.raises(InputError, match="holds a run"):
        build([runs], runs / "bc/seed_0")


def test_markup_in_any_name_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>[/red]$\\frac{$"
    folder = tmp_path / "<img src=x onerror=y>[bold]"
    experiment(folder / "runs", task=evil, data=evil, command=evil, commit=evil, finetuner=evil)
    for name, values in {"evaluation.json": EVALUATION | {"method": evil}, "versions.json": {evil: evil}}.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "config.yaml").write_text(yaml.safe_dump({evil: {evil: [evil]}}))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION | {"agent_seed": "<script>"}))
    (folder / "posterior[red].png").write_bytes(PNG)
    Report((folder,), tmp_path / "report [/red]", evil).run()
    text, checker = check(tmp_path / "report [/red]/report.html")
    assert "&lt;script&gt;alert(1)" in text
    assert "onerror=y&gt;" in text
    assert "[/red]" in capsys.readouterr().out
    assert "left out" in text  # the evaluation
    assert checker.seen.count("img") == 1


def test_only_real_pictures_of_the_run_directory_are_embedded(tmp_path: Path) -> None:
    runs, outside = experiment(tmp_path / "runs"), tmp_path / "secret.png"
    outside.write_bytes(PNG)
    (runs / "posterior").mkdir()
    os.symlink(outside, runs / "posterior/out.png")
    os.symlink(tmp_path, runs / "posterior/up")
    os.symlink("loop.mp4", runs / "posterior/loop.mp4")
    os.mkfifo(runs / "posterior/pipe.png")
    (runs / "posterior/text.png").write_text("root:x:0:0")
    (runs / "posterior/text.mp4").write_text("root:x:0:0")
    (runs / ".hidden").mkdir()
    (runs / ".hidden/posterior.png").write_bytes(PNG)
    _, checker = check(build_at(runs, tmp_path / "report"))
    assert checker.fetched == []
    os.symlink("../real.png", runs / "posterior/inside.png")
    (runs / "real.png").write_bytes(PNG)
    assert len(look([runs]).posterior_pictures()) == 0  # its real name says nothing of a posterior


def test_files_of_other_types_are_notes(tmp_path: Path) -> None:
    runs = experiment(tmp_path / "runs")
    garbage = {"evaluation.json": "[1, 2]", "versions.json": '"text"', "config.yaml": "a: &x [1]\nb: *x"}
    for name, text in garbage.items():
        (runs / name).write_text(text)
    (runs / "bc/seed_0/config.yaml").write_bytes(b"\xff\xfe\x00")
    (runs / "bc/seed_1/versions.json").write_text("[" * 100_000)
    (runs / "bc/seed_1/metrics.csv").write_bytes(b"\x00\xff")
    text, _ = check(build_at(runs, tmp_path / "report"))
    for name in garbage:
        assert f"runs/{name} is left out" in text


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["<b>", "$x$", "[/red]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KINDS: dict[str, dict[str, Any]] = {
    "results.json": result("bc", 0), "evaluation.json": EVALUATION, "versions.json": VERSIONS,
    "config.yaml": {"data": {"demonstrations": "x", "chunk": 4}, "utd": 8}, "summary.json": result("bc", 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_input_errors_or_reports(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, kind: str, data: st.DataObject
) -> None:
    monkeypatch.setattr(Content, "draw", lambda self, name, figure, caption: Picture(caption))  # written out, it takes seconds
    tmp_path = tmp_path_factory.mktemp("mutated")
    values: Any = dict(KINDS[kind])
    for key in data.draw(st.lists(st.sampled_from([*values, "more"]), max_size=2)):
        if data.draw(st.booleans()):
            values.pop(key, None)
        else:
            values[key] = data.draw(PLAIN)
    if data.draw(st.integers(0, 5)) == 0:
        values = data.draw(PLAIN)
    values = [values] if kind == "summary.json" else values
    text = yaml.safe_dump(values) if kind == "config.yaml" else json.dumps(values)
    content = text.encode()
    if data.draw(st.integers(0, 4)) == 0:
        cut = data.draw(st.integers(0, len(content)))
        content = content[:cut] + data.draw(st.binary(max_size=4)) + content[cut + 1 :]
    runs = tmp_path / "runs"
    if kind != "summary.json":
        write(runs / "other", result("postbc", 0))
    (runs / "seed_0" if kind != "summary.json" else runs).mkdir(parents=True)
    ((runs / "seed_0" if kind != "summary.json" else runs) / kind).write_bytes(content)
    try:
        build([runs], tmp_path / "report")
    except InputError as error:
        said = str(error)
        assert kind in said or "nothing to report" in said
        assert kind in ("results.json", "summary.json")
        assert not (tmp_path / "report").exists()
    else:
        check(tmp_path / "report/report.html")
        for entry in json.loads((tmp_path / "report/summary.json").read_text()):
            assert math.isfinite(entry["success_after"])


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    runs = experiment(tmp_path / "runs")
    (tmp_path / "report").write_text("a file")
    with pytest.raises(InputError):
        build([runs], tmp_path / "report")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = experiment(tmp_path / "runs")
    Report((runs / "bc", runs / "postbc"), tmp_path / "out").run()
    out = capsys.readouterr().out
    assert "PostBC higher" in out
    assert str(tmp_path / "out/report.html") in out
    with pytest.raises(InputError):
        Report((), tmp_path / "out")


# -- action distributions ------------------------------------------------------------------------------------------------------
class Wide:
    """Its spread is the first observation, times `scale`."""

    chunk, action_dim, feature_dim, observation_steps = 3, 4, 2, 1

    def __init__(self, scale: float) -> None:
        self.scale, self.shapes, self.normalization = scale, {"state": (2,)}, Normalization.identity(2, 4)

    def encode(self, observation: Any) -> torch.Tensor:
        return observation["state"]

    def loss(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError

    def sample(self, features: torch.Tensor, noise: Any = None, generator: torch.Generator | None = None) -> torch.Tensor:
        wide = torch.tensor([1.0, 3.0, 2.0, 9.0]) * torch.randn(len(features), 3, 4, generator=generator)
        return self.scale * features[:, :1, None] * wide


def some_windows() -> Windows:
    rng = np.random.default_rng(0)
    states = np.column_stack([np.linspace(0.1, 1, 100), rng.random(100)]).astype(np.float32)
    actions = rng.uniform(-0.5, 0.5, (100, 4)).astype(np.float32)
    actions[:, 3] = np.sign(actions[:, 3])  # a gripper
    return Windows(Dataset.from_arrays(np.split(states, 4), np.split(actions, 4)), 3, tail="pad")


def test_action_distribution_dense_and_sparse() -> None:
    windows = some_windows()
    first = windows.observation(torch.arange(100))["state"][:, 0]
    rows = torch.zeros(100, 2, 12)
    rows[:, 0, :4] = first[:, None]  # posterior std of the first action = first observation
    rows[:, 1, 4:] = 100  # later actions of the chunk do not count
    found = action_distribution({"narrow": Wide(0.1), "wide": Wide(0.2)}, windows, Factor(rows))
    assert uncertainty(first[:, None], windows.episode, 3, Factor(rows)) == pytest.approx(first.numpy())
    assert found.axes == (1, 2)  # the widest two that are no switch
    dense, sparse = first[:10].mean().item(), first[-10:].mean().item()
    assert found.spread["dense"]["narrow"] == pytest.approx(0.1 * dense * 2, rel=0.05)  # mean of 1, 3, 2
    assert found.spread["sparse"]["wide"] == pytest.approx(0.2 * sparse * 2, rel=0.05)
    assert found.samples["sparse"]["wide"] == pytest.approx(2 * found.samples["sparse"]["narrow"], rel=1e-4)  # the same noise
    assert found.demonstrated["sparse"] == pytest.approx(windows.chunk(torch.tensor([95]))[0, 0].numpy(), abs=1e-5)
    assert found.posterior_std["dense"] == pytest.approx(np.full(4, first[5].item()))
    assert switches(windows.chunk(torch.arange(100))[:, 0].numpy()).tolist() == [False, False, False, True]
    plots.actions(found, {"narrow": "bc", "wide": "post"})


def test_uncertainty_without_a_posterior_is_distance_to_other_trajectories() -> None:
    x = torch.tensor([[0.0], [0.1], [0.05], [5.0], [5.0]])
    # the two of trajectory 0 are measured against 0.05, 5 and 5; 5 against 0 and 0.1
    assert uncertainty(x, np.array([0, 0, 1, 1, 1]), 1) == pytest.approx([10.05 / 3, 9.85 / 3, 0.05, 4.95, 4.95], abs=0.01)


def test_policies_that_do_not_belong_together_are_noted(tmp_path: Path) -> None:
    for method, seed in (("bc", 0), ("postbc", 1)):
        folder = tmp_path / f"runs/{method}/seed_{seed}"
        save_policy(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"demonstrations": "[/red].hdf5"}}))
    (tmp_path / "runs/bc/seed_0/policy.safetensors").write_bytes(b"\xff" * 100)
    text, _ = check(build_at(tmp_path / "runs", tmp_path / "report"))
    assert "They have no seed in common" in text
