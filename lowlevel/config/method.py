"""The method of a configuration that does not name one: by the keys that only one method reads, else by its rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lowlevel.config import METHODS
from lowlevel.config.schema import ONLINE
from lowlevel.errors import ConfigError

SHARED = ("model.adapter", "model.adapter_mode")  # by dpo, kto and reward
ONLY = {**dict.fromkeys((*SHARED, "data.max_prompt_length"), "dpo"), "data.weight_column": "sft"}
FORMATS = {"messages": "sft", "preference": "dpo", "hh": "dpo", "orca": "dpo"}  # of data.format; kto takes each
OF_OTHERS = {  # kto, reward and the online methods read the rows and the adapter of the others, too, but not these keys
    method: (*(f"{other}." for other in METHODS if other != method), "data.weight_column", *more)
    for method, more in (
        *((method, ("data.max_prompt_length",)) for method in ("kto", *ONLINE)),
        ("reward", ()),
    )
}
PAIR, LABELLED = {"chosen", "rejected"}, {"completion", "label"}


def infer_method(tables: Mapping[str, Any], columns: Callable[[], Collection[str]]) -> tuple[str, str]:
    """The method, and the reason in words; `columns` gives the columns of the training rows.

    Raises:
        ConfigError: the keys, or the columns, are those of two methods.
    """
    signs = _signs(tables)
    if signs["dpo"] and {*signs["dpo"]} <= {*SHARED} and {*columns()} >= LABELLED:
        signs = {**signs, "dpo": [], "kto": signs["kto"] + signs["dpo"]}
    for method, own in OF_OTHERS.items():
        if signs[method]:
            signs = {m: [key for key in keys if m == method or key.startswith(own)] for m, keys in signs.items()}
    named = [(method, keys[0]) for method, keys in signs.items() if keys]
    if len(named) > 1:
        (method, one), (another, other), *_ = named
        raise ConfigError(f"{one} is for {method}, {other} is for {another}: leave one of them out")
    if named:
        return named[0][0], f"{named[0][1]} is given"
    found = set(columns())
    if not found:
        return "sft", "the default; nothing names another"
    if found >= LABELLED and not found >= PAIR:
        return "kto", "its rows have the columns completion and label"
    if not found >= PAIR:
        return "sft", "its rows have no columns chosen and rejected"
    if both := sorted(found & {"messages", "completion"}):
        raise ConfigError(f"the rows have the columns of sft and of dpo ({both[0]}; chosen, rejected): give --method")
    return "dpo", "its rows have the columns chosen and rejected"


def _signs(tables: Mapping[str, Any]) -> dict[str, list[str]]:
    """Keys that only one method reads, by method."""
    given = {f"{section}.{key}": value for section, table in tables.items() if isinstance(table, Mapping)
             for key, value in table.items()}  # fmt: skip
    signs: dict[str, list[str]] = {method: [] for method in METHODS}
    for name, value in given.items():
        section = name.partition(".")[0]
        if section in signs:
            signs[section].append(name)
        elif name in ONLY:
            signs[ONLY[name]].append(name)
        elif name == "data.format" and value in FORMATS:
            signs[FORMATS[value]].append(f'data.format = "{value}"')
    return signs
