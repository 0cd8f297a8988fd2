"""A benchmark's report: JSON with everything, CSV, Markdown, and one HTML file."""

import csv
import io
import json
import re
from html import escape
from pathlib import Path
from typing import Any

from qexport.page import Page, Table, cell, html

__all__ = ["machine_facts", "markdown", "table_text", "write_report"]


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
