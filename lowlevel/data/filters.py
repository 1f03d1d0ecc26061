"""[[data.filters]]: keep the rows that meet all conditions, and count the others by the condition that failed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowlevel.config.schema import Filter
from lowlevel.data.messages import listed
from lowlevel.data.sources import Row, RowProblem, SourceRows, kind_of
from lowlevel.errors import ConfigError


def apply_filters(source: SourceRows, filters: Sequence[Filter]) -> SourceRows:
    """Keep the rows that meet every condition. Conditions are tried in order; the first that fails drops the row.

    Raises:
        ConfigError: a column that no row has, a list for an operator on one value, or one value for "in" / "not in".
    """
    rows: list[Row] = []
    problems: list[RowProblem] = []
    dropped: Counter[str] = Counter()
    for condition in filters:
        _check_filter(condition, source)
    for row in source.rows:
        try:
            failed = next((f for f in filters if not _holds(f, row.columns.get(f.column))), None)
        except TypeError as error:
            problems.append(RowProblem(row.where, "not comparable in a filter", str(error)))
            continue
        if failed is None:
            rows.append(row)
        else:
            dropped[describe(failed)] += 1
    return replace(source, rows=rows, problems=source.problems + problems, dropped=dropped)


def describe(condition: Filter) -> str:
    """A filter as text: chosen_score >= 8."""
    return f"{condition.column} {condition.op} {json.dumps(condition.value)}"


def _check_filter(condition: Filter, source: SourceRows) -> None:
    found = {column for row in source.rows for column in row.columns}
    if condition.column not in found:
        known = listed(sorted(found))
        raise ConfigError(f'data.filters: {source.name} has no column "{condition.column}"; found: {known}')
    if isinstance(condition.value, list) != (condition.op in ("in", "not in")):
        expected = "a list" if condition.op in ("in", "not in") else "one value"
        raise ConfigError(f"data.filters: {describe(condition)}: {condition.op} takes {expected}")


def _holds(condition: Filter, value: Any) -> bool:
    """Compare as Python does, within one type; null equals no value and has no order. Raises TypeError otherwise."""
    wanted: Any = condition.value
    candidates = wanted if isinstance(wanted, list) else [wanted]
    ordered = condition.op in (">", ">=", "<", "<=")
    same_kind = value is None and not ordered or any(kind_of(value) == kind_of(c) for c in candidates)
    if not same_kind and candidates:
        kinds = " or ".join(sorted({kind_of(candidate) for candidate in candidates}))
        raise TypeError(f'"{condition.column}" is {kind_of(value)}; {describe(condition)} compares it with {kinds}')
    match condition.op:
        case "==" | "in":
            return value in candidates
        case "!=" | "not in":
            return value not in candidates
        case ">":
            return value > wanted
        case ">=":
            return value >= wanted
        case "<":
            return value < wanted
        case _:
            return value <= wanted
