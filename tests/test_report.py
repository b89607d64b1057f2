"""The report: numbers equal those of statistics.py, the page is whole and self-contained, and any subset of material is enough."""

from __future__ import annotations

import base64
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from postbc import cli, statistics
from postbc.demonstrations import LOW_DIM_KEYS, Demonstrations, Normalization, Windows, chunk_windows, write_robomimic
from postbc.errors import InputError
from postbc.experiments import report_plots
from postbc.experiments.action_distribution import action_distribution, switches, uncertainty
from postbc.experiments.report import build
from postbc.experiments.report_material import shared_and_differing, within
from postbc.experiments.summary import FIELDS, collect, compare_groups, group, verdict
from postbc.nn import Generators, make_generators, randn
from postbc.policies import DiffusionConfig, DiffusionPolicy
from postbc.posterior.factor import Factor

RATES = {"bc": [0.6, 0.62, 0.58, 0.64, 0.6], "sigma-bc": [0.7, 0.5, 0.66, 0.6, 0.62], "postbc": [0.8, 0.84, 0.79, 0.83, 0.82]}
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def entry(pretraining: str, seed: int, **changes: Any) -> dict[str, Any]:
    after = RATES[pretraining][seed]
    return {
        "task": "Lift", "data": "lift.hdf5", "finetuner": "dsrl-sac", "pretraining": pretraining, "seed": seed,
        "demonstrations": 5, "posterior_weight": 0.5 if pretraining == "postbc" else None,
        "sigma": 0.1 if pretraining == "sigma-bc" else None, "budget_env_steps": 1000, "episodes": 200, "success_before": 0.5,
        "success_after": after, "chunk_success_before": 0.45, "chunk_success_after": after - 0.05,
        "curve": [[0, 0.5], [500, (0.5 + after) / 2], [1000, after]], "wall_clock_s": 60.0,
        "command": f"postbc finetune dsrl --policy <{pretraining}>", "commit": "abc",
    } | changes  # fmt: skip


def write(directory: Path, entries: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(entries))
    if config is not None:
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        (directory / "versions.json").write_text(json.dumps({"torch": "2", "command": "postbc finetune dsrl"}))
    return directory


def experiment(root: Path, **changes: Any) -> Path:
    for method in RATES:
        write(root / f"dsrl-{method}", [entry(method, s, **changes) for s in range(5)], {"utd": 8, "policy": method})
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
    write(tmp_path / "a", [entry("bc", s) for s in (0, 1, 2)] + [entry("postbc", s) for s in (1, 2, 3)])
    write(tmp_path / "b", [entry("bc", s, budget_env_steps=2000) for s in (0, 1)])
    write(tmp_path / "c", [entry("postbc", s, finetuner="best-of-n") for s in (0, 1)])
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
        runs = [entry(method, s, finetuner="best-of-n", budget_env_steps=900 + 10 * s, rollout_episodes=300) for s in range(5)]
        write(tmp_path / method, runs)
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
        ([0.5], 1.0, "one seed: no statement possible"),
    ],
)
def test_verdicts(differences: list[float], p: float, expected: str) -> None:
    d = np.array(differences)
    assert verdict(statistics.compare(d, np.zeros_like(d)), p) == expected


def test_repeated_seeds_are_averaged_and_unfinished_runs_noted(tmp_path: Path) -> None:
    write(tmp_path / "a", [entry("bc", 0, success_after=0.4), entry("bc", 1, success_after=None)])
    write(tmp_path / "b", [entry("bc", 0, success_after=0.6, curve=[[0, 0.5], [1000, 0.6]])])
    entries, notes = collect([tmp_path, tmp_path / "a"])  # overlapping directories: a file counts once
    assert len(entries) == 2
    assert "not finished" in notes[0]
    (only,), more = group(entries)
    assert only.values("success_after").tolist() == [0.5]
    assert "averaged" in more[0]


# -- files ---------------------------------------------------------------------------------------------------------------------
def test_summary_and_csv(tmp_path: Path) -> None:
    build([experiment(tmp_path / "runs")], tmp_path / "report")
    summary = json.loads((tmp_path / "report/summary.json").read_text())
    assert len(summary) == 15
    assert all(list(e)[: len(FIELDS)] == list(FIELDS) for e in summary)
    assert summary[0]["curve"] == entry("bc", 0)["curve"]
    assert summary[0]["run"] == "runs/dsrl-bc"
    rows = list(csv.DictReader((tmp_path / "report/results.csv").open()))
    assert [float(r["success_after"]) for r in rows] == [e["success_after"] for e in summary]
    build([tmp_path / "report"], tmp_path / "again")  # a former report is material too
    assert (tmp_path / "again/summary.json").read_text() == (tmp_path / "report/summary.json").read_text()


class Checker(HTMLParser):
    """Counts tags, and records everything that would be fetched."""

    VOID = ("meta", "img", "br", "link", "hr", "input", "path", "use", "rect", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        values = {k: v or "" for k, v in attrs}
        self.fetched += [v for k, v in values.items() if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        self.ids += [values["id"]] if "id" in values else []
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
    assert all(v.startswith("data:") for v in checker.fetched)
    assert "script" not in checker.seen
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    return text, checker


def test_page_is_whole_self_contained_and_follows_light_and_dark(tmp_path: Path) -> None:
    runs = experiment(tmp_path / "runs")
    (runs / "posterior").mkdir()
    (runs / "posterior/posterior_seed_0.png").write_bytes(PNG)
    (runs / "evaluation/videos").mkdir(parents=True)
    (runs / "evaluation/videos/failure_seed0_1000000007.mp4").write_bytes(b"not a real video")
    text, checker = check(build_at(runs, tmp_path / "report", title="A <b>bold</b> title"))
    assert "<b>bold</b>" not in text
    assert "&lt;bc&gt;" in text  # commands are shown, not interpreted
    assert checker.seen.count("svg") == 2
    assert sum(v.startswith("data:video/mp4") for v in checker.fetched) == 1
    assert sum(v.startswith("data:image/png") for v in checker.fetched) == 1
    body = text[text.index("<body>") :]
    for name, colours in report_plots.PALETTE.items():  # no fixed colour is left in a figure
        assert not any(colour in body for colour in colours), name
    assert "var(--post)" in body
    for mark in ("PostBC higher", "0.816", "DSRL-SAC", "least possible 0.062"):
        assert mark in text
    assert (tmp_path / "report/plots/lift--5-demonstrations--dsrl-sac-curves.png").read_bytes()[:4] == b"\x89PNG"
    referred = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    assert referred
    assert all(checker.ids.count(name) == 1 for name in referred)  # two figures in one page must not share clips or markers


def build_at(runs: Path, output: Path, title: str = "t") -> Path:
    build([runs], output, title)
    return output / "report.html"


def test_wilson_intervals_of_a_group_are_pooled_over_episodes(tmp_path: Path) -> None:
    text, _ = check(build_at(experiment(tmp_path / "runs"), tmp_path / "report"))
    low, high = statistics.wilson_interval(round(sum(RATES["postbc"]) * 200), 1000)
    assert f"episodes [{low:.2f}, {high:.2f}]" in text
    _, low, high = statistics.mean_interval(np.array(RATES["postbc"]))
    assert f"seeds [{low:.2f}, {high:.2f}]" in text


def test_configurations_that_differ_are_shown(tmp_path: Path) -> None:
    write(tmp_path / "runs/a", [entry("bc", 0)], {"utd": 8, "policy": "a", "net": {"hidden": 3}})
    write(tmp_path / "runs/b", [entry("postbc", 0)], {"utd": 9, "policy": "b", "net": {"hidden": 3}})
    text, _ = check(build_at(tmp_path / "runs", tmp_path / "report"))
    assert "Fields in which these runs differ" in text
    assert "no statement possible" in text
    assert shared_and_differing([{"a": 1, "b": None}, {"a": 1}]) == ({"a": 1}, ["b"])


@pytest.mark.parametrize("kept", ["bc", "postbc", "evaluation", "pretraining"])
def test_any_subset_is_enough(tmp_path: Path, kept: str) -> None:
    runs = tmp_path / "runs"
    if kept in RATES:
        write(runs / "x", [entry(kept, 0, curve=[], data=None, demonstrations=None, wall_clock_s=None, command=None)])
    elif kept == "evaluation":
        (runs / "x").mkdir(parents=True)
        rate = {"success": 0.5, "success_interval": [0.4, 0.6], "chunk_success": 0.4, "chunk_success_interval": [0.3, 0.5]}
        value = {"method": "bc", "members": [{"seed": 3, "episodes": 50, **rate}]}
        (runs / "x/evaluation.json").write_text(json.dumps(value))
    else:
        (runs / "x").mkdir(parents=True)
        (runs / "x/config.yaml").write_text("data:\n  demonstrations: gone.hdf5\n")
        (runs / "x/policy.safetensors").write_bytes(b"")
        (runs / "x/policy.json").write_text(json.dumps({"seeds": [0], "about": {"method": "bc"}}))
    text, _ = check(build_at(runs, tmp_path / "report"))
    assert "nothing can be compared" in text
    assert ("not pictured" in text) == (kept == "pretraining")


def test_files_that_are_too_large_stay_outside(tmp_path: Path) -> None:
    found = []
    for i, size in enumerate((400_000, 700_000, 300_000)):
        path = tmp_path / f"{i}.mp4"
        path.write_bytes(b"0" * size)
        found.append((path.name, path))
    chosen, left = within(found, megabytes=1.0, number=5)
    assert [name for name, _ in chosen] == ["0.mp4", "2.mp4"]
    assert left == 1
    assert within(found, 9, 2)[1] == 1


BAD: dict[str, tuple[Any, str]] = {
    "not json": ("{", "cannot be read"),
    "not a list": ({}, "holds a list"),
    "missing field": ([{k: v for k, v in entry("bc", 0).items() if k != "episodes"}], "episodes"),
    "null": ([entry("bc", 0, success_before=None)], "success_before"),
    "rate above one": ([entry("bc", 0, success_after=1.2)], "success_after"),
    "NaN": ([entry("bc", 0, success_after=float("nan"))], "success_after"),
    "unknown method": ([{**entry("bc", 0), "pretraining": "dagger"}], "pretraining"),
    "no episodes": ([entry("bc", 0, episodes=0)], "episodes"),
    "backward curve": ([entry("bc", 0, curve=[[5, 0.1], [4, 0.2]])], "curve"),
    "short points": ([entry("bc", 0, curve=[[5]])], "curve"),
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
    with pytest.raises(InputError, match="no such run directory"):
        build([tmp_path / "none"], tmp_path / "report")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing to report"):
        build([tmp_path / "empty"], tmp_path / "report")
    runs = experiment(tmp_path / "runs")
    with pytest.raises(InputError, match="holds a run"):
        build([runs], runs / "dsrl-bc")


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "report", ("postbc.experiments.report_command:Report", ""))
    runs = experiment(tmp_path / "runs")
    assert cli.main(["report", str(runs / "dsrl-bc"), str(runs / "dsrl-postbc"), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "PostBC higher" in out
    assert str(tmp_path / "out/report.html") in out
    assert cli.main(["report", str(tmp_path / "none"), "--output", str(tmp_path / "out2")]) == 2


# -- action distributions ------------------------------------------------------------------------------------------------------
class Wide:
    """Its spread is the first observation, times `scale`."""

    members, observation_dim, chunk, action_dim = 1, 2, 3, 4

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def loss(self, observation: Tensor, chunk: Tensor, generators: Generators) -> Tensor:
        raise NotImplementedError

    def sample(self, observation: Tensor, noise: Tensor | None = None, generators: Generators | None = None) -> Tensor:
        assert generators is not None
        wide = torch.tensor([1.0, 3.0, 2.0, 9.0]) * randn(generators, observation.shape[1], 3, 4)
        return self.scale * observation[:, :, :1, None] * wide


def some_windows() -> Windows:
    rng = np.random.default_rng(0)
    observations = np.column_stack([np.linspace(0.1, 1, 100), rng.random(100)]).astype(np.float32)
    chunks = rng.uniform(-0.5, 0.5, (100, 3, 4)).astype(np.float32)
    chunks[:, :, 3] = np.sign(chunks[:, :, 3])  # a gripper
    return Windows(observations, chunks, np.arange(100) % 4, np.arange(100) // 4)


def test_action_distribution_dense_and_sparse() -> None:
    windows = some_windows()
    rows = torch.zeros(100, 2, 12)
    rows[:, 0, :4] = torch.as_tensor(windows.observations[:, :1])  # posterior std of the first action = first observation
    rows[:, 1, 4:] = 100  # later actions of the chunk do not count
    found = action_distribution({"narrow": Wide(0.1), "wide": Wide(0.2)}, windows, Factor(rows))
    assert uncertainty(windows, Factor(rows)) == pytest.approx(windows.observations[:, 0])
    assert found.axes == (1, 2)  # the widest two that are no switch
    dense, sparse = windows.observations[:10, 0].mean(), windows.observations[-10:, 0].mean()
    assert found.spread["dense"]["narrow"] == pytest.approx(0.1 * dense * 2, rel=0.05)  # mean of 1, 3, 2
    assert found.spread["sparse"]["wide"] == pytest.approx(0.2 * sparse * 2, rel=0.05)
    assert found.samples["sparse"]["wide"] == pytest.approx(
        2 * found.samples["sparse"]["narrow"], rel=1e-4
    )  # same latent noise
    assert found.demonstrated["sparse"] == pytest.approx(windows.chunks[95, 0])
    assert found.posterior_std["dense"] == pytest.approx(np.full(4, windows.observations[5, 0]))
    assert switches(windows.chunks[:, 0]).tolist() == [False, False, False, True]
    report_plots.actions(found, {"narrow": "bc", "wide": "post"})


def test_uncertainty_without_a_posterior_is_distance_to_other_trajectories() -> None:
    x = np.array([[0.0], [0.1], [0.05], [5.0], [5.0]], np.float32)
    windows = Windows(x, np.zeros((5, 1, 2), np.float32), np.array([0, 0, 1, 1, 1]), np.arange(5))
    # the two of trajectory 0 are measured against 0.05, 5 and 5; 5 against 0 and 0.1
    assert uncertainty(windows) == pytest.approx([(0.05 + 10) / 3, (0.05 + 9.8) / 3, 0.075 * 2 / 3, 4.95, 4.95], abs=0.03)


def test_policies_are_pictured_with_their_demonstrations(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = (30, 40)
    data = Demonstrations.from_arrays(
        [rng.random((n, 4), np.float32) for n in lengths], [rng.uniform(-1, 1, (n, 2)).astype(np.float32) for n in lengths],
        observation_keys=LOW_DIM_KEYS, observation_dims=(1, 1, 1, 1), environment={"env_name": "Lift"},
    )  # fmt: skip
    write_robomimic(tmp_path / "data.hdf5", data)
    normalization = Normalization.fit(data)
    assert len(chunk_windows(data, 2))
    for method in ("bc", "postbc"):
        policy = DiffusionPolicy(
            DiffusionConfig(chunk=2, hidden=8, denoising_steps=4, inference_steps=2), 4, 2, [0, 1], make_generators([0, 1]),
            [normalization], {"method": method, "posterior_weight": 1.0 if method == "postbc" else None},
        )  # fmt: skip
        folder = tmp_path / "runs" / method
        policy.save(folder / "policy.safetensors")
        config = {
            "seeds": [0, 1],
            "data": {"demonstrations": str(tmp_path / "data.hdf5"), "chunk": 2, "num_trajectories": None},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    text, checker = check(build_at(tmp_path / "runs", tmp_path / "report"))
    assert "not pictured" not in text
    assert checker.seen.count("svg") == 1
    assert "PostBC (α=1)" in text
    assert "nearest demonstrated states of other trajectories" in text
    assert "one and the same set of demonstrations" in text
