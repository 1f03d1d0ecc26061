"""Rows with a label for KTO, and pairs as two such rows."""

from dataclasses import replace

from lowlevel.data.messages import _preference
from lowlevel.data.sources import Row, SourceRows


def split_pairs(source: SourceRows) -> SourceRows:
    rows = []
    for row in source.rows:
        if "chosen" not in row.columns:
            rows.append(replace(row, id=len(rows)))
            continue
        prompt, texts, _ = _preference(row.columns)
        for name, label, text in zip(("chosen", "rejected"), (True, False), texts):
            messages = [*prompt, {"role": "assistant", "content": text}]
            rows.append(Row(len(rows), f"{row.where} {name}", {"messages": messages, "label": label}))
    return replace(source, rows=rows)
