"""Pairs of a trace: the best and the worst of the last traced steps, and likelihood displacement.

Displacement: DPO reads only the difference of two log-ratios. The loss also falls if the chosen completion becomes less
likely than under the reference, as long as the rejected one falls faster: both lose probability to other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowlevel.tracing import read_trace

SHOWN = 5  # pairs in a table
NEWEST = 64  # least number of pairs in "the last traced steps", if the trace has as many
LEAST = 5e-4  # nats; smaller values are shown as zero
ALARM = 0.5  # share of pairs below their reference
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TokenFall:
    """A token of chosen completions, and the summed change of its log-probability from reference to policy."""

    token: int
    change: float
    count: int


@dataclass(frozen=True)
class PairTables:
    """The tables of a dpo trace: pairs of the last traced steps, `first` to `last`."""

    first: int
    last: int
    count: int
    below: int  # pairs whose chosen completion is less likely than under the reference
    both_fell: int  # those of them whose rejected completion fell, too
    lowest: tuple[Row, ...]  # all pairs, the lowest log-ratio of a chosen completion first
    best: tuple[Row, ...]
    worst: tuple[Row, ...]
    falls: tuple[TokenFall, ...]

    @property
    def alarm(self) -> bool:
        """Whether most pairs are displaced."""
        return self.below > ALARM * self.count

    @property
    def farthest(self) -> tuple[Row, ...]:
        """The up to `SHOWN` pairs whose chosen completions fell farthest below the reference."""
        return self.lowest[: min(SHOWN, self.below)]


def pair_tables(trace: Path) -> PairTables | None:
    """Tables of the newest traced steps with `NEWEST` pairs; each data row once, at its last step. None: no trace."""
    table = read_trace(trace, "pairs")
    if table is None:
        return None
    rows = table.to_pylist()
    steps = sorted({row["step"] for row in rows}, reverse=True)
    newest: dict[int, Row] = {}
    first = steps[0]
    for step in steps:
        if len(newest) >= NEWEST:
            break
        first = step
        for row in (row for row in rows if row["step"] == step):
            newest.setdefault(row["row"], row)
    ranked = sorted(newest.values(), key=lambda row: row["margin"])
    below = [row for row in ranked if row["chosen_logratio"] < 0]
    shown = min(SHOWN, max(1, len(ranked) // 2))
    return PairTables(
        first=first,
        last=steps[0],
        count=len(ranked),
        below=len(below),
        lowest=tuple(sorted(ranked, key=lambda row: row["chosen_logratio"])),
        both_fell=sum(row["rejected_logratio"] < 0 for row in below),
        best=tuple(reversed(ranked[-shown:])),
        worst=tuple(ranked[:shown]),
        falls=token_falls(below),
    )


def token_falls(rows: Sequence[Row]) -> tuple[TokenFall, ...]:
    """The tokens of chosen completions that lost most; empty if the trace is at pair level."""
    sums: dict[int, tuple[float, int]] = {}
    for row in rows:
        if row.get("chosen_token_ids") is None:
            continue
        values = zip(row["chosen_token_ids"], row["chosen_token_logps"], row["chosen_ref_token_logps"], strict=True)
        for token, logp, reference in values:
            change, count = sums.get(token, (0.0, 0))
            sums[token] = change + logp - reference, count + 1
    falls = sorted((TokenFall(token, *value) for token, value in sums.items()), key=lambda fall: fall.change)
    return tuple(fall for fall in falls[: 2 * SHOWN] if fall.change < -LEAST)
