"""The training rows of one or several sources, filtered, in the order from which holdout and limit take.

Sources without weights follow one another. With weights, the rows are interleaved until a source has no row left: none
is repeated, and after any number of rows each source is less than one row away from its share.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import inf, lcm
from pathlib import Path
from typing import Any

from lowlevel.config.data import DataConfig, Filter
from lowlevel.config.given import GivenRows
from lowlevel.data.formats import halves, listed, recognised
from lowlevel.data.rows import Part, Row, RowProblem, SourceRows, data_error, kind_of, shuffled
from lowlevel.data.sources import read_source
from lowlevel.errors import ConfigError, DataError


def training_rows(data: DataConfig, method: str) -> SourceRows:
    """Read, filter, shuffle and mix the rows to train on, before holdout and limit.

    Raises ConfigError for an unknown source or column, or a row in two sources; DataError for a source without rows.
    """
    kept = [
        filtered(part, [*data.filters, *source.filters])
        for source, part in zip(data.parts, read_parts(data, method), strict=True)
    ]
    if not data.sources:
        return _ordered(kept[0], data)
    _refuse_repeated(kept, data)
    mix = SourceRows(
        name=", ".join(part.name for part in kept),
        rows=[row for part in kept for row in part.rows],
        problems=[problem for part in kept for problem in part.problems],
        warnings=sum((part.warnings for part in kept), Counter()),
        dropped=sum((part.dropped for part in kept), Counter()),
        parts=tuple(Part(part.name, part.read) for part in kept),
        read_as="; ".join(f"{part.read_as} ({part.name})" for part in kept if part.read_as),
    )
    weights = [source.weight for source in data.sources if source.weight]
    return (
        _weighted(mix, [_ordered(part, data).rows for part in kept], weights, data) if weights else _ordered(mix, data)
    )


def read_parts(data: DataConfig, method: str) -> list[SourceRows]:
    """All rows of each source, with their format.

    Ids count through the sources; files of one name are told apart by their folder.
    """
    read = [_read(source.source, source.split, source.format or data.format, data, method) for source in data.parts]
    if not data.sources:
        return read
    parts: list[SourceRows] = []
    known = Counter(part.name for part in read)
    for i, (source, part) in enumerate(zip(data.sources, read, strict=True)):
        path, first = Path(str(source.source)), sum(len(earlier.rows) for earlier in parts)
        name = f"{path.resolve().parent.name}/{part.name}" if path.is_file() and known[part.name] > 1 else part.name
        rows = [
            replace(row, id=first + row.id, where=name + row.where[len(part.name) :], source=i) for row in part.rows
        ]
        problems = [replace(problem, where=name + problem.where[len(part.name) :]) for problem in part.problems]
        parts.append(replace(part, name=name, rows=rows, problems=problems))
    return parts


def evaluation_rows(source: str | GivenRows, split: str, data: DataConfig, method: str) -> SourceRows:
    """The rows of data.eval_source that pass data.filters. Raises ConfigError and DataError as `training_rows`."""
    return filtered(_read(source, split, data.format, data, method), data.filters)


def _read(source: str | GivenRows, split: str, name: str, data: DataConfig, method: str) -> SourceRows:
    read = recognised(read_source(source, split, method), name, method, data.numbers)
    return halves(read) if method == "kto" else read


def filtered(source: SourceRows, filters: Sequence[Filter]) -> SourceRows:
    """Apply filters to a source. Raises ConfigError or DataError if no row is left."""
    if not source.rows:
        raise data_error(source.problems)
    kept = apply_filters(source, filters)
    if not kept.rows and not kept.problems:
        drops = "; ".join(f"{condition} drops {count}" for condition, count in kept.dropped.items())
        raise DataError(f"{kept.name}: no usable rows: {kept.read} of {kept.read} filtered out ({drops})")
    return kept


def _ordered(source: SourceRows, data: DataConfig) -> SourceRows:
    return source if data.shuffle_seed is None else replace(source, rows=shuffled(source.rows, data.shuffle_seed))


def _refuse_repeated(parts: Sequence[SourceRows], data: DataConfig) -> None:
    """One file may be several sources whose filters keep different rows."""
    first: dict[tuple[str, str], int] = {}
    for i, (source, part) in enumerate(zip(data.sources, parts, strict=True)):
        path = Path(str(source.source))
        name = str(path.resolve()) if path.is_file() else part.name
        for row in part.rows:
            other = first.setdefault((name, row.where[len(part.name) :]), i)
            if other != i:
                both = f"sources {other + 1} and {i + 1} of data.sources"
                raise ConfigError(f"{row.where} is in {both}: a row is trained on once; filter one of them")


def _weighted(mix: SourceRows, rows: Sequence[list[Row]], weights: Sequence[float], data: DataConfig) -> SourceRows:
    """Take the rows in the order of `interleaved`, and count those that are left over if more were wanted."""
    order, empty = interleaved(weights, [len(part) for part in rows])
    iterators = [iter(part) for part in rows]
    taken = [next(iterators[i]) for i in order]
    left = len(mix.rows) - len(taken)
    wanted = inf if data.limit is None else data.limit + (data.eval_limit or 0) * (data.eval_source == "holdout")
    warnings = mix.warnings
    if left and wanted > len(taken):
        limit = f", before data.limit {data.limit:,}" if data.limit else ""
        warnings = warnings + Counter({f"rows left over when {mix.parts[empty].name} ends{limit}": left})
    total = sum(weights)
    parts = tuple(replace(part, share=weight / total) for part, weight in zip(mix.parts, weights, strict=True))
    return replace(mix, rows=taken, warnings=warnings, parts=parts, left=left)


def interleaved(weights: Sequence[float], counts: Sequence[int]) -> tuple[list[int], int]:
    """The source of each row until the next row would come from an empty source, and that source.

    Row j of a source with share w is due after (j + 1) / w rows of the mix and not taken before j / w of them. Of the
    rows that may be taken, the one that is due first is next: earliest deadline first, which keeps every deadline
    because the shares sum to 1 (Liu and Layland 1973; Baruah et al. 1996, "Proportionate progress").
    """
    exact = [Fraction(repr(weight)) for weight in weights]  # 0.7 is 7/10
    scale = lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * scale) for weight in exact]
    period, order, taken = sum(shares), list[int](), [0] * len(shares)
    while True:
        place = len(order)
        if place >= period:  # all shares are met exactly: the order repeats
            source = order[place - period]
        else:
            ready = [i for i, share in enumerate(shares) if taken[i] * period < (place + 1) * share]
            source = min(ready, key=lambda i: -(-(taken[i] + 1) * period // shares[i]))
        if taken[source] == counts[source]:
            return order, source
        order.append(source)
        taken[source] += 1


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
