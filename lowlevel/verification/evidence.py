"""Shared by several groups of checks: every example of the step alone, by the training path and in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowlevel.losses import LabelledLogps, PairLogps, PairRewards, TokenLogps
from lowlevel.methods.kto import KTO
from lowlevel.verification.exact import ExactModel, HeadScores, Scored, base_parameters, exact_model, head_scores
from lowlevel.verification.formulas import Logps, count_of, exact_losses, value_slopes, with_tokens
from lowlevel.verification.subject import Subject

Scores = Sequence[Sequence[Tensor]]  # [example][chosen, rejected] or [example][whole]
BUDGET = 1.5e10  # parameters x tokens of a float64 pass: seconds on a CPU core


@dataclass(frozen=True)
class Evidence:
    """Results by example, without dropout."""

    subject: Subject
    sequences: list[list[Scored]]
    sums: list[dict[str, Tensor]]  # `method.loss` of a micro-batch that holds the example alone
    policy: list[HeadScores]
    reference: list[HeadScores] | None  # None if the loss has no reference
    values: Mapping[str, Tensor]  # numeric columns that the loss reads, one number an example; kto: also "kl"
    kl: Tensor | None  # () of the training path, kto
    model: ExactModel | None  # in float64; None if the base is too large
    exact: int  # how many examples are run through it

    @property
    def tokens(self) -> int:
        """Scored tokens of the step."""
        return sum(len(sequence.places) for sequences in self.sequences for sequence in sequences)

    @property
    def largest_logit(self) -> float:
        """In absolute value, of policy and reference."""
        return max(one.largest_logit for one in [*self.policy, *(self.reference or [])])

    @cached_property
    def logps(self) -> Logps:
        """What a loss reads of all examples, float64."""
        return self.logps_of(slice(None))

    def logps_of(self, part: slice) -> Logps:
        """The same of some of the examples."""
        reference = None if self.reference is None else by_side(self.reference[part])
        values = {name: column[part] for name, column in self.values.items()}
        return logps_of(self.subject, self.subject.examples[part], by_side(self.policy[part]), reference, values)

    @cached_property
    def losses(self) -> Tensor:
        """The configured loss of each pair or example (P,), or token (N,), float64."""
        return exact_losses(self.logps, self.subject.config)

    def steepest(self) -> float:
        """How far an error of one nat in each sequence can move the loss of an example, the largest of all."""
        ids = self.logps.sequence_ids
        assert ids is not None
        zeros = torch.zeros(int(ids.max()) + 1, dtype=torch.float64)
        found = value_slopes(self.logps, self.subject.config)
        parts = [zeros.scatter_reduce(0, ids, slope.abs().sum(1), "amax") for slope in found]
        return float(torch.stack(parts).reshape(-1, len(self.policy)).sum(0).max())

    def loss_error(self, nats: float) -> float:
        """Error of the step's loss, rms, if each token's log-probability has an independent error of `nats`.

        First order: the slopes of the loss in all of them, under policy and reference.
        """
        slopes = value_slopes(self.logps, self.subject.config)
        square = float(sum(slope.square().sum() for slope in slopes))
        return nats * math.sqrt(square) / count_of(self.logps)

    def step_loss(self) -> float:
        """What the step must log: the sum over the step, divided once."""
        return float(self.losses.sum()) / count_of(self.logps)


def gather(subject: Subject) -> Evidence:
    """Run every example of the step alone."""
    sequences = [subject.sequences(example) for example in subject.examples]
    kl = subject.batches()[0].kl
    alone = [replace(batch, kl=kl) for example in subject.examples for batch in subject.batches(examples=[example])]
    sums = [subject.sums(batch) for batch in alone]
    policy, reference = head_scores_of(subject, subject.examples)
    size, names = base_parameters(subject.policy), subject.method.statistics
    model = exact_model(subject.policy, subject.config.model, names) if size <= subject.exact_parameters else None
    values = subject.values(subject.examples)
    if isinstance(subject.method, KTO):
        scores = [by_side(one or []) for one in head_scores_of(subject, subject.method.mismatched(subject.examples))]
        values["kl"] = mean_logratio(*scores).expand(len(sequences))
    return Evidence(subject, sequences, sums, policy, reference, values, kl, model, _within(size, sequences))


def logps_of(
    subject: Subject, examples: Sequence[Any], policy: Scores, reference: Scores | None, values: Mapping[str, Tensor]
) -> Logps:
    """What the loss reads of some examples, from their scores (n, 1 + K).

    `reference` is None without one; `values`: numeric columns of the rows, one number an example; for kto with "kl".
    """
    tokens = torch.cat(sequences := _sequences(policy))
    lengths = torch.tensor(list(map(len, sequences)))
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)
    if subject.rewards:
        return PairRewards(*tokens[:, 0].chunk(2), values=values)
    statistics = dict(zip(subject.method.statistics, tokens[:, 1:].unbind(1), strict=True))
    if subject.method.name == "sft":
        given = subject.weights(examples)
        weights = None if given is None else torch.cat(given)
        return TokenLogps(tokens[:, 0], ids, lengths, values, statistics, weights)
    of_reference = tokens.new_zeros(len(tokens), 1) if reference is None else torch.cat(_sequences(reference))
    empty = tokens.new_zeros(len(policy))
    rows: Logps
    if "kl" in values:
        rows = LabelledLogps(empty, empty, values["label"] > 0, values["kl"], sequence_ids=ids)
    else:
        more: dict[str, Any] = {"sequence_ids": ids, "values": values, "statistics": statistics}
        rows = PairLogps(empty, empty, empty, empty, *lengths.chunk(2), **more)
    return with_tokens(rows, tokens, of_reference[:, :1])


def _sequences(examples: Scores) -> list[Tensor]:
    """All chosen completions, then all rejected ones."""
    return [example[side] for side in range(len(examples[0])) for example in examples]


def mean_logratio(policy: Scores, reference: Scores) -> Tensor:
    """Mean over sequences of log pi - log ref, (); 0 without any. From scores of the tokens [example][whole]."""
    pairs = zip(policy, reference, strict=True)
    ratios = [one[:, 0].sum() - other[:, 0].sum() for (one,), (other,) in pairs]
    return torch.stack(ratios).mean() if ratios else torch.zeros((), dtype=torch.float64)


def head_scores_of(subject: Subject, examples: Sequence[Any]) -> tuple[list[HeadScores], list[HeadScores] | None]:
    """Scores of every example alone, under policy and reference (None if the loss reads none)."""
    policy, reference = [], []
    for example in examples:
        (batch,) = subject.batches(examples=[example])
        given = subject.policy, batch, subject.method.statistics, subject.temperature
        policy.append(head_scores(*given))
        if subject.method.has_reference:
            with subject.policy.reference():
                reference.append(head_scores(*given))
    return policy, reference or None


def _within(size: int, sequences: list[list[Scored]]) -> int:
    """How many examples, from the first, fit the budget of a float64 model of this size; at least one."""
    taken, used = 0, 0
    for example in sequences:
        used += sum(len(sequence.ids) for sequence in example)
        if taken and size * used > BUDGET:
            break
        taken += 1
    return taken


def by_side(scores: list[HeadScores]) -> list[list[Tensor]]:
    """[example][chosen, rejected], or [example][whole] without pairs. Scored tokens of a pair's prompt are left out."""
    paired = bool(scores) and bool((scores[0].sides > 1).any())
    return [[one.exact[one.sides == side] for side in (1, 2)] if paired else [one.exact] for one in scores]


def flat64(subject: Subject) -> Tensor:
    """The trained adapter's weights (n,) float64 on the CPU."""
    return subject.policy.flat.weights.detach().to("cpu", torch.float64)


def reference64(subject: Subject) -> Tensor | None:
    """The same of a moving reference; None for the reference without a trained adapter."""
    moving = subject.policy.moving
    return None if moving is None else moving.weights.to("cpu", torch.float64)
