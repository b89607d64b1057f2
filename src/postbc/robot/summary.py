"""What a session came to: labels with an interval, and whether the robot was commanded in time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from postbc.errors import require
from postbc.robot.labels import Labels
from postbc.robot.recorded import read_timings, recorded
from postbc.schemas import CountOrZero, NonNegative, Share, read_json, schema
from postbc.statistics import wilson_interval

SUMMARY = "session.json"


@schema
class Spread:
    """Of a quantity over control steps."""

    mean: NonNegative
    p99: NonNegative
    max: NonNegative


@schema
class TimingSummary:
    """Of all control steps of a session; seconds."""

    steps: CountOrZero
    missed_deadlines: CountOrZero
    """Actions that were late by more than a tenth of a control step."""
    limited_actions: CountOrZero
    """Actions that bounds or rate limits changed."""
    late: Spread
    observation_age: Spread
    """Of the newest observation when it came."""
    plan_age: Spread
    """Control steps between the observation that an action was computed from and the action."""
    inference: Spread
    """Of a chunk, once for each of its actions."""


@schema
class SessionSummary:
    """session.json."""

    robot: str
    policy: str
    """Where it was read from."""
    episodes: CountOrZero
    """On the disk."""
    success: CountOrZero
    failure: CountOrZero
    discard: CountOrZero
    unlabelled: CountOrZero
    rate: Share | None
    """success / (success + failure); None where there is neither."""
    interval: tuple[Share, Share]
    """95 %, Wilson."""
    timing: TimingSummary | None


def summarise(folder: Path, robot: str, policy: str) -> SessionSummary:
    """What a session's folder says as it stands."""
    numbers, labels = recorded(folder), Labels(folder).current()
    there = [labels.get(number) for number in numbers]
    count = {name: there.count(name) for name in ("success", "failure", "discard", None)}  # type: ignore[arg-type]
    decided = count["success"] + count["failure"]
    return SessionSummary(
        robot=robot, policy=policy, episodes=len(numbers), success=count["success"], failure=count["failure"],
        discard=count["discard"], unlabelled=count[None], rate=count["success"] / decided if decided else None,
        interval=wilson_interval(count["success"], decided), timing=summarise_timing(folder, numbers),
    )  # fmt: skip


def summarise_timing(folder: Path, numbers: Sequence[int]) -> TimingSummary | None:
    """What the tables of timing say; None where there is no control step."""
    steps = [timing for rows in read_timings(folder, numbers).values() for timing in rows]
    if not steps:
        return None

    def spread(name: str) -> Spread:
        values = np.array([getattr(timing, name) for timing in steps], float)
        return Spread(float(values.mean()), float(np.quantile(values, 0.99)), float(values.max()))

    missed, limited = sum(t.missed for t in steps), sum(t.limited > 0 for t in steps)
    return TimingSummary(len(steps), missed, limited, *map(spread, ("late", "observation_age", "plan_age", "inference")))


def read_summary(folder: Path) -> SessionSummary:
    """Of a session that has come to its end, or was ended."""
    require((folder / SUMMARY).is_file(), "This session has no summary.", file=folder / SUMMARY,
            remedy="let it come to its end: the same command with --resume")  # fmt: skip
    return read_json(folder / SUMMARY, SessionSummary)
