"""How far two stages differ on the same items: bootstrap over items, which keeps the two answers to an item together.

Two separate standard errors are too wide for a difference: stages of one model mostly fail at the same items, and that
part of the noise cancels (Efron and Tibshirani, An Introduction to the Bootstrap, 1993; Miller, arXiv 2411.00640).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000  # of means
SLOW_RESAMPLES = 1000  # of other aggregates, such as perplexity, which Python computes item by item
BLOCK = 2**22  # indices at a time
Aggregate = Callable[[list[Any]], float]


@dataclass(frozen=True)
class Difference:
    """Second minus first, and the same for each resample of the items, (R,); R = 0 for a single item."""

    value: float
    resampled: np.ndarray

    def as_json(self) -> dict[str, float | None]:
        """The difference, its standard error, and the 95 % interval (percentiles of the resampled differences)."""
        if not len(self.resampled):
            return {"difference": self.value, "stderr": None, "low": None, "high": None}
        low, high = np.percentile(self.resampled, (2.5, 97.5)).tolist()
        return {"difference": self.value, "stderr": float(self.resampled.std(ddof=1)), "low": low, "high": high}


def paired_difference(
    first: Sequence[Any],
    second: Sequence[Any],
    task: str,
    aggregate: Aggregate | None = None,
    resamples: int | None = None,
) -> Difference:
    """Difference of an aggregate (None: the mean) of two stages' values, item by item in the same order.

    The task's name is the seed: items of different tasks are drawn independently of each other.
    """
    items = len(first)
    if aggregate is None:
        changes = np.asarray(second, np.float64) - np.asarray(first, np.float64)
        value, count = float(changes.mean()), resamples or RESAMPLES
    else:
        value, count = aggregate(list(second)) - aggregate(list(first)), resamples or SLOW_RESAMPLES
    if items < 2:
        return Difference(value, np.empty(0))
    rng, found = np.random.default_rng(zlib.crc32(task.encode())), list[np.ndarray]()
    rows = max(1, BLOCK // items)
    for start in range(0, count, rows):
        drawn = rng.integers(items, size=(min(rows, count - start), items))
        if aggregate is None:
            found.append(changes[drawn].mean(1))
        else:
            pairs = [([second[i] for i in row], [first[i] for i in row]) for row in drawn.tolist()]
            found.append(np.array([aggregate(after) - aggregate(before) for after, before in pairs]))
    return Difference(value, np.concatenate(found))


def weighted_difference(parts: Sequence[Difference], weights: Sequence[float]) -> Difference:
    """Weighted mean of the differences of several tasks; no interval if one of them has none."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    count = min(len(part.resampled) for part in parts)
    value = float(np.dot(shares, [part.value for part in parts]))
    return Difference(value, shares @ np.stack([part.resampled[:count] for part in parts]))
