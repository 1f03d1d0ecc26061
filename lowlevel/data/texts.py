"""Values of a row's columns: texts that are one message, and lists of messages that were written as text."""

from __future__ import annotations

import ast
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping
from types import UnionType
from typing import Any

from lowlevel.data.rows import kind_of
from lowlevel.errors import printable
from lowlevel.redaction import redact

# texts that are not one message: the frame of a chat template around them, or a transcript
FRAME = re.compile(
    r"\s*(?:<s>|<\|begin_of_text\|>|<bos>)?\s*(?:<\|im_start\|>\w+\n|<\|(?:user|assistant|system|prompter)\|>"
    r"|<start_of_turn>(?:user|model)|<\|start_header_id\|>|\[INST\]"
    r"|### ?(?:Human|Assistant|User|Instruction|Response):)"
)
OPENED = re.compile(
    r"(?:<\|im_start\|>assistant|<\|assistant\|>|<start_of_turn>model|<\|end_header_id\|>|\[/INST\]"
    r"|### ?(?:Assistant|Response):|\n(?:Assistant|ASSISTANT):)\s*$"
)
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
LISTED = re.compile(
    r"""\s*\[\s*\{\s*(?:["'](?:role|from)["']\s*:\s*["'](?:system|user|human|assistant|gpt|tool)["']"""
    r"""|["'](?:content|value)["']\s*:.*["'](?:role|from)["']\s*:)""",
    re.S,
)
OBJECT = re.compile(r"""\s*\[?\s*\{\s*["']""")
Columns = Mapping[str, object]
Message = dict[str, Any]  # role and content; an assistant's tool_calls; a tool's name and tool_call_id


class BadRow(Exception):  # noqa: N818 - always caught, never shown as an exception
    """A row that cannot be used: `reason` is the kind that the report counts, the message is one line for the user."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(redact(printable(message)))  # data_report.json keeps the message
        self.reason = reason


def value_of(columns: Columns, name: str, kind: type | UnionType, expected: str, place: str = "") -> Any:
    """The value of a column or key. Raises BadRow if it is missing or of another kind."""
    if name not in columns:
        raise BadRow("missing column", f'missing "{name}"{place}')
    value = columns[name]
    if not isinstance(value, kind):
        reason = "null" if value is None else "wrong type"
        raise BadRow(reason, f'"{name}"{place} is {kind_of(value)}, expected {expected}')
    return value


def text_of(columns: Columns, name: str) -> str:
    """A text that is one message. Raises BadRow for a transcript or a text with a chat template around it."""
    text = str(value_of(columns, name, str, "text"))
    if FRAME.match(text) or OPENED.search(text):
        where = text[:30] if FRAME.match(text) else text[-30:]
        hint = "give the messages alone: the chat template is added later"
        raise BadRow("chat template in text", f'"{name}" is already in a chat template ({json.dumps(where)}); {hint}')
    if decoded(text, name) is not None:
        raise BadRow("transcript", f'"{name}" is a list of messages written as text, expected one message')
    if is_transcript(text):
        hint = 'expected one message; give a list of messages (pairs of transcripts: data.format = "hh")'
        raise BadRow("transcript", f'"{name}" is a transcript (Human: ... Assistant: ...), {hint}')
    return text


def number_as_text(value: object) -> object:
    """The text of a finite number, 5.0 as "5": a table with gaps stores whole numbers as floats. Else the value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return value
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def reply_of(columns: Columns, name: str) -> str:
    """A text that is a reply, not empty. Raises BadRow."""
    text = text_of(columns, name)
    if is_blank(text):
        raise BadRow(f"empty {name}", f"empty {name}")
    return text


def is_blank(text: str) -> bool:
    """Whether no character of a text can be seen: blanks, and zero-width, direction and byte order marks."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def is_transcript(text: object) -> bool:
    """Whether a text has turns that begin with "Human:" and "Assistant:", as in Anthropic's HH pairs."""
    if not isinstance(text, str):
        return False
    speakers = SPEAKER.findall(text) if SPEAKER.match(text) else []
    return len(speakers) > 1 and speakers[0] == "Human" and "Assistant" in speakers


def is_filled(value: object) -> bool:
    """False for null and empty values. Tables store a missing object as an object of nulls."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(item is not None for item in value.values())
    return value is not None and value != []


def decoded(text: str, name: str) -> list[Any] | None:
    """The messages that a text holds as JSON or as Python writes a list; None for any other text.

    Raises BadRow for a text that begins like such a list but cannot be read: a cut one, or numpy's, without commas.
    """
    if not OBJECT.match(text):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of escapes such as "\\d"
                value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        items = value if isinstance(value, list) else [value]
        return items if items and all(is_message(item) for item in items) else None
    if LISTED.match(text):
        hint = "neither JSON nor Python; write the list itself, not its text"
        raise BadRow("transcript", f'"{name}" is the text of a list of messages, {hint}')
    return None


def is_message(item: object) -> bool:
    """Whether a value has the keys of a message, or of ShareGPT's."""
    return isinstance(item, Mapping) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())


WEIGHTS = "1e-6 to 1e6"  # of a row or a reply in the loss; 0 leaves it out


def is_weight(value: float) -> bool:
    """Whether a number is in the range of `WEIGHTS`."""
    return 1e-6 <= value <= 1e6
