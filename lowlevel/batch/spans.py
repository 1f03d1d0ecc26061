"""The layout's mask as spans: neighbouring queries that attend causally to their own list of keys.

    row          | prompt first | second | third | prompt first | second | padding |
    spans        |      1       |    2   |   3   |      4       |    5   |    6    |
    keys of 1    prompt first      keys of 2    prompt second      keys of 3    prompt third

Prompt and first completion are neighbours, so they are one causal span. Each other completion is a span; its keys are
the prompt's, listed again, and its own. Padding gets spans too, so that every position has an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spans:
    """G spans over M positions, with K listed keys."""

    queries: np.ndarray  # (G + 1,) int32: span g is positions queries[g] to queries[g + 1]
    keys: np.ndarray  # (G + 1,) int32: its keys are the listed keys keys[g] to keys[g + 1]
    key_index: np.ndarray | None  # (K,) int64: position of each listed key; None: the positions themselves
    key_uses: np.ndarray | None  # (U, M) int64: places of each position in the list, ascending; K: unused
    longest: int  # queries or keys of the largest span


def build_spans(
    rows: Sequence[Sequence[np.ndarray]], width: int, *, count: int | None = None, longest: int | None = None
) -> Spans:
    """Spans of flattened rows of `width` positions, given the branch_ids of each row's segments.

    U, the most uses of a position, is rounded up to a power of two. For a fixed shape, empty spans are added up to
    `count`, and the list of keys is padded to 2, 4, 8, ... times the positions. Raises ValueError if a span is longer
    than `longest`.
    """
    ends, listed = [0], []
    for r, row in enumerate(rows):
        start = r * width
        for branches in row:
            prompt = np.arange(start, start + int(np.count_nonzero(branches == 0)))
            first, *others = np.split(np.arange(start, start + len(branches)), _starts(branches))
            listed += [first, *(np.concatenate([prompt, own]) for own in others)]
            ends += [int(own[-1]) + 1 for own in (first, *others)]
            start = ends[-1]
        end = (r + 1) * width
        for place in range(start, end, longest or width):  # padding
            ends.append(min(place + (longest or width), end))
            listed.append(np.arange(place, ends[-1]))
    found = max(map(len, listed))
    if longest is not None and found > longest:
        raise ValueError(f"a span of {found} positions, longer than the batch's bound of {longest}")
    missing = count - len(listed) if count else 0
    key_index, positions = np.concatenate(listed), len(rows) * width
    size = positions * max(2, _power_of_two(-(-len(key_index) // positions))) if count else len(key_index)
    shared = len(key_index) > positions
    return Spans(
        queries=np.pad(np.array(ends, np.int32), (0, missing), mode="edge"),
        keys=np.pad(np.cumsum([0, *map(len, listed)], dtype=np.int32), (0, missing), mode="edge"),
        key_index=np.pad(key_index, (0, size - len(key_index))) if shared else None,
        key_uses=_uses(key_index, positions, size) if shared else None,
        longest=found,
    )


def _starts(branches: np.ndarray) -> np.ndarray:
    """First position of each completion but the first."""
    return np.flatnonzero((branches[1:] != branches[:-1]) & (branches[:-1] > 0)) + 1


def _power_of_two(value: int) -> int:
    """The next one from a value of 1 or more: few different sizes."""
    return 1 << (value - 1).bit_length()


def _uses(key_index: np.ndarray, positions: int, nowhere: int) -> np.ndarray:
    """Places of each position in the list, ascending: (U, positions)."""
    counts = np.bincount(key_index, minlength=positions)
    by_position = np.argsort(key_index, kind="stable")
    use = np.arange(len(key_index)) - np.repeat(np.cumsum(counts) - counts, counts)  # of how many before it
    uses = np.full((_power_of_two(int(counts.max())), positions), nowhere)
    uses[use, key_index[by_position]] = by_position
    return uses
