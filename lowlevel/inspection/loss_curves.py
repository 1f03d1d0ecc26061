"""The preference losses and their slopes over the margin, as a PNG: `lowlevel losses --plot FILE.png`.

The point of the command is one pair. Here it moves along the margin: the chosen log-ratio up and the rejected one down
by as much, reference, mean log-ratio and lengths as they are. Hence

    d loss / d margin = (dL / d log pi(y+)  -  dL / d log pi(y-)) / (2 beta)
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lowlevel.durable import given_file
from lowlevel.errors import ConfigError
from lowlevel.inspection.loss_points import LossAtPoint, Point, evaluate

# Okabe and Ito's colours, told apart with every kind of colour blindness; the line style tells apart what shares one.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)))
STYLES = [{"color": colour, "linestyle": dash, "linewidth": 1.6} for dash in DASHES for colour in COLOURS]


def curve(row: LossAtPoint, point: Point, margins: Sequence[float]) -> list[LossAtPoint]:
    """The loss at other margins, as the module's docstring says."""
    middle = _middle(point)
    found = []
    for margin in margins:
        half = margin / (2 * row.parameters["beta"])
        chosen, rejected = point.ref_chosen + middle + half, point.ref_rejected + middle - half
        found.append(evaluate(row.name, replace(point, chosen=chosen, rejected=rejected), row.parameters))
    return found


def draw(rows: Sequence[LossAtPoint], point: Point, path: Path) -> None:
    """Write the figure; the file is replaced in one step or not at all.

    Raises:
        ConfigError: the path does not end in .png, or cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot writes a PNG file: {path} must end in .png")
    figure = make_figure(rows, point)
    try:
        with given_file(path) as temporary:
            figure.savefig(temporary, format="png")
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror or error}") from None


def make_figure(rows: Sequence[LossAtPoint], point: Point) -> Figure:
    """Loss and d loss / d margin over the margin, 1200 x 600; losses with one and the same curve share a line."""
    reach = max(4.0, 1.25 * abs(rows[0].margin))
    margins = [reach * i / 120 for i in range(-120, 121)]
    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2)
    groups: dict[tuple[float, ...], list[str]] = {}
    lines: dict[tuple[float, ...], Any] = {}
    for row, style in zip(rows, itertools.cycle(STYLES)):  # noqa: B905 (endless on purpose)
        points = curve(row, point, margins)
        key = tuple(float(f"{p.loss:.9g}") for p in points)
        if key not in groups:
            (lines[key],) = axes[0].plot(margins, [p.loss for p in points], **style)
            axes[1].plot(margins, [p.slope for p in points], **style)
        groups.setdefault(key, []).append(f"{row.name} ({row.own_parameters})" if row.own_parameters else row.name)
    for axis, label, linear in zip(axes, ("loss", "d loss / d margin"), (5, 2), strict=True):
        axis.set_xlabel("margin = beta (a - b)")
        axis.set_ylabel(label + _scale(axis, linear))
        axis.axvline(rows[0].margin, color="0.6", linewidth=0.8, zorder=0)
        axis.grid(alpha=0.3)
    names = [textwrap.fill(" =\xa0".join(name.replace(" ", "\xa0") for name in group), 24) for group in groups.values()]
    figure.legend(lines.values(), names, loc="outside right upper", frameon=False, handlelength=3)
    figure.suptitle(
        f"One pair: beta {rows[0].parameters['beta']:g}, (a + b) / 2 = {_middle(point):.6g}, {point.chosen_length} and "
        f"{point.rejected_length} tokens; grey: the given point, margin {rows[0].margin:.6g}",
        fontsize=10,
    )
    return figure


def _scale(axis: Axes, linear: int) -> str:
    """Show squares in the hundreds beside logistic losses: logarithmic beyond +-linear, if anything is; says so."""
    largest = max(map(abs, axis.get_ylim()))
    if largest <= 1.5 * linear:
        return ""
    axis.set_yscale("symlog", linthresh=linear, linscale=2.5)
    axis.autoscale(axis="y")  # anew: what is 5 % of the range on a linear scale is decades on this one
    low, high = axis.get_ylim()
    decades = [10.0**k for k in range(1, 300, 1 if largest < 1e5 else 3) if 10.0**k <= largest]
    ticks = [-decade for decade in decades] + list(range(-linear, linear + 1)) + decades
    axis.set_yticks([tick for tick in ticks if low <= tick <= high])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    return f"   (linear up to {linear}, logarithmic beyond)"


def _middle(point: Point) -> float:
    return (point.chosen - point.ref_chosen + point.rejected - point.ref_rejected) / 2
