"""Direct Preference Optimization (arXiv 2305.18290): the policy against a frozen reference, the same weights without
the trained adapter.

    L = -log sigmoid( beta * [ (log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-)) ] )        (eq. 7)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch, Segment, Shape, build_batch, pair_rows, pair_segment
from lowlevel.batch.packing import micro_batch_rows
from lowlevel.config.schema import DPOConfig
from lowlevel.losses import DPOOutput, dpo_loss
from lowlevel.losses.preference import PairLogps
from lowlevel.losses.sums import LossSums
from lowlevel.model.policy import Policy

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
    name: ClassVar[str] = "dpo"

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
        pairs = PairLogps(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *batch.lengths.chunk(2))
        output = configured_loss(self.config, pairs)
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
        made = micro_batch_rows(examples, self.size, self.batch_size, self.row_length, self.packing, self.shape)
        return [self._batch(rows) for rows in made]

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


def configured_loss(config: DPOConfig, pairs: PairLogps) -> DPOOutput:
    """`dpo_loss` of P pairs under a configuration."""
    return dpo_loss(
        pairs.chosen_logps,
        pairs.rejected_logps,
        pairs.ref_chosen_logps,
        pairs.ref_rejected_logps,
        chosen_lengths=pairs.chosen_lengths,
        rejected_lengths=pairs.rejected_lengths,
        **loss_arguments(config),
    )


def reward_slopes(config: DPOConfig, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Slopes of the summed loss in the chosen and in the rejected rewards, (P,) each, by autograd.

    A reward is beta times a log-ratio, whatever the loss reads of it; for the sigmoid loss the slopes are -sigma(-x)
    and sigma(-x). `aot` sorts the pairs that it is given: they must be those of one micro-batch.
    """
    chosen, rejected = (logps.detach().clone().requires_grad_() for logps in (pairs.chosen_logps, pairs.rejected_logps))
    with torch.enable_grad():
        losses = configured_loss(config, replace(pairs, chosen_logps=chosen, rejected_logps=rejected)).losses
        for_chosen, for_rejected = torch.autograd.grad(losses.sum(), (chosen, rejected))
    return for_chosen / config.beta, for_rejected / config.beta


def loss_arguments(config: DPOConfig) -> dict[str, Any]:
    """`dpo_loss` arguments of a configuration: those that were set."""
    names = ("loss_type", "beta", "label_smoothing", "discopop_tau", "dpop_lambda", "rpo_alpha")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def check_loss(config: DPOConfig) -> None:
    """Raise ValueError for an unknown loss, or a hyper-parameter that the loss does not use; needs no model."""
    zero, one = torch.zeros(1), torch.ones(1)
    dpo_loss(zero, zero, zero, zero, chosen_lengths=one, rejected_lengths=one, **loss_arguments(config))
