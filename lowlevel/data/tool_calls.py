"""Tool calls of messages and tools of rows, in OpenAI's form with arguments as objects, as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowlevel.data.sources import kind_of
from lowlevel.data.texts import BadRow, Columns, Message, is_filled
from lowlevel.errors import quoted


def calls_of(item: Columns, place: str) -> list[Message]:
    """The tool calls of an assistant's message, with OpenAI's older "function_call", in OpenAI's form."""
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
