"""A file of reference numbers as text: an entry a line, so that a difference between two versions shows the case."""

import json
from typing import Any


def as_text(**sections: dict[str, Any] | list[Any]) -> str:
    """The sections as one JSON object in their order, each key of a table and each row of a list on its own line."""
    parts = []
    for name, section in sections.items():
        if isinstance(section, dict):
            opening, closing, lines = "{", "}", [f"{json.dumps(key)}: {json.dumps(v)}" for key, v in section.items()]
        else:
            opening, closing, lines = "[", "]", [json.dumps(row) for row in section]
        body = ",\n".join(f"  {line}" for line in lines)
        parts.append(f' "{name}": {opening}\n{body}\n {closing}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
