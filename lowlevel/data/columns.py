"""The columns of a data source, from its first rows: what the source is for, before it is read whole."""

from __future__ import annotations

import gzip
from itertools import islice
from pathlib import Path

from lowlevel.config.given import GivenRows
from lowlevel.data.sources import parse_line
from lowlevel.errors import DataError

FIRST_ROWS = 20


def column_names(source: str | GivenRows, split: str) -> set[str]:
    """Names of the columns of the first rows; none for the demo, and for what cannot be read: reading it says why."""
    if isinstance(source, GivenRows):
        return {name for row in source.rows[:FIRST_ROWS] for name in row}
    try:
        if source == "demo":
            return set()
        if source.endswith((".jsonl", ".jsonl.gz")):
            return _of_lines(Path(source))
        if source.endswith(".parquet"):
            import pyarrow.parquet

            return set(pyarrow.parquet.read_schema(source).names)
        import datasets

        return set(datasets.load_dataset(source, split=split).column_names)
    except Exception:  # as in sources.py, of many types
        return set()


def _of_lines(path: Path) -> set[str]:
    names: set[str] = set()
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        for line in islice(stream, FIRST_ROWS):
            try:
                names |= parse_line(line.removeprefix(b"\xef\xbb\xbf")).keys() if line.strip() else set()
            except DataError:
                continue
    return names
