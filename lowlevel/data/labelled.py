"""Rows for KTO: a conversation whose last reply has a label, or a pair of completions as two such rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lowlevel.config.schema import KTOConfig
from lowlevel.data.readers import PAIR, Read
from lowlevel.data.sources import Row, SourceRows
from lowlevel.data.texts import BadRow, Columns, Message
from lowlevel.data.turns import Turns, refuse_weights
from lowlevel.errors import quoted

if TYPE_CHECKING:
    from lowlevel.data.examples import Example

LABEL = "label"
BALANCED = (1.0, 4 / 3)  # desirable_weight n_desirable / (undesirable_weight n_undesirable), arXiv 2402.01306


def label_of(columns: Columns) -> float:
    """1 for a desirable completion, 0 for an undesirable one. Raises BadRow for anything but true, false, 1 and 0."""
    value = columns.get(LABEL)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    found = "is missing" if value is None else f"is {quoted(json.dumps(value, ensure_ascii=False)[:40])}"
    hint = '; convert it: row["label"] = row["label"] == "good"' if isinstance(value, str) else ""
    raise BadRow("label is not true or false", f'"label" {found}, expected true (desirable) or false{hint}')


def with_label(read: Callable[[Columns], Read]) -> Callable[[Columns], Read]:
    """A reader of conversations whose last reply is the completion; the replies before it are context."""

    def last_reply(columns: Columns) -> Read:
        turns, _ = read(columns)
        refuse_weights("a reply", turns)
        if len(turns.messages) - 1 in turns.context:
            raise BadRow("not to be learned", "the completion is marked as not to be learned (weight 0)")
        return _last_of(turns), ()

    return last_reply


def halves(source: SourceRows) -> SourceRows:
    """Each pair as two rows, the chosen completion desirable, the rejected one undesirable; labelled rows as they are.

    A pair that cannot be read stays one row, so that its problem is told once.
    """
    if not source.rows or source.rows[0].format.labelled:
        return source
    rows: list[Row] = []
    half = replace(source.rows[0].format, read=partial(_half, source.rows[0].format.read), labelled=True)
    for row in source.rows:
        for side in PAIR if _is_readable(row) else PAIR[:1]:
            columns = {**row.columns, LABEL: side == "chosen"}
            rows.append(replace(row, id=len(rows), where=f"{row.where} {side}", columns=columns, format=half))
    read_as = "; ".join(filter(None, (source.read_as, "each pair as a desirable and an undesirable completion")))
    return replace(source, rows=rows, read_as=read_as)


def _is_readable(row: Row) -> bool:
    try:
        row.format.read(row.columns)
    except BadRow:
        return False
    return True


def _half(read: Callable[[Columns], Read], columns: Columns) -> Read:
    prompt, pair = read(columns)
    reply = pair[0 if columns[LABEL] else 1]  # type: ignore[misc]
    message: Message = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
    return _last_of(Turns([*prompt.messages, message], notes=prompt.notes)), ()


def _last_of(turns: Turns) -> Turns:
    """The same turns, of whose replies only the last is learned."""
    replies = [i for i, message in enumerate(turns.messages) if message["role"] == "assistant"]
    return replace(turns, weights=dict.fromkeys(replies[:-1], 0.0))


def balance(examples: Sequence[Example], config: KTOConfig) -> str:
    """The number of examples with each label; if they are unbalanced, the range of a weight that balances them."""
    desirable = sum(example.values[0] > 0 for example in examples)
    undesirable = len(examples) - desirable
    counts = f"{desirable:,} desirable and {undesirable:,} undesirable completions"
    good, bad = config.desirable_weight * desirable, config.undesirable_weight * undesirable
    low, high = BALANCED
    if not good or not bad or low <= good / bad <= high:
        return counts
    name, count, ends = (
        ("undesirable_weight", undesirable, (good / high, good / low))
        if good > bad
        else ("desirable_weight", desirable, (bad * low, bad * high))
    )
    weights = " to ".join(f"{end / count:.3g}" for end in ends)
    return f"{counts}, weighted {good / bad:.2f} to 1; for 1:1 to 4:3, as the paper advises, set kto.{name} = {weights}"
