"""The method of a configuration that does not name one: by the keys that only one method reads, else by its rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lowlevel.errors import ConfigError

ONLY = {
    **dict.fromkeys(("model.adapter", "model.adapter_mode", "data.max_prompt_length"), "dpo"),
    "data.weight_column": "sft",
}
FORMATS = {"messages": "sft", "preference": "dpo", "hh": "dpo", "orca": "dpo"}  # of data.format; others: both
PAIR = {"chosen", "rejected"}


def infer_method(tables: Mapping[str, Any], columns: Callable[[], Collection[str]]) -> tuple[str, str]:
    """The method, and the reason in words; `columns` gives the columns of the training rows.

    Raises:
        ConfigError: the keys, or the columns, are those of both methods.
    """
    signs = _signs(tables)
    if signs["sft"] and signs["dpo"]:
        one, other = signs["sft"][0], signs["dpo"][0]
        raise ConfigError(f"{one} is for sft, {other} is for dpo: leave one of them out")
    for method, keys in signs.items():
        if keys:
            return method, f"{keys[0]} is given"
    found = set(columns())
    if not found:
        return "sft", "the default; nothing names another"
    if not found >= PAIR:
        return "sft", "its rows have no columns chosen and rejected"
    if both := sorted(found & {"messages", "completion"}):
        raise ConfigError(f"the rows have the columns of both methods ({both[0]}; chosen, rejected): give --method")
    return "dpo", "its rows have the columns chosen and rejected"


def _signs(tables: Mapping[str, Any]) -> dict[str, list[str]]:
    """Keys that only one method reads, by method."""
    given = {f"{section}.{key}": value for section, table in tables.items() if isinstance(table, Mapping)
             for key, value in table.items()}  # fmt: skip
    signs: dict[str, list[str]] = {"sft": [], "dpo": []}
    for name, value in given.items():
        section = name.partition(".")[0]
        if section in signs:
            signs[section].append(name)
        elif name in ONLY:
            signs[ONLY[name]].append(name)
        elif name == "data.format" and value in FORMATS:
            signs[FORMATS[value]].append(f'data.format = "{value}"')
    return signs
