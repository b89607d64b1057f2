"""What run.sh made, as tables: `python summarise.py OUTPUT RUNS [RUNS ...]`, a directory for all seeds or one for each.

Writes results.csv (a row a seed and policy), comparisons.csv, real_time.csv and tables.md. Success is the simulator's own word, not the
labels.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from postbc.evaluation import Evaluation
from postbc.robot.comparison import Comparison
from postbc.robot.labels import Labels
from postbc.robot.recorded import said_success
from postbc.robot.summary import read_summary
from postbc.schemas import plain, read_json
from postbc.stages.evaluate import EPISODES
from postbc.stages.robot_compare import COMPARISON
from postbc.statistics import mean_interval

METHODS = {"bc": "BC", "postbc": "PostBC"}
POLICIES = {"": "pretrained", "n4-": "Best-of-4", "n16-": "Best-of-16"}


def rollouts(folder: Path) -> dict[str, Any]:
    """Of one session: episodes, success by the simulator and by the labels, share of wrong labels."""
    labels = {number: label for number, label in Labels(folder).current().items() if label in ("success", "failure")}
    truth = {number: said_success(folder, number) for number in labels}
    wrong = sum(truth[number] != (label == "success") for number, label in labels.items())
    return {
        "rollouts": len(labels), "rollout_success": sum(truth.values()) / len(labels),
        "labelled_success": sum(label == "success" for label in labels.values()) / len(labels), "wrong_labels": wrong / len(labels),
    }  # fmt: skip


def main() -> None:
    output, roots = Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]]
    rows: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    lateness: list[dict[str, Any]] = []
    for root in roots:
        for method in METHODS:
            for prefix in POLICIES:
                for folder in sorted((root / "evaluation" / f"{prefix}{method}").glob("seed_*")):
                    if not (folder / EPISODES).exists():
                        continue
                    outcomes = Evaluation.load(folder / EPISODES).outcomes()
                    seed = int(folder.name.removeprefix("seed_"))
                    row = {"seed": seed, "pretraining": method, "policy": POLICIES[prefix], "episodes": len(outcomes),
                           "success": float(outcomes.mean())}  # fmt: skip
                    rows.append({**row, **({} if prefix else rollouts(root / f"rollouts-{method}" / folder.name))})
        for folder in sorted((root / "comparison").glob("seed_*")):
            if not (folder / COMPARISON).exists():
                continue
            found = read_json(folder / COMPARISON, Comparison)
            pair = found.pairs[0]
            solved = {"postbc": found.agents[0].successes, "bc": found.agents[1].successes}
            better = {"A": "postbc", "B": "bc"}.get(found.best or "", "not known")
            verdicts.append({
                "seed": int(folder.name.removeprefix("seed_")), "rounds": found.rounds, **solved, "difference": pair.difference,
                "low": pair.interval[0], "high": pair.interval[1], "better": better,
            })  # fmt: skip
        for folder in sorted(root.glob("real-time-*/seed_*")):
            timing = read_summary(folder).timing
            assert timing is not None
            lateness.append({
                "rate": float(folder.parent.name.removeprefix("real-time-")), "seed": int(folder.name.removeprefix("seed_")),
                "steps": timing.steps, "missed_deadlines": timing.missed_deadlines,
                **{f"{what}_{k}": v for what in ("late", "plan_age", "inference") for k, v in plain(getattr(timing, what)).items()},
            })  # fmt: skip
    for name, table in (("results.csv", rows), ("comparisons.csv", verdicts), ("real_time.csv", lateness)):
        names = list(dict.fromkeys(key for row in table for key in row))
        with (output / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(table)
    lines = ["| | " + " | ".join(POLICIES.values()) + " |", "| --- |" + " --- |" * len(POLICIES)]
    for method, name in METHODS.items():
        cells = []
        for policy in POLICIES.values():
            values = [row["success"] for row in rows if (row["pretraining"], row["policy"]) == (method, policy)]
            each = ", ".join(f"{value:.2f}" for value in values)
            if len(values) > 2:
                mean, low, high = mean_interval(values)
                each = f"{mean:.2f} [{max(low, 0):.2f}, {min(high, 1):.2f}] ({each})"
            cells.append(each)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (output / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
