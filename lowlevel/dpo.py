"""Direct Preference Optimization (arXiv 2305.18290): the policy against a frozen reference, the same weights without
the trained adapter.

    L = -log sigmoid( beta * [ (log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-)) ] )        (eq. 7)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowlevel.config import DPOConfig
from lowlevel.layout import PackedBatch, Segment, Shape, build_batch, pair_rows, pair_segment
from lowlevel.loss_sums import LossSums
from lowlevel.losses import dpo_loss
from lowlevel.model.policy import Policy
from lowlevel.packing import micro_batch_rows

if TYPE_CHECKING:
    from lowlevel.data.examples import PreferenceExample


@dataclass(frozen=True)
class DPO:
    """The DPO method. With packing, pairs share rows of `row_length` positions and each prompt is computed once."""

    config: DPOConfig
    batch_size: int  # pairs a micro-batch without packing; rows a micro-batch with it
    row_length: int
    packing: bool
    shape: Shape | None = None  # fill batches up to few shapes; a packed micro-batch is then one long row
    name: str = "dpo"

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """The preference loss, summed over the batch's pairs."""
        ref_token_logps, ref_logps = None, batch.reference_logps
        if ref_logps is None:  # no cache knows them
            ref_token_logps = reference_token_logps(policy, batch)
            ref_logps = batch.sequence_sums(ref_token_logps)
        ref_chosen_logps, ref_rejected_logps = ref_logps.chunk(2)
        if self.config.disable_dropout:
            policy.dropout.disable()
        token_logps = policy.token_logps(batch)  # (N,) fp32
        chosen_logps, rejected_logps = batch.sequence_sums(token_logps).chunk(2)  # (P,) each
        chosen_lengths, rejected_lengths = batch.lengths.chunk(2)
        output = dpo_loss(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            **loss_arguments(self.config),
        )
        losses = torch.where(batch.real, output.losses, 0.0)  # a filled-up batch holds pairs that are none
        metrics = {
            "rewards/chosen": output.chosen_rewards,
            "rewards/rejected": output.rejected_rewards,
            "rewards/margins": output.margins,
            "rewards/accuracies": (output.margins > 0).float() + 0.5 * (output.margins == 0).float(),
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
            "logps/ref_chosen": ref_chosen_logps,
            "logps/ref_rejected": ref_rejected_logps,
        }
        return LossSums(
            losses.sum(),
            {name: torch.where(batch.real, value.detach(), 0.0).sum() for name, value in metrics.items()},
            examples={"loss": losses.detach(), **{name: value.detach() for name, value in metrics.items()}},
            tokens={"logps": token_logps.detach()}
            | ({} if ref_token_logps is None else {"ref_logps": ref_token_logps}),
        )

    def count(self, batch: PackedBatch) -> int:
        """Preference pairs."""
        return len(batch.data_rows)

    def size(self, example: PreferenceExample) -> int:
        """Positions of a pair with its prompt shared."""
        return len(example.prompt_ids) - 1 + len(example.chosen_ids) + len(example.rejected_ids)

    def micro_batches(self, examples: Sequence[PreferenceExample]) -> list[PackedBatch]:
        """Pairs of one step in rows; each pair counts once wherever it lies."""
        sizes = [self.size(example) for example in examples]
        groups = micro_batch_rows(sizes, self.batch_size, self.row_length, self.packing, self.shape)
        return [self._batch([[examples[i] for i in row] for row in rows]) for rows in groups]

    def _batch(self, groups: list[list[PreferenceExample]]) -> PackedBatch:
        numbers = iter(range(sum(map(len, groups))))
        rows: list[list[Segment]] = []
        for group in groups:
            parts = [(x.row, next(numbers), x.prompt_ids, x.chosen_ids, x.rejected_ids) for x in group]
            rows.extend(
                [[pair_segment(*part) for part in parts]] if self.packing else [[s] for s in pair_rows(*parts[0])]
            )
        return build_batch(rows, pairs=True, shape=self.shape)


def completion_logps(policy: Policy, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """log pi(y+ | x) and log pi(y- | x), summed over the tokens of each completion: two (P,) fp32 tensors."""
    chosen, rejected = batch.sequence_sums(policy.token_logps(batch)).chunk(2)
    return chosen, rejected


def reference_token_logps(policy: Policy, batch: PackedBatch) -> Tensor:
    """Log-probability of each scored token under the reference, (N,) fp32: no dropout, no gradient."""
    with policy.reference():  # the same batch, layout and kernels: equal weights give equal bits
        return policy.token_logps(batch)


def loss_arguments(config: DPOConfig) -> dict[str, Any]:
    """`dpo_loss` arguments of a configuration: those that were set."""
    names = ("loss_type", "beta", "label_smoothing", "discopop_tau", "dpop_lambda", "rpo_alpha")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def check_loss(config: DPOConfig) -> None:
    """Raise ValueError for an unknown loss, or a hyper-parameter that the loss does not use; needs no model."""
    zero, one = torch.zeros(1), torch.ones(1)
    dpo_loss(zero, zero, zero, zero, chosen_lengths=one, rejected_lengths=one, **loss_arguments(config))
