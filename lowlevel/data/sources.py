"""Read rows from JSON lines, parquet, hub data sets, Python or the built-in demo; each row knows its place.

The content of a row is checked later. An unreadable line becomes a `RowProblem`, not an exception, so that all problems
of a file can be counted and shown together.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from lowlevel.config.given import GIVEN, GivenRows
from lowlevel.config.schema import ONLINE
from lowlevel.data.mends import (
    ANY_TEXT,
    BOM,
    OTHER_SUFFIXES,
    LineError,
    address_refusal,
    is_json,
    parse_line,
    refusal,
    said,
    spans_lines,
    table_refusal,
    text_refusal,
    whole_file,
)
from lowlevel.data.rows import Row, RowProblem, SourceRows, kind_of
from lowlevel.demo import world
from lowlevel.errors import ConfigError, DataError, LowlevelError, one_line, quoted
from lowlevel.hub import offline_without_network

FILE_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet")
ABOUT = ("dataset_infos.json", "dataset_info.json")  # files about a data set, not of its rows
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
FIRST_ROWS = 20  # that say which columns a source has
MOST_FILES = 10_000  # in a folder with data; datasets needs minutes to look through 200,000


def read_source(source: str | GivenRows, split: str, method: str = "sft") -> SourceRows:
    """Read all rows of "demo", a file of JSON lines, a JSON array or parquet, a hub data set, or rows given in Python.

    Files and given rows have no splits. The demo has conversations for sft, and preference pairs.
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
        if split not in world.SPLITS:
            raise ConfigError(f'data source "demo" has the splits {", ".join(world.SPLITS)}, not "{split}"')
        kind = "sft" if method == "sft" else "prompt" if method in ONLINE else "preference"
        read = _numbered(f"demo[{split}]", world.rows(f"{kind}-{split}"))
    elif mend := address_refusal(source):
        raise ConfigError(f"data source {quoted(source)} is a web address: {mend}")
    elif source.endswith(FILE_SUFFIXES) or path.is_file():
        read = _read_file(path)
    elif source.endswith(OTHER_SUFFIXES) or not path.is_dir() and not HUB_NAME.fullmatch(source):
        raise ConfigError(f"data source {source}: no such file; use {', '.join(FILE_SUFFIXES)} or a hub name")
    else:
        read = _read_hub(source, split)
    if not read.rows and not read.problems:
        raise DataError(f"{read.name} has no rows")
    return read


def column_names(source: str | GivenRows, split: str) -> set[str]:
    """Names of the columns of the first rows; none for the demo, and for what cannot be read: reading it says why."""
    if source == "demo":
        return set()
    try:
        names = _first_names(Path(str(source))) if str(source).endswith((".jsonl", ".jsonl.gz")) else set()
        return names or {name for row in read_source(source, split).rows[:FIRST_ROWS] for name in row.columns}
    except LowlevelError:
        return set()


def _first_names(path: Path) -> set[str]:
    """Columns of the first lines: a large file is not read whole. None if they are not JSON lines."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            lines = [line.removeprefix(BOM) for line in islice(stream, FIRST_ROWS) if line.strip()]
        return {name for row in map(parse_line, lines) if isinstance(row, dict) for name in row}
    except (OSError, EOFError, LowlevelError):
        return set()


def _read_file(path: Path) -> SourceRows:
    """What a file is, its content says; the suffix counts where the content has no mark."""
    try:
        if not path.is_file():
            state = "is a folder; name a file in it" if path.is_dir() else "no such file"
            raise ConfigError(f"data source {quoted(str(path))}: {state}")
        with path.open("rb") as stream:
            head = stream.read(512)
        if wrong := refusal(head, path.name):
            raise DataError(f"{quoted(path.name)}: {wrong}")
        as_named = not is_json(head)
        if head.startswith(b"PAR1") or as_named and path.suffix == ".parquet":
            return _read_parquet(path)
        return _read_text(path, head.startswith(b"\x1f\x8b") or as_named and path.suffix == ".gz")
    except OSError as error:  # pyarrow raises it too, for damaged pages
        raise DataError(f"{quoted(path.name)}: cannot be read: {error.strerror or one_line(error)}") from None


def _read_text(path: Path, compressed: bool) -> SourceRows:
    """Read JSON lines with line numbers and reasons for problems, which `datasets` does not give; or one JSON array."""
    read = SourceRows(path.name, [])
    with gzip.open(path, "rb") if compressed else path.open("rb") as stream:
        lines = _lines(stream, read)
        start = list(islice(lines, 2))
        if start and (wrong := refusal(start[0][1], path.name)):
            raise DataError(f"{quoted(path.name)}: {wrong}")
        if spans_lines([line for _, line in start]):
            _add_rows(read, whole_file(read.name, [*start, *lines]))
        else:
            _add_rows(read, ((f"{read.name}:{number}", line) for number, line in chain(start, lines)))
    wrong = None
    if start and read.problems and not read.rows:
        wrong = None if any(p.mend for p in read.problems) else text_refusal(start[0][1], path)
        read.problems.sort(key=lambda problem: not problem.mend)  # the first known cause is that of the file
        mend = read.problems[0].mend or (f"; {ANY_TEXT}" if len(read.problems) > 1 else "")
        read.problems[:] = [replace(problem, mend=mend) for problem in read.problems]
    elif len(read.rows) == 1 and not read.problems:
        wrong = table_refusal(read.rows[0].columns, path.name)
    if wrong:
        raise DataError(f"{quoted(path.name)}: {wrong}")
    return read


def _lines(stream: Iterable[bytes], read: SourceRows) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            if number == 1 and line.startswith(BOM):
                line = line[len(BOM) :]
                read.warnings["byte order mark"] += 1
            if line.strip():
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"the compressed data is damaged or cut ({error})"
        read.problems.append(RowProblem(f"{read.name}:{number + 1}", "damaged file", problem))


def _add_rows(read: SourceRows, items: Iterable[tuple[str, object]]) -> None:
    """Add each item, the bytes of a line or a parsed value, as a row or a problem."""
    for where, item in items:
        try:
            columns = _columns(parse_line(item) if isinstance(item, bytes) else item)
            if not isinstance(item, bytes) or b"\\ud" in item or b"\\uD" in item:
                _reject_lone_surrogates(columns)
            read.rows.append(Row(len(read.rows), where, columns))
        except LineError as bad:
            read.problems.append(RowProblem(where, "not valid JSON", str(bad), said("", bad.mend, read.name)))


def _columns(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        messages = isinstance(value, list) and value and isinstance(value[0], dict)
        mend = 'name the column: {"messages": [...]}' if messages else ""
        if isinstance(value, str) and value.startswith("{"):
            mend = "it was encoded twice: json.dumps each row once"
        raise LineError(f"is {kind_of(value)}, expected an object with the columns of a row", mend)
    return value


def _reject_lone_surrogates(value: object) -> None:
    """JSON can escape half a surrogate pair. It is not text: it cannot be printed, hashed or tokenised."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise LineError("holds half a surrogate pair (\\ud800 to \\udfff), which is not text") from None


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
    import datasets  # and pandas with it: as long to import as half of torch

    datasets.disable_progress_bars()
    try:
        saved = Path(name, split) if Path(name, "dataset_dict.json").is_file() else Path(name)  # by save_to_disk
        on_disk = (saved / "state.json").is_file()
        if not Path(name).is_dir():
            offline_without_network()
        elif not on_disk:
            _check_folder(Path(name))
        table = datasets.load_from_disk(str(saved)) if on_disk else datasets.load_dataset(name, split=split)
    except ConfigError:
        raise
    except Exception as error:  # datasets, fsspec, huggingface_hub and httpx raise many types
        reason = one_line(error.__cause__ or error)  # the cause: datasets often says only that an error occurred
        kinds = f"; this is a folder: name a file in it ({', '.join(FILE_SUFFIXES)})"
        hint = kinds if Path(name).is_dir() else "; nor is there a file or folder of this name"
        raise ConfigError(f'data source "{name}", split "{split}": {reason}{hint}') from None
    return _numbered(f"{name}[{split}]", map(dict, table))


def _check_folder(folder: Path) -> None:
    """Refuse a folder of many files, and one whose files belong to no split. A README.md can say which are meant.

    datasets 5.2 looks at all files, takes those with "train" in their names and leaves the others.
    """
    import datasets

    paths = list(islice(folder.rglob("*"), MOST_FILES + 1))
    files = sorted(path for path in paths if path.name.endswith(FILE_SUFFIXES) and path.name not in ABOUT)
    if len(paths) > MOST_FILES:
        kinds, some = ", ".join(FILE_SUFFIXES), f", such as {quoted(str(files[0]))}" if files else ""
        raise ConfigError(f'data source "{folder}": more than {MOST_FILES:,} files; name one with rows ({kinds}){some}')
    if (folder / "README.md").is_file():
        return
    splits = datasets.load_dataset_builder(str(folder)).config.data_files or {}
    read = {Path(file).resolve() for files in splits.values() for file in files}
    if left := [str(path.relative_to(folder)) for path in files if path.resolve() not in read]:
        some = f"{quoted(left[0])}{f' and {len(left) - 1:,} more' if len(left) > 1 else ''}"
        hint = "name one file, or list the files as data.sources"
        raise ConfigError(f'data source "{folder}": {len(left):,} of its files belong to no split ({some}); {hint}')


def _numbered(name: str, rows: Iterable[Mapping[str, object]], first: int = 0) -> SourceRows:
    return SourceRows(name, [Row(i, f"{name}:{i + first}", row) for i, row in enumerate(rows)])


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
