"""Which rows a step trains on: a pure function of (seed, epoch, position), so resuming needs no iterator state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lowlevel.config.schema import RunConfig, TrainConfig
from lowlevel.errors import ConfigError
from lowlevel.hashing import splitmix64

MOST_STEPS = 1_000_000_000  # of runs without max_steps: 30 years at one step per second
ORDER_VERSION = 1  # in checkpoints: with another algorithm a resumed run would train on other rows


@dataclass(frozen=True)
class DataOrder:
    """The order of the examples over epochs; the last step of an epoch may have fewer than `rows_per_step`."""

    num_rows: int
    rows_per_step: int
    seed: int
    shuffled: bool
    repeats: int = 1  # steps on the same rows: num_iterations of an online method
    together: tuple[int, ...] = ()  # for each example the one whose place in the order it follows; (): itself

    @classmethod
    def of(cls, config: RunConfig, examples: Sequence[Any]) -> DataOrder:
        """The order of a run's training examples. Raises ConfigError if its epochs have too many steps."""
        train, shuffled = config.train, config.train.data_order != "sequential"
        repeats = config.sampled.num_iterations if config.sampled else 1
        together: tuple[int, ...] = ()
        if train.data_order == "shuffled_pairs":  # a pair's rows for kto are "FILE:N chosen" and "FILE:N rejected"
            rows = [x.where.removesuffix(" chosen").removesuffix(" rejected") for x in examples]
            first = {row: i for i, row in reversed([*enumerate(rows)])}
            together = tuple(first[row] for row in rows)
        order = cls(len(examples), config.prompts_per_step, train.seed, shuffled, repeats, together)
        steps = order.steps_per_epoch * train.num_train_epochs  # a float, which may be infinite
        if train.max_steps is None and steps > MOST_STEPS:
            epochs = f"train.num_train_epochs {train.num_train_epochs:g}"
            raise ConfigError(f"{epochs} x {order.steps_per_epoch:,} = {steps:.3g} steps; at most {MOST_STEPS:,}")
        return order

    def total_steps(self, train: TrainConfig) -> int:
        """Optimizer steps of a run, at least one."""
        return train.max_steps or max(1, math.ceil(self.steps_per_epoch * train.num_train_epochs - 1e-9))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that pass over every row once."""
        return math.ceil(self.num_rows / self.rows_per_step) * self.repeats

    def step_rows(self, step: int) -> np.ndarray:
        """Indices of the examples of optimizer step `step` (counted from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position // self.repeats * self.rows_per_step
        return self.epoch_order(epoch)[start : start + self.rows_per_step]

    def epoch_order(self, epoch: int) -> np.ndarray:
        """A permutation of the examples, (num_rows,) int64: sorted by a 64-bit hash of (seed, epoch, index)."""
        rows = self.together or range(self.num_rows)
        return _shuffled(rows, self.seed, epoch) if self.shuffled else np.arange(self.num_rows)


@lru_cache(maxsize=2)  # each step asks for its epoch's order; with prefetching, steps at an epoch's end ask for two
def _shuffled(rows: tuple[int, ...] | range, seed: int, epoch: int) -> np.ndarray:
    """See `epoch_order`; read-only, because callers share it."""
    seeded = splitmix64(np.array([seed], np.uint64))
    salt = splitmix64(seeded + np.uint64(epoch))
    order = np.argsort(splitmix64(np.array(rows, np.uint64) ^ salt), kind="stable")
    order.setflags(write=False)
    return order
