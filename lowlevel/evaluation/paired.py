"""How far two stages differ on the same items: bootstrap over items, which keeps the two answers to an item together.

Two separate standard errors are too wide for a difference: stages of one model mostly fail at the same items, and that
part of the noise cancels (Efron and Tibshirani, An Introduction to the Bootstrap, 1993; Miller, arXiv 2411.00640).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
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
        """The value, its standard error, and the 95 % interval (percentiles of the resampled differences)."""
        if not len(self.resampled):
            return {"value": self.value, "stderr": None, "low": None, "high": None}
        low, high = np.percentile(self.resampled, (2.5, 97.5)).tolist()
        return {"value": self.value, "stderr": float(self.resampled.std(ddof=1)), "low": low, "high": high}


def paired_difference(
    first: Sequence[Any],
    second: Sequence[Any],
    task: str,
    aggregate: Aggregate | None = None,
    resamples: int = SLOW_RESAMPLES,
) -> Difference:
    """Difference of an aggregate (None: the mean) of two stages' values, item by item in the same order.

    The task's name is the seed: items of different tasks are drawn independently of each other. `resamples` is the
    number for an aggregate.
    """
    if aggregate is None:
        return mean_by_weight(np.asarray(second, np.float64) - np.asarray(first, np.float64), np.ones(len(first)), task)
    value = aggregate(list(second)) - aggregate(list(first))
    resampled = [
        aggregate([second[i] for i in row]) - aggregate([first[i] for i in row])
        for row in resampled_items(len(first), task, resamples)
    ]
    return Difference(value, np.array(resampled))


def mean_by_weight(sums: np.ndarray, weights: np.ndarray, task: str) -> Difference:
    """Sum of `sums` over sum of `weights`, (n,) each, an item's tokens for example; items are drawn with both."""
    value = float(sums.sum() / weights.sum())
    parts = [sums[drawn].sum(1) / weights[drawn].sum(1) for drawn in _draws(len(sums), task, RESAMPLES)]
    return Difference(value, np.concatenate([np.empty(0), *parts]))


def resampled_items(items: int, task: str, resamples: int) -> Iterator[np.ndarray]:
    """Indices of the items of each resample, (n,); nothing for a single item."""
    for drawn in _draws(items, task, resamples):
        yield from drawn


def _draws(items: int, task: str, resamples: int) -> Iterator[np.ndarray]:
    """Indices of the items of each resample, in blocks (rows, n); nothing for a single item."""
    if items < 2:
        return
    rng, rows = np.random.default_rng(zlib.crc32(task.encode())), max(1, BLOCK // items)
    for start in range(0, resamples, rows):
        yield rng.integers(items, size=(min(rows, resamples - start), items))


def weighted_difference(parts: Sequence[Difference], weights: Sequence[float]) -> Difference:
    """Weighted mean of the differences of several tasks; no interval if one of them has none."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    count = min(len(part.resampled) for part in parts)
    value = float(np.dot(shares, [part.value for part in parts]))
    return Difference(value, shares @ np.stack([part.resampled[:count] for part in parts]))
