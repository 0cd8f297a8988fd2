"""Line charts as SVG: one text, no script, no outside resource."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape

__all__ = ["line_chart"]

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 230, 40, 50
_LONGEST_NAME = 28
_FEW = 11  # ticks
_FEWEST = 3
_COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Points],
    dashed: Collection[str] = (),
    order: Sequence[str] = (),
    linear: str = "",
) -> str:
    """Lines of (x, y) on logarithmic axes; both have to be positive. Raises ValueError for none.

    linear   axes that are linear instead, as in "x" or "xy"
    dashed   names of lines that are no measurements, and have no points
    order    names by which colours are given, so that several charts agree
    """
    points = [point for line in series.values() for point in line]
    logarithmic = [
        value for at, axis in enumerate("xy") if axis not in linear for value in _column(points, at)
    ]
    if not points or min(logarithmic, default=1) <= 0:
        raise ValueError("a logarithmic chart wants points, and positive ones")
    x_axis = _Axis(_column(points, 0), _LEFT, _WIDTH - _RIGHT, "x" in linear)
    y_axis = _Axis(_column(points, 1), _HEIGHT - _BOTTOM, _TOP, "y" in linear)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12" '
        'fill="currentColor">',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    parts += _frame(x_axis, y_axis, x_label, y_label)
    known = list(dict.fromkeys([*order, *series]))
    for number, (name, line) in enumerate(series.items()):
        color = _COLORS[known.index(name) % len(_COLORS)]
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in line]
        parts += _line(places, color, name in dashed)
        at = _TOP + 8 + 20 * number
        parts.append(_grid_line(_WIDTH - _RIGHT + 12, at, _WIDTH - _RIGHT + 32, at, color, 3))
        parts.append(_text(_WIDTH - _RIGHT + 38, at + 4, _cut(name), "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _frame(x_axis: "_Axis", y_axis: "_Axis", x_label: str, y_label: str) -> Iterator[str]:
    for value, place in x_axis.ticks():
        yield _grid_line(place, _TOP, place, _HEIGHT - _BOTTOM)
        yield _text(place, _HEIGHT - _BOTTOM + 18, _short(value), "middle")
    for value, place in y_axis.ticks():
        yield _grid_line(_LEFT, place, _WIDTH - _RIGHT, place)
        yield _text(_LEFT - 8, place + 4, _short(value), "end")
    yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x_label, "middle")
    yield (
        f'<text transform="translate(16 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )


def _line(places: Points, color: str, dashed: bool) -> Iterator[str]:
    """A line, and a point for each measurement of one that is not dashed."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>'
    if not dashed:
        for x, y in places:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'


def _column(points: Points, at: int) -> list[float]:
    return [point[at] for point in points]


class _Axis:
    """Values to places, by their logarithms or as they are."""

    def __init__(
        self, values: Sequence[float], begin: float, end: float, linear: bool = False
    ) -> None:
        self._linear = linear
        low, high = self._measure(min(values)), self._measure(max(values))
        spare = 0.04 * (high - low) or 0.5
        self._low, self._high = low - spare, high + spare
        self._begin, self._end = begin, end
        self._values = values

    def _measure(self, value: float) -> float:
        return value if self._linear else math.log10(value)

    def place(self, value: float) -> float:
        share = (self._measure(value) - self._low) / (self._high - self._low)
        return self._begin + share * (self._end - self._begin)

    def ticks(self) -> list[tuple[float, float]]:
        """The values themselves where they are few whole numbers, as batches are.

        Else powers of ten, with twos and fives between where there is room; on a linear axis, and
        where that gives too few, round numbers at even distances.
        """
        distinct = sorted(set(self._values))
        if len(distinct) <= _FEW and all(float(value).is_integer() for value in distinct):
            return [(value, self.place(value)) for value in distinct]
        values = [] if self._linear else self._powers()
        if len(values) < _FEWEST:
            values = _even(min(distinct), max(distinct))
        return [(value, self.place(value)) for value in values]

    def _powers(self) -> list[float]:
        decades = range(math.floor(self._low), math.ceil(self._high) + 1)
        steps = (1, 2, 5) if self._high - self._low < 3 else (1,)
        values = [step * 10.0**decade for decade in decades for step in steps]
        return [value for value in values if self._low <= math.log10(value) <= self._high]


def _even(low: float, high: float) -> list[float]:
    """Some round numbers from low to high."""
    if low == high:
        return [low]
    rough = (high - low) / _FEW * 2
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def _grid_line(
    x1: float, y1: float, x2: float, y2: float, color: str = "#8884", width: int = 1
) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
        f'stroke-width="{width}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _short(value: float) -> str:
    return f"{value:g}" if value == 0 or 1e-3 <= value < 1e5 else f"{value:.0e}"
