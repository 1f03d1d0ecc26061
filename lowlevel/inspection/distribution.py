"""Predictions besides the target: entropy, rank and the likeliest other tokens, computed in chunks of rows."""

from __future__ import annotations

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
        return Distribution(
            self.entropies[index], self.ranks[index], self.alternative_ids[index], self.alternative_logps[index]
        )


@torch.no_grad()
def distribution(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> Distribution:
    """Summarise `softmax(hidden @ lm_head_weight.T)` row by row; at most chunk_size x V numbers are in memory.

    Args:
        hidden: (N, D), floating.
        lm_head_weight: (V, D); its dtype is the dtype of the product; everything after it is fp32 (float64 stays
            float64), as in `lowlevel.losses.token_logps`.
        targets: (N,) int64.
        chunk_size: rows a chunk.
    """
    count, kept = len(hidden), min(ALTERNATIVES, lm_head_weight.shape[0] - 1)
    dtype = torch.promote_types(lm_head_weight.dtype, torch.float32)
    entropies, ranks = torch.empty(count, dtype=dtype), torch.empty(count, dtype=torch.int64)
    ids, logps = torch.empty(count, kept, dtype=torch.int64), torch.empty(count, kept, dtype=dtype)
    for start in range(0, count, chunk_size):
        rows = slice(start, start + chunk_size)
        logits = head_logits(hidden[rows], lm_head_weight)  # (chunk, V)
        target = targets[rows, None]
        ranks[rows] = (logits > logits.gather(1, target)).sum(1).cpu() + 1
        log_probabilities = logits.log_softmax(1)
        entropies[rows] = torch.special.entr(log_probabilities.exp()).sum(1).cpu()
        others = log_probabilities.scatter(1, target, -torch.inf).topk(kept, dim=1)
        ids[rows], logps[rows] = others.indices.cpu(), others.values.cpu()
    return Distribution(entropies, ranks, ids, logps)


def head_logits(hidden: Tensor, lm_head_weight: Tensor) -> Tensor:
    """The LM head's product in its own dtype, as fp32 (float64 stays float64): (n, D), (V, D) -> (n, V)."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear(hidden.to(lm_head_weight.dtype), lm_head_weight)
    return logits.to(torch.promote_types(lm_head_weight.dtype, torch.float32))
