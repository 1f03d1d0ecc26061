"""Lists of messages in a row: roles of other tools, text parts, tool calls, and marks of replies not to be learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowlevel.data.rows import kind_of
from lowlevel.data.texts import WEIGHTS, BadRow, Columns, Message, decoded, is_blank, is_filled, is_weight, value_of
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
# keys of a message that say whether a reply is learned, with the value that says so; the last two may hold other data
MARKS = {"weight": 1, "train": 1, "training": 1, "masked": 0, "trainable": 1, "loss": 1, "mask": 0}
RESULT_KEYS = ("name", "tool_call_id")
STRICT_MARKS = ("weight", "train", "training", "masked", "trainable")
PARTLY = ("train_detail", "training_detail")  # axolotl's marks of parts of a reply
MASKED = "replies that the data marks as not to be learned (context only)"
WEIGHTED = "replies with a weight of their own in the loss"
DECODED = "list of messages written as text: decoded"


@dataclass(frozen=True)
class Turns:
    """Messages, the weights of replies in the loss by index, and notes that the report counts.

    A reply without a weight has 1; one with 0 is only context.
    """

    messages: list[Message]
    weights: Mapping[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def context(self) -> frozenset[int]:
        """The indices of replies that are only context."""
        return frozenset(index for index, weight in self.weights.items() if weight == 0)

    def __add__(self, other: Turns) -> Turns:
        """The turns of both, in order."""
        shifted = {index + len(self.messages): weight for index, weight in other.weights.items()}
        return Turns(self.messages + other.messages, {**self.weights, **shifted}, self.notes + other.notes)

    def after(self, count: int) -> Turns:
        """The turns without the first `count`."""
        weights = {index - count: weight for index, weight in self.weights.items() if index >= count}
        return Turns(self.messages[count:], weights, self.notes)


def refuse_weights(name: str, turns: Turns) -> None:
    """Refuse weights of replies other than 1 and 0, which only sft reads. Raises BadRow."""
    if weight := next(filter(None, turns.weights.values()), None):
        raise BadRow("unclear weight", f"{name} has a weight of {weight:g}; weights of replies are for sft")


def message(role: str, content: str) -> Turns:
    """One message; none for an empty system text."""
    return Turns([] if role == "system" and not content.strip() else [{"role": role, "content": content}])


def turns_or_none(columns: Columns, name: str) -> Turns | None:
    """The messages of a column that holds a list, one message, or such a list as text; None for any other value."""
    value = columns.get(name)
    items = decoded(value, name) if isinstance(value, str) else [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list):
        return None
    if not items:
        raise BadRow("empty messages", f'"{name}" is empty')
    turns = _turns(items, name)
    return Turns(turns.messages, turns.weights, (*turns.notes, DECODED)) if isinstance(value, str) else turns


def turns_of(columns: Columns, name: str) -> Turns:
    """The messages of a column. Raises BadRow."""
    found = turns_or_none(columns, name)
    return found if found is not None else value_of(columns, name, list, "a list of messages")  # type: ignore[no-any-return]


def _turns(items: Sequence[object], name: str) -> Turns:
    """Messages of a list, reduced to the keys that a template reads; notes name their other non-empty keys."""
    called = any(isinstance(item, Mapping) and is_filled(item.get("tool_calls")) for item in items)
    result, ignored = Turns([]), set[str]()
    for turn, item in enumerate(items, 1):
        place = f" (turn {turn})"
        if not isinstance(item, Mapping):
            raise BadRow("wrong type", f'"{name}"{place} is {kind_of(item)}, expected an object with role and content')
        shared = item.get("role") is None and item.get("from") is not None  # ShareGPT's names
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
    return Turns(result.messages, result.weights, result.notes + notes)


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
    calls = [call_of(value_of(item, key, str, "text", place), place)] if is_call else calls_of(item, place)
    content = "" if is_call else _content(item, key, place, optional=bool(calls))
    if is_blank(content) and not calls:
        what = "completion" if name in ("messages", "conversations") else name
        raise BadRow(f"empty {what}", f"empty {what}{place}")
    one = message("assistant", content).messages[0] | ({"tool_calls": calls} if calls else {})
    weight = _weight_of(item, place)
    return Turns([one]) if weight == 1 else Turns([one], {0: weight}, (WEIGHTED if weight else MASKED,))


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


def _weight_of(item: Columns, place: str) -> float:
    """The weight of a reply in the loss; 0 if a mark says that it is only context. Raises BadRow: an unclear mark."""
    weight, learned = 1.0, True
    if part := next((key for key in PARTLY if is_filled(item.get(key))), None):
        raise BadRow(
            "unclear weight", f'"{part}"{place} marks parts of a reply; a reply is learned whole or not at all'
        )
    for key, yes in MARKS.items():
        value = item.get(key)
        if isinstance(value, bool | int | float) and value in (0, 1) and (key in STRICT_MARKS or value is bool(value)):
            learned = learned and value == yes
        elif key == "weight" and isinstance(value, int | float) and is_weight(value):
            weight = float(value)
        elif value is not None and key in STRICT_MARKS:
            what = f"{value}" if isinstance(value, int | float) else kind_of(value)
            hint = "expected 1 or 0 (or true, false): a reply is learned or only context"
            hint += f"; a weight may also be from {WEIGHTS}" * (key == "weight")
            raise BadRow("unclear weight", f'"{key}"{place} is {what}, {hint}')
    return weight if learned else 0.0


def calls_of(item: Columns, place: str) -> list[Message]:
    """The tool calls of an assistant's message, with OpenAI's older "function_call", as chat templates take them."""
    value, single = item.get("tool_calls"), item.get("function_call")
    if isinstance(value, str) and value.strip():
        value = from_json(value, f'"tool_calls"{place}')
    if is_filled(value) and not isinstance(value, list):
        raise BadRow("tool call", f'"tool_calls"{place} is {kind_of(value)}, expected a list')
    calls = value if isinstance(value, list) else []
    return [call_of(call, place) for call in (*calls, *([single] if is_filled(single) else []))]


def call_of(call: object, place: str) -> Message:
    """One call: an object with name and arguments, or its JSON text. Raises BadRow."""
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
