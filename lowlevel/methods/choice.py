"""The method and the loss of a configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lowlevel.batch.layout import Shape, row_width
from lowlevel.batch.order import DataOrder
from lowlevel.batch.packing import micro_batch_rows
from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError
from lowlevel.labels import IGNORED
from lowlevel.losses import LOSSES, SFT_LOSSES, loss_spec
from lowlevel.losses.registry import LossSpec, find
from lowlevel.methods import DPO, GRPO, KTO, PPO, RLOO, SFT, Method, Reward, dpo, reward, sft
from lowlevel.methods.sampled import SampledMethod
from lowlevel.methods.sampled import check_loss as check_sampled
from lowlevel.model.attention_choice import Attention

LOOKED_AT = 256  # steps, which stand for the others
CAPTURE = 4096  # positions that are computed while one shape could be captured: 2,000 on a T4, more on an H200
KINDS: dict[str, Any] = {kind.name: kind for kind in (SFT, DPO, KTO, Reward, GRPO, RLOO, PPO)}


def build_method(
    config: RunConfig, attention: Attention, examples: Sequence[Any] | None = None, *, ranks: int = 1
) -> Method:
    """The method of a configuration. The row of a pair has room for a prompt and two completions.

    `examples`: those of the run, for the micro-batches that it has (see `fitted`). For several `ranks`, packed
    micro-batches come in multiples of their number.

    Attention over spans makes rows of any length cheap, so batches are padded to 8 to 32 shapes, each captured once;
    1 to 4 % of the positions are padding.
    """
    method, packing = _without_shape(config), config.data.packing
    if not attention.kernel:
        return method
    batch, length = method.batch_size, method.row_length
    multiple = batch * config.train.gradient_accumulation_steps if packing else batch
    capacity = config.train.micro_batch_positions or batch * length
    granule = min(max(8, capacity // 16 // 8 * 8), 128 if capacity <= 4096 else 256) if packing else 64
    if run_loss(config).mixes_pairs:
        multiple, ranks = 1, 0  # no dummy pairs: they would take part in the sort; nor other micro-batches
    method = replace(method, shape=Shape(granule, min(8, multiple), length, capacity, ranks))
    return method if examples is None else fitted(method, config, examples)


def fitted(method: Method, config: RunConfig, examples: Sequence[Any]) -> Method:
    """The method with the `Shape` that makes a run over `examples` shortest: padding and captures both take time.

    Its room for scored tokens is what the fullest micro-batch needs, in sixteenths, so each width is one shape. Methods
    that sample their rows, and kto, whose rows share prompts, keep the shape that they have.
    """
    if not isinstance(method, SFT | DPO | Reward) or config.sampled or method.shape is None or not method.packing:
        return method
    order, shape, sizes = DataOrder.of(config, examples), method.shape, list[tuple[int, int]]()
    looked_at = min(total := order.total_steps(config.train), LOOKED_AT)
    for step in range(looked_at):
        rows = [examples[i] for i in order.step_rows(step)]
        for (row,) in micro_batch_rows(rows, method.size, method):
            sizes.append((sum(method.size(x) for x in row), sum(_scored(method, x) for x in row)))

    def cost(one: Shape) -> float:
        widths = [row_width(size, one) for size, _ in sizes]
        return sum(widths) * total / looked_at + CAPTURE * len({*widths, row_width(shape.capacity, one)})

    multiples = (shape.positions, *(max(8, int(shape.positions * k) // 8 * 8) for k in (0.5, 2, 4)))
    best = min((replace(shape, positions=multiple) for multiple in multiples), key=cost)
    fill = max(scored / row_width(size, best) for size, scored in sizes)
    return replace(method, shape=replace(best, fill=math.ceil(16 * fill) / 16))


def _scored(method: Method, example: Any) -> int:
    """Tokens that the loss reads."""
    if isinstance(method, Reward):
        return 2
    if method.paired:
        return len(example.chosen_ids) + len(example.rejected_ids)
    return int(np.count_nonzero(example.labels[1:] != IGNORED))


def _without_shape(config: RunConfig) -> Method:
    online_dpo = config.method == "online_dpo"  # its loss is in [dpo], and its pairs are those of dpo
    kind, own = KINDS["dpo" if online_dpo else config.method], config.dpo if online_dpo else config.own
    batch, length = config.train.per_device_train_batch_size, config.row_positions
    columns = {"columns": config.data.columns} if kind in (SFT, DPO, Reward) else {}
    method: Method = kind(config=own, batch_size=batch, row_length=length, packing=config.data.packing, **columns)
    return method


def run_loss(config: RunConfig) -> LossSpec:
    """The configured loss. Raises ValueError for an unknown one."""
    if config.method == "sft":
        return find(config.sft.loss_type, SFT_LOSSES)
    return loss_spec(config.dpo.loss_type) if config.method in ("dpo", "online_dpo") else _without_shape(config).spec


def check_loss(config: RunConfig) -> None:
    """Refuse a loss that does not exist, is misused, or fails on a trial batch. Raises ConfigError."""
    try:
        if config.method == "sft":
            sft.check_loss(config.sft, config.data.columns)
        elif config.method == "dpo":
            dpo.check_loss(config.dpo, config.data.columns)
        elif config.method == "online_dpo":
            find(config.online_dpo.loss_type, {name: LOSSES[name] for name in config.online_dpo.losses})
            dpo.check_loss(config.dpo)
        elif isinstance(method := _without_shape(config), SampledMethod):
            check_sampled(method)
        elif config.method == "reward":
            reward.check_columns(config.data.columns)
    except ValueError as error:
        raise ConfigError(f"[{config.method}]: {error}") from None
    if config.train.memory_budget is not None and run_loss(config).mixes_pairs:
        raise ConfigError(mixed_by_a_budget(config))


def mixed_by_a_budget(config: RunConfig) -> str:
    """The error for train.memory_budget with a loss that sorts the pairs of a micro-batch."""
    return (
        f'train.memory_budget chooses the micro-batches, and loss_type = "{config.dpo.loss_type}" compares the pairs '
        "of each, so the loss would change; set train.micro_batch_positions instead"
    )
