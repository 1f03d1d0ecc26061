"""How a loss is shown: what it reads of a pair, which gives its weights their meaning; formulas and numbers as text.

margin     only the margin, x = beta a - beta b: one weight for the pair, -dL/dx
averages   only the margin of averages, beta (a/n+ - b/n-): a token counts less in a longer completion
both       both log-ratios, or the chosen log-probability, separately: one weight for each completion
quantiles  sorted over the micro-batch: element i of the loss belongs to quantile i and not to pair i
"""

from __future__ import annotations

import math
import re
from typing import Literal

from lowlevel.losses.dpo_table import HYPERPARAMETERS
from lowlevel.losses.registry import LossSpec
from lowlevel.methods import Method

NONE = "–"


def plain(value: float, digits: int = 4, sign: str = "-") -> str:
    """A number; `sign="+"` also marks positive values. A value that rounds to zero has no sign."""
    if math.isnan(value):
        return NONE
    text = f"{value:{sign}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def signed(value: float, digits: int = 4) -> str:
    """A summand, with its sign."""
    return plain(value, digits, "+")


def percent(share: float) -> str:
    """A share in [0, 1]."""
    if not math.isfinite(share):
        return NONE
    if 0 < share < 1e-4:
        return "<0.01%"
    return f"{100 * share:.{2 if share < 1e-2 else 1}f}%"


COUNTS, SHARES = ("tokens", "rank"), ("prob", "share", "of the step", "clipped")
SIGNED = ("log-ratio", "adds", "sum", "weight", "reward", "advantage", "margin", "averaged margin")


def shown(name: str, value: float, digits: int = 4) -> str:
    """A number of an inspection, by its name."""
    if name in COUNTS or name in SHARES:
        return f"{value:.0f}" if name in COUNTS else percent(value)
    return plain(value, 2 if name == "entropy" else digits, "+" if name in SIGNED else "-")


def typographic(text: str) -> str:
    """Numbers with minus signs instead of hyphens, for a page."""
    return re.sub(r"(?<!\w)-(?=\d|inf)|(?<=\de)-(?=\d)", "\u2212", text)


Reading = Literal["margin", "averages", "both", "quantiles"]

READINGS: dict[str, Reading] = {
    **dict.fromkeys(("sigmoid", "cdpo", "robust", "hinge", "ipo_sum", "exo_pair", "discopop", "odpo", "wpo"), "margin"),
    **dict.fromkeys(("ipo", "sigmoid_norm", "simpo"), "averages"),
    **dict.fromkeys(("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "dpop", "rpo"), "both"),
    **dict.fromkeys(("f_forward_kl", "f_js", "f_alpha", "ld_dpo", "orpo", "cpo", "cpo_sum", "nll"), "both"),
    **dict.fromkeys(("aot", "aot_unpaired"), "quantiles"),
}
SIGNS = {
    "ls(": "log σ(", "s(": "σ(", "log pi(": "log π(", "pi(": "π(",
    "beta": "β", "eps": "ε", "tau": "τ", "lambda": "λ", "alpha": "α", "gamma": "γ",
    "eps_high": "ε₊", "r+": "r₊", "r-": "r₋",
    "n+": "n₊", "n-": "n₋", "y+": "y₊", "y-": "y₋", "y_t": "yₜ", "y_<t": "y<ₜ",
}  # fmt: skip


def reading_of(loss_type: str) -> Reading:
    """What a preference loss reads of a pair; "both" for a custom loss, which may read anything."""
    return READINGS.get(loss_type, "both")


def settings(method: Method) -> str:
    """Loss and hyper-parameters as one phrase."""
    spec, values = method.spec, method.settings
    signs = {name: SIGNS[one.sign] for name, one in HYPERPARAMETERS.items()}
    names = {"beta": "β", "label_smoothing": "ε", "epsilon": "ε", "epsilon_high": "ε₊", **signs}
    shown = {key: value if isinstance(value, str) else f"{value:g}" for key, value in values.items()}
    return ", ".join([spec.name, *(f"{names.get(key, key)} {value}" for key, value in shown.items())])


def formula(spec: LossSpec) -> str:
    """The formula in mathematical signs; for a custom loss the first line of its docstring, unchanged."""
    if spec.own:
        return spec.formula
    words = "|".join(re.escape(word) + r"\b" * word.isalpha() for word in SIGNS)
    signs = re.sub(rf"\b({words})", lambda found: SIGNS[found[0]], spec.formula)
    return signs.replace("^2", "²").replace("-", "−")
