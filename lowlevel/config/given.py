"""Rows that a Python program passes to a run, instead of the name of a file or hub data set.

The saved configuration cannot hold them: it says "rows given in Python", and opening the run needs the rows again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

from lowlevel.config.section import expanded
from lowlevel.errors import ConfigError

GIVEN = "rows given in Python"
ROWS_OF = {  # by package and type: tables that are no lists of rows
    ("pandas", "DataFrame"): 'data.to_dict("records")',
    ("polars", "DataFrame"): "data.to_dicts()",
    ("pyarrow", "Table"): "data.to_pylist()",
    ("datasets", "DatasetDict"): 'data["train"]',
    ("datasets", "IterableDatasetDict"): 'data["train"]',
}


@dataclass(frozen=True, eq=False)
class GivenRows:
    """Rows in memory. Two objects are equal only if they are the same object; make them with `GivenRows.of`."""

    rows: Sequence[Mapping[str, object]] = field(repr=False)

    def __str__(self) -> str:
        return GIVEN

    @classmethod
    def of(cls, data: object) -> GivenRows:
        """Rows of a list or other iterable of dicts, a `datasets.Dataset`, or a `torch.utils.data.Dataset`.

        A map-style torch dataset is read through `__len__` and `__getitem__`; everything else is iterated once.
        Raises ConfigError for another type, an item that is not a mapping with text keys, or no rows.
        """
        if isinstance(data, GivenRows):
            return data
        kind = (type(data).__module__.partition(".")[0], type(data).__name__)
        if kind in ROWS_OF:
            raise ConfigError(f"data: got a {kind[1]} of {kind[0]}, expected its rows: {ROWS_OF[kind]}")
        if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable | Sized):
            expected = "expected a list of dicts, a datasets.Dataset or a torch Dataset"
            raise ConfigError(f"data: got {type(data).__name__}, {expected}")
        indexed = cast(Any, data)
        items = data if isinstance(data, Iterable) else (indexed[i] for i in range(len(data)))
        rows = tuple(_row(number, item) for number, item in enumerate(items, 1))
        if not rows:
            raise ConfigError(f"data: the {type(data).__name__} has no rows")
        return cls(rows)


def rows_of(data: object) -> GivenRows | None:
    """Rows given in Python; None for None."""
    return None if data is None else GivenRows.of(data)


def source_of(data: object) -> str | GivenRows | None:
    """The name of a file or hub data set, or rows."""
    return str(data) if isinstance(data, str | Path) else rows_of(data)


def _row(number: int, item: object) -> Mapping[str, object]:
    if not isinstance(item, Mapping):
        hint = "" if isinstance(item, str) else " (pydantic: row.model_dump(); a dataclass: dataclasses.asdict(row))"
        expected = f"expected a dict with the columns of a row{hint}"
        raise ConfigError(f"data: row {number} is a {type(item).__name__}, {expected}")
    other = next((key for key in item if not isinstance(key, str)), None)
    if other is not None:
        raise ConfigError(f"data: row {number} has the key {other!r} ({type(other).__name__}), expected text keys")
    return item


def _validated(value: object) -> str | GivenRows:
    value = expanded(value)
    if not isinstance(value, str | GivenRows):
        raise PydanticCustomError("string_type", "Input should be a valid string")
    return value


Source = Annotated[str | GivenRows, PlainValidator(_validated), PlainSerializer(str, when_used="json")]
