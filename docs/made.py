"""Parts of pages that are made from what they speak of: measurements, verdicts, pictures.

A page has `<!-- made: NAME -->` before such a part and `<!-- end -->` after it; NAME is a key of
PARTS, and what follows it goes to the function. `python -m docs.made` makes all of them anew, and a
test holds them to be current. Links are written from the root of the repository.
"""

import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from docs.figures import FIGURES, table
from docs.peers import peers
from docs.pictures import PICTURES
from qexport.formats.table import verdict_table
from qexport.training.recipe import RECIPES, Recipe

__all__ = ["PARTS", "current", "pages"]

ROOT = Path(__file__).parent.parent
_MADE = re.compile(r"(<!-- made: ([a-z0-9_ -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_LINK = re.compile(r"\]\(/([^)]+)\)")


def pages() -> list[Path]:
    """Every page that is written by hand, the READMEs too."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def current(path: Path) -> str:
    """The text of a page with all its made parts as they would be made now."""

    def made(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        text = PARTS[name](*arguments)
        up = os.path.relpath(ROOT, path.parent)
        text = _LINK.sub(lambda link: f"]({'' if up == '.' else up + '/'}{link[1]})", text)
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return _MADE.sub(made, path.read_text(encoding="utf-8"))


def verdicts(name: str = "") -> str:
    """How one format, or every one, holds every grid of a matrix of 4096 x 4096."""
    rows = verdict_table((4096, 4096))
    formats = [name] if name else [n for n in rows[0]["formats"] if n != "gptq_v2"]
    lines = []
    for row in rows:
        if not name and row["group_size"] not in (None, 128):
            continue
        group = row["group_size"] or "per channel"
        cells = [_verdict(row["formats"][form], row["grid"]) for form in formats]
        lines.append([f"`{row['grid']}`", str(group), *cells])
    if name:
        refused = {row["grid"] for row in rows} - {
            row["grid"] for row in rows if row["formats"][name]["verdict"] != "refused"
        }
        shown = [line for line in lines if line[0].strip("`") not in refused]
        key = "Of 4096 x 4096 weights with float16 scales; \\* re-coded without loss."
        also = f" Refused in any group: {', '.join(sorted(refused))}." if refused else ""
        return (
            f"{table(['grid', 'group', 'held as, bits per weight on disk'], shown)}\n\n{key}{also}"
        )
    return table(["grid", "group", *formats], lines)


def recipes() -> str:
    """What `train --recipe` sets, at every width that differs."""
    shown = {
        f"{name}: {' '.join(bits for bits in widths if widths[bits] == row)}": row
        for name, widths in RECIPES.items()
        for row in widths.values()
    }
    lines = [
        [
            f"`--{field.name.replace('_', '-')}`",
            *(f"{getattr(row, field.name)}" for row in shown.values()),
        ]
        for field in fields(Recipe)
    ]
    return table(["at bits", *shown], lines)


def picture(name: str) -> str:
    """A picture of docs/pictures.py, as a link to the file that it is written to."""
    return f"![{PICTURES[name].__doc__}](/docs/pictures/{name}.svg)"


def _verdict(cell: dict[str, Any], grid: str) -> str:
    if cell["verdict"] == "refused":
        return "refused"
    kind = {"exact": "", "embedded": "\\*"}.get(cell["verdict"], f", {cell['verdict']}")
    stored = "" if cell["stored"] == grid else f"{cell['stored']} "
    return f"{stored}{cell['bits_per_weight']:.4g}{kind}"


PARTS: dict[str, Callable[..., str]] = {
    **FIGURES,
    "peers": peers,
    "verdicts": verdicts,
    "picture": picture,
    "recipes": recipes,
}


def main() -> None:
    """Make all parts and pictures anew."""
    for name, draw in PICTURES.items():
        (ROOT / "docs/pictures" / f"{name}.svg").write_text(draw(), encoding="utf-8")
    for path in pages():
        path.write_text(current(path), encoding="utf-8")


if __name__ == "__main__":
    main()
