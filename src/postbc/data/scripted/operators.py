"""Who demonstrates: the styles and qualities of the scripted operators. How they act is in :mod:`postbc.data.scripted.hands`.

A multi-human set (robomimic MH: six people, two each "better", "okay" and "worse") differs from one controller with noise in that each
person has ways of their own: the side they come from, how high they hover, whether they turn the gripper to the object, how long they
look before they grasp, how often they miss. Those are the fields below; the figures were chosen so that lengths spread over about 50 to
200 steps at 20 Hz (Lift), as people's do. The two proficient people stand for a set like robomimic's PH: as quick (35 to 55 steps at
Lift, 100 to 190 at Can) and without a miss, but each with a way of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from postbc.errors import require


@dataclass(frozen=True)
class Operator:
    """One person's hand. Lengths in metres, times in control steps of 0.05 s, commands in the controller's [-1, 1]."""

    name: str
    """Also the filter key in the file."""
    quality: str
    """"proficient", "better", "okay" or "worse": the second filter key."""
    speed: float
    """Largest translation command."""
    gain: float
    """Command per 0.05 m of distance: how late the hand slows down (above about 1.5 it overshoots)."""
    smoothing: float
    """Share of the previous command that is kept: inertia of the hand."""
    hover: tuple[float, float]
    """Mean and standard deviation of the height above the object at which the hand arrives before it descends."""
    side: float
    """Sideways distance of the point through which the hand comes; left or right is drawn for each episode. 0: straight."""
    tolerance: float
    """Horizontal error at which the hand starts to descend: small is up-and-over, large is a diagonal."""
    precision: float
    """Standard deviation of the grasp point's error in each direction."""
    align: float
    """Probability of turning the gripper to the object's faces."""
    other_face: float
    """Probability of choosing the second nearest pair of faces when aligning."""
    noise: float
    """Standard deviation of the Ornstein-Uhlenbeck hand noise in the translation commands; a third of it in the rotation ones."""
    noise_time: float
    """Correlation time of that noise."""
    pause_rate: float
    """Pauses begun per step."""
    pause_time: float
    """Mean length of a pause."""
    fumble: float
    """Probability that the first grasp is aimed beside the object, so that it has to be repeated."""
    settle: float
    """Mean time for which the closed hand waits before lifting."""
    lift: float
    """Height to which the object is lifted above where it was grasped."""
    turn: tuple[float, float]
    """A round object: mean and standard deviation of the yaw to which the gripper turns from where it starts (rad)."""
    depth: tuple[float, float]
    """A tall object: mean and standard deviation of how far above its usual grasp it is gripped."""


# fmt: off
_COLUMNS = (
    "name", "quality", "speed", "gain", "smoothing", "hover", "side", "tolerance", "precision",
    "align", "other_face", "noise", "noise_time", "pause_rate", "pause_time", "fumble", "settle", "lift", "turn", "depth",
)
_TABLE: tuple[tuple[object, ...], ...] = (
    ("operator_a", "better", 0.55, 0.9, 0.3, (0.035, 0.008), 0.00, 0.012, 0.0025, 1.0, 0.00, 0.04, 6, 0.004, 4, 0.00, 6, 0.07,
        (0.0, 0.05), (0.0, 0.003)),
    ("operator_b", "better", 0.42, 0.8, 0.4, (0.075, 0.012), 0.05, 0.008, 0.0025, 1.0, 0.25, 0.05, 6, 0.006, 6, 0.00, 7, 0.10,
        (0.4, 0.1), (0.012, 0.004)),
    ("operator_c", "okay",   0.45, 0.8, 0.3, (0.020, 0.015), 0.00, 0.060, 0.0060, 0.5, 0.10, 0.12, 5, 0.015, 6, 0.10, 8, 0.08,
        (-0.4, 0.2), (-0.01, 0.006)),
    ("operator_d", "okay",   0.35, 0.7, 0.5, (0.100, 0.020), 0.07, 0.015, 0.0060, 0.8, 0.30, 0.08, 8, 0.020, 6, 0.10, 8, 0.06,
        (0.7, 0.2), (0.012, 0.006)),
    ("operator_e", "worse",  0.65, 1.6, 0.2, (0.050, 0.030), 0.08, 0.040, 0.0100, 0.2, 0.50, 0.25, 4, 0.020, 8, 0.35, 10, 0.12,
        (0.0, 0.5), (0.0, 0.012)),
    ("operator_f", "worse",  0.32, 0.7, 0.6, (0.050, 0.020), 0.04, 0.025, 0.0100, 0.3, 0.40, 0.15, 8, 0.025, 8, 0.30, 10, 0.06,
        (-0.3, 0.3), (0.0, 0.006)),
    ("operator_g", "proficient", 1.0, 1.2, 0.3, (0.035, 0.008), 0.00, 0.012, 0.0025, 1.0, 0.00, 0.04, 6, 0.004, 4, 0.00, 6, 0.07,
        (0.0, 0.0), (0.0, 0.0)),
    ("operator_h", "proficient", 0.9, 1.1, 0.3, (0.075, 0.012), 0.05, 0.012, 0.0025, 1.0, 0.00, 0.05, 6, 0.006, 6, 0.00, 7, 0.10,
        (0.0, 0.0), (0.0, 0.0)),
)
# fmt: on

#: The eight people, two of each quality.
OPERATORS: dict[str, Operator] = {str(row[0]): Operator(**dict(zip(_COLUMNS, row))) for row in _TABLE}  # type: ignore[arg-type]


def find_operators(names: Sequence[str]) -> tuple[Operator, ...]:
    """Operators by name, quality or the word "all", in the table's order, each once. InputError for an unknown word or none."""
    words = set(names)
    known = set(OPERATORS) | {operator.quality for operator in OPERATORS.values()} | {"all"}
    unknown = sorted(words - known)
    require(words and not unknown, "There is no such operator." if unknown else "No operators were named.", key="operators",
            found=", ".join(unknown) or "nothing", expected=f"some of {', '.join(sorted(known))}")  # fmt: skip
    return tuple(o for o in OPERATORS.values() if words & {o.name, o.quality, "all"})
