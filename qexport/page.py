"""A page of figures for people: facts, charts and tables, as one HTML file that needs nothing.

What is shown is a `Page`, which each benchmark and training run makes of its JSON; nothing here
knows what was measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

__all__ = ["Page", "Table", "cell", "html"]

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

    facts   of machine and settings
    noise   why figures are not clean, nothing where they are; None where no time was measured
    clean   what is said of clean figures
    charts  SVG texts; notes: formulas and what else has to be said
    """

    title: str
    facts: dict[str, str]
    noise: list[str] | None
    tables: list[Table]
    charts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    clean: str = "the machine was quiet, and repeats lie close together"

    @property
    def verdict(self) -> str:
        """One line on how far the figures are to be trusted."""
        if self.noise:
            return f"Noisy, not to be quoted: {'; '.join(self.noise)}."
        return f"Clean: {self.clean}."


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


def html(page: Page) -> str:
    """The page as one file: no script, nothing fetched."""
    facts = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in page.facts.items())
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(page.title)}</h1>",
    ]
    if page.noise is not None:
        kind = "noisy" if page.noise else "clean"
        parts.append(f'<p class="{kind}">{escape(page.verdict)}</p>')
    parts += [f"<dl>{facts}</dl>", f'<div class="charts">{"".join(page.charts)}</div>']
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
