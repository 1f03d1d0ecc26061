"""The layout's mask as spans: neighbouring queries that attend causally to their own list of keys.

    row          | prompt chosen | rejected | prompt chosen | rejected | padding |
    spans        |       1       |     2    |       3       |     4    |    5    |
    keys of 1    prompt chosen                 keys of 2    prompt rejected

Prompt and chosen completion are neighbours, so they are one causal span. The rejected completion is a second span; its
keys are the prompt's, listed again, and its own. Padding gets spans too, so that every position has an output.
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
    key_uses: np.ndarray | None  # (2, M) int64: up to two places in the list for each position; K: unused
    longest: int  # queries or keys of the largest span


def build_spans(
    rows: Sequence[Sequence[np.ndarray]], width: int, *, count: int | None = None, longest: int | None = None
) -> Spans:
    """Spans of flattened rows of `width` positions, given the branch_ids of each row's segments.

    For a fixed shape, empty spans are added up to `count`, and the list of keys is padded to twice the positions.
    Raises ValueError if a span is longer than `longest`.
    """
    ends, listed = [0], []
    for r, row in enumerate(rows):
        start = r * width
        for branches in row:
            end = start + len(branches)
            shares_prompt = bool(np.any(branches == 1) and np.any(branches == 2))
            split = start + int(np.count_nonzero(branches < 2)) if shares_prompt else end
            prompt = start + int(np.count_nonzero(branches == 0))
            ends.append(split)
            listed.append(np.arange(start, split))
            if shares_prompt:
                ends.append(end)
                listed.append(np.concatenate([np.arange(start, prompt), np.arange(split, end)]))
            start = end
        end = (r + 1) * width
        for first in range(start, end, longest or width):  # padding
            ends.append(min(first + (longest or width), end))
            listed.append(np.arange(first, ends[-1]))
    found = max(map(len, listed))
    if longest is not None and found > longest:
        raise ValueError(f"a span of {found} positions, longer than the batch's bound of {longest}")
    missing = count - len(listed) if count else 0
    key_index, positions = np.concatenate(listed), len(rows) * width
    size = 2 * positions if count else len(key_index)
    shared = len(key_index) > positions
    return Spans(
        queries=np.pad(np.array(ends, np.int32), (0, missing), mode="edge"),
        keys=np.pad(np.cumsum([0, *map(len, listed)], dtype=np.int32), (0, missing), mode="edge"),
        key_index=np.pad(key_index, (0, size - len(key_index))) if shared else None,
        key_uses=_uses(key_index, positions, size) if shared else None,
        longest=found,
    )


def _uses(key_index: np.ndarray, positions: int, nowhere: int) -> np.ndarray:
    """First place of each position in the list, and the last one if it differs: (2, positions)."""
    uses = np.full((2, positions), nowhere)
    places = np.arange(len(key_index))
    uses[1, key_index] = places  # numpy keeps the last of several values for one element
    uses[0, key_index[::-1]] = places[::-1]
    uses[1, uses[0] == uses[1]] = nowhere
    return uses
