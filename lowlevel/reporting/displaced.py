"""The tokens that gained the probability of displaced pairs, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowlevel.errors import ConfigError
from lowlevel.inspection import PairRecord, TokenGain, inspect_pairs, largest_gains
from lowlevel.inspection.displacement import NOTICED
from lowlevel.inspection.figures import percent, signed
from lowlevel.inspection.lines import FallLine, fall_line
from lowlevel.inspection.opening import example_of_row, last_weights
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.methods.dpo import DPO
from lowlevel.reporting.pairs import PairTables
from lowlevel.running.reopening import Reopened, step_examples

SHOWN = 10  # tokens in the table
NAMED = 3  # of them in the terminal
NOTICED_TEXT = percent(NOTICED)


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
    gains: tuple[tuple[str, TokenGain], ...]  # the tokens that gained most there, with their texts

    @property
    def sentence(self) -> str:
        """For a terminal."""
        if not self.falls:
            return f"none of {self.looked} pairs {self.origin} is below its reference ({self.weights})"
        named = [f"{text} {signed(gain.gained, 3)} ({gain.positions})" for text, gain in self.gains[:NAMED]]
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
    weights = last_weights(folder, opened.note)
    tokenizer, data = opened.data()
    if tables is None:
        step = max(record["step"] for record in folder.read_metrics())
        examples, origin = step_examples(config, data, step), f"of step {step}"
    else:
        rows = [row["row"] for row in tables.lowest[:limit]]
        examples = [example_of_row(config, tokenizer, data, row) for row in rows]
        origin = f"with the lowest chosen log-ratios of steps {tables.first} to {tables.last}"
    run = opened.load(weights.adapter, reference=True)
    assert isinstance(run.method, DPO)
    records = inspect_pairs(run.policy, run.method, examples)
    return displaced_pairs(records, TokenPieces(run.tokenizer), weights=weights.line, origin=origin, limit=limit)


def displaced_pairs(
    records: Sequence[PairRecord], pieces: TokenPieces, *, weights: str, origin: str, limit: int
) -> DisplacedPairs:
    """Up to `limit` pairs of `records`, those displaced farthest, and the tokens that gained over all of them."""
    farthest = sorted(records, key=lambda record: float(record.chosen.logratio))[:limit]
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
        gains=tuple((pieces.text(gain.token), gain) for gain in largest_gains(found, SHOWN)),
    )
