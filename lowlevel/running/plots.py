"""The charts of a run and of its report, from logged records; they and memory by phase drawn by matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowlevel.durable import replaced_file
from lowlevel.perplexity import PERPLEXITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Palette of Okabe and Ito, for colour-blind readers. The report's page has a shade of each for its themes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6D00")
DASHES = ("-", "--", ":")
FEW = 30  # curves with at most this many points get markers
IN_LOSS_PNG = ("loss", "sampled_reward", "rewards", "labelled_rewards", "margin", "accuracy")  # panels
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A line of a chart: (step, value) points. `run` numbers the runs of the chart, `kind` the curves of a run."""

    label: str
    points: tuple[tuple[float, float], ...]
    run: int
    kind: int


@dataclass(frozen=True)
class Panel:
    """A chart of the report and of loss.png."""

    name: str  # of its PNG file
    title: str
    unit: str
    note: str
    curves: tuple[Curve, ...]
    level: tuple[float, str] | None = None  # a horizontal line and its meaning, such as every run's value at its start
    alarm: str | None = None  # a warning that the page shows


# name, title, unit, note, and (key, label) of each curve
Plan = tuple[str, str, str, str, tuple[tuple[str, str], ...]]
PLANS: tuple[Plan, ...] = (
    ("loss", "Loss", "nats", "", (("loss", "training"), ("eval_loss", "held out"))),
    ("sampled_reward", "Reward of sampled completions", "", "held out: of greedy ones.",
     (("reward", "training"), ("eval_reward", "held out"))),
    ("perplexity", "Held-out perplexity", "", "by the supervised tokens of an example.",
     tuple((f"eval_{name}", name.rpartition("/")[2].replace("perplexity", "all")) for name in PERPLEXITIES)),
    ("margin", "Margin", "", "chosen reward minus rejected reward; desirable minus undesirable in kto.",
     (("rewards/margins", "training"), ("eval_rewards/margins", "held out"))),
    ("rewards", "Rewards", "", "beta times the log-ratio of policy to reference; of a reward model its output.",
     (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    ("labelled_rewards", "Rewards by label", "", "beta times the log-ratio of policy to reference; both start at 0.",
     (("rewards/desirable", "desirable"), ("rewards/undesirable", "undesirable"))),
    ("kl", "KL baseline", "nats", "mean log-ratio of mismatched completions; z0 is its part above 0.",
     (("kl", "training"), ("eval_kl", "held out"))),
    ("labelled_logps", "Log-probability by label", "nats", "",
     (("logps/desirable", "desirable"), ("logps/ref_desirable", "its reference"),
      ("logps/undesirable", "undesirable"), ("logps/ref_undesirable", "its reference"))),
    ("accuracy", "Pairs ranked right", "share", "margin above 0; a tie counts one half.",
     (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held out"))),
    ("chosen_logps", "Log-probability of the chosen", "nats", "",
     (("logps/chosen", "policy"), ("logps/ref_chosen", "reference"))),
    ("rejected_logps", "Log-probability of the rejected", "nats", "",
     (("logps/rejected", "policy"), ("logps/ref_rejected", "reference"))),
    ("grad_norm", "Gradient norm", "", "before clipping.", (("grad_norm", "norm"),)),
    ("learning_rate", "Learning rate", "", "", (("learning_rate", "rate"),)),
    ("loss_scale", "Loss scale", "", "fp16 only; each halving is a step that overflowed and was repeated.",
     (("loss_scale", "scale"),)),
    ("skipped_steps", "Repeated steps", "so far", "steps that were repeated after an fp16 overflow.",
     (("skipped_steps", "steps"),)),
    ("tokens_per_second", "Speed", "tokens/s", "without padding.",
     (("tokens_per_second", "speed"),)),
    ("padding_share", "Padding", "share", "computed positions without a token.", (("padding_share", "share"),)),
    ("memory", "GPU memory", "GiB", "peaks of the allocator so far, without paged optimizer state.",
     (("peak_allocated_gib", "allocated"), ("peak_reserved_gib", "reserved"))),
)  # fmt: skip
KNOWN = {key for *_, keys in PLANS for key, _ in keys} | {"step", "epoch", "num_tokens", "supervised_tokens"}
KNOWN |= {"share/desirable", "share/undesirable"}
ZERO_SAYS_NOTHING = ("memory", "skipped_steps")  # on a CPU; in a run without an overflow
LEVELS = {"accuracy": (0.5, "chance"), "margin": (0.0, "at the start"), "rewards": (0.0, "at the start")}


def panels(runs: Sequence[tuple[str, Sequence[Record]]]) -> list[Panel]:
    """The charts with at least one point; each metric of a custom loss has one.

    Args:
        runs: name and logged records of each; the first one is the report's own.
    """
    own = sorted({key for _, records in runs for record in records for key in record} - KNOWN)
    metrics: list[Plan] = [
        (re.sub(r"\W+", "_", f"metric_{key}"), key, "", "", ((key, "training"), (f"eval_{key}", "held out")))
        for key in own if not key.startswith("eval_")
    ]  # fmt: skip
    made = []
    for chart, title, unit, note, keys in (*PLANS, *metrics):
        curves = [
            Curve(f"{name}: {label}" if len(runs) > 1 else label, points, number, kind)
            for number, (name, records) in enumerate(runs)
            for kind, (key, label) in enumerate(keys)
            if (points := points_of(records, key))
        ]
        empty = chart in ZERO_SAYS_NOTHING and all(y == 0 for curve in curves for _, y in curve.points)
        constant = chart == "loss_scale" and all(y == 1 for curve in curves for _, y in curve.points)
        if curves and not empty and not constant:
            level = LEVELS.get(chart)
            alarm = fallen(runs[0][1]) if chart == "chosen_logps" else None
            made.append(Panel(chart, title, unit, note, tuple(curves), level, alarm))
    return made


def fallen(records: Sequence[Record]) -> str | None:
    """A warning if the mean chosen log-probability stays below the reference's from some step to the end."""
    pairs = [(r["step"], r["logps/chosen"] - r["logps/ref_chosen"]) for r in records if "logps/ref_chosen" in r]
    above = [i for i, (_, change) in enumerate(pairs) if change >= 0]
    since = above[-1] + 1 if above else 0
    if since == len(pairs):
        return None
    return f"The chosen lie below their reference from step {pairs[since][0]:g} on, by {-pairs[-1][1]:.3g} at the end."


def points_of(records: Sequence[Mapping[str, Any]], key: str) -> tuple[tuple[float, float], ...]:
    """The finite values of a key over the steps."""
    return tuple((r["step"], r[key]) for r in records if key in r and math.isfinite(r[key]))


def colours_of(curves: Sequence[Curve]) -> list[int]:
    """Index into COLOURS of each curve: by run if there are several runs, else by kind."""
    several = len({curve.run for curve in curves}) > 1
    return [(curve.run if several else curve.kind) % len(COLOURS) for curve in curves]


def plot_loss(records: Sequence[Record], path: Path, *, title: str) -> None:
    """The panels of `IN_LOSS_PNG` that a run has, side by side, as PNG."""
    from matplotlib.figure import Figure

    found = [panel for panel in panels([("", records)]) if panel.name in IN_LOSS_PNG]
    figure = Figure(figsize=(5 * max(1, len(found)), 3.6), layout="constrained")
    for axis, panel in zip(figure.subplots(1, max(1, len(found)), squeeze=False)[0], found, strict=False):
        draw_panel(axis, panel)
    figure.suptitle(title)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def plot_panels(panels: Sequence[Panel], folder: Path, *, title: str) -> None:
    """Write NAME.png for each panel of the report. Raises OSError."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for panel in panels:
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        draw_panel(figure.subplots(), panel, title)
        with replaced_file(folder / f"{panel.name}.png") as temporary:
            figure.savefig(temporary, dpi=130, format="png")


def draw_panel(axis: Axes, panel: Panel, title: str = "") -> None:
    """Draw a panel, with a legend for more than one line; `title`: of the runs."""
    for curve, colour in zip(panel.curves, colours_of(panel.curves), strict=True):
        marker = "o" if len(curve.points) <= FEW else None
        x, y = zip(*curve.points, strict=True)
        dashes = DASHES[curve.kind % len(DASHES)]
        axis.plot(x, y, marker=marker, markersize=3, label=curve.label, color=COLOURS[colour], linestyle=dashes)
    if panel.level:
        axis.axhline(panel.level[0], color="0.5", linewidth=0.8, label=panel.level[1])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    if len(panel.curves) + bool(panel.level) > 1:
        axis.legend(frameon=False, fontsize=9)
    names = ", ".join(filter(None, (panel.title, title)))
    axis.set(xlabel="optimizer step", ylabel=panel.unit or panel.title.lower(), title=names)
