"""What the loop needs of a training method: how examples become micro-batches, and their loss as (sum, count)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lowlevel.layout import PackedBatch, Shape
from lowlevel.model.policy import Policy


@dataclass(frozen=True)
class LossSums:
    """Sums over a micro-batch's `count` (tokens or pairs). Nothing here is a mean: only the loop divides."""

    loss: Tensor  # scalar, differentiable
    metrics: Mapping[str, Tensor]  # scalars, detached, by the name they are logged under
    # What a trace keeps, detached: (P,) by example, fillers among them, and (N,) by scored token.
    examples: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """SFT or DPO."""

    @property
    def name(self) -> str:
        """The method's name."""

    @property
    def packing(self) -> bool:
        """Whether examples share rows."""

    @property
    def shape(self) -> Shape | None:
        """How batches are filled up, if they are."""

    def size(self, example: Any) -> int:
        """Positions that an example takes."""

    def micro_batches(self, examples: Sequence[Any]) -> list[PackedBatch]:
        """Lay the examples of one optimizer step out, on the CPU."""

    def count(self, batch: PackedBatch) -> int:
        """What the summed loss is divided by: supervised tokens (sft) or pairs (dpo)."""

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """The summed loss of a micro-batch."""
