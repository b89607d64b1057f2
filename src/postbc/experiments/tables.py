"""The report's tables: from groups, comparisons and run directories to plain cells, which `page.html.j2` sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from postbc import statistics
from postbc.evaluation import TaskRate
from postbc.experiments.material import Evaluated, Material, Stage, shared_and_differing
from postbc.experiments.summary import FINETUNERS, PRETRAINING, TOO_FEW, Entry, Group, Pair

MEASURES = {
    "success_after": "after finetuning", "area": "mean success over the budget", "success_before": "before finetuning"
}  # fmt: skip
#: Fields of a run's configuration that are meant to differ between methods and seeds
EXPECTED = ("output", "seed", "seeds", "policy", "policy_fingerprint", "fingerprint", "posterior", "resume", "jobs")


class Cell(NamedTuple):
    """A value, and small lines under it."""

    value: str
    small: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Turns into cards on a phone. Columns in `text` are left-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    text: Sequence[int] = ()


def text(value: Any) -> Cell:
    """Any value as a cell, long ones cut."""
    shown = "none" if value is None else str(value)
    return Cell(shown if len(shown) <= 500 else f"{shown[:500]}…")


def signed(pair: Pair) -> tuple[str, ...]:
    """("+0.07", "[−0.02, +0.16]")."""
    r = pair.result
    interval = (f"[{r.low:+.2f}, {r.high:+.2f}]",) if r.seeds >= statistics.FEWEST_SEEDS else ()
    return tuple(part.replace("-", "−") for part in (f"{r.difference:+.2f}", *interval))


# -- results -------------------------------------------------------------------------------------------------------------------
def _rate(g: Group, field_name: str) -> Cell:
    values = g.values(field_name)
    mean, low, high = statistics.mean_interval(values)
    wilson = g.pooled_interval(field_name)
    enough = len(values) >= statistics.FEWEST_SEEDS
    seeds = f"seeds [{max(low, 0):.2f}, {min(high, 1):.2f}]" if enough else TOO_FEW
    return Cell(f"{mean:.3f}", (f"episodes [{wilson[0]:.2f}, {wilson[1]:.2f}]", seeds))


def before_after(groups: Sequence[Group]) -> Table:
    """One row a method of a setting: success before and after finetuning."""
    curves = any(len(curve) > 2 for g in groups for curve in g.curves)  # two points are the table's own
    rows = [
        [
            Cell(g.label), Cell(str(len(g.runs))), _rate(g, "success_before"), _rate(g, "success_after"),
            Cell(f"{(g.values('success_after') - g.values('success_before')).mean():+.3f}".replace("-", "−")),
            *([Cell(f"{g.values('area').mean():.3f}")] if curves else []),
        ]
        for g in groups
    ]  # fmt: skip
    of = groups[0].setting
    caption = (
        f"{of.budget or 'budget not recorded'}; {of.evaluation} a run; "
        "95 % intervals over episodes (Wilson) and over seeds (Student)"
    )
    return Table(["pretraining", "seeds", "before", "after", "gain", *(["mean over budget"] if curves else [])], rows, caption)


def by_task(groups: Sequence[Group]) -> Table | None:
    """One row a task of a setting's environment, a column a method: success before and after finetuning, and the tasks' mean."""
    columns = [(g.by_task("tasks_before"), g.by_task("tasks_after")) for g in groups]
    tasks = sorted({task for before, after in columns for task in (*before, *after)})
    if not tasks:
        return None

    def cell(before: TaskRate | None, after: TaskRate | None) -> Cell:
        shown = ["–" if rate is None else f"{rate.success:.2f}" for rate in (before, after)]
        small = (
            () if after is None else ("after [{:.2f}, {:.2f}]".format(*after.success_interval), f"{after.episodes} episodes")
        )
        return Cell(" → ".join(shown), small)

    rows = [[Cell(task), *(cell(before.get(task), after.get(task)) for before, after in columns)] for task in tasks]
    means = [[sum(r.success for r in of.values()) / len(of) if of else math.nan for of in column] for column in columns]
    rows.append(
        [
            Cell("mean of the tasks"),
            *(Cell(" → ".join(f"{m:.3f}" if math.isfinite(m) else "–" for m in pair)) for pair in means),
        ]
    )
    caption = "Success by task, before → after finetuning: the episodes of all seeds together, 95 % Wilson intervals"
    return Table(["task", *(g.label for g in groups)], rows, caption)


THRESHOLD = 0.9
"""Success to which environment steps are counted."""


def _has_curve(g: Group) -> bool:
    return any(len(curve) > 2 for curve in g.curves)


def _steps(g: Group) -> list[float | None]:
    return [statistics.steps_to_threshold(curve, THRESHOLD) for curve in g.curves]


def log_ranks(pairs: Sequence[Pair]) -> list[tuple[Pair, float, float]]:
    """(pair, p, Holm-adjusted p) of the log-rank tests of whether both need equally many steps, where the seeds are enough."""
    tested = [
        p for p in pairs
        if _has_curve(p.ours) and _has_curve(p.baseline) and min(len(p.ours.runs), len(p.baseline.runs)) >= statistics.FEWEST_SEEDS
    ]  # fmt: skip
    found = []
    for pair in tested:
        a, b = ([curve[-1][0] for curve in of.curves] for of in (pair.ours, pair.baseline))
        found.append(statistics.log_rank(_steps(pair.ours), _steps(pair.baseline), (a, b)))
    return list(zip(tested, found, map(float, statistics.holm(found))))


def efficiency(groups: Sequence[Group], *families: Sequence[Pair]) -> Table | None:
    """How soon: environment steps to a threshold, area, gradient steps and time, of runs with a learning curve.

    Args:
        families: pairs of groups to test, each adjusted within itself.
    """
    tests = [test for pairs in families for test in log_ranks(pairs)]
    rows = []
    for g in filter(_has_curve, groups):
        steps = _steps(g)
        reached = sorted(s for s in steps if s is not None)
        middle = sorted(math.inf if s is None else s for s in steps)[(len(steps) - 1) // 2]
        ranks = [
            f"log-rank against {pair.baseline.label}: p = {holm:.2g} (unadjusted {p:.2g})"
            for pair, p, holm in tests
            if pair.ours is g
        ]
        mean, low, high = statistics.mean_interval(g.values("area"))
        area = (f"seeds [{max(low, 0):.2f}, {min(high, 1):.2f}]" if len(g.runs) >= statistics.FEWEST_SEEDS else TOO_FEW,)
        gradient = [run.gradient_steps for run in g.runs if run.gradient_steps is not None]
        minutes = [run.wall_clock_s / 60 for run in g.runs if run.wall_clock_s]
        rows.append(
            [
                Cell(g.label, (g.setting.title, *((g.setting.budget,) if g.setting.budget else ()))),
                Cell(f"{middle:,.0f}" if math.isfinite(middle) else "not reached", (f"{len(reached)} of {len(steps)} seeds", *ranks)),
                Cell(f"{mean:.3f}", area),
                Cell(f"{sum(gradient) / len(gradient):,.0f}" if gradient else "–"),
                Cell(f"{sum(minutes) / len(minutes):.1f} min" if minutes else "–"),
            ]
        )  # fmt: skip
    caption = (
        f"Environment steps at which the interpolated curve first reaches {THRESHOLD:g}: the middle seed (of an even number the "
        "lower), seeds that never do so counted as later than all; gradient steps and time a seed"
    ) + ("; log-rank p-values are Holm-adjusted" if tests else "")
    header = ["pretraining", f"steps to {THRESHOLD:g}", "mean over budget", "gradient steps", "time"]
    return Table(header, rows, caption) if rows else None


def _p_values(p: Pair) -> tuple[Cell, Cell]:
    if p.result.seeds < statistics.FEWEST_SEEDS:
        return Cell("–"), Cell("–")
    return (
        Cell(f"{p.p_holm:.2g}", (f"unadjusted {p.result.p:.2g}",)),
        Cell(f"{p.result.p_sign_flip:.2g}", (f"least possible {p.result.p_sign_flip_minimum:.2g}",)),
    )


def _episodes(p: Pair) -> Cell:
    r = p.result
    return (
        Cell("–") if p.p_episodes is None else Cell(f"{p.p_episodes:.2g}", (f"solved by one alone: {r.only_a} and {r.only_b}",))
    )


def comparisons(pairs_of: Mapping[str, Sequence[Pair]], of: str = "") -> list[Table]:
    """Every difference with its interval, p-values and verdict; `of` begins the captions."""
    tables = []
    for measure, name in MEASURES.items():
        pairs = pairs_of[measure]
        if measure == "area":
            pairs = [p for p in pairs if _has_curve(p.ours) or _has_curve(p.baseline)]
        kept = any(p.p_episodes is not None for p in pairs)
        rows = [
            [
                Cell(f"{p.ours.label} − {p.baseline.label}", (p.setting.title,)), Cell(signed(p)[0], signed(p)[1:]), *_p_values(p),
                *([_episodes(p)] if kept else []),
                Cell(str(p.result.seeds), (f"ahead in {p.result.wins}, behind in {p.result.losses}",)), Cell(p.verdict),
            ]
            for p in pairs
        ]  # fmt: skip
        header = [
            "difference of", "difference", "p (t, Holm)", "p (sign flip)", *(["p (episodes, Holm)"] if kept else []), "seeds", "verdict"
        ]  # fmt: skip
        if rows:
            caption = f"{of}{name if measure == 'area' else f'success {name}'}"
            tables.append(Table(header, rows, caption[0].upper() + caption[1:], text=(len(header) - 1,)))
    return tables


def evaluations(material: Material) -> Table | None:
    """Rates of `postbc evaluate` runs."""
    rows = []
    for found in material.named("evaluation.json"):
        e = material.json(found, Evaluated)
        if e is not None:
            where, method = str(Path(found.name).parent), PRETRAINING.get(e.method or "", e.method or "–")
            method += f" after {e.finetuner}" if e.finetuner else ""
            seed = "–" if e.agent_seed is None else str(e.agent_seed)
            rates = [
                Cell(f"{rate:.3f}", ("[{:.2f}, {:.2f}]".format(*interval),))
                for rate, interval in ((e.success, e.success_interval), (e.chunk_success, e.chunk_success_interval))
            ]
            rows.append([Cell(where, (method,)), Cell(seed), Cell(str(e.episodes)), *rates])
    caption = (
        "95 % Wilson intervals. Any step: some environment step was successful; whole chunk: every step of some chunk was."
    )
    return Table(["evaluation", "seed", "episodes", "any step", "whole chunk"], rows, caption) if rows else None


def configurations(stages: Sequence[Stage], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Configurations by stage: what differs between runs, and what does not."""
    finetuner = {e.run: FINETUNERS.get(e.finetuner, e.finetuner) for e in entries}
    kinds: dict[str, list[Stage]] = {}
    for stage in stages:
        kinds.setdefault(f"{stage.kind} {finetuner.get(stage.name, '')}".strip(), []).append(stage)
    parts = []
    for kind, members in kinds.items():
        if kind == "run":
            continue
        same, differing = shared_and_differing([s.config for s in members])
        shown = [k for k in differing if k not in EXPECTED][:8]
        rows = [[Cell(s.name), *(text(s.config[k]) if k in s.config else Cell("–") for k in shown)] for s in members]
        parts.append(
            {
                "title": f"{kind[0].upper() + kind[1:]}: {len(members)} run{'s' if len(members) > 1 else ''}",
                "several": len(members) > 1,
                "differing": Table(["run", *shown], rows, "Fields in which these runs differ", text=range(1, 9))
                if shown and len(members) > 1
                else None,
                "same": Table(["field", "value"], [[Cell(k), text(v)] for k, v in same.items()], text=(1,)),
            }
        )
    return parts


def runs(groups: Sequence[Group]) -> Table | None:
    """One row a run."""
    rows = []
    for g in groups:
        for run in g.runs:
            cells = []
            for rate, chunk in ((run.success_before, run.chunk_success_before), (run.success_after, run.chunk_success_after)):
                low, high = statistics.wilson_interval(round(rate * run.episodes), run.episodes)
                also = (f"chunk {chunk:.3f}",) if chunk is not None else ()
                cells.append(Cell(f"{rate:.3f}", (f"[{low:.2f}, {high:.2f}]", *also)))
            minutes = f"{run.wall_clock_s / 60:.1f} min" if run.wall_clock_s else "–"
            rows.append(
                [Cell(g.label, (g.setting.title,)), Cell(str(run.seed)), *cells, Cell(str(run.episodes)), Cell(minutes)]
            )
    caption = "Success at any step, with Wilson's 95 % interval over the run's episodes; chunk: whole-chunk success"
    return Table(["run", "seed", "before", "after", "episodes", "time"], rows, caption) if rows else None


def commands(stages: Sequence[Stage], entries: Sequence[Entry]) -> str:
    """Each command once, in an order in which they can be given."""
    order = ["posterior", "pretraining", "evaluation", "finetuning"]
    ordered = sorted(stages, key=lambda s: order.index(s.kind) if s.kind in order else len(order))
    known = [*(s.versions.get("command") for s in ordered), *(e.command for e in entries)]
    return "\n".join(dict.fromkeys(c for c in known if c))


def versions(stages: Sequence[Stage]) -> Table | None:
    """What the commands ran with."""
    rows = []
    for key in dict.fromkeys(k for s in stages for k in s.versions if k != "command"):
        values = list(dict.fromkeys(_version(key, s.versions[key]) for s in stages if key in s.versions))
        rows.append([text(key), text(("differs: " if len(values) > 1 else "") + ", ".join(values))])
    return Table(["version of", ""], rows, text=(1,)) if rows else None


def _version(key: str, value: str) -> str:
    changed = " with changes" if key == "commit" and value.endswith("+changes") else ""
    return value.removesuffix("+changes")[:12] + changed if key == "commit" else value
