"""What the field reports (Agarwal et al. 2021): interquartile means and probabilities of improvement, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from postbc import statistics
from postbc.experiments.summary import FINETUNERS, TOO_FEW, Group, label
from postbc.experiments.tables import Cell, Table

Estimate = tuple[float, float, float]  # value, low, high
MOST = 8
"""Methods in a table of each against each."""


def _cell(enough: bool, estimate: Callable[[], Estimate], digits: int = 3) -> Cell:
    if not enough:
        return Cell("–", (TOO_FEW,))
    value, low, high = estimate()
    return Cell(f"{value:.{digits}f}", (f"[{low:.2f}, {high:.2f}]",))


def _better(x: np.ndarray, y: np.ndarray) -> Cell:
    enough = min(len(x), len(y)) >= statistics.FEWEST_SEEDS
    return _cell(enough, lambda: statistics.probability_of_improvement(x, y), 2)


def iqm_cell(scores: np.ndarray) -> Cell:
    """The interquartile mean of (runs, tasks) scores."""
    return _cell(len(scores) >= statistics.FEWEST_SEEDS, lambda: statistics.stratified_bootstrap(scores))


def improvement(groups: Sequence[Group]) -> Table | None:
    """Each method of a setting against each: how probably a run of the row's ends higher than one of the column's."""
    groups = groups[:MOST]
    if len(groups) < 2:
        return None
    scores = [g.values("success_after")[:, None] for g in groups]
    rows = [
        [Cell(g.label), Cell(str(len(x))), iqm_cell(x), *(Cell("") if x is y else _better(x, y) for y in scores)]
        for g, x in zip(groups, scores)
    ]
    caption = (
        "After finetuning: interquartile mean over seeds, and probability that a seed of the row's method ends higher than one of the "
        "column's (ties half); 95 % stratified bootstrap intervals over seeds"
    )
    return Table(["pretraining", "seeds", "IQM", *(f"above {g.label}" for g in groups)], rows, caption)


def together(groups: Sequence[Group]) -> list[Table]:
    """A finetuner's settings together (tasks, numbers of demonstrations …): methods that all of them have, on seeds that all have."""
    finetuners = list(dict.fromkeys(g.setting.finetuner for g in groups))
    found = (_together([g for g in groups if g.setting.finetuner == finetuner]) for finetuner in finetuners)
    return [table for table in found if table is not None]


def _together(groups: Sequence[Group]) -> Table | None:
    settings = list(dict.fromkeys(g.setting for g in groups))
    if len(settings) < 2:
        return None
    short = [(g.setting, label(g.pretraining, None, g.runs[0].variant, g.policy)) for g in groups]
    own = len(set(short)) == len(short) and not any(g.recipe for g in groups)  # α may be another in each setting, if it is one
    methods: dict[str, list[Group]] = {}
    for g, (_, name) in zip(groups, short):
        methods.setdefault(name if own else g.label, []).append(g)
    methods = {name: of for name, of in methods.items() if len(of) == len(settings)}
    seeds = sorted(set.intersection(*(set(g.seeds) for of in methods.values() for g in of))) if methods else []
    if len(methods) < 2 or not seeds:
        return None

    def scores(of: Sequence[Group], field: str) -> np.ndarray:
        return np.array([[dict(zip(g.seeds, g.values(field)))[seed] for g in of] for seed in seeds])

    after = {name: scores(of, "success_after") for name, of in list(methods.items())[:MOST]}
    before = {name: scores(methods[name], "success_before") for name in after}
    rows = [
        [Cell(name), iqm_cell(before[name]), iqm_cell(x), *(Cell("") if x is y else _better(x, y) for y in after.values())]
        for name, x in after.items()
    ]
    titles = "; ".join(" · ".join(part for part in s.title.split(" · ")[:-1]) for s in settings)
    finetuner = FINETUNERS.get(settings[0].finetuner, settings[0].finetuner)
    caption = (
        f"{finetuner}, {len(settings)} settings together ({titles}), seeds {', '.join(map(str, seeds))}: interquartile means of all "
        "runs, and probability that a run of the row's method ends higher than one of the column's in the same setting; 95 % "
        "stratified bootstrap intervals"
    )
    return Table(["pretraining", "IQM before", "IQM after", *(f"above {name}" for name in after)], rows, caption)
