"""Which tokens took the probability of displaced pairs: what the page and the terminal say, from inspected records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowlevel.inspection import PairRecord, largest_gains
from lowlevel.inspection.displacement import NOTICED
from lowlevel.inspection.figures import percent, signed
from lowlevel.inspection.lines import FallLine, fall_line
from lowlevel.inspection.pieces import TokenPieces

SHOWN = 10  # tokens in the table
NAMED = 3  # of them in the terminal
NOTICED_TEXT = percent(NOTICED)


@dataclass(frozen=True)
class GainLine:
    """A token that took probability, as texts."""

    token: str
    id: str
    gained: str
    positions: str


@dataclass(frozen=True)
class DisplacedPairs:
    """Pairs that were looked at with the run's weights.

    Attributes:
        weights: one line.
        origin: how the pairs were found.
        looked: pairs looked at.
        below: those of them that these weights displace.
        falls: data row and line of the displaced pairs that are shown, farthest first.
        lost: probability that their chosen tokens lost, summed over the positions where they lost any.
        positions: how many those are.
        gains: the tokens that gained most there, from the chosen tokens and from others.
    """

    weights: str
    origin: str
    looked: int
    below: int
    falls: tuple[tuple[int, FallLine], ...]
    lost: float
    positions: int
    gains: tuple[GainLine, ...]

    @property
    def sentence(self) -> str:
        """For a terminal."""
        if not self.falls:
            return f"none of {self.looked} pairs {self.origin} is below its reference ({self.weights})"
        tokens = ", ".join(f"{gain.token} {gain.gained} ({gain.positions})" for gain in self.gains[:NAMED]) or "none"
        return (
            f"{self.below} of {self.looked} pairs {self.origin} below their reference ({self.weights}); at the "
            f"{self.positions} positions where chosen tokens of {len(self.falls)} fell, by {self.lost:.3f} in all, "
            f"gained most: {tokens}"
        )


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
        gains=tuple(
            GainLine(pieces.text(gain.token), str(gain.token), signed(gain.gained, 3), str(gain.positions))
            for gain in largest_gains(found, SHOWN)
        ),
    )
