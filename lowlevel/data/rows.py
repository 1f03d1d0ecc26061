"""Rows of a source, and problems with rows: each knows its place, so that an error can name it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowlevel.errors import DataError

SHOWN = 5
KINDS = (
    *((type(None), "null"), (bool, "true or false"), (int, "a number"), (float, "a number"), (str, "text")),
    *((list, "a list"), (Mapping, "an object")),
)


@dataclass(frozen=True)
class Row:
    """One row. `id` counts the rows of all sources from 0; `where` is "train.jsonl:7", "name[split]:7" or "data:7".

    `source` is its place in data.sources, `format` the source's own.
    """

    id: int
    where: str
    columns: Mapping[str, object]
    source: int = 0
    format: Any = None  # formats.Format, once recognised


@dataclass(frozen=True)
class RowProblem:
    """Why a row cannot be used. The report counts problems by `reason`; `message` is for the user.

    Rows with the same `mend` ("; " and what to do with their whole file) have one cause.
    """

    where: str
    reason: str
    message: str
    mend: str = ""


@dataclass(frozen=True)
class Part:
    """One source of a mix: its name, its number of rows, and its share by weight."""

    name: str
    read: int
    share: float | None = None


@dataclass(frozen=True)
class SourceRows:
    """Rows of one or more sources, problems with other rows, warnings by kind, and rows dropped by each filter."""

    name: str
    rows: list[Row]
    problems: list[RowProblem] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    parts: tuple[Part, ...] = ()  # of a mix
    left: int = 0  # rows beyond their source's weight
    read_as: str = ""  # format and columns, if it is not a plain one

    @property
    def read(self) -> int:
        """Number of rows in the source, unreadable, dropped and left ones included."""
        return len(self.rows) + len(self.problems) + self.dropped.total() + self.left


def data_error(problems: Sequence[RowProblem]) -> DataError:
    """An error with one line for each of the first five causes, then the number of the other problems."""
    causes: dict[str, list[RowProblem]] = {}
    for problem in problems:
        causes.setdefault(problem.mend or problem.where, []).append(problem)
    shown, lines = list(causes.values())[:SHOWN], []
    for first, *others in shown:
        more = f", and {len(others):,} more lines" if others and first.mend else ""
        lines.append(f"{first.where}: {first.message}{more}{first.mend}")
    if rest := len(problems) - sum(map(len, shown)):
        lines.append(f"and {rest} more; --on-bad-row skip continues without them")
    return DataError("\n".join(lines))


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """Rows in the order of `datasets.Dataset.shuffle(seed)`, which uses numpy's default generator."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def kind_of(value: object) -> str:
    """Name of a JSON value's type for messages."""
    return next((name for kind, name in KINDS if isinstance(value, kind)), type(value).__name__)
