"""Pairs of a trace: the best and the worst of the last traced steps, and likelihood displacement.

Displacement: DPO reads only the difference of two log-ratios. The loss also falls if the chosen completion becomes less
likely than under the reference, as long as the rejected one falls faster: both lose probability to other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowlevel.checkpoints.tables import read_table
from lowlevel.errors import ConfigError
from lowlevel.inspection.displacement import TokenChange, largest_gains
from lowlevel.inspection.example import Example
from lowlevel.inspection.opening import example_of_row, last_weights
from lowlevel.inspection.pairs import FallLine, fall_line, inspect_pairs
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import signed
from lowlevel.methods.dpo import DPO
from lowlevel.running.reopening import Reopened, step_examples

SHOWN = 5  # pairs in a table
NEWEST = 64  # least number of pairs in "the last traced steps", if the trace has as many
LEAST = 5e-4  # nats; smaller values are shown as zero
ALARM = 0.5  # share of pairs below their reference
Row = Mapping[str, Any]


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
    falls: tuple[TokenChange, ...]  # log-probabilities from reference to policy

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
    table = read_table(trace, "pairs")
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


def token_falls(rows: Sequence[Row]) -> tuple[TokenChange, ...]:
    """The tokens of chosen completions that lost most; empty if the trace is at pair level."""
    sums: dict[int, tuple[float, int]] = {}
    for row in rows:
        if row.get("chosen_token_ids") is None:
            continue
        values = zip(row["chosen_token_ids"], row["chosen_token_logps"], row["chosen_ref_token_logps"], strict=True)
        for token, logp, reference in values:
            change, count = sums.get(token, (0.0, 0))
            sums[token] = change + logp - reference, count + 1
    falls = sorted((TokenChange(token, *value) for token, value in sums.items()), key=lambda fall: fall.change)
    return tuple(fall for fall in falls[: 2 * SHOWN] if fall.change < -LEAST)


TOKENS = 10  # in the table
NAMED = 3  # of them in the terminal


@dataclass(frozen=True)
class DisplacedPairs:
    """Pairs that were inspected with the run's weights."""

    weights: str  # one line
    origin: str  # where the pairs come from
    looked: int  # number of inspected pairs
    below: int  # number of those that are displaced under these weights
    falls: tuple[tuple[int, FallLine], ...]  # data row and line of the displaced pairs that are shown, farthest first
    lost: float  # probability that their chosen tokens lost, summed over the positions with a loss
    positions: int  # number of those positions
    gains: tuple[tuple[str, TokenChange], ...]  # the tokens that gained most there, with their texts

    @property
    def sentence(self) -> str:
        """For a terminal."""
        if not self.falls:
            return f"none of {self.looked} pairs {self.origin} is below its reference ({self.weights})"
        named = [f"{text} {signed(gain.change, 3)} ({gain.positions})" for text, gain in self.gains[:NAMED]]
        return (
            f"{self.below} of {self.looked} pairs {self.origin} are below their reference ({self.weights}); at the "
            f"{self.positions} positions where chosen tokens of {len(self.falls)} fell, by {self.lost:.3f} in all, "
            f"gained most: {', '.join(named) or 'none'}"
        )


def look_at_displaced(opened: Reopened, tables: PairTables | None, limit: int) -> DisplacedPairs:
    """The tokens that gained the probability of up to `limit` displaced pairs, under the final or newest good weights.

    Args:
        opened: a dpo run.
        tables: of its trace, to choose the pairs that fell farthest; None: inspect those of the last logged step.
        limit: number of pairs.

    Raises:
        ConfigError: an sft run, or nothing saved yet.
        DataError: data that changed since the run.
        CheckpointError: no good checkpoint, or a base or adapter that is not the run's.
    """
    folder, config = opened.folder, opened.config
    if config.method != "dpo":
        raise ConfigError(f"--displaced: {folder.path} is a run of {config.method}; only dpo runs have pairs")
    adapter, line = last_weights(folder, opened.note)
    tokenizer, data = opened.data()
    if tables is None:
        step = max(record["step"] for record in folder.read_metrics())
        examples, origin = step_examples(config, data, step), f"of step {step}"
    else:
        rows = [row["row"] for row in tables.lowest[:limit]]
        examples = [example_of_row(config, tokenizer, data, row) for row in rows]
        origin = f"with the lowest chosen log-ratios of steps {tables.first} to {tables.last}"
    run = opened.load(adapter, reference=True)
    assert isinstance(run.method, DPO)
    records = inspect_pairs(run.policy, run.method, examples)
    return displaced_pairs(records, TokenPieces(run.tokenizer), weights=line, origin=origin, limit=limit)


def displaced_pairs(
    records: Sequence[Example], pieces: TokenPieces, *, weights: str, origin: str, limit: int
) -> DisplacedPairs:
    """Up to `limit` pairs of `records`, those displaced farthest, and the tokens that gained over all of them."""
    farthest = sorted(records, key=lambda record: record.texts[0].numbers["log-ratio"])[:limit]
    found = [record.displacement for record in farthest if record.displacement]
    falls = [(record.row, line) for record in farthest if (line := fall_line(record, pieces))]
    return DisplacedPairs(
        weights=weights,
        origin=origin,
        looked=len(records),
        below=sum(record.displacement is not None for record in records),
        falls=tuple(falls),
        lost=sum(one.lost for one in found),
        positions=sum(int((one.losses > 0).sum()) for one in found),
        gains=tuple((pieces.text(gain.token), gain) for gain in largest_gains(found, TOKENS)),
    )
