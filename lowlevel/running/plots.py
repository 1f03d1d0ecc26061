"""Curves of a run as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowlevel.durable import given_file, replaced_file

PANELS = {
    "loss": (("loss", "training"), ("eval_loss", "held out")),
    "reward": (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("rewards/margins", "margin")),
    "accuracy": (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held out")),
}


def plot_loss(records: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw the loss, and for DPO rewards and accuracy, over optimizer steps, as a PNG that is whole or not there."""
    from matplotlib.figure import Figure

    panels = {name: curves for name, curves in PANELS.items() if any(curves[0][0] in record for record in records)}
    figure = Figure(figsize=(5 * max(1, len(panels)), 3.6), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axis, (name, curves) in zip(axes, panels.items(), strict=False):
        for key, label in curves:
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None, label=label)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(f"{name} (nats)" if name == "loss" else name)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def plot_memory(report: Mapping[str, Any], path: Path, *, title: str) -> None:
    """A PNG of memory by phase, stacked by component; `report` as in a run's memory.json."""
    from matplotlib.figure import Figure

    paged = "optimizer state"
    parts = {name: size / 2**20 for name, size in report["components"].items() if name != paged}
    names = list(report["phases"])
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(names)
    for number, (part, size) in enumerate(parts.items()):
        axes.barh(names, size, left=left, label=part, color=f"C{number}")
        left = [value + size for value in left]
    rest = [report["phases"][name] / 2**20 - start for name, start in zip(names, left, strict=True)]
    axes.barh(names, rest, left=left, label="activations and workspaces", color="0.75")
    axes.invert_yaxis()
    axes.set(xlabel="MiB allocated at the phase's peak (paged optimizer state apart)", title=title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    with given_file(path) as target:
        figure.savefig(target, dpi=120, format=path.suffix.removeprefix(".") or "png")
