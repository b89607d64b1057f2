"""What sweeps made, as tables: `python summarise.py OUTPUT RUNS`.

Writes results.csv (a row an arm and seed), differences.csv (paired over seeds: each arm against BC and against α = 1, `auto` against
the fixed α that is best in hindsight, closed-form-auto against auto) and tables.md. Rows of OUTPUT/results.csv that RUNS does not have
stay: one machine ran some seeds, another the others. Coverage is of OUTPUT/tries.json, what α was told of the policy's calibration.json
or of RUNS/calibration, where these are there.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from postbc.experiments.formats import markdown
from postbc.experiments.summary import Entry, collect
from postbc.experiments.tables import Cell, Table
from postbc.policies import load_policy, policy_fingerprint
from postbc.posterior import Calibration
from postbc.schemas import read_json
from postbc.statistics import FEWEST_SEEDS, compare, holm, steps_to_threshold

STEPS = "dsrl_steps_to_0.9"
MEASURES = ("before", "best-of-n", "dsrl", "coverage", STEPS)
SETTINGS = ("five", "mixed", "human", "can", "pusht")
AUTO = {"alpha-1": "auto", "closed-form-1": "closed-form-auto"}
"""Arms of α = 1, and what is the same run, to the bit, where `auto` falls back to 1."""
REFERENCES = {"closed-form-auto": ("bc", "alpha-1", "auto"), "auto": ("bc", "alpha-1", "best"), "alpha-1": ("bc",)}
"""What an arm is held against, if not BC and α = 1."""


def facts_of(directory: Path, runs: Path) -> dict[str, Any]:
    """Of a policy's run: what α was told, and the seconds that its posterior took from its start to its file, as the machine was."""
    found: dict[str, Any] = {}
    config = yaml.safe_load((directory / "config.yaml").read_text())
    if config["posterior"] is None:
        return found
    name = Path(config["posterior"]).name
    posterior = runs / "posterior" / name / directory.name
    if (posterior / "posterior.safetensors").exists():
        begun, done = ((posterior / file).stat().st_mtime for file in ("versions.json", "posterior.safetensors"))
        found["posterior_seconds"] = round(done - begun)
    for path in (directory / "calibration.json", runs / "calibration" / name / directory.name / "calibration.json"):
        if path.exists():
            c = read_json(path, Calibration)
            return found | {"told": c.chunk.alpha, "low": c.chunk.low, "high": c.chunk.high, "safe": c.safe, "source": c.source}
    return found


def steps_to(entry: Entry, success: float = 0.9) -> float:
    """Environment steps to that success; the budget where it was never seen, which is too few."""
    steps = steps_to_threshold(entry.curve, success)
    return entry.curve[-1][0] if steps is None else steps


def rows_of(runs: Path) -> list[dict[str, Any]]:
    """A row an arm and seed, of what has finished."""
    finished = [path.parent for path in runs.glob("pretraining/*/seed_*/policy.safetensors")]
    facts = {policy_fingerprint(load_policy(path)): facts_of(path, runs) for path in finished}
    made: dict[tuple[str, str, int], dict[str, Any]] = {}
    for entry in collect([runs])[0]:
        assert entry.run is not None
        policy = yaml.safe_load((runs.parent / entry.run / "config.yaml").read_text())["inputs"]["policy"]
        for name in entry.recipes:
            setting, arm = name.split("-", 1)
            row = made.setdefault((setting, arm, entry.seed), {"setting": setting, "arm": arm, "seed": entry.seed})
            kind = "dsrl" if entry.finetuner.startswith("dsrl") else entry.finetuner
            row |= {"alpha": entry.posterior_weight, "before": entry.success_before, kind: entry.success_after}
            row |= facts.get(policy, {})
            if kind == "dsrl":
                row[STEPS] = steps_to(entry)
    return [*made.values()]


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.csv, empty cells left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: yaml.safe_load(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def together(former: list[dict[str, Any]], new: list[dict[str, Any]], tries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Former rows with new cells over them and the coverage of tries ("setting/arm/seed"), in the order of settings, arms and seeds.

    Where `auto` fell back, its row is α = 1's.
    """
    made: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in (*former, *new):
        made.setdefault((row["setting"], row["arm"], row["seed"]), {}).update(row)
    for (setting, arm, seed), row in made.items():
        if (found := tries.get(f"{setting}/{arm}/{seed}")) is not None:
            row["coverage"] = found["solved_within"][-1]
    for (setting, arm, seed), row in [*made.items()]:
        if arm in AUTO and row.get("source") == "fallback":
            made[setting, AUTO[arm], seed] = {**row, "arm": AUTO[arm]}
    return [made[key] for key in sorted(made, key=lambda key: (SETTINGS.index(key[0]), key[1], key[2]))]


def best_in_hindsight(of: Mapping[str, Mapping[int, float]], measure: str) -> str | None:
    """The arm of a fixed α, BC among them, whose mean over the seeds that `auto` and all of them have is best."""
    fixed = {arm: values for arm, values in of.items() if arm == "bc" or arm.startswith("alpha-")}
    seeds = set(of.get("auto", {})).intersection(*fixed.values())
    sign = -1 if measure == STEPS else 1
    return max(fixed, key=lambda arm: sign * np.mean([fixed[arm][s] for s in seeds])) if fixed and seeds else None


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every arm against its references; Holm over the arms of a setting, measure and reference."""
    found: list[dict[str, Any]] = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        for measure in MEASURES:
            of: dict[str, dict[int, float]] = {}
            for row in rows:
                if row["setting"] == setting and row.get(measure) is not None:
                    of.setdefault(row["arm"], {})[row["seed"]] = row[measure]
            best = best_in_hindsight(of, measure)
            for reference in ("bc", "alpha-1", "best", "auto"):
                other, family = best if reference == "best" else reference, []
                for arm, values in of.items():
                    seeds = sorted(set(values) & set(of.get(other or "", {})))
                    wanted = reference in REFERENCES.get(arm, ("bc", "alpha-1")) and arm not in ("bc", other)
                    if not wanted or len(seeds) < FEWEST_SEEDS:
                        continue
                    c = compare(np.array([values[s] for s in seeds]), np.array([of[other or ""][s] for s in seeds]))
                    name = f"best α ({other})" if reference == "best" else reference
                    family.append({"setting": setting, "measure": measure, "arm": arm, "against": name, "seeds": len(seeds),
                                   "difference": c.difference, "low": c.low, "high": c.high, "p": c.p})  # fmt: skip
                for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
                    found.append({**row, "p_holm": float(p)})
    return found


def tables(rows: list[dict[str, Any]], between: list[dict[str, Any]]) -> str:
    """Markdown: a table a setting (means over seeds), what α was told, then the differences."""
    made = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        lines = []
        for arm in dict.fromkeys(row["arm"] for row in rows if row["setting"] == setting):
            mine = [row for row in rows if (row["setting"], row["arm"]) == (setting, arm)]
            alphas = ", ".join(f"{row['alpha']:.2f}" for row in mine if row.get("alpha") is not None)
            columns = [[row[name] for row in mine if row.get(name) is not None] for name in (*MEASURES, "posterior_seconds")]
            means = [f"{np.mean(of):.{3 if np.mean(of) < 2 else 0}f}" if of else "–" for of in columns]
            lines.append([*map(Cell, (arm, str(len(mine)), alphas or "–", *means))])
        header = ("arm", "seeds", "α", *MEASURES, "posterior fit, s")
        made.append(Table(header, lines, f"{setting}: means over seeds"))
    lines = []
    for row in (row for row in rows if row.get("source")):
        safe = "–" if row.get("safe") is None else f"{row['safe']:.2f}"
        told = f"{row['told']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(
            [*map(Cell, (row["setting"], row["arm"], str(row["seed"]), f"{row['alpha']:.2f}", told, safe, row["source"]))]
        )
    if lines:
        made.append(
            Table(("setting", "arm", "seed", "α", "likelihood's [90 %]", "safe up to", "source"), lines, "What α was told")
        )
    lines = []
    for d in between:
        digits = 0 if d["measure"] == STEPS else 3
        interval = f"{d['difference']:+.{digits}f} [{d['low']:+.{digits}f}, {d['high']:+.{digits}f}]"
        words = (d["setting"], d["measure"], f"{d['arm']} − {d['against']}", interval, f"{d['p']:.3f}, {d['p_holm']:.3f}")
        lines.append([*map(Cell, words)])
    header = ("setting", "measure", "arm − reference", "difference [95 %]", "p, after Holm")
    return "\n".join(map(markdown, [*made, Table(header, lines, "Paired over seeds", text=(1, 2))]))


def main() -> None:
    output, runs = map(Path, sys.argv[1:3])
    tries = json.loads((output / "tries.json").read_text()) if (output / "tries.json").exists() else {}
    rows = together(rows_in(output / "results.csv"), rows_of(runs), tries)
    between = differences(rows)
    for name, table in (("results.csv", rows), ("differences.csv", between)):
        with (output / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)))
            writer.writeheader()
            writer.writerows(table)
    text = tables(rows, between)
    (output / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
