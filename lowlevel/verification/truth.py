"""Examples as plain sequences, and their log-probabilities in float64 from the model's own hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.labels import IGNORED
from lowlevel.model.policy import Policy

ROWS = 256  # of float64 logits at once: 65 MB for 32,000 words


@dataclass(frozen=True)
class Scored:
    """A sequence of L tokens, and which of them are scored."""

    ids: np.ndarray  # (L,)
    places: np.ndarray  # (n,) index of each scored token; token t is predicted from the tokens before it


@dataclass(frozen=True)
class HeadScores:
    """Scores of one example's n tokens: log-probability, and the K statistics that the loss reads, in its order.

    Both are in float64, from hidden states in the run's precision. Of a reward model it is the reward, and K = 0.
    """

    path: Tensor  # (n, 1 + K) from the training path's `Policy.scores`
    exact: Tensor  # (n, 1 + K) float64, from the upcast hidden states and head
    sides: Tensor  # (n,) branch of each token: 0 sft, 1 chosen, 2 rejected
    largest_logit: float  # in absolute value; of a reward the sum of its absolute products


def sequences_of(example: Any, paired: bool, rewards: bool = False) -> list[Scored]:
    """One sequence of a conversation; two of a pair, chosen and rejected.

    With `rewards` a sequence of L tokens has the place L: its hidden state is that of the last token.
    """
    if not paired:
        scored = np.flatnonzero(example.labels != IGNORED)
        return [Scored(example.input_ids, scored[scored > 0])]
    first = len(example.prompt_ids)
    wholes = [np.concatenate([example.prompt_ids, ids]) for ids in (example.chosen_ids, example.rejected_ids)]
    return [Scored(ids, np.array([len(ids)]) if rewards else np.arange(first, len(ids))) for ids in wholes]


def head_scores(policy: Policy, batch: PackedBatch, needs: Sequence[str] = ()) -> HeadScores:
    """Score a micro-batch's tokens twice from the same hidden states: by the training path, and in float64.

    Targets are read from `batch.targets`; dummy positions are left out.
    """
    policy.dropout.disable()
    with torch.no_grad():
        hidden = policy.scored_hidden_states(batch)
        scores, statistics = policy.scores(hidden, batch.scored_targets, needs)
        path = torch.stack([scores, *statistics.values()], dim=1)
        targets = batch.targets.flatten()[batch.scored_positions]
        real = targets != IGNORED
        if policy.reward_head is not None:
            products = hidden[real].double() * policy.reward_head.double()
            exact, largest_logit = products.sum(-1, keepdim=True), float(products.abs().sum(-1).max())
        else:
            exact, largest_logit = scores64(hidden[real], policy.lm_head_weight, targets[real], needs)
    sides = batch.branch_ids.flatten()[batch.scored_positions][real]
    return HeadScores(path[real].double().cpu(), exact.cpu(), sides.cpu(), largest_logit)


def scores64(hidden: Tensor, weight: Tensor, targets: Tensor, needs: Sequence[str]) -> tuple[Tensor, float]:
    """Scores in float64: hidden (N, D), weight (V, D), targets (N,) -> (N, 1 + K), and the largest |logit|."""
    head = weight.detach().double()
    parts, largest_logit = [hidden.new_zeros(0, 1 + len(needs), dtype=torch.float64)], 0.0
    for states, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        if not len(wanted):
            continue
        logits = states.double() @ head.T  # (rows, V)
        largest_logit = max(largest_logit, float(logits.detach().abs().max()))
        parts.append(scores_of(logits, wanted, needs))
    return torch.cat(parts), largest_logit


def scores_of(logits: Tensor, targets: Tensor, needs: Sequence[str]) -> Tensor:
    """Scores (n, 1 + K) of logits (n, V) by their definitions: log-softmax at the targets (n,), then statistics."""
    logps = logits.log_softmax(-1)
    statistics = {
        "lse": lambda: (logits - logps)[:, 0],
        "mean_logp": lambda: logps.mean(-1),
        "log_square_sum": lambda: logps.detach().exp().square().sum(-1).log(),
    }
    return torch.stack([logps.gather(1, targets[:, None])[:, 0], *(statistics[name]() for name in needs)], dim=1)
