"""The geometry of the report's charts, for its page; which there are is in running/plots.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowlevel.inspection.charts import Tick, round_width
from lowlevel.inspection.reading import typographic
from lowlevel.running.plots import Panel, colours_of

TICKS = 4
ROOM = 0.06  # of the range, above and below


@dataclass(frozen=True)
class Line:
    """A curve in a box of 100 x 100, y downwards, with its last value."""

    label: str
    path: str
    dots: tuple[tuple[float, float], ...]
    colour: int
    dash: int
    last: str


@dataclass(frozen=True)
class Chart:
    """What the page's template draws."""

    panel: Panel
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    level: float | None


def chart(panel: Panel) -> Chart:
    """Geometry of a panel for the page, which draws it as SVG in its own colours; PNG files: running/plots.py."""
    xs = [x for curve in panel.curves for x, _ in curve.points]
    ys = [y for curve in panel.curves for _, y in curve.points] + ([panel.level[0]] if panel.level else [])
    left, right = min(xs), max(max(xs), min(xs) + 1)
    low, high = min(ys), max(ys)
    room = ROOM * (high - low) or 0.1 * abs(high) or 1.0
    bottom, top = low - room, high + room

    def place(x: float, y: float) -> tuple[float, float]:
        return round(100 * (x - left) / (right - left), 2), round(100 * (top - y) / (top - bottom), 2)

    lines = []
    for curve, colour in zip(panel.curves, colours_of(panel.curves), strict=True):
        points = [place(*point) for point in curve.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        dots = tuple(points) if len(points) == 1 else ()
        lines.append(Line(curve.label, path, dots, colour, curve.kind, number(curve.points[-1][1])))
    return Chart(
        panel,
        tuple(lines),
        tuple(Tick(place(x, low)[0], f"{x:g}") for x in ticks(left, right) if x == int(x)),
        tuple(Tick(place(left, y)[1], number(y, digits=12)) for y in ticks(bottom, top)),
        place(left, panel.level[0])[1] if panel.level else None,
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`, about `TICKS` of them."""
    width = round_width((high - low) / TICKS, (1, 2, 2.5, 5, 10))
    return [round(i * width, 12) for i in range(math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9) + 1)]


def number(value: float, digits: int = 4) -> str:
    """A value in a legend: four digits, thousands with commas; on an axis, whose values are round, all digits."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return typographic(f"{value:.3g}")
    return typographic(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}")
