"""The tables of an inspection as texts, for terminal and page: the batch, the tokens of a text, the way to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowlevel.errors import how_many
from lowlevel.inspection.example import Example, Inspection, Text, View
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import NONE, percent, shown

SIDES = ("+", "-")  # of a pair


@dataclass(frozen=True)
class Line:
    """A line of the batch: an example, or one of its texts."""

    example: int
    text: int
    row: str
    cells: tuple[str, ...]
    measure: float  # the number that is drawn
    note: str  # the beginning of the text, or where the row is from


def batch_table(inspection: Inspection, names: Sequence[str]) -> tuple[list[str], list[Line]]:
    """Headings and lines of some numbers; one that both completions of a pair have stands there for each."""
    view, lines, headings = inspection.view, list[Line](), list[str]()
    for i, x in enumerate(inspection.examples):
        for j, text in enumerate(x.texts if view.by_text else x.texts[:1]):
            found: dict[str, float] = {}
            for name in names:
                own = [text.numbers[name]] if view.by_text and name in text.numbers else x.values(name)
                ends = SIDES if len(own) == len(SIDES) else ("",) * len(own)
                found |= {f"{name}{end}": value for end, value in zip(ends, own, strict=True) if value is not None}
            headings = list(found)
            cells = tuple(shown(name.rstrip("+-"), value) for name, value in found.items())
            row, start = f"{x.row}", " ".join(inspection.pieces.decode(text.token_ids).split())
            row += f" {text.name}" if view.by_text else ""
            lines.append(Line(i, j, row, cells, found.get(view.measure, 0.0), start if view.by_text else x.where))
    return headings, lines


@dataclass(frozen=True)
class TokenLine:
    """One token as texts; `others` are the likeliest tokens besides it, each with its probability."""

    position: str
    token: str
    numbers: dict[str, str]
    others: tuple[str, ...]


def token_lines(text: Text, pieces: TokenPieces) -> list[TokenLine]:
    """The scored tokens of a text; log-probabilities in nats."""
    columns = [
        [("yes" if value else "") if values.dtype == torch.bool else shown(name, value) for value in values.tolist()]
        for name, values in text.columns.items()
    ]
    numbers = [dict(zip(text.columns, row, strict=True)) for row in zip(*columns, strict=True)]
    others: list[tuple[str, ...]] = [()] * len(text.scored)
    if text.predicted is not None:
        likeliest = zip(text.predicted.alternative_ids, text.predicted.alternative_logps.exp().tolist(), strict=True)
        others = [
            tuple(f"{token} {percent(share)}" for token, share in zip(pieces.texts(ids), shares, strict=True))
            for ids, shares in likeliest
        ]
    lines = zip(map(str, text.positions), pieces.texts(text.token_ids), numbers, others, strict=True)
    return [TokenLine(*line) for line in lines]


def steps_of(example: Example) -> list[tuple[str, str, list[str]]]:
    """Name, formula and values of each number on the way to the loss: one value, or one of each text."""
    found = []
    for name, formula in example.equation.items():
        values = example.values(name)
        if any(value is not None for value in values):
            cells = [NONE if value is None else shown(name, value, 5) for value in values]
            found.append((name, formula, cells))
    return found


def facts_of(example: Example, view: View) -> list[tuple[str, str]]:
    """The numbers that stand beside the name of an example; of a group its own."""
    group = view.by_text and len(example.texts) > 1
    found = []
    for name in example.numbers if group else dict.fromkeys((*view.facts, *example.numbers)):
        if name in view.facts or (name not in example.equation or group):
            values = dict.fromkeys(shown(name, value) for value in example.values(name) if value is not None)
            found.append((name, " / ".join(values)))
    return found


def summary(text: Text) -> str:
    """The tokens of a text and its numbers, in a few words."""
    n = len(text.scored)
    count = f"{n} of {len(text.ids)} tokens learned" if 0 < n < len(text.ids) and text.predicted else ""
    numbers = [f"{name} {shown(name, text.numbers[name])}" for name in ("score", "reward", "advantage", "log-ratio")
               if name in text.numbers]  # fmt: skip
    return ", ".join([count or how_many(len(text.ids), "tokens"), *numbers[:2], *filter(None, [text.note])])


def caption(inspection: Inspection) -> str:
    """What the numbers of the batch are."""
    view, lines = inspection.view, {**inspection.examples[0].equation, "loss": inspection.view.formula}
    return "; ".join(f"{name}: {lines[name]}" for name in view.facts if name in lines)
