"""What every statement returns: checks of its claims, the numbers behind them, and a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from postbc.theory.tabular import Array

#: Wraps a sequence to show progress over it: (sequence, what it is) -> the same items.
Track = Callable[[Sequence[Any], str], Iterable[Any]]

#: Colours that colour-blind readers can tell apart (Okabe and Ito), one an estimator in all pictures.
COLORS = {"BC": "#D55E00", "uniform": "#E69F00", "uniform, same α": "#56B4E9", "posterior": "#0072B2", "bound": "#555555"}


def untracked(items: Sequence[Any], description: str) -> Iterable[Any]:
    """No progress display."""
    return items


@dataclass(frozen=True)
class Check:
    """One claim held against what was found."""

    claim: str
    found: str
    holds: bool
    how: Literal["exact", "simulated"]
    """exact: computed without sampling error; simulated: estimated from, or inspected on, sampled datasets."""


@dataclass(frozen=True)
class StatementResult(ABC):
    """The outcome of executing one statement."""

    @abstractmethod
    def checks(self) -> list[Check]:
        """The statement's claims, one by one."""

    @abstractmethod
    def rows(self) -> list[dict[str, float | int | str]]:
        """The numbers as a table, every row with the same keys."""

    @abstractmethod
    def plot(self, figure: Figure) -> None:
        """Draw the statement."""


@dataclass(frozen=True)
class PowerLaw:
    """y ≈ factor·x^slope, fitted by least squares in logarithms."""

    slope: float
    low: float
    high: float
    factor: float

    def __str__(self) -> str:
        return f"{self.slope:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def fit_power_law(x: Array, y: Array, confidence: float = 0.95) -> PowerLaw:
    """Slope of log y on log x with Student's interval; it widens with curvature as well as with sampling noise."""
    fit = stats.linregress(np.log(x), np.log(y))
    half = float(stats.t.ppf(0.5 + confidence / 2, len(x) - 2) * fit.stderr)
    slope = float(fit.slope)
    return PowerLaw(slope, slope - half, slope + half, float(np.exp(fit.intercept)))


def standard_error(values: Array) -> Array:
    """Standard error of the mean over the first axis."""
    return values.std(axis=0, ddof=1) / np.sqrt(len(values))


def tidy(axes: Axes, title: str, xlabel: str, ylabel: str, *, legend: bool = True) -> None:
    """The look that all pictures share."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False)
