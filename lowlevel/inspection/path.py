"""From four log-probabilities to a pair's loss, one line a quantity, each with its formula and its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowlevel.config.schema import DPOConfig
from lowlevel.inspection.reading import formula, reading_of
from lowlevel.inspection.records import PairRecord
from lowlevel.losses import loss_spec


@dataclass(frozen=True)
class PathStep:
    """A quantity: of each completion, or of the pair."""

    name: str
    formula: str
    chosen: float | None = None
    rejected: float | None = None
    pair: float | None = None


def loss_path(record: PairRecord, config: DPOConfig) -> list[PathStep]:
    """The steps from log-probabilities to loss, for the loss that was configured."""
    chosen, rejected = record.chosen, record.rejected
    averages = reading_of(config.loss_type) == "averages"
    steps = [
        _both("policy", "log π(y|x), sum over tokens", chosen.logp, rejected.logp),
        _both("reference", "log ref(y|x)", chosen.ref_logp, rejected.ref_logp),
        _both("log-ratio a, b", "log π − log ref", chosen.logratio, rejected.logratio),
        _both("reward", f"β · log-ratio, β = {config.beta:g}", chosen.reward, rejected.reward),
        PathStep("margin x", "chosen − rejected reward", pair=float(record.margin)),
    ]
    if averages:
        lengths = f"n₊ = {len(chosen.tokens)}, n₋ = {len(rejected.tokens)}"
        averaged = [completion.reward / max(1, len(completion.tokens)) for completion in (chosen, rejected)]
        steps.append(_both("reward a token", f"reward / n, {lengths}", *averaged))
        steps.append(PathStep("averaged margin", "β (a/n₊ − b/n₋)", pair=float(record.argument)))
    return [*steps, _weight(record, config), _loss(record, config)]


def _weight(record: PairRecord, config: DPOConfig) -> PathStep:
    """How hard the pair is pushed: one number where the loss reads one number, else one a completion."""
    reading = reading_of(config.loss_type)
    if reading in ("margin", "averages"):
        what = "−dL/dx" if reading == "margin" else "−dL/d(averaged margin)"
        return PathStep("weight", "σ(−x)" if config.loss_type == "sigmoid" else what, pair=float(record.chosen.weight))
    return _both("weight", "−dL/d(chosen reward), dL/d(rejected reward)", record.chosen.weight, record.rejected.weight)


def _loss(record: PairRecord, config: DPOConfig) -> PathStep:
    quantile = " (of the micro-batch's quantile)" if reading_of(config.loss_type) == "quantiles" else ""
    return PathStep("loss L", f"{formula(config.loss_type)}{quantile}", pair=float(record.loss))


def _both(name: str, text: str, chosen: Tensor, rejected: Tensor) -> PathStep:
    return PathStep(name, text, float(chosen), float(rejected))


def source(config: DPOConfig) -> str:
    """Where the loss was published."""
    return loss_spec(config.loss_type).paper
