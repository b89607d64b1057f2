"""The sections of the report, each from :class:`Content` to HTML; an empty text where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from postbc import statistics
from postbc.experiments import report_material as material
from postbc.experiments import report_page as html
from postbc.experiments import report_plots as plots
from postbc.experiments.summary import FINETUNERS, PRETRAINING, Entry, Group, Pair, Setting

MEASURES = {
    "success_after": "after finetuning", "area": "mean success over the budget", "success_before": "before finetuning"
}  # fmt: skip
#: Fields of a finetuning or pretraining run that are meant to differ between methods
EXPECTED = ("output", "seeds", "policy", "policy_fingerprint", "fingerprint", "posterior", "resume")


@dataclass
class Content:
    """All that a report is made of."""

    entries: list[Entry]
    groups: list[Group]
    pairs: dict[str, list[Pair]]
    """Measure -> comparisons."""
    stages: list[material.Stage]
    directories: list[Path]
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(g.setting for g in self.groups))

    def of(self, setting: Setting) -> list[Group]:
        return [g for g in self.groups if g.setting == setting]


def _picture(output: Path, name: str, figure: Figure, caption: str) -> str:
    plots.save_png(figure, output / "plots" / f"{name}.png")
    return html.figure(plots.svg(figure, name, caption), caption)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-").replace("--", "-")


# -- results -------------------------------------------------------------------------------------------------------------------
def signed(pair: Pair) -> str:
    """+0.07 [−0.02, 0.16]."""
    r = pair.result
    interval = f" [{r.low:+.2f}, {r.high:+.2f}]" if math.isfinite(r.low) else ""
    return f"{r.difference:+.2f}{interval}".replace("-", "−")


def _sentence(pair: Pair) -> str:
    ours, theirs = (pair.mean(g) for g in (pair.ours, pair.baseline))
    p = f", p = {pair.p_holm:.2g}" if pair.result.seeds > 1 else ""
    seeds = f"{pair.result.seeds} seed{'s' if pair.result.seeds > 1 else ''}"
    text = f"{pair.ours.label} {ours:.2f}, {pair.baseline.label} {theirs:.2f}: "
    return f"<li>{html.escape(text)}<b>{html.escape(pair.verdict)}</b> ({html.escape(signed(pair) + p)}, {seeds})</li>"


def answer(content: Content) -> str:
    """What the comparisons say, in sentences."""
    final, start = content.pairs["success_after"], content.pairs["success_before"]
    if not final:
        text = "No finetuned PostBC run beside a BC or σ-BC run of the same setting and seed was found, so nothing can be compared."
        return f'<div class="answer">{html.paragraph(text)}</div>'
    worse = [p for p in start if p.verdict == "PostBC lower"]
    equal = [p for p in start if p.verdict.startswith(("equal", "PostBC higher"))]
    if worse:
        before = f"PostBC starts lower than the baseline in {len(worse)} of {len(start)} comparisons."
    elif len(equal) == len(start):
        before = "PostBC's pretrained success is nowhere lower than the baselines'."
    else:
        before = (
            f"No pretrained PostBC policy is distinguishably worse than its baseline; in {len(start) - len(equal)} of {len(start)} "
            "comparisons the intervals leave a difference of more than 0.05 open."
        )
    said = ""
    for setting in dict.fromkeys(p.setting for p in final):
        lines = "".join(_sentence(p) for p in final if p.setting == setting)
        said += f"<p><b>{html.escape(setting.title)}</b>, success after finetuning</p><ul>{lines}</ul>"
    return f'<div class="answer">{said}{html.paragraph(before)}</div>'


def _rate(g: Group, field_name: str) -> str:
    values = g.values(field_name)
    mean, low, high = statistics.mean_interval(values)
    wilson = g.pooled_interval(field_name)
    seeds = f"seeds [{max(low, 0):.2f}, {min(high, 1):.2f}]" if len(values) > 1 else "one seed"
    return html.cell(f"{mean:.3f}", f"episodes [{wilson[0]:.2f}, {wilson[1]:.2f}]", seeds)


def setting(content: Content, of: Setting, output: Path) -> str:
    """Table and figures of one setting."""
    groups, slug = content.of(of), _slug(of.title)
    curves = any(len(curve) > 2 for g in groups for curve in g.curves)  # two points are the table's own
    rows = [
        [
            html.cell(g.label), html.cell(str(len(g.runs))), _rate(g, "success_before"), _rate(g, "success_after"),
            html.cell(f"{(g.values('success_after') - g.values('success_before')).mean():+.3f}".replace("-", "−")),
            *([html.cell(f"{g.values('area').mean():.3f}")] if curves else []),
        ]
        for g in groups
    ]  # fmt: skip
    episodes = " or ".join(map(str, sorted({run["episodes"] for g in groups for run in g.runs})))
    caption = (
        f"{of.budget or 'budget not recorded'}; {episodes} evaluation episodes a run; "
        "95 % intervals over episodes (Wilson) and over seeds (Student)"
    )
    header = ["pretraining", "seeds", "before", "after", "gain", *(["mean over budget"] if curves else [])]
    text = "Success before and after finetuning: marks are means, ticks the seeds, bars 95 % intervals over seeds."
    pictures = [_picture(output, f"{slug}-before-after", plots.before_after(groups), text)]
    if curves:
        text = "Learning curves from the pretrained score on: mean, thin lines for the seeds, 95 % bootstrap band over seeds."
        pictures.append(_picture(output, f"{slug}-curves", plots.learning_curves(groups), text))
    return f"<h3>{html.escape(of.title)}</h3>" + html.table(header, rows, caption) + html.figures(pictures)


def comparisons(content: Content) -> str:
    """Every difference with its interval, p-values and verdict."""
    parts = []
    for measure, name in MEASURES.items():
        pairs = content.pairs[measure]
        if measure == "area":
            pairs = [p for p in pairs if any(len(curve) > 2 for g in (p.ours, p.baseline) for curve in g.curves)]
        rows = [
            [
                html.cell(f"{p.ours.label} − {p.baseline.label}", p.setting.title), html.cell(*signed(p).split(" ", 1)),
                html.cell(f"{p.p_holm:.2g}" if p.result.seeds > 1 else "–", f"unadjusted {p.result.p:.2g}"),
                html.cell(f"{p.result.p_sign_flip:.2g}", f"least possible {p.result.p_sign_flip_minimum:.2g}"),
                html.cell(str(p.result.seeds), f"ahead in {p.result.wins}, behind in {p.result.losses}"),
                html.cell(p.verdict),
            ]
            for p in pairs
        ]  # fmt: skip
        header = ["difference of", "difference", "p (t, Holm)", "p (sign flip)", "seeds", "verdict"]
        if rows:
            parts.append(html.table(header, rows, f"Success {name}" if measure != "area" else name.capitalize(), text=(5,)))
    return "".join(parts)


def evaluations(content: Content) -> str:
    """Rates of `postbc evaluate` runs."""
    rows = []
    for name, path in material.find(content.directories, "evaluation.json"):
        found = material.read_json(path, {})
        method = PRETRAINING.get(str(found.get("method")), "–")
        for m in found.get("members", []):
            rates = [
                html.cell(f"{m[k]:.3f}", "[{:.2f}, {:.2f}]".format(*m[f"{k}_interval"])) for k in ("success", "chunk_success")
            ]
            rows.append([html.cell(str(Path(name).parent), method), str(m["seed"]), str(m["episodes"]), *rates])
    caption = (
        "95 % Wilson intervals. Any step: some environment step was successful; whole chunk: every step of some chunk was."
    )
    return html.table(["evaluation", "seed", "episodes", "any step", "whole chunk"], rows, caption) if rows else ""


# -- pictures ------------------------------------------------------------------------------------------------------------------
def _label(setting: Setting) -> Callable[[str, float | None], str]:
    return lambda pretraining, parameter: Group(setting, pretraining, parameter, ()).label


def actions(content: Content, output: Path) -> str:
    """Action distributions of pretrained policies."""
    empty = Setting("", None, None, "", None)
    found, notes = material.policies(content.stages, _label(empty))
    content.notes += notes
    parts = []
    for number, item in enumerate(found):
        hue = {"bc": "bc", "sigma-bc": "sigma", "postbc": "post"}
        drawn = plots.actions(item.distribution, {name: hue[method] for name, method in item.methods.items()})
        caption = (
            f"Samples of the first action of a chunk (normalised units) at one dense and one sparse state of {item.data}, seed "
            f"{item.seed}; + is the demonstrated action. Spread: standard deviation at a state, averaged over action dimensions "
            "(switches such as a gripper left out) and over states."
        )
        parts.append(_picture(output, f"actions-{number}", drawn, caption))
        dense, sparse = (item.distribution.spread[kind] for kind in ("dense", "sparse"))
        rows = [
            [html.cell(n), f"{dense[n]:.3f}", f"{sparse[n]:.3f}", f"{sparse[n] / max(dense[n], 1e-9):.2f}"]
            for n in item.methods
        ]
        definition = item.distribution.definition.capitalize()
        parts.append(html.table(["policy", "spread, dense", "spread, sparse", "ratio"], rows, definition))
    return html.figures(parts)


def posterior(content: Content) -> str:
    """Pictures that the posterior stage drew."""
    chosen, left = material.within(material.posterior_pictures(content.directories), 3.0, 4)
    shown = [html.figure(html.embedded(path, f"Posterior standard deviation, {name}"), name) for name, path in chosen]
    return html.figures(shown) + html.paragraph(f"{left} more in the run directories." if left else "", True)


def videos(content: Content) -> str:
    """Some successes and failures."""
    chosen, left = material.within(material.videos(content.directories), 6.0, 12)
    shown = []
    for name, path in chosen:
        outcome, *rest = path.stem.split("_")
        shown.append(html.figure(html.embedded(path, name), f"{outcome}: {Path(name).parent.parent} {' '.join(rest)}"))
    return html.figures(shown, "videos") + html.paragraph(f"{left} more in the run directories." if left else "", True)


# -- setting -------------------------------------------------------------------------------------------------------------------
def configurations(content: Content) -> str:
    """Configurations by stage: what differs between runs, and what does not."""
    kinds: dict[str, list[material.Stage]] = {}
    for stage in content.stages:
        finetuner = material.read_json(stage.path / "results.json", [{}])
        name = FINETUNERS.get(finetuner[0].get("finetuner"), "") if stage.kind == "finetuning" and finetuner else ""
        kinds.setdefault(" ".join([stage.kind, name]).strip(), []).append(stage)
    parts = []
    for kind, members in kinds.items():
        if kind == "run":
            continue
        same, differing = material.shared_and_differing([s.config for s in members])
        parts.append(f"<h3>{html.escape(kind[0].upper() + kind[1:])}: {len(members)} run{'s' if len(members) > 1 else ''}</h3>")
        shown = [k for k in differing if k not in EXPECTED]
        if shown and len(members) > 1:
            header = ["run", *shown[:8]]
            rows = [[html.cell(s.name), *(html.cell(str(s.config.get(k, "–"))) for k in shown[:8])] for s in members]
            parts.append(html.table(header, rows, "Fields in which these runs differ", text=range(1, 9)))
        elif len(members) > 1:
            parts.append(html.paragraph("All of one configuration, seeds and policies apart."))
        rows = [[html.cell(k), html.cell("none" if v is None else str(v))] for k, v in same.items()]
        parts.append(
            html.details(f"{len(rows)} fields that are the same in all", html.table(["field", "value"], rows, text=(1,)))
        )
    return "".join(parts)


def runs(content: Content) -> str:
    """One row a run."""
    rows = []
    for g in content.groups:
        for run in g.runs:
            cells = []
            for k in ("success_before", "success_after"):
                low, high = statistics.wilson_interval(round(run[k] * run["episodes"]), run["episodes"])
                chunk = run.get(f"chunk_{k}")
                cells.append(
                    html.cell(
                        f"{run[k]:.3f}", f"[{low:.2f}, {high:.2f}]", *([f"chunk {chunk:.3f}"] if chunk is not None else [])
                    )
                )
            minutes = f"{run['wall_clock_s'] / 60:.1f} min" if run["wall_clock_s"] else "–"
            rows.append([html.cell(g.label, g.setting.title), str(run["seed"]), *cells, str(run["episodes"]), minutes])
    caption = "Success at any step, with Wilson's 95 % interval over the run's episodes; chunk: whole-chunk success"
    tabled = html.table(["run", "seed", "before", "after", "episodes", "time"], rows, caption) if rows else ""
    return html.details(f"{len(rows)} runs", tabled)


def commands(content: Content) -> str:
    """The commands, and the versions that they ran with."""
    known = [*(s.versions.get("command") for s in content.stages), *(e["command"] for e in content.entries)]
    listed = "\n".join(dict.fromkeys(c for c in known if c))
    rows = []
    for key in dict.fromkeys(k for s in content.stages for k in s.versions if k != "command"):
        values = dict.fromkeys(str(s.versions[key]) for s in content.stages if s.versions.get(key) is not None)
        if key == "commit":
            values = dict.fromkeys(v[:12] + (" with changes" if v.endswith("+changes") else "") for v in values)
        rows.append([html.cell(key), html.cell(("differs: " if len(values) > 1 else "") + ", ".join(values))])
    return (html.preformatted(listed) if listed else "") + (html.table(["version of", ""], rows, text=(1,)) if rows else "")
