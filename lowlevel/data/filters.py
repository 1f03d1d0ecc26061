"""[[data.filters]]: keep the rows that meet all conditions, and count the others by the condition that failed."""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowlevel.config.schema import Filter
from lowlevel.data.formats import listed
from lowlevel.data.sources import RowProblem, SourceRows, kind_of
from lowlevel.errors import ConfigError

ORDERS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def apply_filters(source: SourceRows, filters: Sequence[Filter]) -> SourceRows:
    """Keep the rows that meet every condition. Conditions are tried in order; the first that fails drops the row.

    Raises ConfigError for a column that no row has, a list for an operator on one value, or one value for "in".
    """
    kept = replace(source, rows=[], problems=[*source.problems], dropped=Counter())
    for condition in filters:
        _check_filter(condition, source)
    for row in source.rows:
        try:
            failed = next((f for f in filters if not _holds(f, row.columns.get(f.column))), None)
        except TypeError as error:
            kept.problems.append(RowProblem(row.where, "not comparable in a filter", str(error)))
            continue
        if failed is None:
            kept.rows.append(row)
        else:
            kept.dropped[describe(failed)] += 1
    return kept


def describe(condition: Filter) -> str:
    """A filter as text: chosen_score >= 8."""
    return f"{condition.column} {condition.op} {json.dumps(condition.value)}"


def _check_filter(condition: Filter, source: SourceRows) -> None:
    found = {column for row in source.rows for column in row.columns}
    if condition.column not in found:
        known = listed(sorted(found))
        raise ConfigError(f'data.filters: {source.name} has no column "{condition.column}"; found: {known}')
    takes_list = condition.op in ("in", "not in")
    if isinstance(condition.value, list) != takes_list:
        expected = "a list" if takes_list else "one value"
        raise ConfigError(f"data.filters: {describe(condition)}: {condition.op} takes {expected}")


def _holds(condition: Filter, value: Any) -> bool:
    """Compare as Python does, within one type; null equals no value and has no order. Raises TypeError otherwise."""
    wanted: Any = condition.value
    candidates = wanted if isinstance(wanted, list) else [wanted]
    ordered = condition.op in ORDERS
    same_kind = value is None and not ordered or any(kind_of(value) == kind_of(c) for c in candidates)
    if not same_kind and candidates:
        kinds = " or ".join(sorted({kind_of(candidate) for candidate in candidates}))
        raise TypeError(f'"{condition.column}" is {kind_of(value)}; {describe(condition)} compares it with {kinds}')
    if ordered:
        return bool(ORDERS[condition.op](value, wanted))
    return (value in candidates) == (condition.op in ("==", "in"))
