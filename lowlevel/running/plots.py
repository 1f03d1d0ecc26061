"""All plots by matplotlib: loss.png of a run, memory by phase, and the report's charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowlevel.durable import given_file, replaced_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Palette of Okabe and Ito, for colour-blind readers. The report's page has a shade of each for its themes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6D00")
DASHES = ("-", "--", ":")
FEW = 30  # curves with at most this many points get markers
LOSS_PANELS = {
    "loss": (("loss", "training"), ("eval_loss", "held out")),
    "sampled reward": (("reward", "training, sampled"), ("eval_reward", "held out, greedy")),
    "reward": (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("rewards/margins", "margin")),
    "reward by label": (("rewards/desirable", "desirable"), ("rewards/undesirable", "undesirable")),
    "accuracy": (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held out")),
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart: (step, value) points. `run` numbers the runs of the chart, `kind` the curves of a run."""

    label: str
    points: tuple[tuple[float, float], ...]
    run: int
    kind: int


@dataclass(frozen=True)
class Panel:
    """One chart."""

    name: str  # of its PNG file
    title: str
    unit: str
    note: str
    curves: tuple[Curve, ...]
    level: tuple[float, str] | None = None  # a horizontal line and its meaning, such as every run's value at its start
    alarm: str | None = None  # a warning that the page shows


def points_of(records: Sequence[Mapping[str, Any]], key: str) -> tuple[tuple[float, float], ...]:
    """The finite values of a key over the steps."""
    return tuple((r["step"], r[key]) for r in records if key in r and math.isfinite(r[key]))


def colours_of(curves: Sequence[Curve]) -> list[int]:
    """Index into COLOURS of each curve: by run if there are several runs, else by kind."""
    several = len({curve.run for curve in curves}) > 1
    return [(curve.run if several else curve.kind) % len(COLOURS) for curve in curves]


def plot_loss(records: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Loss, and rewards and accuracy if there are any, over optimizer steps, as PNG."""
    from matplotlib.figure import Figure

    panels = {name: curves for name, curves in LOSS_PANELS.items() if any(curves[0][0] in record for record in records)}
    count = max(1, len(panels))
    figure = Figure(figsize=(5 * count, 3.6), layout="constrained")
    for axis, (name, keys) in zip(figure.subplots(1, count, squeeze=False)[0], panels.items(), strict=False):
        drawn = [Curve(label, points_of(records, key), 0, kind) for kind, (key, label) in enumerate(keys)]
        draw_curves(axis, [curve for curve in drawn if curve.points])
        axis.set(xlabel="optimizer step", ylabel=f"{name} (nats)" if name == "loss" else name)
    figure.suptitle(title)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def plot_panels(panels: Sequence[Panel], folder: Path, *, title: str) -> None:
    """Write NAME.png for each panel of the report. Raises OSError."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for panel in panels:
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis = figure.subplots()
        draw_curves(axis, panel.curves, panel.level)
        axis.set(xlabel="optimizer step", ylabel=panel.unit or panel.title.lower(), title=f"{panel.title}, {title}")
        with replaced_file(folder / f"{panel.name}.png") as temporary:
            figure.savefig(temporary, dpi=130, format="png")


def draw_curves(axis: Axes, curves: Sequence[Curve], level: tuple[float, str] | None = None) -> None:
    """Draw curves, with a legend for more than one line."""
    for curve, colour in zip(curves, colours_of(curves), strict=True):
        marker = "o" if len(curve.points) <= FEW else None
        x, y = zip(*curve.points, strict=True)
        dashes = DASHES[curve.kind % len(DASHES)]
        axis.plot(x, y, marker=marker, markersize=3, label=curve.label, color=COLOURS[colour], linestyle=dashes)
    if level:
        axis.axhline(level[0], color="0.5", linewidth=0.8, label=level[1])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    if len(curves) + bool(level) > 1:
        axis.legend(frameon=False, fontsize=9)


def plot_memory(report: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Memory by phase, stacked by component; `report` as in a run's memory.json."""
    from matplotlib.figure import Figure

    parts = {name: size / 2**20 for name, size in report["components"].items() if name != "optimizer state"}
    names = list(report["phases"])
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    left = 0.0
    for number, (part, size) in enumerate(parts.items()):
        axis.barh(names, size, left=left, label=part, color=f"C{number}")
        left += size
    rest = [size / 2**20 - left for size in report["phases"].values()]
    axis.barh(names, rest, left=left, label="activations and workspaces", color="0.75")
    axis.invert_yaxis()
    axis.set(xlabel="MiB allocated at the phase's peak, without paged optimizer state", title=title)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    with given_file(path) as target:
        figure.savefig(target, dpi=120, format=path.suffix.removeprefix(".") or "png")
