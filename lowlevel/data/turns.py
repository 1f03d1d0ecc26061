"""Messages of a row: roles of other tools, text parts, tool calls, marks, and lists of messages written as text."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

from lowlevel.data.sources import kind_of
from lowlevel.errors import printable, quoted
from lowlevel.redaction import redact

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {  # roles of ShareGPT, OpenAI, Gemma and OASST, each with one meaning
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(
        ("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(("function", "function_response", "tool_response", "observation", "ipython"), "tool"),
    "developer": "system",
}
CALLS = ("function_call", "tool_call")  # roles of ShareGPT whose text is a call as JSON
# keys of a message that say whether a reply is learned, with the value that says so; the last three may hold other data
MARKS = {"weight": 1, "train": 1, "training": 1, "masked": 0, "trainable": 1, "loss": 1, "mask": 0}
RESULT_KEYS = ("name", "tool_call_id")
STRICT_MARKS = ("weight", "train", "training", "masked")
MASKED = "replies that the data marks as not to be learned (context only)"
DECODED = "list of messages written as text: decoded"
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


@dataclass(frozen=True)
class Turns:
    """Messages, the indices of replies that are only context, and notes that the report counts."""

    messages: list[Message]
    context: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def __add__(self, other: Turns) -> Turns:
        """The turns of both, in order."""
        shifted = {index + len(self.messages) for index in other.context}
        return Turns(self.messages + other.messages, self.context | shifted, self.notes + other.notes)

    def after(self, count: int) -> Turns:
        """The turns without the first `count`."""
        return Turns(self.messages[count:], frozenset(i - count for i in self.context if i >= count), self.notes)


def message(role: str, content: str) -> Turns:
    """One message; none for an empty system text."""
    return Turns([] if role == "system" and not content.strip() else [{"role": role, "content": content}])


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


def reply_of(columns: Columns, name: str, called: str = "") -> str:
    """A text that is a reply, not empty. Raises BadRow."""
    text = text_of(columns, name)
    if not text.strip():
        raise BadRow(f"empty {called or name}", f"empty {called or name}")
    return text


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


def turns_or_none(columns: Columns, name: str) -> Turns | None:
    """The messages of a column that holds a list, one message, or such a list as text; None for any other value."""
    value = columns.get(name)
    items = decoded(value, name) if isinstance(value, str) else [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list):
        return None
    if not items:
        raise BadRow("empty messages", f'"{name}" is empty')
    turns = _turns(items, name)
    return Turns(turns.messages, turns.context, (*turns.notes, DECODED)) if isinstance(value, str) else turns


def turns_of(columns: Columns, name: str) -> Turns:
    """The messages of a column. Raises BadRow."""
    found = turns_or_none(columns, name)
    return found if found is not None else value_of(columns, name, list, "a list of messages")  # type: ignore[no-any-return]


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
        return items if items and all(_is_message(item) for item in items) else None
    if LISTED.match(text):
        hint = "neither JSON nor Python; write the list itself, not its text"
        raise BadRow("transcript", f'"{name}" is the text of a list of messages, {hint}')
    return None


def _is_message(item: object) -> bool:
    return isinstance(item, Mapping) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())


def _turns(items: Sequence[object], name: str) -> Turns:
    """Messages of a list, reduced to the keys that a template reads; notes name their other non-empty keys."""
    called = any(isinstance(item, Mapping) and is_filled(item.get("tool_calls")) for item in items)
    result, ignored = Turns([]), set[str]()
    for turn, item in enumerate(items, 1):
        place = f" (turn {turn})"
        if not isinstance(item, Mapping):
            raise BadRow("wrong type", f'"{name}"{place} is {kind_of(item)}, expected an object with role and content')
        shared = "from" in item and "role" not in item  # ShareGPT's names
        keys = ("from", "value") if shared else ("role", "content")
        role, spoken = _role(item, keys[0], place)
        read: set[str] = {*keys}
        if role == "assistant":
            one = _said(item, keys[1], name, place, is_call=spoken in CALLS)
            read |= {"tool_calls", "function_call", *MARKS}
        else:
            one = message(role, _content(item, keys[1], place))
        if role == "tool" and called:
            one.messages[0].update((key, item[key]) for key in RESULT_KEYS if is_filled(item.get(key)))
            read |= {*RESULT_KEYS}
        unread = {str(key) for key, value in item.items() if key not in read and is_filled(value)}
        ignored |= {key for key in unread if key not in MARKS or item[key]}  # nothing but replies is learned anyway
        result += one
    if not result.messages:
        raise BadRow("empty messages", f'"{name}" is empty')
    notes = tuple(f'message key "{quoted(redact(printable(key)))}" ignored' for key in sorted(ignored))
    return Turns(result.messages, result.context, result.notes + notes)


def _role(item: Columns, key: str, place: str) -> tuple[str, str]:
    """The role as this project names it, and in the data's spelling in lower case."""
    given = str(value_of(item, key, str, "text", place))
    spoken = given.strip().lower()
    role = ALIASES.get(spoken, spoken)
    if role not in ROLES:
        raise BadRow("unknown role", f"role {quoted(json.dumps(given))}{place}; known: {', '.join(ROLES)}")
    return role, spoken


def _said(item: Columns, key: str, name: str, place: str, *, is_call: bool) -> Turns:
    """A message of the assistant: a text, tool calls, or both; `is_call`: the text is a call as JSON."""
    calls = [_call(value_of(item, key, str, "text", place), place)] if is_call else _calls(item, place)
    content = "" if is_call else _content(item, key, place, optional=bool(calls))
    if not content.strip() and not calls:
        what = "completion" if name in ("messages", "conversations") else name
        raise BadRow(f"empty {what}", f"empty {what}{place}")
    one = message("assistant", content).messages[0] | ({"tool_calls": calls} if calls else {})
    return Turns([one]) if _is_learned(item, place) else Turns([one], frozenset({0}), (MASKED,))


def _content(item: Columns, key: str, place: str, *, optional: bool = False) -> str:
    """The text of a message; text parts are joined. With tool calls (`optional`) it may be missing."""
    value = item.get(key)
    if optional and value is None:
        return ""
    if not isinstance(value, list) or not value:
        return str(value_of(item, key, str, "text", place))
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else kind_of(part)
        if not isinstance(part, Mapping) or kind not in ("text", None) or not isinstance(part.get("text"), str):
            what = f"a part of type {quoted(json.dumps(kind))}"
            raise BadRow("part that is not text", f'"{key}"{place} holds {what}; only text can be learned')
    return "".join(part["text"] for part in value)


def _is_learned(item: Columns, place: str) -> bool:
    """Whether no mark says that a reply is only context. Raises BadRow for a mark that is neither yes nor no."""
    learned = True
    for key, yes in MARKS.items():
        value = item.get(key)
        if isinstance(value, bool | int | float) and value in (0, 1) and (key in STRICT_MARKS or value is bool(value)):
            learned = learned and value == yes
        elif value is not None and key in STRICT_MARKS:
            what = f"{value}" if isinstance(value, int | float) else kind_of(value)
            hint = "expected 1 or 0 (or true, false): a reply is learned or only context"
            raise BadRow("unclear weight", f'"{key}"{place} is {what}, {hint}')
    return learned


def _calls(item: Columns, place: str) -> list[Message]:
    """The tool calls of an assistant's message, with OpenAI's older "function_call", in OpenAI's form."""
    value, single = item.get("tool_calls"), item.get("function_call")
    if isinstance(value, str) and value.strip():
        value = from_json(value, f'"tool_calls"{place}')
    if is_filled(value) and not isinstance(value, list):
        raise BadRow("tool call", f'"tool_calls"{place} is {kind_of(value)}, expected a list')
    calls = value if isinstance(value, list) else []
    return [_call(call, place) for call in (*calls, *([single] if is_filled(single) else []))]


def _call(call: object, place: str) -> Message:
    call = from_json(call, f"the tool call{place}") if isinstance(call, str) else call
    if not isinstance(call, Mapping):
        raise BadRow("tool call", f"a tool call{place} is {kind_of(call)}, expected an object with name and arguments")
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise BadRow("tool call", f"a tool call{place} has no name")
    if isinstance(arguments, str):
        arguments = from_json(arguments, f'"arguments"{place}') if arguments.strip() else {}
    if not isinstance(arguments, Mapping | None):
        raise BadRow("tool call", f'"arguments"{place} is {kind_of(arguments)}, expected an object')
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    function = {"name": name, "arguments": without_nulls(arguments or {})}
    return {**identity, "type": "function", "function": function}


def tools_of(columns: Columns, *, needed: bool) -> list[Message]:
    """The tools of a row: a list of objects, or its JSON text. Others are no tools, an error if `needed` by a call."""
    value = columns.get("tools")
    try:
        value = from_json(value, '"tools"') if isinstance(value, str) and value.strip() else value
        if not is_filled(value):
            return []
        if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
            raise BadRow("tools", f'"tools" is {kind_of(value)}, expected a list of objects')
    except BadRow:
        if needed:
            raise
        return []
    tools = [without_nulls(tool) for tool in value]
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools
    ]


def from_json(text: str, what: str) -> Any:
    """The value of a JSON text. Raises BadRow."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow("tool call", f"{what} is not JSON: {quoted(json.dumps(text[:30]))}") from None


def without_nulls(value: Any) -> Any:
    """A value without the null keys of its objects: a table gives every row the keys of all rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
