"""The columns of a data source, from its first rows: what the source is for, before all of it is read."""

from __future__ import annotations

import gzip
from itertools import islice
from pathlib import Path

from lowlevel.config.given import GivenRows
from lowlevel.data.json_lines import parse_line
from lowlevel.data.sources import read_source
from lowlevel.errors import LowlevelError

FIRST_ROWS = 20


def column_names(source: str | GivenRows, split: str) -> set[str]:
    """Names of the columns of the first rows; none for the demo, and for what cannot be read: reading it says why."""
    if source == "demo":
        return set()
    try:
        if isinstance(source, str) and source.endswith((".jsonl", ".jsonl.gz")) and (names := _of_lines(Path(source))):
            return names
        return {name for row in read_source(source, split).rows[:FIRST_ROWS] for name in row.columns}
    except LowlevelError:
        return set()


def _of_lines(path: Path) -> set[str]:
    """Of a large file only the first lines are read; none if they are not JSON lines."""
    names: set[str] = set()
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for line in islice(stream, FIRST_ROWS):
                row = parse_line(line.removeprefix(b"\xef\xbb\xbf")) if line.strip() else {}
                names |= row.keys() if isinstance(row, dict) else set()
    except (OSError, EOFError, LowlevelError):
        return set()
    return names
