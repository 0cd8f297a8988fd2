"""Pictures of the documentation, drawn from the grids themselves and from what was measured.

Lines and text have the colour of the page: the site puts pictures into its pages as they are, and
elsewhere they follow the reader's light or dark.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path

from docs.figures import load
from qexport.grid import BINARY, INT3, INT4, NF4, SEQ2, TERNARY, Grid
from qexport.svg import line_chart

__all__ = ["PICTURES"]

ROOT = Path(__file__).parent.parent
_STYLE = (
    "<style>.qx{color:var(--md-default-fg-color,#24292f);fill:currentColor}"
    "@media(prefers-color-scheme:dark){.qx{color:var(--md-default-fg-color,#e6edf3)}}</style>"
)
_BLUE, _GREEN, _ORANGE = "#3b82f6", "#059669", "#d97706"


def flow() -> str:
    """From a model to an answer: train or quantize into a RUN, pack, verify, serve"""
    parts = [
        *_box(10, 70, 110, 60, "MODEL", "dense"),
        *_arrow(120, 100, 200, 60, "train"),
        *_arrow(120, 100, 200, 140, "quantize", below=True),
        *_box(200, 40, 130, 120, "RUN", "codes, scales", _BLUE),
        *_arrow(330, 100, 430, 100, "pack"),
        *_box(430, 10, 170, 180, "", "", _GREEN),
    ]
    names = ("native", "GPTQ", "AWQ", "compressed-tensors", "humming", "bitsandbytes", "GGUF")
    parts += [_text(515, 34 + 24 * i, name, "middle") for i, name in enumerate(names)]
    readers = ("qexport serve", "vLLM", "llama.cpp", "transformers")
    for i, name in enumerate(readers):
        y = 28 + 48 * i
        parts += [*_arrow(600, y, 650, y), *_box(650, y - 17, 120, 34, name)]
    parts.append(
        '<path d="M265 160 V222 H515 V190" fill="none" stroke="currentColor" '
        'stroke-dasharray="5 4" marker-start="url(#tip)" marker-end="url(#tip)"/>'
    )
    parts.append(_text(390, 240, "verify: every code, every bit, every other tensor", "middle"))
    return _svg(780, 250, flow, parts)


def grids() -> str:
    """The values of each grid, in units of its scale"""
    shown = (BINARY, TERNARY, SEQ2, INT3, INT4)
    names = ("1 bit", "1.58 bits", "2 bits, SEQ", "3 bits", "4 bits")
    parts = []
    for row, (grid, name) in enumerate(zip(shown, names, strict=True)):
        y = 30 + 38 * row
        parts += [_text(10, y + 4, name), *_line_of(grid, y)]
    at = 30 + 38 * len(shown)
    parts += [_text(10, at + 4, "NF4 (x 8)"), *_dots(_values(NF4), at, 8.0, _ORANGE)]
    parts += [_text(_place(n), at + 34, str(n), "middle") for n in range(-8, 9, 2)]
    return _svg(780, at + 46, grids, parts)


def embedding() -> str:
    """SEQ's half-integer values are whole ones at half the scale: int3 holds them exactly"""
    parts = [_text(10, 34, "SEQ, scale s"), *_dots([2 * v for v in _values(SEQ2)], 30, 1.0, _BLUE)]
    parts += [
        _text(_place(2 * value), 18, f"{value:+g} s", "middle", 11) for value in _values(SEQ2)
    ]
    parts += [_text(10, 94, "int3, scale s/2"), *_line_of(INT3, 90)]
    parts += [_text(_place(v), 116, f"{v:g}", "middle", 11) for v in _values(INT3)]
    parts += [
        f'<line x1="{_place(2 * v)}" x2="{_place(2 * v)}" y1="38" y2="82" stroke="{_BLUE}" '
        'stroke-dasharray="3 3"/>'
        for v in _values(SEQ2)
    ]
    return _svg(780, 126, embedding, parts)


def groups() -> str:
    """A row of weights in groups: one scale for each group, one code for each weight"""
    parts = []
    codes = (0, 3, 2, 1, 1, 2, 0, 3, 2, 2, 1, 0, 3, 1, 2, 2)
    for index, code in enumerate(codes):
        color = (_BLUE, _GREEN, _ORANGE, "#7c3aed")[index // 4]
        x = 110 + 40 * index
        parts.append(
            f'<rect x="{x}" y="50" width="36" height="36" rx="4" fill="{color}" '
            f'fill-opacity=".2" stroke="{color}"/>'
        )
        parts.append(_text(x + 18, 73, str(code), "middle"))
        if index % 4 == 0:
            parts.append(f'<path d="M{x} 42 v-6 h156 v6" fill="none" stroke="{color}"/>')
            parts.append(_text(x + 78, 26, f"scale {index // 4}", "middle"))
    parts += [_text(10, 73, "codes"), _text(10, 26, "scales")]
    parts.append(_text(10, 116, "weight = scale x (code - 1.5), computed in float32, rounded once"))
    return _svg(780, 130, groups, parts)


def batches() -> str:
    """What a step takes by the number of sequences: packed weights win where reading is the work"""
    found = load("latency-smollm2/report.json")
    names = {
        "native seq2": "SEQ-2 (2.25 bits)",
        "native int4": "int4 (4.5 bits)",
        "native dense": "bfloat16",
    }
    lines: dict[str, list[tuple[float, float]]] = {said: [] for said in names.values()}
    for cell in found["cells"]:
        if cell["contender"] in names:
            lines[names[cell["contender"]]].append((cell["batch"], cell["itl"]["p50"] * 1e3))
    chart = line_chart("A decoding step of SmolLM2", "sequences", "milliseconds", lines)
    return chart.replace("<svg ", '<svg class="qx" ', 1).replace(">", f">{_STYLE}", 1)


def _line_of(grid: Grid, y: float) -> list[str]:
    return _dots(_values(grid), y, 1.0, _BLUE)


def _values(grid: Grid) -> list[float]:
    if grid.values is not None:
        return list(grid.values)
    assert grid.zero is not None
    return [code - grid.zero for code in range(grid.levels)]


def _dots(values: list[float], y: float, factor: float, color: str) -> list[str]:
    faint = 'stroke="currentColor" stroke-opacity=".35"/>'
    line = f'<line x1="{_place(-8)}" x2="{_place(8)}" y1="{y}" y2="{y}" {faint}'
    zero = f'<line x1="{_place(0)}" x2="{_place(0)}" y1="{y - 8}" y2="{y + 8}" {faint}'
    dots = [
        f'<circle cx="{_place(v * factor):.1f}" cy="{y}" r="6" fill="{color}"/>' for v in values
    ]
    return [line, zero, *dots]


def _place(value: float) -> float:
    """Of a value from -8 to 8 across the picture."""
    return 440 + 40 * value


def _box(
    x: float, y: float, width: float, height: float, title: str, below: str = "", color: str = ""
) -> list[str]:
    fill = (
        f'fill="{color}" fill-opacity=".15" stroke="{color}"'
        if color
        else ('fill="none" stroke="currentColor"')
    )
    middle = y + height / 2 + (-4 if below else 5)
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" {fill}/>',
        _text(x + width / 2, middle, title, "middle"),
        _text(x + width / 2, middle + 20, below, "middle", 12),
    ]


def _arrow(
    x: float, y: float, to_x: float, to_y: float, name: str = "", *, below: bool = False
) -> list[str]:
    return [
        f'<line x1="{x}" y1="{y}" x2="{to_x - 4}" y2="{to_y}" stroke="currentColor" '
        'marker-end="url(#tip)"/>',
        _text((x + to_x) / 2, (y + to_y) / 2 + (36 if below else -12), name, "middle"),
    ]


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 14) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _svg(width: int, height: int, picture: Callable[[], str], parts: list[str]) -> str:
    name = escape(picture.__doc__ or "")
    tip = (
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="4" '
        'orient="auto-start-reverse">'
        '<path d="M0 0 L8 4 L0 8 z" fill="currentColor"/></marker></defs>'
    )
    return (
        f'<svg class="qx" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'role="img" '
        f'aria-label="{name}" font-family="system-ui, sans-serif">{_STYLE}{tip}\n'
        + "\n".join(part for part in parts if not part.endswith("></text>"))
        + "\n</svg>\n"
    )


PICTURES: dict[str, Callable[[], str]] = {
    picture.__name__: picture for picture in (flow, grids, embedding, groups, batches)
}
