"""The report: one self-contained HTML file, figures (PNG, PDF), tables (Markdown, LaTeX, CSV), summary.json and results.csv, from
whatever run directories hold.

Everything is read and drawn in memory first: a report is written whole or not at all. `page.html.j2` holds every piece of HTML.
"""

from __future__ import annotations

import base64
import importlib.resources
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from postbc.errors import require
from postbc.experiments import aggregates, formats, plots, summary, tables
from postbc.experiments import material as found_in
from postbc.experiments.material import Found, Material, Stage, within
from postbc.experiments.summary import TOO_FEW, Entry, Group, Pair, Setting
from postbc.experiments.tables import MEASURES, Cell, Table, signed
from postbc.files import os_errors, write_bytes
from postbc.progress import progress

T = TypeVar("T", Table, Table | None)
DRAWN = 16
"""Most groups in one figure."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page: inline SVG, or a PNG or MP4 as a data URL."""

    caption: str
    svg: Markup | None = None
    image: str | None = None
    video: str | None = None


@dataclass
class Content:
    """All that a report is made of."""

    entries: list[Entry]
    groups: list[Group]
    pairs: dict[str, list[Pair]]
    """Measure -> comparisons of PostBC with baselines."""
    variants: dict[str, list[Pair]]
    """Measure -> comparisons of a method's variants with one of them."""
    material: Material
    stages: list[Stage]
    notes: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    """Name -> content, beside the page."""

    def set(self, name: str, table: T) -> T:
        """The table for the page, and as Markdown, LaTeX and CSV files."""
        if table is not None:
            self.files |= formats.files(name, table)
        return table

    @property
    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(g.setting for g in self.groups))

    def of(self, setting: Setting) -> list[Group]:
        return [g for g in self.groups if g.setting == setting]

    def draw(self, name: str, figure: Figure, caption: str) -> Picture:
        """The figure for the page, and as PNG and PDF files."""
        self.files |= {f"plots/{name}.png": plots.png(figure), f"plots/{name}.pdf": plots.pdf(figure)}
        return Picture(caption, svg=Markup(plots.svg(figure, name)))  # matplotlib escapes its text


def gather(directories: Sequence[Path]) -> Content:
    """Read everything. InputError if there is nothing to report, or a results.json is damaged."""
    material = found_in.look(directories)
    entries, notes = summary.collect(directories, material)
    groups, more = summary.group(entries)
    pairs = {measure: summary.compare_groups(groups, measure) for measure in MEASURES}
    variants = {measure: summary.compare_variants(groups, measure) for measure in MEASURES}
    stages = material.stages()
    require(
        entries or stages or material.named("evaluation.json"), "There is nothing to report here.",
        file=", ".join(map(str, directories)), expected="results.json, evaluation.json or run directories of postbc",
        remedy="give the directories of finished runs",
    )  # fmt: skip
    finished = {e.run for e in entries}
    for stage in stages:
        learns = any(k.split(".")[0] in ("training", "iql") for k in stage.config) and "methods" not in stage.config
        if stage.kind != "finetuning" and learns and stage.name not in finished:
            more.append(f"{stage.name}: finetuning has not finished (no results.json), and is left out")
    if _one_subset([s for s in stages if s.kind == "pretraining"]):
        more.append(
            "All seeds were pretrained on one and the same set of demonstrations: intervals over seeds hold for these demonstrations, "
            "and say nothing about others."
        )
    return Content(entries, groups, pairs, variants, material, stages, notes + more)


def _one_subset(stages: Sequence[Stage]) -> bool:
    configs = [s.config for s in stages if s.config]
    several = len({s.path.name for s in stages}) > 1
    return several and all(c.get("data.subset_seed") is not None or c.get("data.num_trajectories", 0) is None for c in configs)


def _check_ours(output: Path, names: Iterable[str]) -> None:
    """InputError if a report would replace files that are no former report's."""
    page = output / "report.html"
    with os_errors(page, "read"):
        former = page.is_file() and b'name="generator" content="postbc"' in page.read_bytes()[:2000]
    taken = [] if former else [name for name in ("report.html", *names) if os.path.lexists(output / name)]
    require(not taken, "The output directory holds other files, which a report would replace.", file=output, found=", ".join(taken[:5]),
            remedy="choose another --output")  # fmt: skip


def build(directories: Sequence[Path], output: Path, title: str = "Posterior behavioral cloning") -> Content:
    """Write report.html, plots/*.png and *.pdf, tables/*, summary.json and results.csv into `output`; returns what it found.

    Raises:
        InputError: nothing to report, a damaged results.json, or `output` is a run's directory.
    """
    require(
        not (output / "config.yaml").exists(), "The output directory holds a run.", file=output, found="config.yaml",
        remedy="choose another --output",
    )  # fmt: skip
    content = gather(directories)
    with progress("Report", len(content.settings) + 3) as bar:
        context: dict[str, Any] = {"title": title, "now": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", "settings": []}
        for number, of in enumerate(content.settings):
            context["settings"].append(setting(content, of, number))
            bar.advance()
        context |= {"answer": answer(content), "comparisons": tables.comparisons(content.pairs)}
        context["variants"] = tables.comparisons(content.variants, "variants of a method, ")
        for table in (*context["comparisons"], *context["variants"]):
            content.set(f"comparison-{_slug(table.caption)}", table)
        context["together"] = [
            content.set(f"together-{k}", table) for k, table in enumerate(aggregates.together(content.groups))
        ]
        context["efficiency"] = content.set(
            "efficiency", tables.efficiency(content.groups, content.pairs["success_after"], content.variants["success_after"])
        )
        context["actions"] = actions(content)
        bar.advance()
        context |= {"posterior": posterior(content), "saliency": saliency(content), "videos": videos(content)}
        context["runs"] = content.set("runs", tables.runs(content.groups))
        context |= {
            "evaluations": tables.evaluations(content.material), "commands": tables.commands(content.stages, content.entries),
            "configurations": tables.configurations(content.stages, content.entries), "versions": tables.versions(content.stages),
        }  # fmt: skip
        content.notes += content.material.notes
        page = _template().render(**context, palette=plots.PALETTE, groups=bool(content.groups), notes=content.notes)
        bar.advance()
        if content.entries:
            content.files |= {
                name: text.encode("utf-8", "replace") for name, text in summary.summary_files(content.entries).items()
            }
        _check_ours(output, content.files)
        content.files["report.html"] = page.encode("utf-8", "replace")  # last: it is there when all is there
        for name, data in content.files.items():
            write_bytes(output / name, data)
        bar.advance()
    return content


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = importlib.resources.files("postbc.experiments").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text)


# -- results -------------------------------------------------------------------------------------------------------------------
def answer(content: Content) -> dict[str, Any]:
    """What the comparisons say, in sentences: settings, each with (before the verdict, verdict, after it); and the start."""
    final, start = content.pairs["success_after"], content.pairs["success_before"]
    few = [p for p in start if p.verdict == TOO_FEW]
    worse = [p for p in start if p.verdict == "PostBC lower"]
    equal = [p for p in start if p.verdict.startswith(("equal", "PostBC higher"))]
    if not start:
        before = ""
    elif worse:
        before = f"PostBC starts lower than the baseline in {len(worse)} of {len(start)} comparisons."
    elif few and len(few) == len(start):
        before = f"Whether PostBC starts lower than the baselines: {TOO_FEW}."
    elif len(equal) == len(start):
        before = "PostBC's pretrained success is nowhere lower than the baselines'."
    else:
        before = (
            f"No pretrained PostBC policy is distinguishably worse than its baseline; in {len(start) - len(equal)} of {len(start)} "
            "comparisons the intervals leave a difference of more than 0.05 open."
        )
    said: dict[Setting, list[tuple[str, str, str]]] = {}
    for p in (*final, *content.variants["success_after"]):
        p_value = f", p = {p.p_holm:.2g}" if p.verdict != TOO_FEW else ""
        seeds = f"{p.result.seeds} seed{'s' if p.result.seeds > 1 else ''}"
        rates = f"{p.ours.label} {p.mean(p.ours):.2f}, {p.baseline.label} {p.mean(p.baseline):.2f}: "
        said.setdefault(p.setting, []).append((rates, p.verdict, f" ({' '.join(signed(p))}{p_value}, {seeds})"))
    return {"settings": [(of.title, lines) for of, lines in said.items()], "before": before}


def setting(content: Content, of: Setting, number: int) -> dict[str, Any]:
    """Table and figures of one setting."""
    groups = content.of(of)
    slug = _slug(of.title)
    if any(name.startswith(f"plots/{slug}-") for name in content.files):  # the same title with another budget or data
        slug = f"{slug}-{number}"
    drawn = groups[:DRAWN]
    if len(groups) > DRAWN:
        content.notes.append(f"{of.title}: {DRAWN} of {len(groups)} methods are drawn, all are in the table")
    text = (
        "Success before and after finetuning: marks are means, ticks the seeds, bars 95 % intervals over seeds (three or more)."
    )
    pictures = [content.draw(f"{slug}-before-after", plots.before_after(drawn), text)]
    if any(len(curve) > 2 for g in groups for curve in g.curves):
        text = "Learning curves from the pretrained score on: mean, thin lines for the seeds, 95 % bootstrap band over seeds."
        pictures.append(content.draw(f"{slug}-curves", plots.learning_curves(drawn), text))
    return {
        "title": of.title, "pictures": pictures, "table": content.set(f"{slug}-success", tables.before_after(groups)),
        "improvement": content.set(f"{slug}-improvement", aggregates.improvement(groups)),
        "tasks": content.set(f"{slug}-tasks", tables.by_task(groups)),
    }  # fmt: skip


def _slug(title: str) -> str:
    return "-".join(filter(None, "".join(c if c.isascii() and c.isalnum() else " " for c in title.lower()).split()))[:80]


# -- pictures ------------------------------------------------------------------------------------------------------------------
def actions(content: Content) -> list[tuple[Picture, Table]]:
    """Action distributions of pretrained policies."""
    if not any(s.kind == "pretraining" for s in content.stages):
        return []
    from postbc.experiments.action_distribution import pictured

    found, notes = pictured(content.stages)
    content.notes += notes
    parts = []
    for number, item in enumerate(found):
        drawn = plots.actions(item.distribution, {n: plots.HUES.get(method, "extra") for n, method in item.methods.items()})
        caption = (
            f"Samples of the first action of a chunk (normalised units) at one dense and one sparse state of {item.data}, seed "
            f"{item.seed}; + is the demonstrated action. Spread: standard deviation at a state, averaged over action dimensions "
            "(switches such as a gripper left out) and over states."
        )
        dense, sparse = (item.distribution.spread[kind] for kind in ("dense", "sparse"))
        rows = [
            [Cell(n), *(Cell(f"{v:.{d}f}") for v, d in ((dense[n], 3), (sparse[n], 3), (sparse[n] / max(dense[n], 1e-9), 2)))]
            for n in item.methods
        ]
        table = Table(["policy", "spread, dense", "spread, sparse", "ratio"], rows, item.distribution.definition.capitalize())
        parts.append((content.draw(f"actions-{number}", drawn, caption), table))
    return parts


def _embedded(found: Found, kind: str, content: Content) -> str | None:
    try:
        return f"data:{kind};base64,{base64.b64encode(found.path.read_bytes()).decode()}"
    except OSError as error:
        content.material.note(found, error.strerror)
        return None


def posterior(content: Content) -> dict[str, Any]:
    """Pictures that the posterior stage drew."""
    return _shown(content, content.material.posterior_pictures())


def saliency(content: Content) -> dict[str, Any]:
    """Pictures that evaluations drew of where their agents look."""
    return _shown(content, content.material.saliency_pictures())


def _shown(content: Content, found: Sequence[Found]) -> dict[str, Any]:
    chosen, left = within(found, 3.0, 4)
    return {"pictures": [Picture(f.name, image=_embedded(f, "image/png", content)) for f in chosen], "left": left}


def videos(content: Content) -> dict[str, Any]:
    """Some successes and failures."""
    chosen, left = within(content.material.videos(), 6.0, 12)
    shown = []
    for f in chosen:
        outcome, *rest = f.path.stem.split("_")
        caption = f"{outcome}: {Path(f.name).parent.parent} {' '.join(rest)}"
        shown.append(Picture(caption, video=_embedded(f, "video/mp4", content)))
    return {"pictures": shown, "left": left}
