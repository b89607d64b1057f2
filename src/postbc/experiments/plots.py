"""The report's figures: drawn once in the colours of the light page, as PNG files and as SVG whose colours are the page's variables.

matplotlib writes colours as `#rrggbb`. Each colour of `PALETTE` is written once there and nowhere else, so replacing it by
`var(--name)` makes one inline SVG follow light and dark. Text stays text: it is searchable, read aloud, and set in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from postbc import statistics
from postbc.experiments.summary import Group

if TYPE_CHECKING:  # it brings torch
    from postbc.experiments.action_distribution import ActionDistribution

#: CSS variable -> (light, dark). The methods differ in marker and line too, for eyes that do not tell hues apart.
PALETTE: dict[str, tuple[str, str]] = {
    "fg": ("#1d2329", "#e4e8ec"),
    "soft": ("#5c6670", "#a2acb7"),
    "grid": ("#d9dee3", "#343c45"),
    "bc": ("#6d7681", "#aab4bf"),
    "sigma": ("#b66a06", "#f2ad4e"),
    "post": ("#0a66c8", "#62aeff"),
    "extra": ("#8a3fb5", "#d39bf3"),
    "extra2": ("#13795b", "#5fd0a8"),
}
MARKERS = {"bc": "o", "sigma": "s", "post": "^", "extra": "D", "extra2": "v"}
LINES: dict[str, Any] = {"bc": (0, (5, 2)), "sigma": (0, (2, 1.5)), "post": "-", "extra": "-.", "extra2": (0, (6, 1, 1, 1))}
WIDTH = 4.2  # inches = 302 SVG units, narrower than a phone: text is at least as large there as it says here
_RC: Any = {
    "text.parse_math": False, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.linewidth": 0.8,
    "legend.frameon": False,
}  # fmt: skip


#: method of pretraining -> name in the palette.
HUES = {"bc": "bc", "sigma-bc": "sigma", "postbc": "post"}


def light(name: str) -> str:
    """A colour of the light palette."""
    return PALETTE[name][0]


def hues(groups: Sequence[Group]) -> dict[str, str]:
    """Label -> name in the palette: the first BC, σ-BC and PostBC get their own, further variants the spare ones."""
    chosen: dict[str, str] = {}
    spare = ["extra", "extra2"]
    for g in groups:
        if g.label not in chosen:
            hue = HUES.get(g.pretraining or "", spare[0])
            chosen[g.label] = hue if hue not in chosen.values() else spare[0]
            if chosen[g.label] == spare[0]:
                spare.reverse()
    return chosen


def _figure(height: float, rows: int = 1, columns: int = 1, share: bool = False) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for ax in axes.flat:
        ax.set_facecolor("none")
        ax.tick_params(colors=light("soft"), labelcolor=light("fg"), labelsize=8)
        ax.grid(True, color=light("grid"), lw=0.6)
        ax.set_axisbelow(True)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(light("soft"))
        for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
            text.set_color(light("fg"))
    return figure, axes


def learning_curves(groups: Sequence[Group]) -> Figure:
    """Success against environment steps, from the pretrained score on: mean, bootstrap band over seeds, thin lines the seeds."""
    with rc_context(_RC):
        figure, axes = _figure(2.9)
        ax, chosen = axes[0, 0], hues(groups)
        longest = max(point[0] for g in groups for curve in g.curves for point in curve)
        unit, scale = ("thousand environment steps", 1e3) if longest >= 2e3 else ("environment steps", 1.0)
        for g in groups:
            hue = chosen[g.label]
            for curve in g.curves:
                x, y = np.array(curve, float).T
                ax.plot(x / scale, y, color=light(hue), lw=0.7, alpha=0.35)
            grid, values = statistics.interpolate(g.curves)
            mean, low, high = statistics.bootstrap_band(values)
            style = {"color": light(hue), "lw": 2, "ls": LINES[hue], "marker": MARKERS[hue], "ms": 4.5, "label": g.label}
            ax.plot(grid / scale, mean, markevery=max(1, len(grid) // 12), **style)
            if len(g.runs) >= statistics.FEWEST_SEEDS:
                ax.fill_between(grid / scale, low, high, color=light(hue), alpha=0.16, lw=0)
        ax.set(xlabel=unit, ylabel="success rate", ylim=(-0.02, 1.02), xlim=(0, None))
        columns = max(1, 44 // (7 + max(map(len, chosen))))
        figure.legend(
            loc="outside upper left", ncols=columns, fontsize=8, labelcolor=light("fg"), handlelength=3.2, columnspacing=1.2
        )  # fmt: skip
    return figure


def before_after(groups: Sequence[Group]) -> Figure:
    """Each method's success before (hollow) and after finetuning (filled); ticks are seeds, bars Student's intervals over seeds."""
    with rc_context(_RC):
        figure, axes = _figure(0.65 + 0.42 * len(groups))
        ax, chosen = axes[0, 0], hues(groups)
        for row, g in enumerate(groups):
            colour, marker = light(chosen[g.label]), MARKERS[chosen[g.label]]
            for field, shift, face in (("success_before", 0.17, "none"), ("success_after", -0.17, colour)):
                values = g.values(field)
                y = -row + shift
                ax.plot(values, np.full(len(values), y), ls="", marker="|", ms=7, color=colour, alpha=0.6)
                mean, low, high = statistics.mean_interval(values)
                if len(values) >= statistics.FEWEST_SEEDS:
                    ax.plot(np.clip([low, high], 0, 1), [y, y], color=colour, lw=1.6)
                ax.plot([mean], [y], ls="", marker=marker, ms=7, color=colour, mfc=face, mew=1.4)
        ax.set(xlim=(-0.02, 1.02), ylim=(-len(groups) + 0.4, 0.6), xlabel="success rate: hollow pretrained, filled finetuned")
        ax.set_yticks([-row for row in range(len(groups))], [g.label for g in groups])
        ax.grid(False, axis="y")
    return figure


def actions(found: ActionDistribution, colours: Mapping[str, str]) -> Figure:
    """Samples of each policy's first action at a dense and at a sparse state, in the plane of `found.axes`.

    Args:
        colours: policy -> name in the palette.
    """
    names, (i, j) = list(found.samples["dense"]), found.axes
    points = np.concatenate([s[:, [i, j]] for kind in found.samples.values() for s in kind.values()])
    points = np.concatenate([points, *(a[None, [i, j]] for a in found.demonstrated.values())])
    low, high = points.min(0), points.max(0)
    room = 0.08 * (high - low) + 0.02
    with rc_context(_RC):
        figure, axes = _figure(1.0 + WIDTH / max(len(names), 2) * 1.75, 2, len(names), share=True)
        for row, kind in enumerate(("dense", "sparse")):
            for column, name in enumerate(names):
                ax, sample = axes[row, column], found.samples[kind][name]
                ax.scatter(sample[:, i], sample[:, j], s=5, color=light(colours[name]), alpha=0.45, lw=0)
                demonstrated = found.demonstrated[kind]
                ax.plot(demonstrated[i], demonstrated[j], "+", color=light("fg"), ms=9, mew=1.5)
                ax.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
                ax.text(
                    0.97, 0.03, f"spread {found.spread[kind][name]:.3f}", transform=ax.transAxes, ha="right", color=light("soft"),
                    fontsize=7.5,
                )  # fmt: skip
                if row == 0:
                    ax.set_title(name, fontsize=9)
                else:
                    ax.set_xlabel(f"action {i}")
            axes[row, 0].set_ylabel(f"{kind} state\naction {j}")
    return figure


def svg(figure: Figure, salt: str) -> str:
    """Inline SVG that scales with the page and takes its colours from the page's variables."""
    text = io.StringIO()
    with rc_context({**_RC, "svg.hashsalt": salt}):  # another salt a figure, so that ids differ within one page
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    picture = text.getvalue()
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r"<metadata>.*?</metadata>", "", picture, flags=re.S)
    picture = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", picture, count=1)
    picture = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", picture, count=1)
    picture = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", picture)
    for name, (colour, _) in PALETTE.items():
        picture = picture.replace(colour, f"var(--{name})")
    return picture


def png(figure: Figure) -> bytes:
    """The light variant on white, for slides."""
    return _saved(figure, format="png", dpi=200)


def pdf(figure: Figure) -> bytes:
    """The same for papers: vectors, the text as text."""
    return _saved(figure, format="pdf", metadata={"CreationDate": None})


def _saved(figure: Figure, **how: Any) -> bytes:
    data = io.BytesIO()
    with rc_context({**_RC, "pdf.fonttype": 42}):
        figure.savefig(data, facecolor="white", **how)
    return data.getvalue()
