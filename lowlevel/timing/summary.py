"""Statistics of measured steps: quantiles and rates of whole steps, and means of their phases."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowlevel.errors import ConfigError
from lowlevel.timing.phases import PHASES
from lowlevel.timing.steps import Step


@dataclass(frozen=True)
class Apart:
    """Steps excluded from the statistics: they set something up, or were repeated."""

    count: int
    median_ms: float | None  # None without steps


@dataclass(frozen=True)
class Whole:
    """Whole steps. Rates are sums over the counted steps, divided once."""

    counted: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    tokens_per_second: float  # without padding; a pair's shared prompt counts once
    supervised_tokens_per_second: float
    padding_share: float  # of the computed positions
    set_up: Apart
    repeated: Apart


def counted_steps(steps: Sequence[Step]) -> list[Step]:
    """The steps with a typical time. Raises ConfigError if there is none."""
    found = [step for step in steps if step.counts]
    if not found:
        raise ConfigError(
            f"--steps {len(steps)}: each of these steps met a batch shape for the first time or overflowed; give more"
        )
    return found


def whole(steps: Sequence[Step]) -> Whole:
    """Statistics of the steps after the warm-up. Raises ConfigError if none counts."""
    counted = counted_steps(steps)
    times, results = [step.seconds for step in counted], [step.result for step in counted]
    p10, median, p90 = (1e3 * float(value) for value in np.percentile(times, (10, 50, 90)))
    tokens = sum(result.num_tokens for result in results)
    return Whole(
        counted=len(counted),
        median_ms=median,
        p10_ms=p10,
        p90_ms=p90,
        tokens_per_second=tokens / sum(times),
        supervised_tokens_per_second=sum(result.supervised_tokens for result in results) / sum(times),
        padding_share=1.0 - tokens / sum(result.positions for result in results),
        set_up=_apart([step for step in steps if step.set_up]),
        repeated=_apart([step for step in steps if step.repeated and not step.set_up]),
    )


def _apart(steps: Sequence[Step]) -> Apart:
    return Apart(len(steps), 1e3 * statistics.median(step.seconds for step in steps) if steps else None)


def mean_phases(steps: Sequence[Step]) -> dict[str, float]:
    """Mean milliseconds of each phase, in the order of PHASES; their sum is the mean of the whole step."""
    counted = counted_steps(steps)
    known = [name for name in PHASES if any(name in step.phases for step in counted)]
    return {name: 1e3 * sum(step.phases.get(name, 0.0) for step in counted) / len(counted) for name in known}
