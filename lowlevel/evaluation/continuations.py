"""Log-likelihoods of continuations, such as the choices of a question, on packed rows.

Continuations of one context share its positions, contexts with the same long beginning (few-shot examples) the keys and
values of that beginning, and only the positions that predict a continuation reach the LM head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.beginnings import by_beginning
from lowlevel.batch.layout import PackedBatch, build_batch
from lowlevel.batch.packing import pack
from lowlevel.batch.segments import Segment, prompt_segment, sft_segment
from lowlevel.heartbeat import working
from lowlevel.inspection.displacement import by_chunks, head_logits
from lowlevel.model.attention_choice import MASKED, NAMES, Attention
from lowlevel.model.policy import Policy
from lowlevel.model.suitability import short_positions

POSITIONS = {"cuda": 8192, "cpu": 1024}  # of a batch; a longer request has its own
MASKED_POSITIONS = 2048  # at most, if attention computes the scores of all of them and masks most
CHUNK_SIZE = 512  # rows of logits; with V = 32,000 a buffer has 62 MiB of fp32

Ids = Sequence[int]
Request = tuple[Ids, Ids]  # context and continuation, both with at least one token


class Likelihood(NamedTuple):
    """Log-probability of a continuation in nats, and whether greedy decoding would write it."""

    logp: float
    greedy: bool


@dataclass(frozen=True)
class Scorable:
    """A batch whose scored tokens are those of some continuations, one after the other."""

    batch: PackedBatch
    places: list[int]  # of each continuation in the list of requests
    lengths: list[int]  # of each continuation, in tokens


def likelihoods(policy: Policy, requests: Sequence[Request], max_length: int) -> list[Likelihood]:
    """The likelihood of each continuation after its context, under the active adapters and without dropout.

    Args:
        policy: its attention decides whether contexts share a beginning, and how long a row may be.
        requests: token ids.
        max_length: positions that the model reads at once: the beginning of a longer request is cut off, as in the LM
            Evaluation Harness. The continuation alone must fit.
    """
    found: dict[int, Likelihood] = {}
    contexts = [context[-(max_length + 1 - len(continuation)) :] for context, continuation in requests]
    with scoring(policy) as policy:
        shares = policy.attention.kernel and short_positions(policy.causal_lm.config) is None
        for length, group in by_beginning(contexts) if shares else [(0, [*range(len(contexts))])]:
            after = _after(policy, contexts[group[0]][: length + 1]) if length else policy
            own = [(contexts[i][length:], requests[i][1]) for i in group]
            for made in batches_of(after, own):
                positions = {"position_ids": made.batch.position_ids + length}
                logps, greedy = _scores(after, made.batch.with_tensors(positions))
                split = zip(made.places, logps.split(made.lengths), greedy.split(made.lengths), strict=True)
                found |= {group[i]: Likelihood(float(one.double().sum()), bool(same.all())) for i, one, same in split}
    return [found[place] for place in range(len(requests))]


def _after(policy: Policy, ids: Ids) -> Policy:
    """The policy for what follows the tokens `ids` but for the last one: keys and values of these are computed here."""
    after, tokens = replace(policy, attention=replace(policy.attention, beginnings={})), np.array(ids)
    batch = build_batch([[sft_segment(0, 0, tokens, tokens)]], pairs=False)
    after.scored_hidden_states(batch.to(policy.placement.device))
    return after


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


def batches_of(policy: Policy, requests: Sequence[Request]) -> Iterator[Scorable]:
    """The requests in batches of one row each, on the policy's device; its attention decides how long a row may be.

    A context of one token shares nothing: its requests stay apart, in rows as short as possible.
    """
    device, groups = policy.placement.device, dict[object, list[int]]()  # places of the requests by context
    for place, (context, _) in enumerate(requests):
        groups.setdefault(tuple(context) if len(context) > 1 else place, []).append(place)
    capacity = POSITIONS[device.type]
    capacity = capacity if policy.attention.kernel else min(capacity, MASKED_POSITIONS)
    parts, sizes = list[list[int]](), list[int]()
    for group in groups.values():
        own = len(requests[group[0]][0]) - 1  # each continuation repeats the context's last token, for its first one
        tokens = sum(len(requests[place][1]) for place in group)
        pieces = min(len(group), max(1, -(-tokens // max(1, capacity - own))))  # more than fit a row are divided
        parts += [group[start::pieces] for start in range(pieces)]
        sizes += [own + sum(len(requests[place][1]) for place in part) for part in parts[-pieces:]]
    with working("scoring continuations", len(requests), "continuations") as work:
        for row in pack([min(size, capacity) for size in sizes], capacity):  # a longer one fills its row
            segments, places = list[Segment](), list[int]()
            for part in (parts[i] for i in row):
                completions = {branch: np.array(requests[place][1]) for branch, place in enumerate(part, 1)}
                segments.append(prompt_segment(0, len(places), np.array(requests[part[0]][0]), completions))
                places += part
            batch = build_batch([segments], pairs=False).to(device)
            yield Scorable(batch, places, [len(requests[place][1]) for place in places])
            work.done += len(places)


def _scores(policy: Policy, batch: PackedBatch) -> list[Tensor]:
    """Log-probability of each scored token and whether it is the likeliest, (N,) each, on the CPU."""

    def of(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head_logits(states, policy.lm_head_weight)  # (chunk, V)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1), logits.argmax(1) == targets

    return by_chunks(of, policy.scored_hidden_states(batch), batch.scored_targets, size=CHUNK_SIZE)
