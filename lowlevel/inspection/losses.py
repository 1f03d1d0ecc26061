"""`lowlevel losses`: every preference loss with its formula, its paper, its value and its gradient at one point.

Each number comes out of `lowlevel.losses.dpo_loss` in float64 and out of autograd: the function that training
uses. No formula is written here a second time; what is printed as text is what `lowlevel.losses.LOSSES` holds.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table, box

from lowlevel.errors import ConfigError
from lowlevel.inspection.loss_points import (
    EXO_SMOOTHING,
    LOGPS,
    SYMBOLS,
    LossAtPoint,
    Point,
    applicable,
    evaluate,
    path_of,
)
from lowlevel.losses import LOSSES

HEADINGS = (
    "loss",
    "at\nmargin",
    "value",
    "dL/d\nchosen",
    "dL/d\nrejected",
    "dL/d ref\nchosen",
    "dL/d ref\nrejected",
)
CONVENTIONS = (
    "y+ chosen, y- rejected completion; pi policy, ref reference; log natural, summed over a completion's tokens; "
    "a = log pi(y+) - log ref(y+), b likewise for y-, d = a - b, margin x = beta d; s sigmoid, ls = log s; "
    "n+, n- tokens; eps label_smoothing, tau discopop_tau, lambda dpop_lambda, alpha rpo_alpha.",
    "Signs: losses are minimised, so a negative derivative raises that log-probability and a positive one lowers it. "
    "Margin > 0: the policy prefers y+ to y- by more than the reference does.",
)


def show_losses(
    flags: Mapping[str, str], console: Console, *, name: str | None, plot: Path | None, as_json: bool
) -> None:
    """Print the table of losses, or one of them in detail, or both as JSON; draw the curves if `plot` is a path.

    Args:
        flags: what the user typed, by field of `Point` or hyper-parameter; the rest has its default.
        console: where to print.
        name: show this loss alone; a hyper-parameter that it does not use is then an error.
        plot: PNG file to write.
        as_json: print JSON with every digit instead.

    Raises:
        ConfigError: a flag that is no finite number or out of range, an unknown loss, or a file that cannot be written.
    """
    point = read_point(flags)
    settings = {key: _number(key, flags[key]) for key in SYMBOLS if key in flags}
    if name is None:
        rows = [evaluate(loss, point, applicable(loss, settings)) for loss in LOSSES]
    else:
        rows = [evaluate(name, point, settings)]
    if plot is not None:
        from lowlevel.inspection.loss_curves import draw  # matplotlib

        draw(rows, point, plot)
    if as_json:
        print(json.dumps(document(rows, point, flags, plot), indent=2, allow_nan=False))
        return
    print_path(rows[0], point, flags, console)
    if name is None:
        print_numbers(rows, console)
        print_formulas(rows, console)
    else:
        print_detail(rows[0], console)
    for line in CONVENTIONS:
        console.print(line, style="dim", markup=False)
    if plot is not None:
        console.print(f"\ncurves written to {plot}", markup=False, soft_wrap=True)


def read_point(flags: Mapping[str, str]) -> Point:
    """The pair that the flags describe.

    Raises:
        ConfigError: a log-probability that is not finite or above 0, or a length that is no whole number from 1 on.
    """
    values: dict[str, Any] = {}
    for key in (field.name for field in fields(Point) if field.name in flags):
        value = _number(key, flags[key])
        if key in LOGPS and value > 0:
            raise ConfigError(f"{_flag(key)} is a log-probability and cannot be above 0, got {flags[key]}")
        if key not in LOGPS and not (value.is_integer() and 1 <= value < 2**31):
            raise ConfigError(f"{_flag(key)} is a number of tokens, a whole number from 1 on, got {flags[key]}")
        values[key] = value if key in LOGPS else int(value)
    return Point(**values)


def print_path(row: LossAtPoint, point: Point, flags: Mapping[str, str], console: Console) -> None:
    """From the four log-probabilities to sigma(-margin), a line a step; marks what was not given as default."""
    path = path_of(point, row.parameters["beta"])
    number = "{:.10g}".format

    def given(key: str, text: str) -> str:
        return text if key in flags else f"{text}  (default)"

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "chosen y+", "rejected y-"):
        table.add_column(heading, overflow="fold")
    for label, *keys in (("log pi, policy", *LOGPS[:2]), ("log ref, reference", *LOGPS[2:])):
        table.add_row(label, *(given(key, number(vars(point)[key])) for key in keys))
    lengths = (("chosen_length", f"n+ = {point.chosen_length}"), ("rejected_length", f"n- = {point.rejected_length}"))
    table.add_row("tokens", *(given(*length) for length in lengths))
    table.add_row("beta", given("beta", number(row.parameters["beta"])))
    a, b = path["chosen_logratio"], path["rejected_logratio"]
    table.add_row("log-ratio = log pi - log ref", f"a = {number(a)}", f"b = {number(b)}")
    table.add_row("reward = beta * log-ratio", number(path["chosen_reward"]), number(path["rejected_reward"]))
    table.add_row("margin = reward+ - reward-", f"x = {number(path['margin'])}")
    table.add_row("sigma(-margin)", number(path["sigmoid_of_minus_margin"]), "weight in DPO's gradient")
    console.print(table)


def print_numbers(rows: Sequence[LossAtPoint], console: Console) -> None:
    """Value and gradients to six digits, fewer where the console is narrow; longer lines rather than cut numbers."""
    for digits in (6, 5, 4, 3):
        cells = [(row.name, *_numbers(row, digits)) for row in rows]
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
        for heading, column in zip(HEADINGS, zip(*cells, strict=True), strict=True):
            widest = max(map(len, (*heading.split("\n"), *column)))
            table.add_column(heading, justify="left" if heading == "loss" else "right", min_width=widest)
        for line in cells:
            table.add_row(*line)
        if Measurement.get(console, console.options.update(width=1000), table).maximum <= console.width:
            break
    console.print(table, crop=False)
    console.print()


def print_formulas(rows: Sequence[LossAtPoint], console: Console) -> None:
    """Formula, parameter and paper."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for heading in ("loss", "formula", "parameter", "paper"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "loss")
    for row in rows:
        table.add_row(row.name, LOSSES[row.name].formula, row.own_parameters, LOSSES[row.name].paper)
    console.print(table)
    if {0.0, EXO_SMOOTHING} <= {row.parameters.get("label_smoothing") for row in rows}:
        console.print(
            f"eps 0 is no smoothing: cdpo, robust, aot are then sigmoid; exo_pair needs some: {EXO_SMOOTHING}."
        )


def print_detail(row: LossAtPoint, console: Console) -> None:
    """One loss with every digit, and what its docstring says of it."""
    console.print((inspect.getdoc(LOSSES[row.name].function) or "").replace("`", ""), markup=False)
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    numbers = (row.margin, row.loss, *row.gradients.values(), row.slope)
    labels = (*(heading.replace("\n", " ") for heading in HEADINGS[1:]), "d loss / d margin (a up, b down)")
    for label, value in (*row.parameters.items(), *zip(labels, numbers, strict=True)):
        table.add_row(label, repr(value + 0.0))
    console.print(table)


def document(rows: Sequence[LossAtPoint], point: Point, flags: Mapping[str, str], plot: Path | None) -> dict[str, Any]:
    """What is printed, with every digit, for other programs."""
    return {
        "point": asdict(point),
        "defaults": [key for key in (*asdict(point), "beta") if key not in flags],
        "path": path_of(point, rows[0].parameters["beta"]),
        "conventions": list(CONVENTIONS),
        "plot": None if plot is None else str(plot),
        "losses": [
            {"formula": LOSSES[row.name].formula, "paper": LOSSES[row.name].paper, **asdict(row)} for row in rows
        ],
    }


def _numbers(row: LossAtPoint, digits: int) -> list[str]:
    return [f"{value + 0.0:.{digits}g}" for value in (row.margin, row.loss, *row.gradients.values())]  # + 0.0: no -0


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{_flag(key)} must be a finite number, got {text!r}")
    return value


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"
