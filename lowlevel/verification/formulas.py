"""The losses once more, in float64 and from the configuration alone: nothing of `dpo_loss` or its arguments.

`sigmoid`, `cdpo`, `robust`, `hinge` and `ipo_sum` are written out here with their slopes; the others take their
function of `lowlevel.losses.preference`, whose values the tests hold to numbers worked out elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowlevel.config.schema import DPOConfig
from lowlevel.losses import loss_spec
from lowlevel.losses.preference import PairLogps


@dataclass(frozen=True)
class Logps:
    """Four log-probabilities of P pairs, each (P,) float64, and the two lengths."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def delta(self) -> Tensor:
        """(log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-)), (P,)."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), without overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def pair_losses(pairs: Logps, config: DPOConfig) -> Tensor:
    """The configured loss, (P,) float64, differentiable in the log-probabilities."""
    beta, eps = config.beta, config.label_smoothing
    x = beta * pairs.delta
    written: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: softplus(-x),
        "cdpo": lambda: (1 - eps) * softplus(-x) + eps * softplus(x),
        "robust": lambda: ((1 - eps) * softplus(-x) - eps * softplus(x)) / (1 - 2 * eps),
        "hinge": lambda: (1 - x).clamp(min=0),
        "ipo_sum": lambda: (pairs.delta - 1 / (2 * beta)) ** 2,
    }
    if config.loss_type in written:
        return written[config.loss_type]()
    values = config.model_dump()
    names = loss_spec(config.loss_type).parameters
    used = {name: values[name] for name in names if values[name] is not None}
    given = PairLogps(
        pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, pairs.chosen_lengths, pairs.rejected_lengths
    )
    return loss_spec(config.loss_type).function(given, **used)


def slopes(pairs: Logps, config: DPOConfig) -> tuple[Tensor, ...]:
    """d sum(losses) / d (chosen, rejected, ref_chosen, ref_rejected), (P,) each.

    sigmoid: -beta sigma(-x) for the chosen one, arXiv 2305.18290 section 4, and the same with its sign changed for the
    rejected one and the reference of the chosen one. Others: autograd in float64.
    """
    if config.loss_type == "sigmoid":
        slope = -config.beta / (1 + torch.exp(config.beta * pairs.delta))
        return slope, -slope, -slope, slope
    leaves = [
        value.clone().requires_grad_() for value in (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
    ]
    moved = Logps(leaves[0], leaves[1], leaves[2], leaves[3], pairs.chosen_lengths, pairs.rejected_lengths)
    total = pair_losses(moved, config).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True))
