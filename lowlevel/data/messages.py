"""Check the columns of a row and convert them to messages; an unusable row gives one line that says why."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

from lowlevel.data.sources import Row, SourceRows, kind_of
from lowlevel.errors import ConfigError, DataError, printable, quoted
from lowlevel.redaction import redact

ROLES = ("system", "user", "assistant", "tool")
# columns with which other trainers change the tokens or the loss; only format "orca" reads one of them, "system"
OF_OTHERS = (
    *("system", "system_prompt", "tools", "functions", "documents", "context", "history", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos", "weight"),
)
Columns = Mapping[str, object]
TextMessage = dict[str, str]
Completions = tuple[()] | tuple[str, str]
Read = tuple[list[TextMessage], Completions, set[str]]  # the set: keys of messages that are not used
PAIR_COLUMNS = {"preference": ("prompt", "chosen", "rejected"), "orca": ("system", "input", "chosen", "rejected")}


@dataclass(frozen=True)
class Normalised:
    """A row as messages. `completions` is () for a conversation, and (chosen, rejected) for a preference pair."""

    row: Row
    messages: list[TextMessage]
    completions: Completions
    values: tuple[float, ...]  # numbers in data.columns, in that order
    digest: str  # sha256 of the messages, and of the values if there are any
    prompt_digest: str  # sha256 of the messages before the first reply
    warnings: tuple[str, ...]  # kinds of peculiarities with which the row can still be used


class BadRow(Exception):  # noqa: N818 - always caught, never shown as an exception
    """A row that cannot be used: `reason` is the kind that the report counts, the message is one line for the user."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(redact(printable(message)))  # data_report.json keeps the message
        self.reason = reason


def check_columns(source: SourceRows, data_format: str, numbers: Sequence[str]) -> None:
    """Report a column that no row has once for the whole source.

    Raises DataError for a column of the format, ConfigError for one of `numbers`, the names in data.columns.
    """
    name, rows = source.name, source.rows
    found = sorted({column for row in rows for column in row.columns})
    absent = next((column for column in numbers if column not in found), None)
    if absent is not None:
        raise ConfigError(f'data.columns: {name} has no column "{quoted(absent)}"; found: {listed(found)}')
    if data_format == "messages":
        if "messages" not in found and not {"prompt", "completion"} <= set(found):
            raise DataError(f'{name}: SFT needs "messages" or "prompt"+"completion"; found: {listed(found)}')
        return
    needed = PAIR_COLUMNS[data_format]
    implied = {"prompt"} if any(isinstance(row.columns.get("chosen"), list) for row in rows) else set()
    missing = [column for column in needed if column not in found and column not in implied]
    if missing:
        detail = f"missing: {', '.join(missing)}; found: {listed(found)}"
        fitting = next((other for other, columns in PAIR_COLUMNS.items() if set(columns) <= set(found)), None)
        hint = f'; they fit data.format = "{fitting}"' if fitting else ""
        raise DataError(f"{name}: DPO needs {', '.join(needed)}; {detail}{hint}")


def listed(columns: Sequence[str], shown: int = 20) -> str:
    """Names of columns for a message: the first 20, and the number of the others."""
    more = f" and {len(columns) - shown:,} more" if len(columns) > shown else ""
    return ", ".join(quoted(column) for column in columns[:shown]) + more


def normalise(row: Row, data_format: str, columns: Sequence[str] = ()) -> Normalised:
    """Check a row's content, convert it to messages and read the numbers in `columns`. Raises BadRow."""
    read = _conversation if data_format == "messages" else _orca if data_format == "orca" else _preference
    messages, completions, ignored = read(row.columns)
    values = tuple(_number(row.columns, name) for name in columns)
    first_reply = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    prompt = messages if completions else messages[:first_reply]
    warnings = [f'message key "{quoted(redact(printable(key)))}" ignored' for key in sorted(ignored)]
    warnings += _ignored(row.columns, (*columns, "system") if data_format == "orca" else columns)
    spoken = [m["role"] for m in messages if m["role"] in ("user", "assistant")] + ["assistant"] * bool(completions)
    late_system = any(m["role"] == "system" for m in messages[1:])
    if late_system or any(a == b for a, b in zip(spoken, spoken[1:], strict=False)) or spoken[0] != "user":
        warnings.append("turns not alternating")
    if any(m["role"] == "user" and not m["content"].strip() for m in messages):
        warnings.append("empty user turn")
    identity = digest([messages, completions, *([values] if values else [])])
    return Normalised(row, messages, completions, values, identity, digest(prompt), tuple(warnings))


def _conversation(columns: Columns) -> Read:
    if "messages" in columns:
        messages, ignored = _messages(columns, "messages")
    else:
        prompt, completion = _text(columns, "prompt"), _text(columns, "completion")
        if not completion.strip():
            raise BadRow("empty completion", "empty completion")
        messages, ignored = [_message("user", prompt), _message("assistant", completion)], set()
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no assistant turn", "nothing to learn from (no assistant turn)")
    if messages[-1]["role"] != "assistant":
        raise BadRow("last turn not assistant", f'last turn is "{messages[-1]["role"]}", expected "assistant"')
    if messages[0]["role"] == "assistant":
        raise BadRow("no prompt", "first turn is an assistant reply without a prompt")
    return messages, (), ignored


def _orca(columns: Columns) -> Read:
    prompt = [_message("system", _text(columns, "system")), _message("user", _text(columns, "input"))]
    return _pair(columns, prompt, set())


def _preference(columns: Columns) -> Read:
    columns = _with_prompt(columns)
    if not isinstance(columns.get("prompt"), list):
        return _pair(columns, [_message("user", _text(columns, "prompt"))], set())
    prompt, ignored = _messages(columns, "prompt")
    if prompt[-1]["role"] == "assistant":
        raise BadRow("prompt ends with assistant", 'the last turn of "prompt" is "assistant", expected "user"')
    return _pair(columns, prompt, ignored)


def _pair(columns: Columns, prompt: list[TextMessage], ignored: set[str]) -> Read:
    (chosen, in_chosen), (rejected, in_rejected) = (_completion(columns, key, prompt) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow("chosen = rejected", "chosen and rejected are the same text")
    return prompt, (chosen, rejected), ignored | in_chosen | in_rejected


def _ignored(columns: Columns, read: Sequence[str]) -> Iterator[str]:
    """Warnings about columns that would change training if they were read; a weight of 1 would not."""
    for name in OF_OTHERS:
        value = columns.get(name)
        if name not in read and _is_filled(value) and not (name == "weight" and value == 1):
            hint = " (make it the first message)" if name in ("system", "system_prompt") else ""
            yield f'column "{name}" ignored{hint}'


def _is_filled(value: object) -> bool:
    """False for null and empty values. Tables store a missing object as an object of nulls."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(item is not None for item in value.values())
    return value is not None and value != []


def digest(value: object) -> str:
    """sha256 of a value as canonical JSON."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _message(role: str, content: str) -> TextMessage:
    return {"role": role, "content": content}


def _value(columns: Columns, name: str, kind: type | UnionType, expected: str, place: str = "") -> Any:
    if name not in columns:
        raise BadRow("missing column", f'missing "{name}"{place}')
    value = columns[name]
    if not isinstance(value, kind):
        reason = "null" if value is None else "wrong type"
        raise BadRow(reason, f'"{name}"{place} is {kind_of(value)}, expected {expected}')
    return value


def _text(columns: Columns, name: str, place: str = "") -> str:
    return str(_value(columns, name, str, "text", place))


def _number(columns: Columns, name: str) -> float:
    try:
        number = float(_value(columns, name, int | float, "a number"))
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow("not a finite number", f'"{name}" is {number}, expected a finite number')
    return number


def _messages(columns: Columns, name: str) -> tuple[list[TextMessage], set[str]]:
    """Messages of a column reduced to role and content, and the names of their other non-empty keys."""
    items = _value(columns, name, list, "a list of messages")
    if not items:
        raise BadRow("empty messages", f'"{name}" is empty')
    messages, ignored = [], set()
    for turn, item in enumerate(items, 1):
        place = f" (turn {turn})"
        if not isinstance(item, Mapping):
            raise BadRow("wrong type", f'"{name}"{place} is {kind_of(item)}, expected an object with role and content')
        role = _text(item, "role", place)
        if role not in ROLES:
            raise BadRow("unknown role", f"role {quoted(json.dumps(role))}{place}; known: {', '.join(ROLES)}")
        content = _text(item, "content", place)
        if role == "assistant" and not content.strip():
            what = "completion" if name == "messages" else name
            raise BadRow(f"empty {what}", f"empty {what}{place}")
        messages.append(_message(role, content))
        ignored |= {str(key) for key, other in item.items() if key not in ("role", "content") and _is_filled(other)}
    return messages, ignored


def _with_prompt(columns: Columns) -> Columns:
    """Take an implicit prompt (as TRL calls it) from two conversations: all messages before the last, if they agree.

    It also replaces a "prompt" that is only the text of the last question, as in UltraFeedback's binarised pairs.
    """
    chosen, rejected = columns.get("chosen"), columns.get("rejected")
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return columns
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        return columns
    asked = chosen[-2].get("content") if isinstance(chosen[-2], Mapping) else None
    given = columns.get("prompt", asked)
    return {**columns, "prompt": chosen[:-1]} if given == asked else columns


def _completion(columns: Columns, name: str, prompt: Sequence[TextMessage]) -> tuple[str, set[str]]:
    """Text of a completion, and the names of ignored keys of its messages.

    The column holds text, one assistant message, or the whole conversation that begins with the prompt.
    """
    value = columns.get(name)
    if value == [] or isinstance(value, str) and not value.strip():
        raise BadRow(f"empty {name}", f"empty {name}")
    if not isinstance(value, list):
        return _text(columns, name), set()
    messages, ignored = _messages(columns, name)
    reply = messages[len(prompt) :] if messages[: len(prompt)] == list(prompt) else messages
    if [message["role"] for message in reply] != ["assistant"]:
        raise BadRow("completion is not one reply", f'"{name}" is not one assistant message after the prompt')
    return reply[0]["content"], ignored
