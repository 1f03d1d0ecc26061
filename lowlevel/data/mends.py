"""Files as people have them: what is wrong with a file or line that cannot be read, and how to mend it.

What a file is, its first bytes say; its name only counts for kinds that have no mark.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowlevel.errors import DataError, one_line, quoted

BOM = b"\xef\xbb\xbf"
# Suffixes that never end a hub name.
OTHER_SUFFIXES = (
    *(".csv", ".tsv", ".txt", ".ndjson", ".arrow"),
    *(".gz", ".tgz", ".tar", ".zip", ".zst", ".xz", ".bz2"),
)
# First bytes of a file or of its first line; what it is; the mend.
FIRST_BYTES = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "is UTF-32", "save it as UTF-8: iconv -f UTF-32 -t UTF-8 {name} > utf8-{name}"),
    (
        rb"\xff\xfe|\xfe\xff|[\[{\s]\0|\0[\[{\s]",
        "is UTF-16 (as PowerShell's > writes)",
        "save it as UTF-8: iconv -f UTF-16 -t UTF-8 {name} > utf8-{name}",
    ),
    (rb"\x28\xb5\x2f\xfd", "is compressed with zstd", "unpack it: zstd -d {name}"),
    (rb"\xfd7zXZ", "is compressed with xz", "unpack it: xz -d {name}"),
    (rb"BZh\d", "is compressed with bzip2", "unpack it: bunzip2 {name}"),
    (rb"PK\x03\x04", "is a zip archive or a spreadsheet", "unpack it, or export JSON lines, and name that file"),
    (rb"(?s).{257}ustar", "is a tar archive", "unpack it and name a file in it: tar -xf {name}"),
    (
        rb"ARROW1|\xff\xff\xff\xff..\0\0",
        "is an Arrow file",
        'write JSON lines: datasets.Dataset.from_file("{name}").to_json("rows.jsonl")',
    ),
    (rb"\x80[\x02-\x05]", "is a pickle, which is never opened", "write one JSON object a line to a .jsonl file"),
    (
        rb"version https://git-lfs",
        "is a Git LFS pointer, not the data",
        "fetch the data: git lfs pull (or hf download --repo-type dataset NAME)",
    ),
    (
        rb"\s*<[!?a-zA-Z]",
        "is a web page or XML, not data",
        "download the raw file (on the hub the address has /resolve/, not /blob/)",
    ),
)
PANDAS = "write JSON lines: pandas.read_csv('{name}'SEP).to_json('{stem}.jsonl', orient='records', lines=True)"
TEXT_KINDS = {
    ".csv": ("is CSV", PANDAS.replace("SEP", "")),
    ".tsv": ("is a table with tabs", PANDAS.replace("SEP", ", sep='\\t'")),
    ".txt": ("is plain text", 'write one JSON object a line, such as {"prompt": "...", "completion": "..."}'),
}
ANY_TEXT = "write one JSON object a line"
OBJECT_A_LINE = "write one object a line, for example with jq -c . {name} > lines-{name}"
# What stands at the place where a line becomes invalid; what it is; the mend.
AT_ERROR = (
    (r"\s*\0", "holds NUL bytes, as after an interrupted copy", "copy or download {name} again"),
    (r"\s*(True|False|None)\b", "is Python's notation, not JSON", 'write json.dumps(row) + "\\n" for each row'),
    (r"\s*'", "has single quotes: Python's notation, not JSON", 'write json.dumps(row) + "\\n" for each row'),
    (
        r"(?<=[{,])\s*[A-Za-z_$][\w$]*\s*:",
        "has keys without quotes (JSON5), not JSON",
        "write plain JSON, one object a line",
    ),
    (r"\s*(//|#|/\*)", "holds a comment, which JSON has not", "remove the comments"),
    (r"(?<=[}\]]),?\s*\{", "holds several objects", OBJECT_A_LINE),
    (r"(?<=[}\]]),\s*$", "ends with a comma", "write one object a line without commas between them"),
    (r"(?<=,)\s*[}\]]|,\s*[}\]]", "has a comma before the closing bracket", "remove it: JSON has no trailing commas"),
)


def refusal(head: bytes, name: str) -> str | None:
    """Why a file with these first bytes (or first line) is not JSON lines, and the mend; None if it may be."""
    return next((said(cause, mend, name) for start, cause, mend in FIRST_BYTES if re.match(start, head)), None)


def text_refusal(first: bytes, path: Path) -> str | None:
    """Why a text file without valid JSON in any line is not JSON lines; None if it has the brackets of JSON."""
    if b"{" in first or b"[" in first:
        return None
    by_content = ".tsv" if b"\t" in first else ".csv" if b"," in first else ".txt"
    kind = path.suffix if path.suffix in TEXT_KINDS else by_content
    return said(*TEXT_KINDS[kind], path.name)


def is_json(head: bytes) -> bool:
    """Whether the bytes begin as a JSON object or array."""
    return head.removeprefix(BOM).lstrip()[:1] in (b"{", b"[")


def address_refusal(source: str) -> str | None:
    """The mend for a source that is a web address."""
    if not re.match(r"[a-z][a-z0-9+]*://", source):
        return None
    found = re.match(r"(?:hf://|https://(?:www\.)?(?:huggingface\.co|hf\.co)/)datasets/([^/]+/[^/@?#]+)/?$", source)
    return f'use the hub name "{found[1]}"' if found else "download the file and name it here"


def line_mend(text: str, place: int) -> tuple[str, str]:
    """What is wrong with text that is not JSON from a place on, and the mend; empty texts if the cause is not known."""
    place = len(text[:place].rstrip())
    found = ((cause, mend) for pattern, cause, mend in AT_ERROR if re.compile(pattern).match(text, place))
    return next(found, ("", ""))


def table_refusal(row: Mapping[str, Any], name: str) -> str | None:
    """Why the only row of a file is no row: it holds all rows under one key, or the values of each column."""
    for key, items in row.items():
        if (len(row) == 1 or key in ("data", "rows", "train")) and isinstance(items, list) and items:
            if isinstance(items[0], dict) and not {"role", "from"} & items[0].keys():
                one_a_line = f"write them one a line: jq -c '.[{json.dumps(key)}][]' {{name}} > lines-{{name}}"
                return said(f'holds its rows in "{quoted(key)}"', one_a_line, name)
    columns = [v if isinstance(v, list) else list(v.values()) for v in row.values() if isinstance(v, list | dict)]
    if columns and len(columns) == len(row) and not any(isinstance(item, dict) for items in columns for item in items):
        return said("holds columns, not rows", PANDAS.replace("read_csv", "read_json").replace("SEP", ""), name)
    return None


def encoding_mend(line: bytes, error: UnicodeDecodeError) -> str:
    """The encoding that a line which is not UTF-8 may have; single high bytes between ASCII letters are western."""
    if error.reason == "unexpected end of data":
        return ""
    runs = re.findall(rb"[\x80-\xff]+", line)
    if sum(map(len, runs)) > 1.5 * len(runs):
        return "find its encoding and convert it: iconv -f ENCODING -t UTF-8 {name} > utf8-{name}"
    return "looks like CP1252: iconv -f CP1252 -t UTF-8 {name} > utf8-{name}"


def said(cause: str, mend: str, name: str) -> str:
    """A cause, and the mend (if there is one) for a file of this name."""
    return f"{cause}; {mend.replace('{name}', name).replace('{stem}', name.split('.')[0])}" if mend else cause


class LineError(DataError):
    """A line that is no row. `mend` is what to do with its file, if the cause is a known one."""

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message)
        self.mend = mend


def parse_line(line: bytes) -> object:
    """Parse one JSON value. LineError names the column (from 1, in characters) where the line becomes invalid."""
    text = _text(line).rstrip("\r\n")
    try:
        return _value(text)
    except json.JSONDecodeError as error:
        cause, mend = line_mend(text, error.pos)
        cut = not line.endswith(b"\n") or error.pos >= len(text) or error.msg.startswith("Unterminated")
        problem = f"cut at column {len(text)}?" if cut else f"{error.msg} at column {error.colno}"
        raise LineError(f"{cause} (column {error.colno})" if cause else f"not valid JSON ({problem})", mend) from None


def spans_lines(start: Sequence[bytes]) -> bool:
    """Whether the first two lines are those of one JSON value: an array, or an object that goes on in line 2."""
    if len(start) < 2 or start[1].lstrip()[:1] == start[0].lstrip()[:1] == b"{":
        return bool(start) and start[0].lstrip()[:1] == b"["
    try:
        json.loads(start[0])
    except json.JSONDecodeError as error:
        return is_json(start[0]) and error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def whole_file(name: str, lines: Sequence[tuple[int, bytes]]) -> Iterator[tuple[str, object]]:
    """The rows of a file that is one JSON array (or one object), with their places. Raises DataError."""
    try:
        value = _value(_text(b"".join(line for _, line in lines)))
    except LineError as bad:
        raise DataError(f"{name}: {said(str(bad), bad.mend, name)}") from None
    except json.JSONDecodeError as error:
        cause, mend = line_mend(error.doc, error.pos)
        place = f"{name}:{lines[min(error.lineno, len(lines)) - 1][0]}"
        if error.msg == "Extra data" and error.doc.lstrip()[0] == "{":
            cause, mend, place = "an object goes over several lines", OBJECT_A_LINE, f"{name}:{lines[0][0]}"
        elif error.doc.rstrip()[-1] not in "]}":
            cause, mend = "the JSON is cut here", ""
        cause = cause or f"not valid JSON ({error.msg} at column {error.colno})"
        raise DataError(f"{place}: {said(cause, mend, name)}") from None
    for i, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"{name}:row {i}", item


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
        raise LineError(problem, encoding_mend(line, error)) from None


def _value(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object_without_duplicates, parse_constant=_reject_constant)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise LineError("not valid JSON (nested too deeply)") from None
    except ValueError as error:
        too_large = str(error).startswith("Exceeds the limit")  # Python's, on digits of an integer
        problem = "a number of more than 4,300 digits" if too_large else one_line(error)
        raise LineError(f"not valid JSON ({problem})") from None


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {quoted(json.dumps(twice))}")
    return result


def _reject_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")
