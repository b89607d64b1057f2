"""`make bench`: every speed figure, ours and theirs side by side in one run, into benchmarks/latest.json.

python -m benchmarks [NAME ...]      only the figures whose name contains NAME
"""

from __future__ import annotations

import importlib
import platform
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from postbc.disk import write_json

#: file -> the figures it measures, with the least ratio that the project asks of itself; all of one thread against one but the
#: simulator's. The ensemble's is 2 and more on processors with bfloat16 units.
FIGURES = {
    "bench_core": {"ensemble_member_step": 1.2, "closed_form_posterior": 30.0, "ddim_sampling": 1.3},
    "bench_dsrl": {"dsrl_sac_update": 1.1},
    "bench_iql": {"iql_update": 1.1},
    "bench_finetuners": {"dppo_update": 1.5, "residual_update": 1.5},
    "bench_lift_to_90": {"lift_to_90": 5.0},
    "bench_control": {
        "control_steps_lift": 5.0, "control_steps_can": 4.0, "control_steps_square": 4.0, "control_thread_scaling": 1.7,
        "control_fraction_of_mj_step": 0.7,
    },
    "bench_images": {"image_loading": 2.0},
    "bench_libero": {"libero_states": 5.0, "libero_images": 5.0, "libero_memory": 1.0},
}  # fmt: skip


def main(asked: list[str]) -> None:
    """Measure, print, write."""
    results = {}
    for module, figures in FIGURES.items():
        if any(word in name for name in figures for word in asked) or not asked:
            print(f"measuring {', '.join(figures)} ...", flush=True)
            results.update(importlib.import_module(f"benchmarks.{module}").run())
    goals = {name: goal for figures in FIGURES.values() for name, goal in figures.items()}
    table = Table(title=f"ours against theirs, one run ({platform.processor() or platform.machine()})")
    for heading in ("figure", "ours", "theirs", "unit", "ratio", "goal"):
        table.add_column(heading, justify="left" if heading in ("figure", "unit") else "right")
    for name, r in results.items():
        table.add_row(
            name, f"{r['ours']:.4g}", f"{r['theirs']:.4g}", r["unit"], f"{r['ratio']:.2f}", f"≥ {goals.get(name, 0):g}"
        )
    Console().print(table)
    if not asked:
        write_json(Path(__file__).parent / "latest.json", results)


if __name__ == "__main__":
    main(sys.argv[1:])
