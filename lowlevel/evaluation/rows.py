"""Rows of a file that is not for training: a probe's texts, a judge's questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lowlevel.data.sources import read_source
from lowlevel.errors import DataError

Value = TypeVar("Value")


def read_rows(path: Path, read: Callable[[Mapping[str, Any]], Value]) -> list[Value]:
    """What `read` makes of each row's columns; it raises ValueError for an unusable row.

    Raises ConfigError if there is no such file, DataError with the first unusable row and the number of all.
    """
    source, found = read_source(str(path), "train"), []
    problems = [f"{problem.where}: {problem.message}" for problem in source.problems]
    for row in source.rows:
        try:
            found.append(read(row.columns))
        except ValueError as error:
            problems.append(f"{row.where}: {error}")
    if problems:
        more = f" ({len(problems):,} of {len(source.rows) + len(source.problems):,} rows are unusable)"
        raise DataError(problems[0] + more)
    return found
