"""Read rows from JSON lines, parquet, hub data sets, Python or the built-in demo; each row knows its place.

The content of a row is checked later. An unreadable line becomes a `RowProblem`, not an exception, so that all problems
of a file can be counted and shown together.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lowlevel.config.given import GIVEN, GivenRows
from lowlevel.demo import world
from lowlevel.errors import ConfigError, DataError, one_line, quoted

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Suffixes that never end a hub name.
OTHER_SUFFIXES = (".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".xz")
DEMO_ROWS = {"train": 2400, "heldout": 240}
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
    format: str | None = None


@dataclass(frozen=True)
class RowProblem:
    """Why a row cannot be used. The report counts problems by `reason`; `message` is for the user."""

    where: str
    reason: str
    message: str


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

    @property
    def read(self) -> int:
        """Number of rows in the source, unreadable, dropped and left ones included."""
        return len(self.rows) + len(self.problems) + self.dropped.total() + self.left


def data_error(problems: Sequence[RowProblem]) -> DataError:
    """An error with one line for each of the first five problems, then the number of the others."""
    lines = [f"{problem.where}: {problem.message}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more; --on-bad-row skip continues without them")
    return DataError("\n".join(lines))


def read_source(source: str | GivenRows, split: str, data_format: str = "messages") -> SourceRows:
    """Read all rows of "demo", a .jsonl, .jsonl.gz or .parquet file, a hub data set, or rows given in Python.

    Files and given rows have no splits. The demo has conversations for format "messages", and preference pairs.
    Raises ConfigError for an unknown file, data set or split, or missing given rows; DataError if there are no rows.
    """
    if isinstance(source, GivenRows):
        return _read_given(source)
    if source == GIVEN:
        raise ConfigError("the rows of this run were given in Python: open it with lowlevel.Run(DIR, data=rows)")
    path = Path(source)
    if not source.strip() or "\0" in source:
        raise ConfigError(f"data source {source!r} is not a name: use {', '.join(FILE_SUFFIXES)} or a hub name")
    if source == "demo":
        read = _read_demo(split, data_format)
    elif source.endswith(FILE_SUFFIXES):
        read = _read_file(path)
    elif (other := path.is_file() or source.endswith(OTHER_SUFFIXES)) or source[0] in "./" and not path.is_dir():
        state = "unknown kind of file" if other else "no such file"
        raise ConfigError(f"data source {source}: {state}; use {', '.join(FILE_SUFFIXES)} or a hub name")
    else:
        read = _read_hub(source, split)
    if not read.rows and not read.problems:
        raise DataError(f"{read.name} has no rows")
    return read


def _read_file(path: Path) -> SourceRows:
    try:
        if not path.is_file():
            state = "is a folder; name a file in it" if path.is_dir() else "no such file"
            raise ConfigError(f"data source {quoted(str(path))}: {state}")
        return _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    except OSError as error:  # pyarrow raises it too, for damaged pages
        raise DataError(f"{quoted(path.name)}: cannot be read: {error.strerror or one_line(error)}") from None


def _read_jsonl(path: Path) -> SourceRows:
    """Read JSON lines with line numbers and reasons for problems, which `datasets` does not give."""
    read = SourceRows(path.name, [])
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        for number, line in _lines(stream, read):
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
                read.warnings["byte order mark"] += 1
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                read.rows.append(Row(len(read.rows), where, parse_line(line)))
            except DataError as error:
                read.problems.append(RowProblem(where, "not valid JSON", str(error)))
    return read


def _lines(stream: Iterable[bytes], read: SourceRows) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"the compressed data is damaged or cut ({error})"
        read.problems.append(RowProblem(f"{read.name}:{number + 1}", "damaged file", problem))


def parse_line(line: bytes) -> dict[str, object]:
    """Parse one JSON object. The DataError names the column (from 1, in characters) where the line becomes invalid."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not valid UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})") from None
    text = text.rstrip("\r\n")
    try:
        value = json.loads(text, object_pairs_hook=_object_without_duplicates, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        cut = not line.endswith(b"\n") or error.pos >= len(text) or error.msg.startswith("Unterminated")
        problem = f"cut at column {len(text)}?" if cut else f"{error.msg} at column {error.colno}"
        raise DataError(f"not valid JSON ({problem})") from None
    except RecursionError:
        raise DataError("not valid JSON (nested too deeply)") from None
    except ValueError as error:
        too_large = str(error).startswith("Exceeds the limit")  # Python's, on digits of an integer
        problem = "a number of more than 4,300 digits" if too_large else one_line(error)
        raise DataError(f"not valid JSON ({problem})") from None
    if not isinstance(value, dict):
        raise DataError(f"is {kind_of(value)}, expected an object with the columns of a row")
    if "\\ud" in text or "\\uD" in text:
        _reject_lone_surrogates(value)
    return value


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {quoted(json.dumps(twice))}")
    return result


def _reject_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


def _reject_lone_surrogates(value: object) -> None:
    """JSON can escape half a surrogate pair. It is not text: it cannot be printed, hashed or tokenised."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("holds half a surrogate pair (\\ud800 to \\udfff), which is not text") from None


def _read_parquet(path: Path) -> SourceRows:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(path, page_checksum_verification=True).to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError, RecursionError, OverflowError) as error:
        reason = one_line(error).replace(str(path), path.name)
        raise DataError(f"{path.name}: not a readable parquet file: {quoted(reason)}") from None
    return _numbered(path.name, columns, first=1)


def _read_hub(name: str, split: str) -> SourceRows:
    import datasets

    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets, fsspec, huggingface_hub and httpx raise many types
        reason = one_line(error.__cause__ or error)  # the cause: datasets often says only that an error occurred
        hint = f"; this is a folder: name a file in it ({', '.join(FILE_SUFFIXES)})" if Path(name).is_dir() else ""
        raise ConfigError(f'data source "{name}", split "{split}": {reason}{hint}') from None
    return _numbered(f"{name}[{split}]", map(dict, table))


def _numbered(name: str, rows: Iterable[Mapping[str, object]], first: int = 0) -> SourceRows:
    return SourceRows(name, [Row(i, f"{name}:{i + first}", row) for i, row in enumerate(rows)])


def _read_demo(split: str, data_format: str) -> SourceRows:
    if split not in DEMO_ROWS:
        raise ConfigError(f'data source "demo" has the splits {", ".join(DEMO_ROWS)}, not "{split}"')
    make = world.sft_rows if data_format == "messages" else world.preference_rows
    return _numbered(f"demo[{split}]", make(split, DEMO_ROWS[split], 0))


def _read_given(given: GivenRows) -> SourceRows:
    read = SourceRows(GIVEN, [])
    for i, row in enumerate(given.rows):
        try:
            columns = {name: _json_value(name, value) for name, value in row.items()}
            _reject_lone_surrogates(columns)
            read.rows.append(Row(i, f"data:{i + 1}", columns))
        except DataError as error:
            read.problems.append(RowProblem(f"data:{i + 1}", "wrong type", str(error)))
    return read


def _json_value(column: str, value: object) -> object:
    """The value as JSON has it: numpy scalars and arrays become Python values. Raises DataError for other types."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        return str.__str__(value)  # the plain text of a subclass, such as an enum
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_json_value(column, item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _json_value(column, item) for key, item in value.items()}
    kind = type(value).__name__ + (" with keys that are not text" if isinstance(value, Mapping) else "")
    raise DataError(f'column "{quoted(column)}" is a {kind}, expected text, number, list or object')


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """Rows in the order of `datasets.Dataset.shuffle(seed)`, which uses numpy's default generator."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def kind_of(value: object) -> str:
    """Name of a JSON value's type for messages."""
    return next((name for kind, name in KINDS if isinstance(value, kind)), type(value).__name__)
