"""How a run rounds up the sizes of its micro-batches: chosen from its rows, which are known before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from lowlevel.batch.layout import Shape, row_width
from lowlevel.batch.order import DataOrder
from lowlevel.batch.packing import micro_batch_rows
from lowlevel.config.schema import RunConfig
from lowlevel.labels import IGNORED
from lowlevel.methods import DPO, SFT, Reward

MethodT = TypeVar("MethodT")
LOOKED_AT = 256  # steps, which stand for the others
CAPTURE = 4096  # positions that are computed while one shape could be captured: 2,000 on a T4, more on an H200


def fitted(method: MethodT, config: RunConfig, examples: Sequence[Any]) -> MethodT:
    """The method with the `Shape` that makes a run over `examples` shortest: padding and captures both take time.

    Its room for scored tokens is what the fullest micro-batch needs, in sixteenths, so each width is one shape. Methods
    that sample their rows, and kto, whose rows share prompts, keep the shape that they have.
    """
    known = isinstance(method, SFT | DPO | Reward) and not config.sampled
    if not known or method.shape is None or not method.packing:
        return method
    order, shape = DataOrder.of(config, examples), method.shape
    total = order.total_steps(config.train)
    looked_at = min(total, LOOKED_AT)
    sizes: list[tuple[int, int]] = []  # positions and scored tokens of each micro-batch
    for step in range(looked_at):
        rows = [examples[i] for i in order.step_rows(step)]
        for (row,) in micro_batch_rows(rows, method.size, method.batch_size, method.row_length, True, shape):
            sizes.append((sum(map(method.size, row)), sum(_scored(x, method.paired) for x in row)))

    def cost(one: Shape) -> float:
        widths = [row_width(size, one) for size, _ in sizes]
        return sum(widths) * total / looked_at + CAPTURE * len({*widths, row_width(shape.capacity, one)})

    multiples = (shape.positions, *(max(8, int(shape.positions * k) // 8 * 8) for k in (0.5, 2, 4)))
    best = min((replace(shape, positions=multiple) for multiple in multiples), key=cost)
    fill = max(scored / row_width(size, best) for size, scored in sizes)
    return replace(method, shape=replace(best, fill=math.ceil(16 * fill) / 16))


def _scored(example: Any, paired: bool) -> int:
    """Tokens of an example that the loss reads."""
    if paired:
        return len(example.chosen_ids) + len(example.rejected_ids)
    return int(np.count_nonzero(example.labels[1:] != IGNORED))
