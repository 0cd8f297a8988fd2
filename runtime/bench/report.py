"""A benchmark's report: JSON with everything, CSV, Markdown, and one HTML file that needs nothing.

What is shown is a `Page`, which each benchmark makes of its JSON; nothing here knows what is
measured.
"""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["Page", "Table", "cell", "machine_facts", "markdown", "table_text", "write_report"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #8884; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: #888; } dd { margin: 0; overflow-wrap: anywhere; }
.noisy { border-left: 4px solid #d97706; padding: .5rem 1rem; background: #d977061a; }
.clean { border-left: 4px solid #059669; padding: .5rem 1rem; background: #0596691a; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(32rem, 100%), 1fr)); }
svg { width: 100%; height: auto; }
td:first-child { white-space: nowrap; }
"""


@dataclass(frozen=True)
class Table:
    """Rows under headings; what is None is not known."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Page:
    """What people see of a report.

    facts   of machine and settings; noise: why figures are not clean, nothing where they are
    charts  SVG texts; notes: formulas and what else has to be said
    """

    title: str
    facts: dict[str, str]
    noise: list[str]
    tables: list[Table]
    charts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One line on how far the figures are to be trusted."""
        if self.noise:
            return f"Noisy, not to be quoted: {'; '.join(self.noise)}."
        return "Clean: the machine was quiet, and repeats lie close together."


def machine_facts(machine: dict[str, Any]) -> dict[str, str]:
    """The facts of `machine.describe` for people."""
    versions = ", ".join(f"{name} {found}" for name, found in machine["packages"].items())
    return {
        "machine": f"{machine['cpu']}, {machine['cores']} cores"
        + (f"; {machine['gpu']}" if machine["gpu"] else ""),
        "memory": f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        "load average before": f"{machine['load_average']:.2f}",
        "versions": f"qexport {machine['qexport']}, Python {machine['python']}, {versions}",
    }


def cell(value: Any) -> str:
    """A table's value as text: three digits of a number."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if value == 0 or not 1e-3 <= abs(value) < 1e6:
            return f"{value:.3g}"
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}"
    return str(value)


def table_text(table: Table) -> str:
    """In columns, for a terminal."""
    rows = [list(table.headings), *([cell(value) for value in row] for row in table.rows)]
    wide = [max(len(row[i]) for row in rows) for i in range(len(table.headings))]
    lines = [
        "  ".join(
            text.ljust(size) if i == 0 else text.rjust(size)
            for i, (text, size) in enumerate(zip(row, wide, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([table.title, *lines])


def markdown(page: Page) -> str:
    """The page without its charts."""
    parts = [f"# {page.title}", _plain(page.verdict)]
    parts.append("\n".join(f"- {name}: {_plain(value)}" for name, value in page.facts.items()))
    for table in page.tables:
        parts.append(f"## {table.title}")
        lines = [" | ".join(table.headings), " | ".join(["---"] * len(table.headings))]
        lines += [" | ".join(_plain(cell(value)) for value in row) for row in table.rows]
        parts.append("\n".join(f"| {line} |" for line in lines))
    parts += map(_plain, page.notes)
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that a server or a folder may have made up, without any meaning to Markdown or HTML."""
    flat = escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", flat)


def html(page: Page) -> str:
    """The page as one file: no script, nothing fetched."""
    facts = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in page.facts.items())
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(page.title)}</h1>",
        f'<p class="{"noisy" if page.noise else "clean"}">{escape(page.verdict)}</p>',
        f"<dl>{facts}</dl>",
        f'<div class="charts">{"".join(page.charts)}</div>',
    ]
    for table in page.tables:
        head = "".join(f"<th>{escape(text)}</th>" for text in table.headings)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell(value))}</td>' for value in row)}</tr>"
            for row in table.rows
        )
        parts.append(
            f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr>'
            f"</thead><tbody>{rows}</tbody></table></div>"
        )
    parts += [f"<p>{escape(note)}</p>" for note in page.notes]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def write_report(folder: Path, result: dict[str, Any], page: Page) -> None:
    """report.json, report.csv (the first table), report.md and report.html in `folder`."""
    # without blanks: most of it is samples
    whole = json.dumps(result, separators=(",", ":"), ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(whole, encoding="utf-8")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*page.tables[0].headings, "clean"])
    writer.writerows([*row, not page.noise] for row in page.tables[0].rows)
    (folder / "report.csv").write_text(text.getvalue(), encoding="utf-8")
    (folder / "report.md").write_text(markdown(page), encoding="utf-8")
    (folder / "report.html").write_text(html(page), encoding="utf-8")
