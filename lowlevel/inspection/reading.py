"""What each preference loss reads of a pair: which sum its tokens' contributions add up to, and which weights it has.

margin     the margin alone, x = beta a - beta b: one weight a pair, -dL/dx
averages   the margin of averages alone, beta (a/n+ - b/n-): a token counts less in a longer completion
both       the two log-ratios, or the chosen log-probability, apart: a weight for each completion
quantiles  sorted over the micro-batch: element i of the loss belongs to the i-th quantile, not to pair i
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from lowlevel.config.schema import DPOConfig
from lowlevel.losses import loss_spec

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
)


def reading_of(loss_type: str) -> Reading:
    """What a loss reads of a pair; a user's own loss may read anything."""
    return READINGS.get(loss_type, "both")


def formula(loss_type: str) -> str:
    """The loss as its `LossSpec` writes it, in mathematical signs."""
    text = loss_spec(loss_type).formula
    for pattern, sign in SYMBOLS:
        text = re.sub(pattern, sign, text)
    return text.replace("-", "−")


def sum_name(loss_type: str) -> str:
    """What a pair's contributions add up to."""
    return "averaged margin" if reading_of(loss_type) == "averages" else "margin"


def weight_name(loss_type: str) -> str:
    """What a chosen completion's weight is called: the pair's, where the loss reads one number of it."""
    names = {"averages": "weight of the averaged margin", "margin": "weight"}
    return names.get(reading_of(loss_type), "chosen weight")


def settings(config: DPOConfig) -> str:
    """Loss and hyper-parameters as one phrase: those that the loss reads."""
    names = {"beta": "β", "label_smoothing": "ε", "discopop_tau": "τ", "dpop_lambda": "λ", "rpo_alpha": "α"}
    values = config.model_dump()
    values |= config.loss_kwargs
    keys = [key for key in loss_spec(config.loss_type).parameters if values.get(key) is not None]
    given = [f"{names.get(key, key)} {values[key]:g}" for key in keys]
    return ", ".join([config.loss_type, *given])
