"""From run directories to numbers: every results.json, validated, grouped into settings and methods, compared seed by seed.

A *setting* is what must be equal for two methods to be comparable: task, data, number of demonstrations, finetuner, budget. A *method*
is the pretraining with its own parameter (α or σ). A *group* is one method in one setting: its runs differ in the seed alone.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from postbc import statistics
from postbc.errors import InputError
from postbc.runs import write_json, write_text

Entry = dict[str, Any]

#: fields of an entry, in the order of summary.json; the second half may be absent from a results.json
FIELDS = (
    "task", "data", "finetuner", "pretraining", "seed", "demonstrations", "posterior_weight", "sigma", "budget_env_steps",
    "episodes", "success_before", "success_after", "curve", "wall_clock_s", "command", "commit",
)  # fmt: skip
OPTIONAL = ("chunk_success_before", "chunk_success_after", "run")
NULLABLE = ("data", "demonstrations", "posterior_weight", "sigma", "wall_clock_s", "command", "commit", "budget_env_steps")
PRETRAINING = {"bc": "BC", "sigma-bc": "σ-BC", "postbc": "PostBC"}
FINETUNERS = {"dsrl-sac": "DSRL-SAC", "dsrl-na": "DSRL-NA", "best-of-n": "Best-of-N"}


class Setting(NamedTuple):
    """What is held equal between methods."""

    task: str
    data: str | None
    demonstrations: int | None
    finetuner: str
    budget: str | None
    """80,000 environment steps, or 300 rollouts."""

    @property
    def title(self) -> str:
        """For a heading: Lift · 5 demonstrations · DSRL-SAC."""
        shown = [self.task, f"{self.demonstrations} demonstrations" if self.demonstrations else None]
        return " · ".join([*(s for s in shown if s), FINETUNERS.get(self.finetuner, self.finetuner)])


@dataclass(frozen=True)
class Group:
    """The runs of one method in one setting, by seed."""

    setting: Setting
    pretraining: str
    parameter: float | None
    runs: tuple[Entry, ...]
    """One a seed, in the order of the seeds."""

    @property
    def label(self) -> str:
        """BC, σ-BC (σ=0.1), PostBC (α=1)."""
        name = PRETRAINING.get(self.pretraining, self.pretraining)
        symbol = {"sigma-bc": "σ", "postbc": "α"}.get(self.pretraining)
        return name if symbol is None or self.parameter is None else f"{name} ({symbol}={self.parameter:g})"

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return [run["seed"] for run in self.runs]

    def values(self, field: str) -> np.ndarray:
        """(S,) one number a seed; "area" is the mean height of the learning curve over the budget."""
        if field == "area":
            return np.array([statistics.area_under_curve(curve) for curve in self.curves])
        return np.array([run[field] for run in self.runs], float)

    def pooled_interval(self, field: str) -> tuple[float, float]:
        """Wilson's interval over all episodes of all seeds: of these very policies, not of the method."""
        trials = sum(run["episodes"] for run in self.runs)
        successes = sum(round(run[field] * run["episodes"]) for run in self.runs)
        return statistics.wilson_interval(successes, trials)

    @property
    def curves(self) -> list[list[list[float]]]:
        """Learning curves that start at the pretrained score."""
        return [
            run["curve"] if run["curve"] and run["curve"][0][0] == 0 else [[0, run["success_before"]], *run["curve"]]
            for run in self.runs
        ]


@dataclass(frozen=True)
class Pair:
    """PostBC against a baseline in one setting on one measure."""

    setting: Setting
    ours: Group
    baseline: Group
    field: str
    result: statistics.Comparison
    p_holm: float
    """Holm-adjusted within all pairs of the report on this measure."""

    def mean(self, group: Group) -> float:
        """A group's mean over the seeds that are compared."""
        shared = set(self.ours.seeds) & set(self.baseline.seeds)
        return float(np.mean([v for seed, v in zip(group.seeds, group.values(self.field)) if seed in shared]))

    @property
    def verdict(self) -> str:
        """What may be said, in words."""
        return verdict(self.result, self.p_holm)


def verdict(result: statistics.Comparison, p_holm: float, margin: float = 0.05) -> str:
    """PostBC higher | PostBC lower | equal within ±margin | not distinguishable | one seed: no statement."""
    if result.seeds < 2:
        return "one seed: no statement possible"
    if p_holm < 0.05 and not (result.low < 0 < result.high):
        return "PostBC higher" if result.difference > 0 else "PostBC lower"
    if -margin < result.low and result.high < margin:
        return f"equal within ±{margin:g}"
    return "not distinguishable"


# -- reading -------------------------------------------------------------------------------------------------------------------
def collect(directories: Iterable[str | Path]) -> tuple[list[Entry], list[str]]:
    """Entries of every results.json under the directories, sorted, and notes on what is left out (unfinished runs).

    A directory without any is taken for a former report's, and its summary.json is read.

    Raises:
        InputError: a directory does not exist, or a results.json is damaged; the message names file and field.
    """
    files: dict[Path, Path] = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise InputError("There is no such run directory.", file=directory, remedy="give directories that postbc wrote")
        found = [directory / "results.json"] if (directory / "results.json").is_file() else []
        found += sorted(directory.rglob("results.json"))
        if not found and (directory / "summary.json").is_file():
            found = [directory / "summary.json"]
        for path in found:
            files.setdefault(path.resolve(), Path(directory.name) / path.parent.relative_to(directory))
    entries: list[Entry] = []
    notes: list[str] = []
    for path, name in files.items():
        for number, entry in enumerate(_read(path)):
            if isinstance(entry, dict) and entry.get("success_after") is None and "success_after" in entry:
                notes.append(f"{name}, entry {number}: not finished, left out")
                continue
            checked = _validated(entry, path, number)
            entries.append(checked if path.name == "summary.json" and "run" in checked else {**checked, "run": str(name)})
    return sorted(entries, key=_order), notes


def _order(entry: Entry) -> tuple[Any, ...]:
    rank = {name: i for i, name in enumerate(PRETRAINING)}
    parameter = entry["posterior_weight"] or entry["sigma"] or 0.0
    return (
        entry["task"], entry["data"] or "", entry["demonstrations"] or 0, entry["finetuner"],
        (entry.get("rollout_episodes") if entry["finetuner"] == "best-of-n" else entry["budget_env_steps"]) or 0,
        rank.get(entry["pretraining"], 9), parameter, entry["seed"],
    )  # fmt: skip


def _read(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(
            "This results file cannot be read.", file=path, found=str(error), remedy="run its stage again"
        ) from error
    if not isinstance(entries, list):
        raise InputError("A results file holds a list.", file=path, found=type(entries).__name__, remedy="run its stage again")
    return entries


def _validated(entry: Any, path: Path, number: int) -> Entry:
    def refuse(key: str, found: object, expected: str) -> InputError:
        return InputError(
            "A result is not usable.", file=path, key=f"entry {number}: {key}", found=found, expected=expected,
            remedy="run its stage again, or leave this directory out",
        )  # fmt: skip

    if not isinstance(entry, dict):
        raise refuse("", type(entry).__name__, "an object")
    for key in FIELDS:
        if key not in entry and key not in NULLABLE:
            raise refuse(key, "nothing", "a value")
        if entry.get(key) is None and key not in NULLABLE:
            raise refuse(key, None, "a value")
    for key in ("success_before", "success_after", "chunk_success_before", "chunk_success_after"):
        value = entry.get(key)
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise refuse(key, value, "a rate in [0, 1]")
    for key in ("seed", "episodes"):
        if not isinstance(entry[key], int) or entry[key] < (key == "episodes"):
            raise refuse(key, entry[key], "a whole number")
    for key, known in (("pretraining", PRETRAINING), ("finetuner", FINETUNERS)):
        if entry[key] not in known:
            raise refuse(key, entry[key], ", ".join(known))
    curve = entry["curve"]
    good = isinstance(curve, list) and all(
        isinstance(p, list) and len(p) == 2 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in p) for p in curve
    )
    if not good or any(b[0] <= a[0] for a, b in itertools.pairwise(curve)):
        raise refuse("curve", str(curve)[:80], "[[env_steps, success], ...], env_steps increasing")
    return {**{key: entry.get(key) for key in FIELDS}, **{k: v for k, v in entry.items() if k not in FIELDS}}


# -- grouping and comparing ----------------------------------------------------------------------------------------------------
def group(entries: Sequence[Entry]) -> tuple[list[Group], list[str]]:
    """Groups in the order of the entries, and notes. Several runs of one seed in a group are averaged (and noted)."""
    found: dict[tuple[Any, ...], dict[int, list[Entry]]] = {}
    for entry in entries:
        setting = Setting(entry["task"], entry["data"], entry["demonstrations"], entry["finetuner"], _budget(entry))
        parameter = {"postbc": entry["posterior_weight"], "sigma-bc": entry["sigma"]}.get(entry["pretraining"])
        found.setdefault((setting, entry["pretraining"], parameter), {}).setdefault(entry["seed"], []).append(entry)
    groups, notes = [], []
    for (setting, pretraining, parameter), seeds in found.items():
        made = Group(setting, pretraining, parameter, tuple(_average(seeds[seed]) for seed in sorted(seeds)))
        groups.append(made)
        repeated = {seed: len(runs) for seed, runs in seeds.items() if len(runs) > 1}
        if repeated:
            notes.append(f"{setting.title}, {made.label}: several runs of seed {', '.join(map(str, repeated))}, averaged")
    return groups, notes


def _budget(entry: Entry) -> str | None:
    # Best-of-N is given episodes; how many steps those take differs from run to run, and from method to method
    if entry["finetuner"] == "best-of-n":
        return f"{entry['rollout_episodes']:,} rollouts" if entry.get("rollout_episodes") else None
    return f"{entry['budget_env_steps']:,} environment steps" if entry["budget_env_steps"] else None


def _average(runs: list[Entry]) -> Entry:
    if len(runs) == 1:
        return runs[0]
    total = sum(r["episodes"] for r in runs)
    mean = {k: sum(r[k] * r["episodes"] for r in runs) / total for k in ("success_before", "success_after")}
    grid, values = statistics.interpolate([r["curve"] for r in runs if r["curve"]] or [[[0, mean["success_before"]]]])
    curve = [[float(x), float(y)] for x, y in zip(grid, values.mean(0))]
    return {**runs[0], **mean, "episodes": total, "curve": curve}


def compare_groups(groups: Sequence[Group], field: str) -> list[Pair]:
    """Every PostBC group against every BC and σ-BC group of its setting, on the seeds that both have; Holm over all of them.

    The same pretrained policies under another finetuner, with the same success before, are one comparison, not two.
    """
    seen = set()
    found: list[tuple[Group, Group, statistics.Comparison]] = []
    for ours in groups:
        for other in groups:
            if ours.pretraining != "postbc" or other.pretraining == "postbc" or ours.setting != other.setting:
                continue
            shared = sorted(set(ours.seeds) & set(other.seeds))
            if shared:
                a, b = ([dict(zip(g.seeds, g.values(field)))[s] for s in shared] for g in (ours, other))
                identity = (*ours.setting[:3], ours.label, other.label, *a, *b)
                if field == "success_before" and identity in seen:
                    continue
                seen.add(identity)
                found.append((ours, other, statistics.compare(np.array(a), np.array(b))))
    adjusted = statistics.holm([result.p for _, _, result in found])
    return [Pair(a.setting, a, b, field, result, float(p)) for (a, b, result), p in zip(found, adjusted)]


def write_summary(entries: Sequence[Entry], directory: Path) -> None:
    """summary.json (the issue's fields first, `curve` included) and results.csv (one row a run, no curve)."""
    write_json(directory / "summary.json", list(entries))
    columns = [k for k in FIELDS if k != "curve"] + [k for k in OPTIONAL if any(k in e for e in entries)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    write_text(directory / "results.csv", text.getvalue())
