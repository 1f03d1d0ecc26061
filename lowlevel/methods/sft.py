"""Supervised fine-tuning: the summed cross-entropy of the supervised tokens, -sum_t log pi(y_t | y_<t)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.packing import ExampleLayout
from lowlevel.batch.segments import Segment, sft_segment
from lowlevel.config.offline import SFTConfig
from lowlevel.data.examples import SFTExample
from lowlevel.losses import LossSums, SupervisedLoss, TokenLogps
from lowlevel.losses.registry import LossSpec, check_result
from lowlevel.model.policy import Policy
from lowlevel.perplexity import perplexities


@dataclass(frozen=True)
class SFT(ExampleLayout):
    """The SFT method."""

    config: SFTConfig
    name: ClassVar[str] = "sft"
    unit: ClassVar[str] = "tokens"  # of the loss's mean
    has_reference: ClassVar[bool] = False

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """Cross-entropy in nats (or the loss of `sft.loss_type`), summed over the supervised tokens by weight."""
        token_logps, statistics = policy.token_scores(batch, self.statistics)  # (N,) fp32 each
        losses, metrics = self.token_losses(batch, token_logps, statistics)  # (N,): -token_logps
        sums = batch.sequence_sums(losses)  # (S,)
        logps = batch.sequence_sums(token_logps.detach())
        weights = 1.0 if batch.token_weights is None else batch.token_weights
        return LossSums(
            sums.sum(),
            {name: torch.where(batch.belongs, value * weights, 0.0).sum() for name, value in metrics.items()},
            examples={"logps": logps, "loss": sums.detach()},
            tokens={"logps": token_logps.detach()},
        )

    def token_losses(
        self, batch: PackedBatch, token_logps: Tensor, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each scored token, (N,), times its weight, and metrics without weights, (N,) each."""
        values, weights = batch.values(self.columns), batch.token_weights
        return self.token_loss(TokenLogps(token_logps, batch.sequence_ids, batch.lengths, values, statistics, weights))

    @cached_property
    def token_loss(self) -> SupervisedLoss:
        """The loss of `sft.loss_type`, with its hyper-parameters."""
        return sft_loss(self.config)

    @property
    def spec(self) -> LossSpec:
        """The configured loss, without the z-loss."""
        return self.token_loss.spec

    @property
    def settings(self) -> Mapping[str, float]:
        """The hyper-parameters that were given to it, and the weight of the z-loss if there is one."""
        loss = self.token_loss
        return {**loss.settings, **({"z_loss_weight": loss.z_loss_weight} if loss.z_loss_weight > 0 else {})}

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics of the vocabulary that loss and z-loss read."""
        return self.token_loss.statistics

    def losses(self, logps: TokenLogps) -> Tensor:
        """The loss of each token, (N,), times its weight."""
        return self.token_loss(logps)[0]

    def count(self, batch: PackedBatch) -> float:
        """Supervised tokens; the sum of their weights, if they have any."""
        return batch.num_scored if batch.total_weight is None else batch.total_weight

    def held_out_scores(self, seen: Mapping[str, Tensor]) -> dict[str, float]:
        """Perplexities."""
        return perplexities(seen["logps"].tolist(), seen["lengths"].tolist())

    def segments(self, example: SFTExample, number: int) -> list[Segment]:
        """The whole conversation."""
        return [sft_segment(example.row, number, example.input_ids, example.labels, example.weights)]


def sft_loss(config: SFTConfig) -> SupervisedLoss:
    """The configured loss. Raises ValueError for an unknown one, or a hyper-parameter that it does not use."""
    given = {"label_smoothing": config.label_smoothing, **config.loss_kwargs}
    return SupervisedLoss.of(config.loss_type, z_loss_weight=config.z_loss_weight, **given)


def check_loss(config: SFTConfig, columns: Sequence[str] = ()) -> None:
    """Raise ValueError as `sft_loss`, and for a custom loss that fails on a trial batch; needs no model."""
    loss = sft_loss(config)
    logps = torch.tensor([-0.5, -1.0, -2.0, -1.5], requires_grad=True)  # the last token is a dummy
    values = {name: torch.ones(2) for name in columns}
    statistics = {name: torch.full((4,), -1.0) for name in loss.spec.statistics}
    tokens = TokenLogps(logps, torch.tensor([0, 0, 1, 2]), torch.tensor([2, 1]), values, statistics)
    check_result(loss.spec, tokens, loss.settings, logps, size=4)
