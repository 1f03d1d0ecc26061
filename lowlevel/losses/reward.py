"""Reward model: a scalar head on the hidden state of a completion's last token, trained on pairs (Bradley-Terry).

    r(x, y) = w . h      h: final hidden state of the last token of y, which is its end-of-turn token; w: the head

    L = -log s(r+ - r- - m) + c (r+ + r-)^2

The first term is that of InstructGPT (arXiv 2203.02155) for a prompt with two completions; m is a rated margin as in
Llama 2 (arXiv 2307.09288), 0 without one; the second term keeps the rewards around 0 (arXiv 2312.09244 eq 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lowlevel.losses.modifiers import rated_margins
from lowlevel.losses.registry import LossSpec, spec_of

BINS = 10  # of a confidence from 0.5 to 1


@dataclass(frozen=True)
class PairRewards:
    """Rewards of P pairs, and the numeric columns of their rows, (P,) each."""

    chosen: Tensor
    rejected: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    @property
    def margins(self) -> Tensor:
        """Chosen minus rejected, (P,)."""
        return self.chosen - self.rejected

    @property
    def sequence_ids(self) -> Tensor:
        """(2P,): each reward is that of its own sequence, all chosen before all rejected."""
        return torch.arange(2 * len(self.chosen), device=self.chosen.device)


def bradley_terry(pairs: PairRewards, *, center_rewards_coefficient: float = 0.0) -> Tensor:
    """`-ls(r+ - r- - m) + c (r+ + r-)^2`, (P,). arXiv 2203.02155, 2307.09288, 2312.09244 eq 2."""
    rated = rated_margins(pairs.values) if pairs.values else 0.0
    return -logsigmoid(pairs.margins - rated) + center_rewards_coefficient * (pairs.chosen + pairs.rejected) ** 2


_FORMULA = "-ls(r+ - r- - m) + c (r+ + r-)^2"
REWARD_LOSSES: Mapping[str, LossSpec] = MappingProxyType(
    {"bradley_terry": spec_of(bradley_terry, _FORMULA, "arXiv 2203.02155")}
)


def head_rewards(hidden: Tensor, head: Tensor) -> Tensor:
    """w . h of each row, in the head's dtype: hidden (N, D), head (1, D) -> (N,)."""
    return (hidden.to(head.dtype) * head).sum(-1)


def ranked(margins: Tensor) -> Tensor:
    """1 for a pair whose chosen completion has the higher reward, 1/2 for a tie, else 0; fp32."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def calibration(margins: Tensor) -> dict[str, float]:
    """How far the probabilities p = s(r+ - r-) of held-out pairs (P,), P > 0, can be trusted.

    Returns:
        brier: mean (1 - p)^2; a model that always says 1/2 has 0.25.
        calibration_error: a pair's prediction is the completion with the higher reward, with confidence s(|r+ - r-|);
            the expected calibration error over equal bins of this confidence, sum_b |right_b - confidence_b| / P
            (Guo et al., arXiv 1706.04599).
    """
    margins = margins.double()
    confidence, right = torch.sigmoid(margins.abs()), ranked(margins).double()
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64, device=margins.device).index_add(0, bins, right - confidence)
    brier = torch.sigmoid(-margins).square().mean()
    return {"brier": float(brier), "calibration_error": float(gaps.abs().sum()) / len(margins)}
