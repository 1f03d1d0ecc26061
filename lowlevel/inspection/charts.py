"""Geometry of charts on pages, in percent of their box: a step chart of cumulative sums, and histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowlevel.inspection.reading import plain, signed, typographic

BINS = 14  # approximate number of bins of a histogram of margins
NEAR = 0.16  # share of an axis: about a label's width on a phone
TOO_NEAR = 0.08  # and on a wide page
OVERLAP = 12  # percent: labels of sums that are closer overlap
LOSS_EDGES = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, math.inf)  # nats a token


@dataclass(frozen=True)
class Tick:
    """A label on an axis, `at` percent from its start (top or left)."""

    at: float
    label: str
    last: bool = False  # the label of the last sum
    near: bool = False  # so close to the label of zero that a narrow page shows only one of them


@dataclass(frozen=True)
class Stair:
    """A step chart of a cumulative sum, one step per token; SVG paths in a box of 100 x 100, y downwards."""

    line: str
    rises: str  # the vertical parts that go up, and those that go down
    falls: str
    zero: float
    heights: tuple[float, ...]  # y after each token
    ticks: tuple[Tick, ...]


def stair(sums: Sequence[float]) -> Stair:
    """The step chart of cumulative sums; token i has the i-th of equally wide columns, with the step in its middle."""
    low, high, end = min([0.0, *sums]), max([0.0, *sums]), [0.0, *sums][-1]
    room = 0.08 * (high - low) or 1.0
    bottom, top = low - room, high + room

    def y(value: float) -> float:
        return round(100 * (top - value) / (top - bottom), 2)

    heights = [y(value) for value in sums]
    middles = [round(100 * (i + 0.5) / len(sums), 3) for i in range(len(sums))]
    steps = list(zip(middles, [y(0.0), *heights], heights, strict=False))
    ticks: list[Tick] = []
    for value in (end, 0.0, high, low):
        if all(abs(y(value) - other.at) > OVERLAP for other in ticks):
            ticks.append(Tick(y(value), typographic(f"{value:+.3g}") if value else "0", value == end))
    line = f"M0 {y(0.0)}" + "".join(f"H{x}V{after}" for x, _, after in steps) + "H100"
    return Stair(
        line=line,
        rises="".join(f"M{x} {before}V{after}" for x, before, after in steps if after < before),
        falls="".join(f"M{x} {before}V{after}" for x, before, after in steps if after > before),
        zero=y(0.0),
        heights=tuple(heights),
        ticks=tuple(ticks),
    )


@dataclass(frozen=True)
class Bin:
    """A bin of a histogram of margins, and its items in ascending order of their values."""

    low: float
    items: tuple[int, ...]


@dataclass(frozen=True)
class Histogram:
    """Equally wide bins; zero is one of their edges."""

    bins: tuple[Bin, ...]
    tallest: int
    ticks: tuple[Tick, ...]


def histogram(values: Sequence[float]) -> Histogram:
    """The histogram of values, with round bin edges."""
    low, high = min([0.0, *values]), max([0.0, *values])
    width = round_width((high - low) / BINS) if high > low else 1.0
    digits = max(0, 1 - math.floor(math.log10(width)))
    first, last = math.floor(low / width), max(math.floor(high / width), math.floor(low / width))
    columns: dict[int, list[int]] = {column: [] for column in range(min(first, -1), max(last, 0) + 1)}
    for item in sorted(range(len(values)), key=lambda i: values[i]):
        columns[math.floor(values[item] / width)].append(item)
    edges = [column * width for column in [*columns, max(columns) + 1]]
    zero = edges.index(0.0)
    ticks = [
        Tick(
            100 * i / len(columns),
            typographic(signed(edges[i], digits)) if edges[i] else "0",
            near=0 < abs(i - zero) < NEAR * len(columns),
        )
        for i in sorted({0, zero, len(edges) - 1})
        if i == zero or abs(i - zero) >= TOO_NEAR * len(columns)
    ]
    return Histogram(
        tuple(Bin(column * width, tuple(items)) for column, items in columns.items()),
        max(map(len, columns.values())),
        tuple(ticks),
    )


def round_width(width: float, factors: Sequence[float] = (1, 2, 5, 10)) -> float:
    """The smallest of `factors` times a power of ten that is at least `width`."""
    power: float = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in factors if factor * power >= width * (1 - 1e-9))


@dataclass(frozen=True)
class LossBand:
    """Tokens whose loss lies in a band: their number, and their shares of all tokens and of the loss."""

    label: str
    count: int
    tokens: float
    loss: float


def loss_bands(losses: Sequence[float]) -> list[LossBand]:
    """Tokens grouped by their loss."""
    total = sum(losses) or 1.0
    bands = []
    for low, high in zip(LOSS_EDGES, LOSS_EDGES[1:], strict=False):
        inside = [loss for loss in losses if low <= loss < high or (loss < 0 and low == 0)]
        label = f"{plain(low, 0)} and more" if high == math.inf else f"{low:g} to {high:g}"
        bands.append(LossBand(label, len(inside), len(inside) / max(1, len(losses)), sum(inside) / total))
    return bands
