"""A panel as SVG that takes its colours from the page, and as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowlevel.durable import replaced_file
from lowlevel.inspection.figures import typographic
from lowlevel.reporting.series import Curve, Panel

# Okabe and Ito's, which colour-blind readers can tell apart; the page has its own shade of each, by theme.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6D00")
DASHES = ("-", "--", ":")
FEW = 30  # points of a curve, up to which each is marked
TICKS = 4
ROOM = 0.06  # of the range, above and below


@dataclass(frozen=True)
class Tick:
    """A label on an axis, `at` percent from its start (top or left)."""

    at: float
    label: str


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
    """Geometry of a panel."""
    xs = [x for curve in panel.curves for x, _ in curve.points]
    ys = [y for curve in panel.curves for _, y in curve.points] + ([panel.level[0]] if panel.level else [])
    left, right = min(xs), max(max(xs), min(xs) + 1)
    low, high = min(ys), max(ys)
    room = ROOM * (high - low) or 0.1 * abs(high) or 1.0
    bottom, top = low - room, high + room

    def place(x: float, y: float) -> tuple[float, float]:
        return round(100 * (x - left) / (right - left), 2), round(100 * (top - y) / (top - bottom), 2)

    several = len({curve.run for curve in panel.curves}) > 1
    lines = []
    for curve in panel.curves:
        points = [place(*point) for point in curve.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        dots = tuple(points) if len(points) == 1 else ()
        lines.append(Line(curve.label, path, dots, _colour(curve, several), curve.kind, number(curve.points[-1][1])))
    return Chart(
        panel,
        tuple(lines),
        tuple(Tick(place(x, low)[0], f"{x:g}") for x in ticks(left, right) if x == int(x)),
        tuple(Tick(place(left, y)[1], number(y)) for y in ticks(bottom, top)),
        place(left, panel.level[0])[1] if panel.level else None,
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`, about `TICKS` of them."""
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    width = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [round(i * width, 12) for i in range(math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9) + 1)]


def number(value: float) -> str:
    """A value in a legend or on an axis: four digits, thousands with commas."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return typographic(f"{value:.3g}")
    return typographic(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")


def write_png(panel: Panel, path: Path, *, title: str) -> None:
    """The panel as a picture on white; the file is replaced whole or not at all. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    several = len({curve.run for curve in panel.curves}) > 1
    for curve in panel.curves:
        marker = "o" if len(curve.points) <= FEW else None
        style = DASHES[curve.kind % len(DASHES)]
        axis.plot(*zip(*curve.points, strict=True), color=COLOURS[_colour(curve, several)], linestyle=style,
                  marker=marker, markersize=3, label=curve.label)  # fmt: skip
    if panel.level:
        axis.axhline(panel.level[0], color="0.5", linewidth=0.8, label=panel.level[1])
    axis.set(xlabel="optimizer step", ylabel=panel.unit or panel.title.lower(), title=f"{panel.title}, {title}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    if len(panel.curves) + bool(panel.level) > 1:
        axis.legend(frameon=False, fontsize=9)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def write_pngs(made: Sequence[Panel], folder: Path, *, title: str) -> list[Path]:
    """One file a panel; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{panel.name}.png" for panel in made]
    for panel, path in zip(made, paths, strict=True):
        write_png(panel, path, title=title)
    return paths


def _colour(curve: Curve, several: bool) -> int:
    return (curve.run if several else curve.kind) % len(COLOURS)
