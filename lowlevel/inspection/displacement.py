"""Predictions besides the target, and likelihood displacement: where the probability of a chosen completion went.

A pair is displaced if log pi(y+ | x) < log ref(y+ | x). The loss allows this if y- falls faster (Razin et al., arXiv
2410.08847). Probabilities of a position sum to 1, so all other tokens together gain what y+ loses:

    delta_t(v) = pi(v | x, y+_<t) - ref(v | x, y+_<t)        sum over v != y+_t of delta_t(v) = -delta_t(y+_t)

Sums over positions exclude positions whose chosen token became likelier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK_SIZE = 256  # rows; with V = 32,000 a buffer has 31 MiB of fp32
ALTERNATIVES = 3


@dataclass(frozen=True)
class Distribution:
    """N predictions, on the CPU, each with its K likeliest tokens besides the target, likeliest first."""

    entropies: Tensor  # (N,) fp32, nats
    ranks: Tensor  # (N,) int64, of the target: 1 is the likeliest token; ties count in its favour
    alternative_ids: Tensor  # (N, K) int64
    alternative_logps: Tensor  # (N, K) fp32

    def at(self, index: Tensor) -> Distribution:
        """The predictions at some positions, (n,) int64."""
        every = self.entropies, self.ranks, self.alternative_ids, self.alternative_logps
        return Distribution(*(values[index] for values in every))


@torch.no_grad()
def distribution(hidden: Tensor, lm_head_weight: Tensor, targets: Tensor) -> Distribution:
    """Summarise `softmax(hidden @ lm_head_weight.T)` row by row; at most CHUNK_SIZE x V numbers are in memory.

    Args:
        hidden: (N, D), floating.
        lm_head_weight: (V, D); its dtype is the dtype of the product; everything after it is fp32 (float64 stays
            float64), as in `lowlevel.losses.token_logps`.
        targets: (N,) int64.
    """

    def summary(states: Tensor, chunk: Tensor) -> tuple[Tensor, ...]:
        logits, target = head_logits(states, lm_head_weight), chunk[:, None]  # (chunk, V), (chunk, 1)
        ranks, logps = (logits > logits.gather(1, target)).sum(1) + 1, logits.log_softmax(1)
        others = logps.scatter(1, target, -torch.inf).topk(min(ALTERNATIVES, logits.shape[1] - 1), dim=1)
        return torch.special.entr(logps.exp()).sum(1), ranks, others.indices, others.values

    return Distribution(*by_chunks(summary, hidden, targets, size=CHUNK_SIZE))


def head_logits(hidden: Tensor, lm_head_weight: Tensor) -> Tensor:
    """The LM head's product in its own dtype, as fp32 (float64 stays float64): (n, D), (V, D) -> (n, V)."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear(hidden.to(lm_head_weight.dtype), lm_head_weight)
    return logits.to(torch.promote_types(lm_head_weight.dtype, torch.float32))


def by_chunks(of: Callable[..., tuple[Tensor, ...]], *rows: Tensor, size: int) -> list[Tensor]:
    """What `of` gives for `size` rows at a time, so that few logits are in memory, joined and on the CPU."""
    found = [of(*part) for part in zip(*(tensor.split(size) for tensor in rows), strict=True)]
    return [torch.cat(column).cpu() for column in zip(*found, strict=True)]


GAINERS = 3
NOTICED = 1e-3  # smallest gain at a position that is counted


@dataclass(frozen=True)
class Displacement:
    """Changes of probability from reference to policy at the positions of n target tokens; on the CPU.

    Attributes:
        losses: (n,) fp32, ref(target) - pi(target); negative if the target became likelier.
        gainer_ids: (n, K) int64, the K tokens besides the target that gained most, largest gain first.
        gainer_ref_probs: (n, K) fp32.
        gainer_probs: (n, K) fp32, under the policy.
        gained: (V,) float64, each token's gain, summed over positions whose target fell and is another token.
        noticed: (V,) int64, number of those positions at which it gained `NOTICED` or more.
    """

    losses: Tensor
    gainer_ids: Tensor
    gainer_ref_probs: Tensor
    gainer_probs: Tensor
    gained: Tensor
    noticed: Tensor

    @property
    def lost(self) -> float:
        """Total loss of the targets that fell; the sum of `gained`."""
        return float(self.losses.double().clamp(min=0).sum())


@dataclass(frozen=True)
class TokenChange:
    """A token, what it gained over some positions in all (probability, or log-probability), and their number."""

    token: int
    change: float
    positions: int


@torch.no_grad()
def displacement_of(hidden: Tensor, ref_hidden: Tensor, lm_head_weight: Tensor, targets: Tensor) -> Displacement:
    """Compare the predictions of policy and reference; at most CHUNK_SIZE / 2 x V numbers of each are in memory.

    Args:
        hidden: (n, D), floating, of the policy.
        ref_hidden: (n, D), of the reference at the same positions.
        lm_head_weight: (V, D), of both; dtypes as in `distribution`.
        targets: (n,) int64, the tokens of the completion.
    """
    vocabulary, device = lm_head_weight.shape[0], hidden.device
    gained = torch.zeros(vocabulary, dtype=torch.float64, device=device)
    noticed = torch.zeros(vocabulary, dtype=torch.int64, device=device)

    def compare(own: Tensor, reference: Tensor, chunk: Tensor) -> tuple[Tensor, ...]:
        target = chunk[:, None]
        probs, ref_probs = (head_logits(states, lm_head_weight).softmax(1) for states in (own, reference))
        gains = probs - ref_probs  # (chunk, V)
        losses = -gains.gather(1, target)[:, 0]
        top = gains.scatter_(1, target, -torch.inf).topk(min(GAINERS, vocabulary - 1), dim=1).indices
        taken = gains.scatter_(1, target, 0.0)[losses > 0]
        gained.add_(taken.sum(0, dtype=torch.float64))
        noticed.add_((taken >= NOTICED).sum(0))
        return losses, top, ref_probs.gather(1, top), probs.gather(1, top)

    losses, ids, ref_probs, probs = by_chunks(compare, hidden, ref_hidden, targets, size=CHUNK_SIZE // 2)
    return Displacement(losses, ids, ref_probs, probs, gained.cpu(), noticed.cpu())


def largest_gains(found: Sequence[Displacement], count: int) -> tuple[TokenChange, ...]:
    """The up to `count` tokens with the largest gains over several completions, largest first; all above 0.

    Counted are the positions at which they gained `NOTICED` or more.
    """
    if not found:
        return ()
    gained = torch.stack([one.gained for one in found]).sum(0)
    noticed = torch.stack([one.noticed for one in found]).sum(0)
    best = gained.topk(min(count, len(gained)))
    return tuple(
        TokenChange(token, gain, int(noticed[token]))
        for token, gain in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        if gain > 0
    )
