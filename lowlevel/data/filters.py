"""Conditions on rows: which rows a run's [[data.filters]] keep, and which condition dropped the others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowlevel.config.schema import Filter
from lowlevel.data.messages import listed
from lowlevel.data.sources import Row, RowProblem, kind_of
from lowlevel.errors import ConfigError


@dataclass(frozen=True)
class Filtered:
    """Rows that meet all conditions, rows dropped by the condition they failed first, and rows not comparable."""

    rows: list[Row]
    dropped: Counter[str]
    problems: list[RowProblem]


def apply_filters(rows: Sequence[Row], filters: Sequence[Filter], name: str) -> Filtered:
    """Keep the rows for which every filter holds, tried in order: a row that fails one is not shown to the next.

    Raises:
        ConfigError: a column that no row has, or a list where the operator takes one value (or the reverse).
    """
    result = Filtered([], Counter(), [])
    for condition in filters:
        _check_filter(condition, rows, name)
    for row in rows:
        try:
            failed = next((f for f in filters if not _holds(f, row.columns.get(f.column))), None)
        except TypeError as error:
            result.problems.append(RowProblem(row.where, "not comparable in a filter", str(error)))
            continue
        if failed is None:
            result.rows.append(row)
        else:
            result.dropped[describe(failed)] += 1
    return result


def describe(condition: Filter) -> str:
    """A filter as a person would write it: chosen_score >= 8."""
    return f"{condition.column} {condition.op} {json.dumps(condition.value)}"


def _check_filter(condition: Filter, rows: Sequence[Row], name: str) -> None:
    found = {column for row in rows for column in row.columns}
    if condition.column not in found:
        known = listed(sorted(found))
        raise ConfigError(f'data.filters: {name} has no column "{condition.column}"; found: {known}')
    if isinstance(condition.value, list) != (condition.op in ("in", "not in")):
        expected = "a list" if condition.op in ("in", "not in") else "one value"
        raise ConfigError(f"data.filters: {describe(condition)}: {condition.op} takes {expected}")


def _holds(condition: Filter, value: Any) -> bool:
    """Python's comparison, within one kind; null equals nothing and has no order. Raises TypeError with both kinds."""
    wanted: Any = condition.value
    candidates = wanted if isinstance(wanted, list) else [wanted]
    ordered = condition.op in (">", ">=", "<", "<=")
    same_kind = value is None and not ordered or any(kind_of(value) == kind_of(c) for c in candidates)
    if not same_kind and candidates:
        kinds = " or ".join(sorted({kind_of(candidate) for candidate in candidates}))
        raise TypeError(f'"{condition.column}" is {kind_of(value)}; {describe(condition)} compares it to {kinds}')
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
