"""What a method's loss gives of a micro-batch: sums that the loop divides, once, by a step's count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossSums:
    """Sums over a micro-batch's `count` (tokens or pairs). Nothing here is a mean: only the loop divides."""

    loss: Tensor  # scalar, differentiable
    metrics: Mapping[str, Tensor]  # scalars, detached, by the name they are logged under
    # What a trace keeps, detached: (P,) by example, fillers among them, and (N,) by scored token.
    examples: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
