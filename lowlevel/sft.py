"""Supervised fine-tuning: the summed cross-entropy of the supervised tokens, -sum_t log pi(y_t | y_<t)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lowlevel.batch.layout import PackedBatch, Shape, build_batch, sft_segment
from lowlevel.batch.packing import micro_batch_rows
from lowlevel.losses.sums import LossSums
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from lowlevel.data.examples import SFTExample


@dataclass(frozen=True)
class SFT:
    """The SFT method. `row_length` positions a row; without packing, one example a row."""

    batch_size: int  # examples a micro-batch without packing; rows a micro-batch with it
    row_length: int
    packing: bool
    shape: Shape | None = None  # fill batches up to few shapes; a packed micro-batch is then one long row
    name: ClassVar[str] = "sft"

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """Cross-entropy in nats, summed over the batch's supervised tokens."""
        token_logps = policy.token_logps(batch)  # (N,) fp32
        sums = batch.sequence_sums(token_logps)  # (S,)
        return LossSums(-sums.sum(), {}, examples={"logps": sums.detach()}, tokens={"logps": token_logps.detach()})

    def count(self, batch: PackedBatch) -> int:
        """Supervised tokens."""
        return batch.num_scored

    def size(self, example: SFTExample) -> int:
        """Positions: all tokens but the last."""
        return len(example.input_ids) - 1

    def micro_batches(self, examples: Sequence[SFTExample]) -> list[PackedBatch]:
        """Examples of one step in rows; each example counts once wherever it lies."""
        made = micro_batch_rows(examples, self.size, self.batch_size, self.row_length, self.packing, self.shape)
        return [self._batch(rows) for rows in made]

    def _batch(self, rows: list[list[SFTExample]]) -> PackedBatch:
        numbers = iter(range(sum(map(len, rows))))
        segments = [[sft_segment(x.row, next(numbers), x.input_ids, x.labels) for x in row] for row in rows]
        return build_batch(segments, pairs=False, shape=self.shape)
