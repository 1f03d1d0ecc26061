"""An inspection: the examples of a step or a row, the weights that they were computed with, and the logged loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowlevel.config.schema import RunConfig
from lowlevel.inspection.example import Example, View
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import settings
from lowlevel.methods import Method


@dataclass(frozen=True, repr=False)
class Inspection:
    """The inspected examples; of methods that sample, each is a prompt with its completions."""

    run: str  # name of the run folder
    subject: str  # "step 5" or "row 12"
    weights: str  # description of the trained adapter
    logged: str | None  # the loss that the run logged for this step, and what it is a mean of; None if not logged
    pieces: TokenPieces  # token ids as text
    method: Method  # holds the configured loss
    view: View
    examples: tuple[Example, ...]

    def __repr__(self) -> str:
        return "\n".join((self.headline, self.conditions, self.result))

    @property
    def loss(self) -> float:
        """The loss as the training loop logs it: the sum over tokens (sft), pairs or completions, by their number."""
        return sum(x.loss for x in self.examples) / self.count

    @property
    def count(self) -> float:
        """Learned tokens (sft), pairs or labelled completions; of sampled completions what the loss counts."""
        return sum(x.count for x in self.examples) or 1.0

    @property
    def headline(self) -> str:
        """Run, subject, number of examples and loss, in one line."""
        texts = [text for x in self.examples for text in x.texts]
        counts = [_count(len(texts if self.view.by_text else self.examples), self.view.unit)]
        counts += [_count(sum(len(text.scored) for text in texts), self.view.tokens)] if self.view.tokens else []
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
