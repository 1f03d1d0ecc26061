"""Rows of a file that is not for training: a probe's texts, a judge's questions, prompts whose replies are judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lowlevel.data.rows import Row
from lowlevel.data.sources import read_source
from lowlevel.data.texts import BadRow
from lowlevel.errors import ConfigError, DataError

Value = TypeVar("Value")


def read_rows(
    source: str | Path, read: Callable[[Row], Value], split: str = "train", method: str = "sft"
) -> list[Value]:
    """What `read` makes of each row; it raises ValueError or BadRow for an unusable one. Arguments of `read_source`.

    Raises ConfigError if there is no such file, DataError with the first unusable row and the number of all.
    """
    if isinstance(source, Path) and not source.is_file():
        raise ConfigError(f"{source}: no such file")
    given, found = read_source(str(source), split, method), []
    problems = [f"{problem.where}: {problem.message}" for problem in given.problems]
    for row in given.rows:
        try:
            found.append(read(row))
        except (ValueError, BadRow) as error:
            problems.append(f"{row.where}: {error}")
    if problems:
        more = f" ({len(problems):,} of {len(given.rows) + len(given.problems):,} rows are unusable)"
        raise DataError(problems[0] + more)
    return found
