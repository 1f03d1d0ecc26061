"""KTO (Ethayarajh et al., arXiv 2402.01306): completions with a label, desirable or not, instead of pairs.

    r  = log pi(y|x) - log ref(y|x)
    z0 = max(0, mean of log pi(y'|x) - log ref(y'|x)), y' a completion of another prompt: an estimate of KL(pi || ref)

    L  = desirable_weight   (1 - s(beta (r - z0)))      y is desirable
         undesirable_weight (1 - s(beta (z0 - r)))      y is undesirable

z0 has no gradient. Here the mean is over the whole optimizer step and not over a micro-batch, so the loss and its
gradient do not depend on how a step is divided. `mismatched` chooses y'.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lowlevel.losses.registry import LossSpec, spec_of


@dataclass(frozen=True)
class LabelledLogps:
    """Log-probabilities of P labelled completions under policy and reference, summed over a completion.

    Attributes:
        logps, ref_logps: (P,) floating.
        desirable: (P,) bool.
        kl: (P,) or (), the mean log-ratio of the step's mismatched completions, before the clamp; without a gradient.
        token_logps, ref_token_logps: (N,) fp32, of every completion token.
        sequence_ids: (N,) int64, the completion of each token; P marks a dummy token.
    """

    logps: Tensor
    ref_logps: Tensor
    desirable: Tensor
    kl: Tensor
    token_logps: Tensor | None = None
    ref_token_logps: Tensor | None = None
    sequence_ids: Tensor | None = None

    @property
    def logratios(self) -> Tensor:
        """`r`, policy minus reference, (P,)."""
        return self.logps - self.ref_logps


def kto(rows: LabelledLogps, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """KTO: `wD s(-x) if desirable, wU s(x) if not, x = beta (r - z0)`. arXiv 2402.01306.

    1 - s(z) is computed as s(-z), which keeps its digits for large z.
    """
    x = beta * (rows.logratios - rows.kl.clamp(min=0))
    return torch.where(rows.desirable, desirable_weight * torch.sigmoid(-x), undesirable_weight * torch.sigmoid(x))


_FORMULA = "wD s(-x) if desirable, wU s(x) if not, x = beta (r - z0)"
KTO_LOSSES: Mapping[str, LossSpec] = MappingProxyType({"kto": spec_of(kto, _FORMULA, "arXiv 2402.01306")})


def mismatched(prompts: Sequence[Hashable]) -> list[tuple[int, int]]:
    """(i, j) for each prompt i: j is the next row, cyclic, with another prompt. Empty if all prompts are the same."""
    size = len(prompts)
    found: dict[int, int] = {}
    following: int | None = None
    for place in range(2 * size - 2, -1, -1):  # twice around: the rows before the end find theirs at the start
        row, after = place % size, (place + 1) % size
        following = after if prompts[after] != prompts[row] else following
        if following is not None:
            found[row] = following
    return sorted(found.items())
