"""Log-likelihoods of continuations, such as the choices of a question, on packed rows.

Continuations of one context share its positions, and only the positions that predict a continuation reach the LM head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch, build_batch
from lowlevel.batch.packing import pack
from lowlevel.batch.segments import Segment, prompt_segment
from lowlevel.heartbeat import working
from lowlevel.inspection.displacement import head_logits
from lowlevel.model.attention_choice import MASKED, NAMES, Attention
from lowlevel.model.policy import Policy

POSITIONS = {"cuda": 8192, "cpu": 1024}  # of a batch; a longer request has its own
MASKED_POSITIONS = 512  # positions of a row, if attention computes the scores of all of them and masks most
CHUNK_SIZE = 512  # rows of logits; with V = 32,000 a buffer has 62 MiB of fp32

Ids = Sequence[int]
Request = tuple[Ids, Ids]  # context and continuation, both with at least one token


@dataclass(frozen=True)
class Likelihood:
    """Log-probability of a continuation in nats, and whether greedy decoding would write it."""

    logp: float
    greedy: bool


@dataclass(frozen=True)
class Shared:
    """A context with some of its continuations; `places` are their indices in the list of requests."""

    context: Ids
    continuations: list[Ids]
    places: list[int]

    def __len__(self) -> int:
        """Positions: each continuation repeats the context's last token, which predicts its first one."""
        return len(self.context) - 1 + sum(map(len, self.continuations))


@dataclass(frozen=True)
class Scorable:
    """A batch whose scored tokens are those of some continuations, one after the other."""

    batch: PackedBatch
    places: list[int]  # of each continuation in the list of requests
    lengths: list[int]  # of each continuation, in tokens


def likelihoods(policy: Policy, requests: Sequence[Request], max_length: int) -> list[Likelihood]:
    """The likelihood of each continuation after its context, under the active adapters and without dropout.

    Arguments as in `batches_of`.
    """
    found: dict[int, Likelihood] = {}
    with scoring(policy) as policy:
        for made in batches_of(policy, requests, max_length):
            logps, greedy = _scores(policy, made.batch)
            split = zip(made.places, logps.split(made.lengths), greedy.split(made.lengths), strict=True)
            found |= {place: Likelihood(float(one.double().sum()), bool(same.all())) for place, one, same in split}
    return [found[place] for place in range(len(requests))]


@contextmanager
def scoring(policy: Policy) -> Iterator[Policy]:
    """The policy for forward passes within the block: without gradient and dropout. On a CPU, where a run has a mask,
    attention computes each span alone; layers compute an adapter's product as in model/linear.py.
    """
    policy.dropout.disable()
    model: Any = policy.causal_lm
    before = model.config._attn_implementation
    if policy.attention == MASKED and model._supports_attention_backend:
        policy = replace(policy, attention=Attention(NAMES["math"], "each span alone"))
    model.config._attn_implementation = policy.attention.implementation
    try:
        with torch.inference_mode():
            yield policy
    finally:
        model.config._attn_implementation = before


def batches_of(policy: Policy, requests: Sequence[Request], max_length: int) -> Iterator[Scorable]:
    """The requests in batches on the policy's device.

    Args:
        policy: its attention decides how long a row of several contexts may be.
        requests: token ids.
        max_length: positions that the model reads at once: the beginning of a longer request is cut off, as in the LM
            Evaluation Harness. The continuation alone must fit.
    """
    with working("scoring continuations", len(requests), "continuations") as work:
        capacity = POSITIONS[policy.placement.device.type]
        width = capacity if policy.attention.kernel else min(capacity, MASKED_POSITIONS)
        for rows in _batches(_shared(requests, max_length, capacity), capacity, width):
            parts = [part for row in rows for part in row]
            places = [place for part in parts for place in part.places]
            lengths = [len(ids) for part in parts for ids in part.continuations]
            yield Scorable(_batch(rows).to(policy.placement.device), places, lengths)
            work.done += len(places)


def _batch(rows: Sequence[Sequence[Shared]]) -> PackedBatch:
    """The rows as a batch, whose scored tokens are the continuations' in the order of `rows`."""
    number, segments = 0, list[list[Segment]]()
    for row in rows:
        segments.append([])
        for part in row:
            completions = dict(enumerate(map(np.array, part.continuations), 1))
            segments[-1].append(prompt_segment(0, number, np.array(part.context), completions))
            number += len(completions)
    return build_batch(segments, pairs=False)


def _scores(policy: Policy, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Log-probability of each scored token and whether it is the likeliest, (N,) each, on the CPU."""
    hidden, targets = policy.scored_hidden_states(batch), batch.scored_targets
    logps, greedy = [], []
    for states, chunk in zip(hidden.split(CHUNK_SIZE), targets.split(CHUNK_SIZE), strict=True):
        logits = head_logits(states, policy.lm_head_weight)  # (chunk, V)
        logps.append(logits.gather(1, chunk[:, None])[:, 0] - logits.logsumexp(1))
        greedy.append(logits.argmax(1) == chunk)
    return torch.cat(logps).cpu(), torch.cat(greedy).cpu()


def _shared(requests: Sequence[Request], max_length: int, capacity: int) -> list[Shared]:
    """Requests by context, split where the continuations of one context exceed the positions of a batch.

    A context of one token shares nothing: its requests stay apart, in rows that are no longer than needed.
    """
    groups: dict[tuple[Any, ...], Shared] = {}
    done: list[Shared] = []
    for place, (context, continuation) in enumerate(requests):
        kept = tuple(context[-(max_length + 1 - len(continuation)) :])
        key = kept if len(kept) > 1 else (kept, place)
        group = groups.setdefault(key, Shared(kept, [], []))
        if group.continuations and len(group) + len(continuation) > capacity:
            done.append(group)
            group = groups[key] = Shared(kept, [], [])
        group.continuations.append(continuation)
        group.places.append(place)
    return [*done, *groups.values()]


def _batches(parts: Sequence[Shared], capacity: int, width: int) -> Iterator[list[list[Shared]]]:
    """Rows of up to `width` positions, and as many of them in a batch as make `capacity`; a longer part is alone."""
    short = [part for part in parts if len(part) <= width]
    rows = [[short[i] for i in row] for row in pack([len(part) for part in short], width)]
    for start in range(0, len(rows), max(1, capacity // width)):
        yield rows[start : start + max(1, capacity // width)]
    yield from ([[part]] for part in parts if len(part) > width)
