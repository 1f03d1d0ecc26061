"""Assign examples to rows, and rows to micro-batches; `Layout`, which every method is, has the settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from lowlevel.batch.layout import PackedBatch, Shape, build_batch
from lowlevel.batch.segments import Segment

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
    examples: Sequence[Example], size: Callable[[Example], int], layout: Layout
) -> list[list[list[Example]]]:
    """Examples by micro-batch and row; `size` gives an example's positions. Without packing, each gets its own row.

    With packing and a `Shape`, a micro-batch is one long row, which needs less padding than several.
    """
    shape = layout.shape
    if layout.packing:
        lengths = [size(example) for example in examples]
        packed = _pack_alike(lengths, shape) if shape else pack(lengths, layout.row_length)
        rows = [[examples[i] for i in row] for row in packed]
    else:
        rows = [[example] for example in examples]
    number = 1 if layout.packing and shape else layout.batch_size
    return [rows[start : start + number] for start in range(0, len(rows), number)]


@dataclass(frozen=True)
class Layout:
    """How a method lays its examples out. With packing, they share rows of `row_length` positions."""

    config: Any  # the section of the method
    batch_size: int  # examples, pairs or completions per micro-batch; with packing, rows
    row_length: int
    packing: bool
    shape: Shape | None = None  # round batches up to few shapes; a packed micro-batch is then one long row
    columns: tuple[str, ...] = ()  # names of the examples' `values` that the loss reads
    paired: ClassVar[bool] = False  # an example has two completions

    def count(self, batch: PackedBatch) -> float:
        """What a sum of losses is divided by, over the micro-batches of a step: examples, if not tokens."""
        return len(batch.data_rows)

    def held_out_scores(self, seen: Mapping[str, Tensor]) -> dict[str, float]:
        """Scores of held-out examples besides means, from `LossSums.examples` and their lengths: (n,) each."""
        return {}

    def size(self, example: Any) -> int:
        """Positions of an example: all tokens but the last."""
        return len(example.input_ids) - 1


class ExampleLayout(Layout, ABC):
    """One whose examples are laid out one by one: rows that share a prompt are in batch/replies.py."""

    @abstractmethod
    def segments(self, example: Any, number: int) -> Sequence[Segment]:
        """An example's segments; `number` is its place in the micro-batch. Without packing each has its own row."""

    def micro_batches(self, examples: Sequence[Any]) -> list[PackedBatch]:
        """The examples of one step in rows."""
        made = []
        for groups in micro_batch_rows(examples, self.size, self):
            numbers, rows = count(), list[Sequence[Segment]]()
            for group in groups:
                found = [segment for example in group for segment in self.segments(example, next(numbers))]
                rows += [found] if self.packing else [[segment] for segment in found]
            values = [example.values for group in groups for example in group] if self.columns else None
            made.append(build_batch(rows, pairs=self.paired, shape=self.shape, values=values))
        return made
