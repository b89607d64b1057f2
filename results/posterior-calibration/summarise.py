"""What a sweep made, as tables: `python summarise.py OUTPUT RUNS REPORT`, REPORT being what `postbc report RUNS` wrote.

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

from postbc.policies import load_policy, policy_fingerprint
from postbc.statistics import compare, holm, mean_interval, steps_to_threshold

MEASURES = ("before", "best-of-n", "dsrl", "coverage")
SETTINGS = ("five", "mixed", "human", "can", "pusht")


def rows_of(runs: Path, report: Path) -> list[dict[str, Any]]:
    """A row an arm and seed."""
    tries = json.loads((runs / "tries.json").read_text()) if (runs / "tries.json").exists() else {}
    coverage = {policy_fingerprint(load_policy(path)): found["solved_within"][-1] for path, found in tries.items()}
    made: dict[tuple[str, str, int], dict[str, Any]] = {}
    for entry in json.loads((report / "summary.json").read_text()):
        policy = yaml.safe_load((runs.parent / entry["run"] / "config.yaml").read_text())["inputs"]["policy"]
        for name in entry["recipes"]:
            setting, arm = name.split("-", 1)
            row = made.setdefault((setting, arm, entry["seed"]), {"setting": setting, "arm": arm, "seed": entry["seed"]})
            kind = "dsrl" if entry["finetuner"].startswith("dsrl") else entry["finetuner"]
            row |= {"alpha": entry["posterior_weight"], "before": entry["success_before"], kind: entry["success_after"]}
            row |= {"coverage": coverage.get(policy)}
            if kind == "dsrl":
                row["dsrl_steps_to_0.9"] = steps_to_threshold(entry["curve"], 0.9)
    order = {name: k for k, name in enumerate(SETTINGS)}
    return [made[key] for key in sorted(made, key=lambda key: (order.get(key[0], 9), key[1], key[2]))]


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
                    if arm == reference or (reference != "bc" and arm == "bc") or len(seeds) < 3:
                        continue
                    c = compare(np.array([values[s] for s in seeds]), np.array([of[reference][s] for s in seeds]))
                    family.append({"setting": setting, "measure": measure, "arm": arm, "against": reference, "seeds": len(seeds),
                                   "difference": c.difference, "low": c.low, "high": c.high, "p": c.p})  # fmt: skip
                for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
                    found.append({**row, "p_holm": float(p)})
    return found


def tables(rows: list[dict[str, Any]], between: list[dict[str, Any]]) -> str:
    """Markdown: a table a setting (means over seeds), then the differences."""
    lines: list[str] = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        lines += [
            f"\n{setting}\n",
            "| arm | seeds | α | " + " | ".join(MEASURES) + " |",
            "| --- |" + " --- |" * (2 + len(MEASURES)),
        ]
        for arm in dict.fromkeys(row["arm"] for row in rows if row["setting"] == setting):
            mine = [row for row in rows if (row["setting"], row["arm"]) == (setting, arm)]
            cells = []
            for measure in MEASURES:
                values = [row[measure] for row in mine if row.get(measure) is not None]
                cells.append(f"{mean_interval(values)[0]:.3f}" if values else "–")
            alphas = ", ".join(f"{row['alpha']:.2f}" for row in mine if row.get("alpha") is not None)
            lines.append(f"| {arm} | {len(mine)} | {alphas or '–'} | " + " | ".join(cells) + " |")
    lines += ["\n| setting | measure | arm − reference | difference [95 %] | p, after Holm |", "| --- |" + " --- |" * 4]
    for d in between:
        found = f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}] | {d['p']:.3f}, {d['p_holm']:.3f}"
        lines.append(f"| {d['setting']} | {d['measure']} | {d['arm']} − {d['against']} | {found} |")
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    output, runs, report = map(Path, sys.argv[1:4])
    rows = rows_of(runs, report)
    between = differences(rows)
    for name, table in (("results.csv", rows), ("differences.csv", between)):
        with (output / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)))
            writer.writeheader()
            writer.writerows(table)
    (output / "tables.md").write_text(tables(rows, between))
    print(tables(rows, between))


if __name__ == "__main__":
    main()
