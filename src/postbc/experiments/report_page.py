"""The report's page: style and the few HTML pieces that it is made of. No script, no request to anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from postbc.experiments.report_plots import PALETTE


def _variables(index: int) -> str:
    return "".join(f"--{name}:{colours[index]};" for name, colours in PALETTE.items())


STYLE = f"""
:root {{ color-scheme: light dark; --page:#ffffff; --panel:#f5f7f9; --mark:#e8f1fc; {_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --page:#14181d; --panel:#1d232a; --mark:#16293f; {_variables(1)} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{ margin:0; background:var(--page); color:var(--fg); font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }}
main {{ max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: .4rem 0 .3rem; }}
h2 {{ font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--grid); }}
h3 {{ font-size: 1.05rem; margin: 1.8rem 0 .5rem; }}
p, li {{ max-width: 46rem; }}
p {{ margin: .5rem 0; }}
ul {{ padding-left: 1.2rem; margin: .5rem 0; }}
.soft, figcaption, caption {{ color: var(--soft); font-size: .875rem; }}
.answer {{ background: var(--mark); border-left: 4px solid var(--post); padding: .7rem 1rem; border-radius: 0 6px 6px 0; }}
.answer ul {{ margin: .2rem 0; }}
.scroll {{ overflow-x: auto; margin: .6rem 0 1rem; }}
table {{ border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; padding: 0 0 .35rem; }}
th, td {{ text-align: right; padding: .34rem .8rem .34rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }}
th {{ font-weight: 600; color: var(--soft); }}
th:first-child, td:first-child, td.text, th.text {{ text-align: left; }}
td small {{ display: block; color: var(--soft); font-size: .8rem; white-space: nowrap; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); gap: 1rem 2rem; }}
figure {{ margin: .4rem 0; min-width: 0; }}
figure svg {{ width: 100%; max-width: 28rem; height: auto; display: block; }}
figure img {{ width: 100%; height: auto; display: block; border-radius: 6px; background: #fff; }}
.videos {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 13rem), 1fr)); gap: 1rem; }}
video {{ width: 100%; display: block; border-radius: 6px; background: var(--panel); }}
pre {{ background: var(--panel); padding: .7rem .9rem; border-radius: 6px; overflow-x: auto; font-size: .82rem; line-height: 1.45; }}
code {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
details {{ margin: .5rem 0; }}
summary {{ cursor: pointer; color: var(--post); }}
@media (max-width: 34rem) {{
  table.cards thead {{ display: none; }}
  table.cards caption {{ display: block; }}
  table.cards, table.cards tbody, table.cards tr, table.cards td {{ display: block; width: 100%; text-align: left; }}
  table.cards tr {{ border-bottom: 1px solid var(--grid); padding: .45rem 0; }}
  table.cards td {{ border: 0; padding: .12rem 0; display: grid; grid-template-columns: 8.2rem 1fr; }}
  table.cards td::before {{ content: attr(data-label); color: var(--soft); }}
  table.cards td:first-child {{ display: block; font-weight: 600; }}
  table.cards td:first-child::before {{ content: none; }}
  table.cards td small {{ grid-column: 2; }}
}}
@media print {{ details > * {{ display: block; }} }}
"""


def page(title: str, body: str) -> str:
    """A whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def cell(value: str, *small: str) -> str:
    """Table cell content: a value, and small lines under it."""
    return escape(value) + "".join(f"<small>{escape(line)}</small>" for line in small)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", text: Sequence[int] = ()) -> str:
    """A table that turns into cards on a phone. Cells are HTML (see :func:`cell`); columns in `text` are left-aligned."""

    def left(i: int) -> str:
        return ' class="text"' if i in text else ""

    head = "".join(f"<th scope=col{left(i)}>{escape(name)}</th>" for i, name in enumerate(header))
    body = "".join(
        "<tr>" + "".join(f'<td{left(i)} data-label="{escape(header[i])}">{c}</td>' for i, c in enumerate(row)) + "</tr>\n"
        for row in rows
    )
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="cards">{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def section(title: str, *parts: str) -> str:
    """A heading and its content; nothing at all if there is no content."""
    content = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>\n" if content else ""


def paragraph(text: str, soft: bool = False) -> str:
    """Plain text as a paragraph."""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>" if text else ""


def bullets(items: Sequence[str]) -> str:
    """Plain texts as a list."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>" if items else ""


def figure(content: str, caption: str) -> str:
    """HTML (an SVG, an image, a video) with a caption."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def figures(items: Sequence[str], kind: str = "figures") -> str:
    """Figures side by side where there is room."""
    return f'<div class="{kind}">' + "\n".join(items) + "</div>" if items else ""


def details(summary: str, content: str) -> str:
    """Folded away."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>" if content else ""


def preformatted(text: str) -> str:
    """Commands and configuration."""
    return f"<pre><code>{escape(text)}</code></pre>"


def embedded(path: Path, alternative: str) -> str:
    """A PNG or an MP4 inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".mp4":
        source = f"data:video/mp4;base64,{data}"
        return f'<video controls loop muted playsinline preload="metadata" aria-label="{escape(alternative)}" src="{source}"></video>'
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'
