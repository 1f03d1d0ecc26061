"""An inspection: the records of a step or a row, the weights that they were computed with, and the logged loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowlevel.config.schema import RunConfig
from lowlevel.inspection.kto_and_reward import LabelledRecord, RewardRecord
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import settings
from lowlevel.inspection.records import PairRecord, SequenceRecord
from lowlevel.inspection.sampled import SampledRecord
from lowlevel.methods import Method


@dataclass(frozen=True, repr=False)
class Inspection:
    """The inspected examples: `pairs` (dpo), `sequences` (sft), `labelled` (kto), `rewards` (reward) or `sampled`."""

    run: str  # name of the run folder
    subject: str  # "step 5" or "row 12"
    weights: str  # description of the trained adapter
    logged: str | None  # the loss that the run logged for this step, and what it is a mean of; None if not logged
    pieces: TokenPieces  # token ids as text
    method: Method  # holds the configured loss
    sequences: tuple[SequenceRecord, ...] = ()
    pairs: tuple[PairRecord, ...] = ()
    labelled: tuple[LabelledRecord, ...] = ()
    rewards: tuple[RewardRecord, ...] = ()
    sampled: tuple[SampledRecord, ...] = ()  # grpo, rloo, ppo

    def __repr__(self) -> str:
        return "\n".join((self.headline, self.conditions, self.result))

    @property
    def records(self) -> Sequence[SequenceRecord | PairRecord | LabelledRecord | RewardRecord | SampledRecord]:
        """Whichever there are."""
        return self.sequences or self.pairs or self.labelled or self.rewards or self.sampled

    @property
    def loss(self) -> float:
        """The loss as the training loop logs it: the sum over tokens (sft), pairs or examples, by their number."""
        return float(torch.stack([record.loss for record in self.records]).double().sum()) / self.count

    @property
    def count(self) -> float:
        """Learned tokens (sft), pairs (dpo) or labelled completions (kto); of sampled ones what the loss counts."""
        if self.sampled:
            return sum(record.count for record in self.sampled) or 1.0
        return len(self.pairs or self.labelled or self.rewards) or sum(len(record.tokens) for record in self.sequences)

    @property
    def headline(self) -> str:
        """Run, subject, number of examples and loss, in one line."""
        if self.sampled:
            tokens = sum(len(record.tokens) for record in self.sampled)
            counts = [_count(len(self.sampled), "completion"), _count(tokens, "token")]
        elif not self.sequences:
            counts = [_count(self.count, "labelled completion" if self.labelled else "pair")]
        else:
            counts = [_count(len(self.sequences), "example"), _count(self.count, "learned token")]
        return f"{self.run}, {self.subject}: {', '.join([*counts, settings(self.method)])}"

    @property
    def conditions(self) -> str:
        """Weights and dropout, in one line."""
        return f"weights: {self.weights}; dropout off"

    @property
    def result(self) -> str:
        """The loss, and the one that the run logged, in one line."""
        return f"loss {self.loss:.6f}" + (f" ({self.logged})" if self.logged else "")


def logged_loss(metrics: Sequence[dict[str, Any]], step: int, config: RunConfig) -> str | None:
    """The logged loss of a step as text, with the steps that it is a mean of; None if the step was not logged."""
    steps = [record["step"] for record in metrics if "loss" in record]
    if step not in steps:
        return None
    first = max((other for other in steps if other < step), default=0) + 1
    loss = next(record["loss"] for record in metrics if record["step"] == step and "loss" in record)
    window = "" if first == step else f", the mean of steps {first} to {step}"
    dropout = f", with dropout {config.active_dropout:g}" if config.active_dropout else ""
    return f"logged: {loss:.6f}{window}{dropout}"


def _count(number: float, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
