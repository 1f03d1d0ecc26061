"""JSON as people write it: one object a line, or one array; invalid text gets its cause and its mend."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from lowlevel.data import mends
from lowlevel.errors import DataError, one_line, quoted


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
        cause, mend = mends.line_mend(text, error.pos)
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
        return mends.is_json(start[0]) and error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def whole_file(name: str, lines: Sequence[tuple[int, bytes]]) -> Iterator[tuple[str, object]]:
    """The rows of a file that is one JSON array (or one object), with their places. Raises DataError."""
    try:
        value = _value(_text(b"".join(line for _, line in lines)))
    except LineError as bad:
        raise DataError(f"{name}: {mends.said(str(bad), bad.mend, name)}") from None
    except json.JSONDecodeError as error:
        cause, mend = mends.line_mend(error.doc, error.pos)
        place = f"{name}:{lines[min(error.lineno, len(lines)) - 1][0]}"
        if error.msg == "Extra data" and error.doc.lstrip()[0] == "{":
            cause, mend, place = "an object goes over several lines", mends.OBJECT_A_LINE, f"{name}:{lines[0][0]}"
        elif error.doc.rstrip()[-1] not in "]}":
            cause, mend = "the JSON is cut here", ""
        cause = cause or f"not valid JSON ({error.msg} at column {error.colno})"
        raise DataError(f"{place}: {mends.said(cause, mend, name)}") from None
    for i, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"{name}:row {i}", item


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
        raise LineError(problem, mends.encoding_mend(line, error)) from None


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
