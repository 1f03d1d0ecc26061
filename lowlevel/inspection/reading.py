"""How a loss is shown: what it reads of a pair, which gives its weights their meaning, and its formula as text.

margin     only the margin, x = beta a - beta b: one weight for the pair, -dL/dx
averages   only the margin of averages, beta (a/n+ - b/n-): a token counts less in a longer completion
both       both log-ratios, or the chosen log-probability, separately: one weight for each completion
quantiles  sorted over the micro-batch: element i of the loss belongs to quantile i and not to pair i
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from lowlevel.losses.registry import LossSpec
from lowlevel.methods import Method
from lowlevel.methods.dpo import DPO

Reading = Literal["margin", "averages", "both", "quantiles"]

_BY_READING: dict[Reading, tuple[str, ...]] = {
    "margin": ("sigmoid", "cdpo", "robust", "hinge", "ipo_sum", "exo_pair", "discopop"),
    "averages": ("ipo", "sigmoid_norm"),
    "both": ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "dpop", "rpo"),
    "quantiles": ("aot", "aot_unpaired"),
}
READINGS: Mapping[str, Reading] = MappingProxyType(
    {name: reading for reading, names in _BY_READING.items() for name in names}
)
SYMBOLS = (
    (r"\bls\(", "log σ("),
    (r"\bs\(", "σ("),
    (r"\blog pi\(", "log π("),
    (r"\bbeta\b", "β"),
    (r"\beps\b", "ε"),
    (r"\btau\b", "τ"),
    (r"\blambda\b", "λ"),
    (r"\balpha\b", "α"),
    (r"\^2", "²"),
    (r"\bn\+", "n₊"),
    (r"\bn-", "n₋"),
    (r"\by\+", "y₊"),
    (r"\by-", "y₋"),
    (r"\by_t\b", "yₜ"),
    (r"\by_<t\b", "y<ₜ"),
)


def reading_of(loss_type: str) -> Reading:
    """What a preference loss reads of a pair; "both" for a custom loss, which may read anything."""
    return READINGS.get(loss_type, "both")


def loss_of(method: Method) -> tuple[LossSpec, Mapping[str, float]]:
    """The configured loss, and the hyper-parameters that were given to it."""
    if isinstance(method, DPO):
        return method.preference_loss.spec, method.preference_loss.settings
    return method.token_loss, method.config.loss_kwargs


def settings(method: Method) -> str:
    """Loss and hyper-parameters as one phrase."""
    spec, values = loss_of(method)
    names = {"beta": "β", "label_smoothing": "ε", "discopop_tau": "τ", "dpop_lambda": "λ", "rpo_alpha": "α"}
    return ", ".join([spec.name, *(f"{names.get(key, key)} {value:g}" for key, value in values.items())])


def formula(spec: LossSpec) -> str:
    """The formula in mathematical signs; for a custom loss the first line of its docstring, unchanged."""
    text = spec.formula
    if spec.own:
        return text
    for pattern, sign in SYMBOLS:
        text = re.sub(pattern, sign, text)
    return text.replace("-", "−")


def source(spec: LossSpec) -> str:
    """Name and publication of the loss."""
    return f"{spec.name}: {spec.paper}"


def sum_name(loss_type: str) -> str:
    """Name of the sum of a pair's contributions."""
    return "averaged margin" if reading_of(loss_type) == "averages" else "margin"


def weight_name(loss_type: str) -> str:
    """Name of a chosen completion's weight; it is the pair's if the loss reads one number of the pair."""
    names = {"averages": "weight of the averaged margin", "margin": "weight"}
    return names.get(reading_of(loss_type), "chosen weight")
