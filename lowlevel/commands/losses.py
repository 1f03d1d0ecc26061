"""preference losses: formula, paper, value and gradient at a point"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lowlevel.commands.common import Options, Overrides, Parser, number
from lowlevel.commands.loss_at_point import (
    EXO_SMOOTHING,
    LENGTHS,
    LOGPS,
    LossAtPoint,
    evaluate,
    flag,
    path_of,
    read_point,
    used_by,
)
from lowlevel.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from lowlevel.losses.registry import LossSpec

NUMBERS = {
    "chosen": "log-probability of the chosen completion under the policy (default: -10)",
    "rejected": "of the rejected completion (default: -12)",
    "ref_chosen": "of the chosen completion under the reference (default: -11)",
    "ref_rejected": "of the rejected completion under the reference (default: -11.5)",
    "chosen_length": "tokens in the chosen completion, for losses that average (default: 4)",
    "rejected_length": "tokens in the rejected completion (default: 5)",
    "margin": "rated margin of the pair, for odpo (default: 1)",
    "log_square_sum": "log sum_v p_v^2 over the vocabulary at each token, for wpo (default: -0.3)",
    "beta": "temperature (default: 0.1; simpo 2)",
    "label_smoothing": "share of flipped labels, for cdpo, robust, exo_pair and both aot (default: 0; exo_pair 0.001)",
    "discopop_tau": "discopop's temperature (default: 0.05)",
    "dpop_lambda": "dpop's penalty (default: 50)",
    "rpo_alpha": "weight of rpo's NLL term (default: 1)",
    "f_alpha": "alpha of f_alpha's divergence (default: 0.5)",
    "ld_alpha": "ld_dpo's weight of the longer completion's tail (default: 0.5)",
    "odpo_alpha": "odpo's weight of the rated margin (default: 1)",
    "simpo_gamma": "simpo's target margin (default: 1)",
    "orpo_lambda": "weight of orpo's odds term (default: 0.1)",
    "cpo_alpha": "weight of cpo's NLL term (default: 1)",
}
SHORT = {"desirable_weight": "wD", "undesirable_weight": "wU", "center_rewards_coefficient": "c"}  # as in formulas
SETTINGS = tuple(NUMBERS)[tuple(NUMBERS).index("beta") :]
SAMPLED = "sampled completions"
HEADINGS = ("at\nmargin", "value", "dL/d\nchosen", "dL/d\nrejected", "dL/d ref\nchosen", "dL/d ref\nrejected")
CONVENTIONS = (
    "y+ chosen, y- rejected completion; pi policy, ref reference; log natural, summed over a completion's tokens; "
    "a = log pi(y+) - log ref(y+), b likewise for y-, d = a - b, margin x = beta d; s sigmoid, ls = log s; "
    "n+, n- tokens; p+ = log pi(y+); eps label_smoothing; tau, lambda, alpha and gamma are the loss's own: --help.",
    "Signs: losses are minimised, so a negative derivative raises that log-probability and a positive one lowers it. "
    "Margin > 0: the policy prefers y+ to y- by more than the reference does.",
)


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    parser.set_defaults(output_is_result=True)
    for name, text in NUMBERS.items():  # as text: `_number` checks them, with one line per error
        add(flag(name), metavar="NUMBER", help=text)
    add("--loss", metavar="NAME", help="only this loss, with every digit; an option that it does not use is an error")
    add("--json", action="store_true", help="JSON with every digit")


def run(options: Options, overrides: Overrides) -> None:
    from lowlevel.losses import LOSSES
    from lowlevel.running.progress import PipedConsole

    given = {key: _number(key, text) for key in NUMBERS if (text := vars(options)[key]) is not None}
    point = read_point(given)
    beta = given.get("beta", 0.1)
    settings = {key: given[key] for key in SETTINGS if key in given}
    if options.loss is None:
        rows = [evaluate(loss, point, used_by(loss, settings)) for loss in LOSSES]
    else:
        for needs, specs in _others().items():
            if spec := specs.get(options.loss):
                what = f"{spec.name} ({needs}) has no value at a pair; its formula: {spec.formula}"
                raise ConfigError(f"{what}; {spec.paper}" if spec.paper else what)
        rows = [evaluate(options.loss, point, settings)]
    if options.json:
        document = {
            "point": point,
            "defaults": [key for key in (*point, "beta") if key not in given],
            "path": path_of(point, beta),
            "conventions": list(CONVENTIONS),
            "losses": [asdict(row) for row in rows],
        }
        print(json.dumps(document, indent=2, allow_nan=False))
        return
    fixed = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    console = PipedConsole(highlight=False, width=fixed)
    print_path(point, beta, given, console)
    if options.loss is None:
        print_numbers(rows, console)
        print_formulas(rows, console)
    else:
        print_detail(rows[0], console)
    for line in CONVENTIONS:
        console.print(line, style="dim", markup=False)


def print_path(point: Mapping[str, float], beta: float, given: Mapping[str, float], console: Console) -> None:
    """The steps from the log-probabilities to sigma(-margin), one per line; defaults are marked."""
    from rich.table import box

    from lowlevel.table import table_of

    path = {key: f"{value:.10g}" for key, value in path_of(point, beta).items()}
    numbers = {key: point[key] for key in (*LOGPS, *LENGTHS)} | {"beta": beta}
    shown = {
        key: f"{sign}{value:.10g}" + ("" if key in given else "  (default)")
        for (key, value), sign in zip(numbers.items(), ("",) * 4 + ("n+ = ", "n- = ", ""), strict=True)
    }
    rows: list[tuple[str, ...]] = [
        ("log pi, policy", shown["chosen"], shown["rejected"]),
        ("log ref, reference", shown["ref_chosen"], shown["ref_rejected"]),
        ("tokens", shown["chosen_length"], shown["rejected_length"]),
        ("beta", shown["beta"]),
        ("log-ratio = log pi - log ref", f"a = {path['chosen_logratio']}", f"b = {path['rejected_logratio']}"),
        ("reward = beta * log-ratio", path["chosen_reward"], path["rejected_reward"]),
        ("margin = reward+ - reward-", f"x = {path['margin']}"),
        ("sigma(-margin)", path["sigmoid_of_minus_margin"], "weight in DPO's gradient"),
    ]
    console.print(table_of(("<", "<chosen y+", "<rejected y-"), rows, box=box.SIMPLE_HEAD))


def print_numbers(rows: Sequence[LossAtPoint], console: Console) -> None:
    """Value and gradients to six digits; on a narrow console lines are too long, but no number is cut."""
    from rich.table import Table, box

    lines = [("loss", *HEADINGS), *((row.name, *(f"{value:.6g}" for value in _numbers(row))) for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for column in zip(*lines, strict=True):
        widest = max(len(part) for cell in column for part in cell.split("\n"))
        table.add_column(column[0], justify="left" if column[0] == "loss" else "right", min_width=widest)
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table, crop=False)
    console.print()


def _others() -> dict[str, Mapping[str, LossSpec]]:
    """The losses of other methods, by what these read."""
    from lowlevel.losses import KTO_LOSSES, POLICY_LOSSES, REWARD_LOSSES, SFT_LOSSES

    pairs = {"sft: messages": SFT_LOSSES, "kto: completions, label": KTO_LOSSES, "reward: pairs": REWARD_LOSSES}
    return {**pairs, SAMPLED: POLICY_LOSSES}


def print_formulas(rows: Sequence[LossAtPoint], console: Console) -> None:
    """Every loss with what it reads, formula, parameters and paper; those of other methods come last."""
    from rich.table import Table, box

    from lowlevel.losses import loss_spec
    from lowlevel.losses.dpo_table import HYPERPARAMETERS

    signs = {"label_smoothing": "eps", **{key: one.sign for key, one in HYPERPARAMETERS.items()}}
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for heading in ("loss", "reads", "formula", "parameter", "paper"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "loss")
    for row in rows:
        own = ", ".join(f"{signs[key]} {value:g}" for key, value in row.parameters.items() if key in signs)
        table.add_row(row.name, reads(loss_spec(row.name)), row.formula, own, row.paper)
    others = _others()
    sampled = ", ".join(others.pop(SAMPLED))
    for needs, specs in others.items():
        for spec in specs.values():
            own = ", ".join(SHORT.get(name, name) for name in spec.parameters)
            table.add_row(spec.name, needs, spec.formula, own, spec.paper)
    console.print(table)
    console.print(f"Of grpo, rloo and ppo, whose formula --loss NAME shows: {sampled}.")
    if {0.0, EXO_SMOOTHING} <= {row.parameters.get("label_smoothing") for row in rows}:
        console.print(f"With eps 0, cdpo, robust and aot are sigmoid; exo_pair needs eps > 0, here {EXO_SMOOTHING}.")


def reads(spec: LossSpec) -> str:
    """What a preference loss reads besides the policy's log-probabilities of pairs."""
    more = {
        "no reference": spec.reference_free,
        "lengths": spec.needs_lengths,
        "tokens": spec.needs_tokens or bool(spec.statistics),
        "rated margin": spec.needs_margin,
        "other pairs": spec.mixes_pairs,
    }
    return ", ".join(["dpo: pairs", *(name for name, needed in more.items() if needed)])


def print_detail(row: LossAtPoint, console: Console) -> None:
    """One loss with every digit, under its docstring."""
    from inspect import getdoc

    from rich.table import Table, box

    from lowlevel.losses import loss_spec

    console.print((getdoc(loss_spec(row.name).function) or "").replace("`", ""), markup=False)
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    labels = (*(heading.replace("\n", " ") for heading in HEADINGS), "d loss / d margin (a up, b down)")
    for label, value in (*row.parameters.items(), *zip(labels, (*_numbers(row), row.slope), strict=True)):
        table.add_row(label, repr(value + 0.0))
    console.print(table)


def _numbers(row: LossAtPoint) -> list[float]:
    return [value + 0.0 for value in (row.margin, row.loss, *row.gradients.values())]  # + 0.0: -0 becomes 0


def _number(key: str, text: str) -> float:
    value = number(text)
    if value is None or not math.isfinite(value):
        raise ConfigError(f"{flag(key)} must be a finite number, got {text!r}")
    return value
