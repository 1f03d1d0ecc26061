"""Assign examples to rows, and rows to micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lowlevel.batch.layout import Shape

Example = TypeVar("Example")


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: item numbers by row, rows and items in ascending order. No row exceeds `capacity`.

    Uses at most 11/9 of the fewest possible rows plus one (Johnson et al., SIAM J. Computing 3, 1974).
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] > capacity:
            raise ValueError(f"a segment of {lengths[item]} positions does not fit a row of {capacity}")
        fit = next((r for r, free in enumerate(room) if free >= lengths[item]), None)
        if fit is None:
            rows.append([])
            room.append(capacity)
            fit = len(rows) - 1
        rows[fit].append(item)
        room[fit] -= lengths[item]
    return sorted(sorted(row) for row in rows)


def divide(loads: Sequence[int], size: int, most: int | None = None) -> list[list[int]]:
    """Item numbers for each of `size` shares, ascending: the largest item first, each to the share with the least load
    so far (Graham, SIAM J. Applied Mathematics 17, 1969), of those that have fewer than `most` items.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    sums = [0] * size
    for item in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        least = min((k for k in range(size) if most is None or len(shares[k]) < most), key=sums.__getitem__)
        shares[least].append(item)
        sums[least] += loads[item]
    return [sorted(share) for share in shares]


def _pack_alike(lengths: Sequence[int], shape: Shape) -> list[list[int]]:
    """As many rows as `pack` needs, or the next multiple of `shape.shares`, with about equal sums if the capacity and
    the items allow it: rows of about one size are of few shapes, and several GPUs end at the same time.
    """
    rows = pack(lengths, shape.capacity)
    count = -(-len(rows) // (shape.shares or 1)) * shape.shares
    if not 0 < count <= len(lengths):
        return rows
    alike = divide(lengths, count)
    fits = max(sum(lengths[i] for i in row) for row in alike) <= shape.capacity
    return sorted(alike) if fits else rows


def micro_batch_rows(
    examples: Sequence[Example],
    size: Callable[[Example], int],
    batch_size: int,
    row_length: int,
    packing: bool,
    shape: Shape | None,
) -> list[list[list[Example]]]:
    """Examples by micro-batch and row; `size` gives an example's positions. Without packing, each gets its own row.

    With packing and a `shape`, a micro-batch is one long row, which needs less padding than several.
    """
    if packing:
        lengths = [size(example) for example in examples]
        rows = [
            [examples[i] for i in row] for row in (_pack_alike(lengths, shape) if shape else pack(lengths, row_length))
        ]
    else:
        rows = [[example] for example in examples]
    count = 1 if packing and shape else batch_size
    return [rows[start : start + count] for start in range(0, len(rows), count)]
