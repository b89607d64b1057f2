"""What a sweep made, as tables: `python summarise.py OUTPUT RUNS`.

Writes results.csv (a row an arm and seed), differences.csv (paired over seeds: each arm against BC, and against α = 1) and tables.md.
Coverage is of RUNS/tries.json, where that is there.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from postbc.experiments.formats import markdown
from postbc.experiments.summary import collect
from postbc.experiments.tables import Cell, Table
from postbc.policies import load_policy, policy_fingerprint
from postbc.statistics import FEWEST_SEEDS, compare, holm, steps_to_threshold

MEASURES = ("before", "best-of-n", "dsrl", "coverage")
SETTINGS = ("five", "mixed", "human", "can", "pusht")


def rows_of(runs: Path) -> list[dict[str, Any]]:
    """A row an arm and seed, of what has finished."""
    tries = json.loads((runs / "tries.json").read_text()) if (runs / "tries.json").exists() else {}
    coverage = {policy_fingerprint(load_policy(path)): found["solved_within"][-1] for path, found in tries.items()}
    made: dict[tuple[str, str, int], dict[str, Any]] = {}
    for entry in collect([runs])[0]:
        assert entry.run is not None
        policy = yaml.safe_load((runs.parent / entry.run / "config.yaml").read_text())["inputs"]["policy"]
        for name in entry.recipes:
            setting, arm = name.split("-", 1)
            row = made.setdefault((setting, arm, entry.seed), {"setting": setting, "arm": arm, "seed": entry.seed})
            kind = "dsrl" if entry.finetuner.startswith("dsrl") else entry.finetuner
            row |= {"alpha": entry.posterior_weight, "before": entry.success_before, kind: entry.success_after}
            row |= {"coverage": coverage.get(policy)}
            if kind == "dsrl":
                row["dsrl_steps_to_0.9"] = steps_to_threshold(entry.curve, 0.9)
    return [made[key] for key in sorted(made, key=lambda key: (SETTINGS.index(key[0]), key[1], key[2]))]


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every arm against BC and against α = 1; Holm over the arms of a setting and measure."""
    found: list[dict[str, Any]] = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        for measure in MEASURES:
            of: dict[str, dict[int, float]] = {}
            for row in rows:
                if row["setting"] == setting and row.get(measure) is not None:
                    of.setdefault(row["arm"], {})[row["seed"]] = row[measure]
            for reference in ("bc", "alpha-1"):
                family = []
                for arm, values in of.items():
                    seeds = sorted(set(values) & set(of.get(reference, {})))
                    if arm == reference or (reference != "bc" and arm == "bc") or len(seeds) < FEWEST_SEEDS:
                        continue
                    c = compare(np.array([values[s] for s in seeds]), np.array([of[reference][s] for s in seeds]))
                    family.append({"setting": setting, "measure": measure, "arm": arm, "against": reference, "seeds": len(seeds),
                                   "difference": c.difference, "low": c.low, "high": c.high, "p": c.p})  # fmt: skip
                for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
                    found.append({**row, "p_holm": float(p)})
    return found


def tables(rows: list[dict[str, Any]], between: list[dict[str, Any]]) -> str:
    """Markdown: a table a setting (means over seeds), then the differences."""
    made = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        lines = []
        for arm in dict.fromkeys(row["arm"] for row in rows if row["setting"] == setting):
            mine = [row for row in rows if (row["setting"], row["arm"]) == (setting, arm)]
            alphas = ", ".join(f"{row['alpha']:.2f}" for row in mine if row.get("alpha") is not None)
            values = [[row[measure] for row in mine if row.get(measure) is not None] for measure in MEASURES]
            means = [f"{np.mean(of):.3f}" if of else "–" for of in values]
            lines.append([*map(Cell, (arm, str(len(mine)), alphas or "–", *means))])
        made.append(Table(("arm", "seeds", "α", *MEASURES), lines, f"{setting}: means over seeds"))
    lines = []
    for d in between:
        interval = f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
        words = (d["setting"], d["measure"], f"{d['arm']} − {d['against']}", interval, f"{d['p']:.3f}, {d['p_holm']:.3f}")
        lines.append([*map(Cell, words)])
    header = ("setting", "measure", "arm − reference", "difference [95 %]", "p, after Holm")
    return "\n".join(map(markdown, [*made, Table(header, lines, "Paired over seeds", text=(1, 2))]))


def main() -> None:
    output, runs = map(Path, sys.argv[1:3])
    rows = rows_of(runs)
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
