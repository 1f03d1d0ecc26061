"""Losses as a user writes them, for tests of inspect, trace and report; imported by name from run files."""

import torch
from torch.nn.functional import logsigmoid

from lowlevel.losses import PairLogps, TokenLogps


def weighted(pairs: PairLogps, *, beta: float, gamma: float = 1.0):
    """DPO with a target margin, weighted by row: -score ls(x - gamma)

    The second paragraph is not a formula.
    """
    margins = beta * pairs.deltas
    return -pairs.values["score"] * logsigmoid(margins - gamma), {"reached": (margins > gamma).float()}


def all_tokens(pairs: PairLogps, *, beta: float):
    """DPO on the log-ratios of all tokens, clipped at +-1"""
    ratios = (pairs.token_logps - pairs.ref_token_logps).clamp(-1, 1)
    sums = ratios.new_zeros(2 * len(pairs.chosen_logps) + 1).index_add(0, pairs.sequence_ids, ratios)
    chosen, rejected = sums[:-1].chunk(2)
    return -logsigmoid(beta * (chosen - rejected))


def chosen_only(pairs: PairLogps, *, beta: float):
    """-beta log pi(y+)"""
    return -beta * pairs.chosen_logps


def focal(tokens: TokenLogps, *, power: float = 2.0):
    """Focal loss: (1 - p)^power times the cross-entropy"""
    confidence = tokens.token_logps.exp()
    scores = torch.cat([tokens.values["score"], tokens.token_logps.new_zeros(1)])[tokens.sequence_ids]
    losses = -((1 - confidence) ** power) * tokens.token_logps * scores
    return losses, {"confidence": confidence}
