"""The report: one self-contained HTML file, figures as PNG, summary.json and results.csv, from whatever run directories hold."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from postbc.errors import InputError
from postbc.experiments import report_material as material
from postbc.experiments import report_page as html
from postbc.experiments import report_sections as sections
from postbc.experiments.report_sections import MEASURES, Content
from postbc.experiments.summary import collect, compare_groups, group, write_summary
from postbc.runs import write_text

QUESTION = (
    "Behavioral cloning (BC) fits the actions that it saw. Where demonstrations are sparse it commits to the few of them, and "
    "reinforcement learning, which starts from its rollouts, never meets the alternatives. Posterior behavioral cloning (PostBC) adds "
    "noise with the posterior covariance of the demonstrator's action to the training targets: wide where the demonstrations leave the "
    "action uncertain, nothing where they do not. Does RL finetuning then reach more from PostBC than from BC, and than from BC with "
    "uniform noise (σ-BC), without a worse start?"
)
READING = (
    "Methods are compared seed by seed: a seed shares its demonstrations and evaluation episodes between methods. Intervals and "
    "p-values of differences are Student's over seeds, because a seed is what an experiment repeats; p-values are Holm-adjusted over "
    "all rows of one measure. The exact sign-flip test over seeds is given beside them, with the least value it can take for that "
    "number of seeds. Wilson intervals are over evaluation episodes: they describe these trained policies, not the method."
)


def gather(directories: Sequence[Path]) -> Content:
    """Read everything. InputError if there is nothing to report, or a results.json is damaged."""
    entries, notes = collect(directories)
    groups, more = group(entries)
    pairs = {measure: compare_groups(groups, measure) for measure in MEASURES}
    found = material.stages(directories)
    if not entries and not found and not material.find(directories, "evaluation.json"):
        raise InputError(
            "There is nothing to report here.", file=", ".join(map(str, directories)),
            expected="results.json, evaluation.json or run directories of postbc", remedy="give the directories of finished runs",
        )  # fmt: skip
    if any(s.kind == "pretraining" and _one_subset(s.config) for s in found):
        more.append(
            "All seeds were pretrained on one and the same set of demonstrations: intervals over seeds hold for these demonstrations, "
            "and say nothing about others."
        )
    return Content(entries, groups, pairs, found, list(directories), notes + more)


def _one_subset(config: dict[str, Any]) -> bool:
    several = isinstance(config.get("seeds"), list) and len(config["seeds"]) > 1
    return several and (config.get("data.subset_seed") is not None or config.get("data.num_trajectories", 0) is None)


def build(directories: Sequence[Path], output: Path, title: str = "Posterior behavioral cloning") -> Content:
    """Write report.html, plots/*.png, summary.json and results.csv into `output`; returns what it found.

    Raises:
        InputError: nothing to report, a damaged results.json, or `output` is a run's directory.
    """
    if (output / "config.yaml").exists():
        raise InputError(
            "The output directory holds a run.", file=output, found="config.yaml", remedy="choose another --output"
        )
    content = gather(directories)
    if content.entries:
        write_summary(content.entries, output)
    head = f"<header><p class=soft>postbc report · {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC</p>"
    body = "".join(
        [
            f"{head}<h1>{html.escape(title)}</h1></header>\n",
            html.section("The question", html.paragraph(QUESTION)),
            html.section("The answer here", sections.answer(content)),
            html.section("Before and after finetuning", *(sections.setting(content, s, output) for s in content.settings)),
            html.section(
                "PostBC against BC and σ-BC",
                sections.comparisons(content),
                html.paragraph(READING if content.groups else "", True),
            ),
            html.section("Pretrained policies", sections.evaluations(content)),
            html.section("What the policies would do", sections.actions(content, output)),
            html.section("Where the demonstrations leave the action uncertain", sections.posterior(content)),
            html.section("Videos", sections.videos(content)),
            html.section("The setting", sections.configurations(content)),
            html.section("Every run", sections.runs(content)),
            html.section("How to make it again", sections.commands(content)),
            html.section("Notes", html.bullets(content.notes)),
        ]
    )
    write_text(output / "report.html", html.page(title, body))
    return content
