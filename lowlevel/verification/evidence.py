"""What several groups of checks share: every example of the step, alone, through the training path and in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowlevel.config.schema import DPOConfig
from lowlevel.verification.exact import ExactModel, base_parameters, exact_model
from lowlevel.verification.formulas import Logps, slopes
from lowlevel.verification.subject import Subject
from lowlevel.verification.truth import HeadScores, Scored, exact_loss, head_scores, pairs_of, sequences_of

BUDGET = 1.5e10  # parameters x tokens of a float64 pass: seconds on a CPU core


@dataclass(frozen=True)
class Evidence:
    """By example, dropout off.

    Attributes:
        sequences: of each example, as plain tokens.
        sums: `method.loss` of a micro-batch that holds the example alone.
        policy, reference: its tokens' scores; no reference for sft.
        model: the whole model in float64, or None where the base is too large.
        exact: how many examples are run through it.
    """

    sequences: list[list[Scored]]
    sums: list[dict[str, Tensor]]
    policy: list[HeadScores]
    reference: list[HeadScores] | None
    model: ExactModel | None
    exact: int

    @property
    def tokens(self) -> int:
        """Scored tokens of the step."""
        return sum(len(sequence.places) for sequences in self.sequences for sequence in sequences)

    @property
    def largest_logit(self) -> float:
        """In absolute value, of policy and reference."""
        return max(one.largest_logit for one in [*self.policy, *(self.reference or [])])

    def loss_error(self, nats: float, config: DPOConfig) -> float:
        """Error of the step's loss, rms, where each token's log-probability has one of `nats` of its own; first order.

        SFT: nats / sqrt(tokens). DPO: the four slopes of each pair, each as often as the completion has tokens.
        """
        if self.reference is None:
            return nats / math.sqrt(self.tokens)
        logps = self.logps()
        chosen, rejected, ref_chosen, ref_rejected = slopes(logps, config)
        square = (chosen**2 + ref_chosen**2) * logps.chosen_lengths
        square += (rejected**2 + ref_rejected**2) * logps.rejected_lengths
        return nats * math.sqrt(float(square.sum())) / len(logps.chosen)

    def logps(self) -> Logps:
        """Over all pairs, float64."""
        assert self.reference is not None
        return pairs_of(_by_side(self.policy), _by_side(self.reference))

    def step_loss(self, subject: Subject) -> float:
        """What the step must log: the sum over the step, divided once."""
        if self.reference is None:
            total, count = exact_loss([[scores.exact] for scores in self.policy], None, subject.config.dpo)
        else:
            total, count = exact_loss(_by_side(self.policy), _by_side(self.reference), subject.config.dpo)
        return float(total) / count


def gather(subject: Subject) -> Evidence:
    """Run every example of the step alone."""
    sequences = [sequences_of(example, subject.preference) for example in subject.examples]
    sums, policy, reference = [], [], []
    for example in subject.examples:
        (batch,) = subject.batches(examples=[example])
        sums.append(subject.sums(batch))
        policy.append(head_scores(subject.policy, batch))
        if subject.preference:
            with subject.policy.reference():
                reference.append(head_scores(subject.policy, batch))
    size = base_parameters(subject.policy)
    model = exact_model(subject.policy, subject.config.model) if size <= subject.exact_parameters else None
    return Evidence(sequences, sums, policy, reference if subject.preference else None, model, _within(size, sequences))


def _within(size: int, sequences: list[list[Scored]]) -> int:
    """Examples, from the first, whose tokens a float64 model of this size can take; at least one."""
    taken, used = 0, 0
    for example in sequences:
        used += sum(len(sequence.ids) for sequence in example)
        if taken and size * used > BUDGET:
            break
        taken += 1
    return taken


def _by_side(scores: list[HeadScores]) -> list[list[Tensor]]:
    return [[one.exact[one.sides == side] for side in (1, 2)] for one in scores]


def flat64(subject: Subject) -> Tensor:
    """The trained adapter's weights (n,) float64 on the CPU."""
    return subject.policy.flat.weights.detach().to("cpu", torch.float64)
