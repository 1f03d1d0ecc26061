"""Examples as plain sequences, and their log-probabilities in float64 from the model's own hidden states."""

from __future__ import annotations

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
    """Scored tokens of one example's micro-batch, in float64 from hidden states in the run's precision."""

    path: Tensor  # (n,) from the training path's `Policy.scores`: log-probabilities, or rewards
    exact: Tensor  # (n,) float64, from the upcast hidden states and head
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


def head_scores(policy: Policy, batch: PackedBatch) -> HeadScores:
    """Score a micro-batch's tokens twice from the same hidden states: by the training path, and in float64.

    Targets are read from `batch.targets`; dummy positions are left out.
    """
    policy.dropout.disable()
    with torch.no_grad():
        hidden = policy.scored_hidden_states(batch)
        path = policy.scores(hidden, batch.scored_targets)
        targets = batch.targets.flatten()[batch.scored_positions]
        real = targets != IGNORED
        if policy.reward_head is not None:
            products = hidden[real].double() * policy.reward_head.double()
            exact, largest_logit = products.sum(-1), float(products.abs().sum(-1).max())
        else:
            exact, largest_logit = log_softmax64(hidden[real], policy.lm_head_weight, targets[real])
    sides = batch.branch_ids.flatten()[batch.scored_positions][real]
    return HeadScores(path[real].double().cpu(), exact.cpu(), sides.cpu(), largest_logit)


def log_softmax64(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """log softmax(h W^T)[target] in float64: hidden (N, D), weight (V, D), targets (N,) -> (N,), and max |logit|."""
    head = weight.detach().double()
    parts, largest_logit = [], 0.0
    for states, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        logits = states.double() @ head.T  # (rows, V)
        largest_logit = max(largest_logit, float(logits.detach().abs().max()))
        top = logits.max(-1, keepdim=True).values.detach()
        normaliser = (logits - top).exp().sum(-1).log() + top.squeeze(-1)
        parts.append(logits[torch.arange(len(wanted), device=wanted.device), wanted] - normaliser)
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float64), largest_logit
