"""The report's tables for papers and programs: Markdown, LaTeX (booktabs), CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

from postbc.experiments.tables import Table

#: What LaTeX does not take as it is.
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "α": r"$\alpha$", "σ": r"$\sigma$", "−": "$-$", "±": r"$\pm$",
    "→": r"$\to$", "·": r"$\cdot$", "–": "--", "…": r"\dots{}", "\n": " ",
}  # fmt: skip


def files(name: str, table: Table) -> dict[str, bytes]:
    """Name -> content of a table in each format."""
    made = {"md": markdown(table), "tex": latex(table), "csv": as_csv(table)}
    return {f"tables/{name}.{ending}": text.encode("utf-8", "replace") for ending, text in made.items()}


def markdown(table: Table) -> str:
    """A pipe table, its caption under it."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(_escaped(cell) for cell in cells)} |"

    sides = [":--" if column == 0 or column in table.text else "--:" for column in range(len(table.header))]
    rows = ([" ".join((cell.value, *(f"({line})" for line in cell.small))) for cell in row] for row in table.rows)
    return "\n".join([line(table.header), f"| {' | '.join(sides)} |", *map(line, rows), "", _escaped(table.caption), ""])


def _escaped(text: str) -> str:
    return re.sub(r"([\\|<>`*_])", r"\\\1", " ".join(text.split()))


def latex(table: Table) -> str:
    """A tabular of booktabs; small lines stand smaller after their value."""

    def text(value: str) -> str:
        return "".join(LATEX.get(letter, letter) for letter in value)

    def cell(value: str, small: Iterable[str]) -> str:
        return " ".join((text(value), *(f"{{\\scriptsize {text(line)}}}" for line in small)))

    sides = "".join("l" if column == 0 or column in table.text else "r" for column in range(len(table.header)))
    rows = [" & ".join(cell(c.value, c.small) for c in row) + r" \\" for row in table.rows]
    head = " & ".join(map(text, table.header)) + r" \\"
    caption = text(table.caption)
    lines = [
        f"% {caption}",
        f"\\begin{{tabular}}{{{sides}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*lines, ""])


def as_csv(table: Table) -> str:
    """Values, and where a column has small lines a column of them after it; minus signs as programs read them."""
    wide = [any(row[column].small for row in table.rows) for column in range(len(table.header))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [h for header, more in zip(table.header, wide) for h in ((header, f"{header}: details") if more else (header,))]
    )
    for row in table.rows:
        cells = (((cell.value, "; ".join(cell.small)) if more else (cell.value,)) for cell, more in zip(row, wide))
        writer.writerow([c.replace("−", "-") for pair in cells for c in pair])
    return out.getvalue()
