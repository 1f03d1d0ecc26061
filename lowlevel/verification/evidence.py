"""Shared by several groups of checks: every example of the step alone, by the training path and in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowlevel.config.schema import RunConfig
from lowlevel.methods.kto import KTO
from lowlevel.verification.exact import ExactModel, HeadScores, Scored, base_parameters, exact_model, head_scores
from lowlevel.verification.formulas import Logps, count_of, exact_losses, logps_of, value_slopes
from lowlevel.verification.subject import Subject

BUDGET = 1.5e10  # parameters x tokens of a float64 pass: seconds on a CPU core


@dataclass(frozen=True)
class Evidence:
    """Results by example, without dropout."""

    sequences: list[list[Scored]]
    sums: list[dict[str, Tensor]]  # `method.loss` of a micro-batch that holds the example alone
    policy: list[HeadScores]
    reference: list[HeadScores] | None  # None if the loss has no reference
    values: Mapping[str, Tensor]  # numeric columns that the loss reads, one number an example; kto: also "kl"
    kl: Tensor | None  # () of the training path, kto
    statistics: tuple[str, ...]  # names of those that the loss reads
    weights: list[Tensor] | None  # of the scored tokens in the loss, by example
    model: ExactModel | None  # in float64; None if the base is too large
    exact: int  # how many examples are run through it
    rewards: bool = False  # scores are rewards and not log-probabilities

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
        weights = None if self.weights is None else self.weights[part]
        policy = by_side(self.policy[part])
        return logps_of(policy, reference, values, self.statistics, weights, rewards=self.rewards)

    def steepest(self, config: RunConfig) -> float:
        """How far an error of one nat in each sequence can move the loss of an example, the largest of all."""
        ids = self.logps.sequence_ids
        assert ids is not None
        zeros = torch.zeros(int(ids.max()) + 1, dtype=torch.float64)
        found = value_slopes(self.logps, config)
        parts = [zeros.scatter_reduce(0, ids, slope.abs().sum(1), "amax") for slope in found]
        return float(torch.stack(parts).reshape(-1, len(self.policy)).sum(0).max())

    def loss_error(self, nats: float, config: RunConfig) -> float:
        """Error of the step's loss, rms, if each token's log-probability has an independent error of `nats`.

        First order: the slopes of the loss in all of them, under policy and reference.
        """
        square = float(sum(slope.square().sum() for slope in value_slopes(self.logps, config)))
        return nats * math.sqrt(square) / count_of(self.logps)

    def step_loss(self, subject: Subject) -> float:
        """What the step must log: the sum over the step, divided once."""
        return float(exact_losses(self.logps, subject.config).sum()) / count_of(self.logps)


def gather(subject: Subject) -> Evidence:
    """Run every example of the step alone."""
    sequences = [subject.sequences(example) for example in subject.examples]
    kl = subject.batches()[0].kl
    alone = [replace(batch, kl=kl) for example in subject.examples for batch in subject.batches(examples=[example])]
    sums = [subject.sums(batch) for batch in alone]
    policy, reference = head_scores_of(subject, subject.examples)
    size, names = base_parameters(subject.policy), subject.method.statistics
    model = exact_model(subject.policy, subject.config.model, names) if size <= subject.exact_parameters else None
    values, weights = subject.values(subject.examples), subject.weights(subject.examples)
    if isinstance(subject.method, KTO):
        scores = [by_side(one or []) for one in head_scores_of(subject, subject.method.mismatched(subject.examples))]
        values["kl"] = mean_logratio(*scores).expand(len(sequences))
    within, rewards = _within(size, sequences), subject.rewards
    return Evidence(sequences, sums, policy, reference, values, kl, names, weights, model, within, rewards)


def mean_logratio(policy: Sequence[Sequence[Tensor]], reference: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean over sequences of log pi - log ref, (); 0 without any. From scores of the tokens [example][whole]."""
    pairs = zip(policy, reference, strict=True)
    ratios = [one[:, 0].sum() - other[:, 0].sum() for (one,), (other,) in pairs]
    return torch.stack(ratios).mean() if ratios else torch.zeros((), dtype=torch.float64)


def head_scores_of(subject: Subject, examples: Sequence[Any]) -> tuple[list[HeadScores], list[HeadScores] | None]:
    """Scores of every example alone, under policy and reference (None if the loss reads none)."""
    policy, reference = [], []
    for example in examples:
        (batch,) = subject.batches(examples=[example])
        policy.append(head_scores(subject.policy, batch, subject.method.statistics))
        if subject.method.has_reference:
            with subject.policy.reference():
                reference.append(head_scores(subject.policy, batch, subject.method.statistics))
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
