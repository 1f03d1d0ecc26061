"""Examples of a step, taken apart: the one description that terminal and page draw, whatever the method.

An example is a prompt with its texts: a conversation, a pair, or the completions of a group. The n scored tokens of a
text have columns of numbers; each text, and the example, has numbers by name; and the equation says, in order, how each
number follows from those before it, down to the loss. The files of the methods say what these numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.errors import how_many
from lowlevel.inspection.displacement import Displacement, Distribution
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import settings
from lowlevel.methods import Method


@dataclass(frozen=True, repr=False)
class Text:
    """A text of L tokens, n of them scored; all on the CPU."""

    name: str  # "chosen", "conversation", "sample 2"
    note: str  # what else is to be known of it
    ids: Tensor  # (L,) int64
    scored: Tensor  # (n,) int64, places in `ids`
    start: int  # tokens before it in its sequence
    columns: Mapping[str, Tensor]  # (n,) each; a bool marks tokens
    numbers: Mapping[str, float]
    predicted: Distribution | None = None  # of the n predictions; its columns' first is their log-probability

    def __repr__(self) -> str:
        return f"Text({self.name!r}: {how_many(len(self.ids), 'tokens')}, {', '.join([*self.columns, *self.numbers])})"

    @property
    def token_ids(self) -> Tensor:
        """Ids of the scored tokens, (n,)."""
        return self.ids[self.scored]

    @property
    def positions(self) -> list[int]:
        """Positions of the scored tokens in their sequence."""
        return (self.scored + self.start).tolist()


@dataclass(frozen=True, repr=False)
class Example:
    """One example of a step, under the inspected weights; dropout is off."""

    row: int
    where: str
    prompt_ids: np.ndarray  # (p,)
    texts: tuple[Text, ...]
    numbers: Mapping[str, float]  # "loss" is one of them, or of each text's
    equation: Mapping[str, str]  # of each number of texts and example, in order: its formula
    count: float = 1.0  # what it adds to the count that the step's loss is divided by
    others: tuple[Text, ...] = ()  # which belong to the example, but are not in its loss
    displacement: Displacement | None = None  # if the chosen completion is less likely than under the reference

    def __repr__(self) -> str:
        texts = ", ".join(f"{text.name} {how_many(len(text.scored), 'tokens')}" for text in self.texts)
        return f"Example(row {self.row}: {texts}, loss {self.loss:z.4f})"

    @property
    def loss(self) -> float:
        """Summed, as the step's loss adds it up."""
        return sum(value or 0.0 for value in self.values("loss"))

    def values(self, name: str) -> list[float | None]:
        """A number by name: one of the example, or one of each text."""
        return [self.numbers[name]] if name in self.numbers else [text.numbers.get(name) for text in self.texts]

    def running(self, column: str) -> Tensor:
        """Cumulative sums of a column along the texts, (sum of n,) float64."""
        return torch.cat([text.columns[column].double() for text in self.texts]).cumsum(0)


@dataclass(frozen=True)
class View:
    """How the examples of a method are shown."""

    unit: str  # what a line of the batch is
    formula: str
    words: Mapping[str, str]  # columns of tokens, and what they are
    sums: str  # what the sum that is drawn along the tokens adds up to
    facts: tuple[str, ...]  # numbers to compare examples by
    adds: str = "adds"  # the column whose sum it is
    more: tuple[str, ...] = ()  # others for a wide table
    measure: str = "loss"  # which of the facts is drawn
    caption: str = ""  # of the histogram of measures; "": the tokens' losses are drawn
    colours: tuple[str, ...] = ("adds",)  # columns that colour tokens, besides surprise and entropy
    by_text: bool = False  # a line of the batch is a text, not an example
    symbols: str = ""  # of the equation
    tokens: str = ""  # what tokens are called where they are counted; "": they are not


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
        counts = [how_many(len(texts if self.view.by_text else self.examples), f"{self.view.unit}s")]
        if self.view.tokens:
            counts.append(how_many(sum(len(text.scored) for text in texts), f"{self.view.tokens}s"))
        return f"{self.run}, {self.subject}: {', '.join([*counts, settings(self.method)])}"

    @property
    def conditions(self) -> str:
        """Weights and dropout, in one line."""
        return f"weights: {self.weights}; dropout off"

    @property
    def result(self) -> str:
        """The loss, and the one that the run logged, in one line."""
        return f"loss {self.loss:z.6f}" + (f" ({self.logged})" if self.logged else "")


WORDS = {  # of every prediction
    "prob": "probability of the token",
    "rank": "1 is the likeliest token",
    "entropy": "of the prediction, in nats",
}


@dataclass(frozen=True)
class ScoredBatch:
    """A micro-batch with columns (N,) of its scored tokens, and their predictions; all on the CPU."""

    batch: PackedBatch
    columns: Mapping[str, Tensor]  # the first: log-probabilities, if they were predicted
    predicted: Distribution | None

    def text(self, sequence: int, name: str, note: str = "", *, ids: Any = None, start: int = 0) -> Text:
        """A sequence as a text: its scored tokens alone, or the tokens `ids`, of which the first is at `start`."""
        index = self.places(sequence)
        positions = self.batch.position_ids.flatten()[self.batch.scored_positions[index]]
        positions = positions + (self.predicted is not None)  # a position predicts the next token; a reward is its own
        columns, predicted = {name: column[index] for name, column in self.columns.items()}, None
        if self.predicted is not None:
            predicted = self.predicted.at(index)
            logps = next(iter(columns.values()))
            columns |= {"prob": logps.exp(), "rank": predicted.ranks, "entropy": predicted.entropies}
        if ids is None:
            ids, start = self.batch.scored_targets[index], int(positions[0])
        ids, tokens = torch.as_tensor(ids, dtype=torch.int64), len(ids if predicted is None else index)
        return Text(name, note, ids, positions - start, start, columns, {"tokens": tokens}, predicted)

    def places(self, sequence: int) -> Tensor:
        """Where a sequence's tokens are among the N scored ones, (n,) int64."""
        return self.batch.sequence_index[sequence, : int(self.batch.lengths[sequence])]


def with_sums(texts: Sequence[Text], column: str) -> list[Text]:
    """The texts with the cumulative sums of a column along all of them as column "sum", float64."""
    sums = torch.cat([text.columns[column].double() for text in texts]).cumsum(0)
    parts = sums.split([len(text.scored) for text in texts])
    return [replace(text, columns={**text.columns, "sum": part}) for text, part in zip(texts, parts, strict=True)]


Step = tuple[str, str, Tensor]  # on the way to the loss: name, formula, and the values of a whole batch


def example_of(
    x: Any, prompt: np.ndarray, texts: Sequence[Text], steps: Sequence[Step], at: int = 0, size: int = 1, **more: Any
) -> Example:
    """Example `at` of `size` with the numbers of `steps`: one value an example, or one a text, text after text."""
    own = {name: float(values[at]) for name, _, values in steps if len(values) == size}
    each = [(name, values) for name, _, values in steps if len(values) > size]
    found = [
        replace(text, numbers={**text.numbers, **{name: float(values[at + i * size]) for name, values in each}})
        for i, text in enumerate(texts)
    ]
    formulas = {name: formula for name, formula, _ in steps}
    return Example(x.row, x.where, prompt, tuple(found), own, formulas, **more)


def in_order(
    examples: Sequence[Any],
    batches: Callable[[Sequence[Any]], Sequence[PackedBatch]],
    of_batch: Callable[[PackedBatch, Sequence[Any]], Sequence[Example]],
) -> list[Example]:
    """The parts of examples by micro-batch, which change their order, in the given order; a row may come twice."""
    found: dict[int, Example] = {}
    for batch in batches([replace(x, row=place) for place, x in enumerate(examples)]):
        own = [examples[place] for place in batch.data_rows]
        found |= zip(batch.data_rows, of_batch(batch, own), strict=True)
    return [found[place] for place in range(len(examples))]
