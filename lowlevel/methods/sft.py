"""Supervised fine-tuning: the summed cross-entropy of the supervised tokens, -sum_t log pi(y_t | y_<t)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch, Shape, build_batch, sft_segment
from lowlevel.batch.packing import micro_batch_rows
from lowlevel.config.schema import SFTConfig
from lowlevel.losses import SFT_LOSSES, LossSums, TokenLogps
from lowlevel.losses.registry import LossSpec, check_result, find
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from lowlevel.data.examples import SFTExample


@dataclass(frozen=True)
class SFT:
    """The SFT method. With packing, examples share rows of `row_length` positions."""

    batch_size: int  # examples per micro-batch; with packing, rows
    row_length: int
    packing: bool
    shape: Shape | None = None  # round batches up to few shapes; a packed micro-batch is then one long row
    config: SFTConfig = field(default_factory=SFTConfig)
    columns: tuple[str, ...] = ()  # data.columns, for a custom loss
    name: ClassVar[str] = "sft"
    unit: ClassVar[str] = "tokens"  # of the loss's mean
    paired: ClassVar[bool] = False  # an example has two completions
    has_reference: ClassVar[bool] = False

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """Cross-entropy in nats (or the loss of `sft.loss_type`), summed over the batch's supervised tokens."""
        token_logps = policy.token_logps(batch)  # (N,) fp32
        losses, metrics = self.token_losses(batch, token_logps)  # (N,): -token_logps
        sums = batch.sequence_sums(losses)  # (S,)
        logps = batch.sequence_sums(token_logps.detach())
        return LossSums(
            sums.sum(),
            {name: torch.where(batch.belongs, value, 0.0).sum() for name, value in metrics.items()},
            examples={"logps": logps, "loss": sums.detach()},
            tokens={"logps": token_logps.detach()},
        )

    def token_losses(self, batch: PackedBatch, token_logps: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each scored token, (N,), and a custom loss's metrics, (N,) each."""
        tokens = TokenLogps(token_logps, batch.sequence_ids, batch.lengths, batch.values(self.columns))
        return self.token_loss(tokens, self.config.loss_kwargs)

    @cached_property
    def token_loss(self) -> LossSpec:
        """The loss of `sft.loss_type`."""
        return sft_loss(self.config)

    @property
    def spec(self) -> LossSpec:
        """The configured loss."""
        return self.token_loss

    @property
    def settings(self) -> Mapping[str, float]:
        """The hyper-parameters that were given to it."""
        return self.config.loss_kwargs

    def example_losses(self, batch: PackedBatch, token_logps: Tensor, ref_token_logps: Tensor | None) -> Tensor:
        """The summed loss of each example, (S,), from its tokens' log-probabilities; 0 for dummies."""
        return batch.sequence_sums(self.token_losses(batch, token_logps)[0])

    def count(self, batch: PackedBatch) -> int:
        """Supervised tokens."""
        return batch.num_scored

    def size(self, example: SFTExample) -> int:
        """Positions: all tokens but the last."""
        return len(example.input_ids) - 1

    def micro_batches(self, examples: Sequence[SFTExample]) -> list[PackedBatch]:
        """The examples of one step in rows."""
        made = micro_batch_rows(examples, self.size, self.batch_size, self.row_length, self.packing, self.shape)
        return [self._batch(rows) for rows in made]

    def _batch(self, rows: list[list[SFTExample]]) -> PackedBatch:
        numbers = iter(range(sum(map(len, rows))))
        segments = [[sft_segment(x.row, next(numbers), x.input_ids, x.labels) for x in row] for row in rows]
        values = [x.values for row in rows for x in row] if self.columns else None
        return build_batch(segments, pairs=False, shape=self.shape, values=values)


def sft_loss(config: SFTConfig) -> LossSpec:
    """The loss of `sft.loss_type`. Raises ValueError for an unknown one, or a hyper-parameter that it does not use."""
    spec = find(config.loss_type, SFT_LOSSES)
    unused = [name for name in config.loss_kwargs if name not in spec.parameters]
    if unused:
        raise ValueError(f"loss_type {spec.name!r} does not use {unused[0]}; it takes: {', '.join(spec.parameters)}")
    return spec


def check_loss(config: SFTConfig, columns: Sequence[str] = ()) -> None:
    """Raise ValueError for an unknown loss, or a custom one that fails on a trial batch; needs no model."""
    spec = sft_loss(config)
    logps = torch.tensor([-0.5, -1.0, -2.0, -1.5], requires_grad=True)  # the last token is a dummy
    values = {name: torch.ones(2) for name in columns}
    tokens = TokenLogps(logps, torch.tensor([0, 0, 1, 2]), torch.tensor([2, 1]), values)
    check_result(spec, tokens, config.loss_kwargs, logps, size=4)
