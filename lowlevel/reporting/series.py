"""The report's charts: panels of curves over optimizer steps, from the records of one or several runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowlevel.inspection.charts import Tick, round_width
from lowlevel.inspection.reading import typographic
from lowlevel.perplexity import PERPLEXITIES
from lowlevel.running.plots import Curve, Panel, colours_of, points_of

Record = Mapping[str, Any]
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
