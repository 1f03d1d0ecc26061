"""Supervised fine-tuning: the summed cross-entropy of the supervised tokens, -sum_t log pi(y_t | y_<t)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowlevel.layout import PackedBatch, build_batch, pack, sft_segment
from lowlevel.losses import token_logps
from lowlevel.method import LossSums
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from lowlevel.data.examples import SFTExample


@dataclass(frozen=True)
class SFT:
    """The SFT method. `row_length` positions a row; without packing, one example a row."""

    batch_size: int  # examples a micro-batch without packing; rows a micro-batch with it
    row_length: int
    packing: bool
    name: str = "sft"

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """Cross-entropy in nats, summed over the batch's supervised tokens."""
        hidden = policy.scored_hidden_states(batch)  # (N, D)
        logps = token_logps(hidden, policy.lm_head_weight, batch.scored_targets)  # (N,) fp32
        return LossSums(loss=-logps.sum(), metrics={})

    def count(self, batch: PackedBatch) -> int:
        """Supervised tokens."""
        return batch.num_scored

    def micro_batches(self, examples: Sequence[SFTExample]) -> list[PackedBatch]:
        """Examples of one step in rows; each example counts once wherever it lies."""
        if self.packing:
            rows = pack([len(example.input_ids) - 1 for example in examples], self.row_length)
        else:
            rows = [[i] for i in range(len(examples))]
        starts = range(0, len(rows), self.batch_size)
        return [self._batch([[examples[i] for i in row] for row in rows[s : s + self.batch_size]]) for s in starts]

    def _batch(self, rows: list[list[SFTExample]]) -> PackedBatch:
        numbers = iter(range(sum(map(len, rows))))
        segments = [[sft_segment(x.row, next(numbers), x.input_ids, x.labels) for x in row] for row in rows]
        return build_batch(segments, pairs=False)
