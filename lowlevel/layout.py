"""The packed layout: examples as segments, segments in rows of fixed shape, and the one rule that makes every mask.

An SFT example is one segment. A preference pair is laid out as shared prompt, then chosen, then rejected: the prompt is
computed once. Its last token is repeated at the head of each branch, because it predicts two first tokens:

    position   0 ... p-2 | p-1   p  p+1 ... | p-1   p  p+1 ...
    branch     0 ... 0   | 1     1  1       | 2     2  2
    input      prompt    | last  chosen ... | last  rejected ...
    target     -         | chosen ......... | rejected .........

Rule: a query sees a key iff key <= query, same segment, and the key is in branch 0 or in the query's own branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowlevel.hashing import mix32_array

IGNORED = -100
PADDING = -1


@dataclass(frozen=True)
class Segment:
    """One example, or one branch of a pair, as it lies in a row. Arrays are (n,) integers."""

    row: int  # data row, for dropout keys and error messages
    pair: int  # sequence number of a target is pair (branch 0 or 1) or pair + number of pairs (branch 2)
    input_ids: np.ndarray
    position_ids: np.ndarray
    branch_ids: np.ndarray
    targets: np.ndarray  # already shifted; IGNORED where nothing is learned

    def __len__(self) -> int:
        """Positions in the row."""
        return len(self.input_ids)


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch. S sequences are scored: one an SFT example, two a pair (all chosen first, then all rejected)."""

    input_ids: Tensor  # (rows, T) int64
    position_ids: Tensor  # (rows, T) int64
    segment_ids: Tensor  # (rows, T) int64, PADDING where there is no token
    branch_ids: Tensor  # (rows, T) int64
    targets: Tensor  # (rows, T) int64, IGNORED where nothing is scored
    dropout_keys: Tensor  # (rows, T) int32, a hash of (data row, branch, position)
    scored_positions: Tensor  # (N,) int64, into the flattened rows
    scored_targets: Tensor  # (N,) int64
    sequence_index: Tensor  # (S, L) int64, into the N scored tokens; N itself stands for "none"
    lengths: Tensor  # (S,) int64, scored tokens
    data_rows: tuple[int, ...]  # host: data row of each example
    num_tokens: int  # host: tokens that are not padding
    num_scored: int  # host: N
    plain: bool  # host: each row is one sequence from position 0, so a causal mask alone is enough

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device; copies do not wait for the device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for field in fields(self)
            for value in [getattr(self, field.name)]
        }
        return PackedBatch(**moved)

    def sequence_sums(self, token_values: Tensor) -> Tensor:
        """Sum values of the N scored tokens by sequence: (N,) -> (S,). Order of addition is fixed on every device."""
        padded = torch.cat([token_values, token_values.new_zeros(1)])
        return padded[self.sequence_index].sum(-1)


def attention_mask(batch: PackedBatch) -> Tensor:
    """The rule as a boolean mask, True where a query may look, (rows, 1, T, T)."""
    segment, branch = batch.segment_ids, batch.branch_ids
    order = torch.arange(segment.shape[1], device=segment.device)
    causal = order[:, None] >= order[None, :]
    same_segment = segment[:, :, None] == segment[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return (causal & same_segment & visible).unsqueeze(1)


def sft_segment(row: int, number: int, input_ids: np.ndarray, labels: np.ndarray) -> Segment:
    """An example of L tokens as L-1 positions: position t predicts token t+1. `number`: its place in the batch."""
    size = len(input_ids) - 1
    return Segment(row, number, input_ids[:-1], np.arange(size), np.zeros(size, int), labels[1:])


def pair_segment(row: int, number: int, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Segment:
    """A pair with the prompt shared: len(prompt) - 1 + len(chosen) + len(rejected) positions."""
    shared = len(prompt) - 1
    parts = [_branch(prompt, completion) for completion in (chosen, rejected)]
    return Segment(
        row,
        number,
        np.concatenate([prompt[:-1], *(part[0] for part in parts)]),
        np.concatenate([np.arange(shared), *(part[1] for part in parts)]),
        np.repeat([0, 1, 2], [shared, len(chosen), len(rejected)]),
        np.concatenate([np.full(shared, IGNORED), chosen, rejected]),
    )


def pair_rows(
    row: int, number: int, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
) -> tuple[Segment, Segment]:
    """The same pair as two plain sequences, prompt + completion each: for comparison with the shared layout."""
    shared = len(prompt) - 1
    segments = []
    for branch, completion in ((1, chosen), (2, rejected)):
        ids, positions = _branch(prompt, completion)
        segments.append(
            Segment(
                row,
                number,
                np.concatenate([prompt[:-1], ids]),
                np.concatenate([np.arange(shared), positions]),
                np.repeat([0, branch], [shared, len(completion)]),
                np.concatenate([np.full(shared, IGNORED), completion]),
            )
        )
    return segments[0], segments[1]


def _branch(prompt: np.ndarray, completion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first = len(prompt) - 1
    return np.concatenate([prompt[-1:], completion[:-1]]), np.arange(first, first + len(completion))


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


def build_batch(rows: Sequence[Sequence[Segment]], *, pairs: bool, length: int | None = None) -> PackedBatch:
    """Lay segments out in rows of `length` positions (default: the longest row, rounded up to a multiple of 8).

    Segment numbers must run from 0 over the whole batch; the two branches of a pair share one number.
    """
    longest = max(sum(map(len, row)) for row in rows)
    width = length or -(-longest // 8) * 8
    grids = {name: np.zeros((len(rows), width), np.int64) for name in ("input_ids", "position_ids", "branch_ids")}
    segment_ids = np.full((len(rows), width), PADDING, np.int64)
    targets = np.full((len(rows), width), IGNORED, np.int64)
    sequence_ids = np.full((len(rows), width), PADDING, np.int64)
    data_rows = np.zeros((len(rows), width), np.uint32)
    number = {segment.pair: segment.row for row in rows for segment in row}
    for r, row in enumerate(rows):
        start = 0
        for s, segment in enumerate(row):
            span = slice(start, start + len(segment))
            for name, grid in grids.items():
                grid[r, span] = getattr(segment, name)
            segment_ids[r, span], targets[r, span], data_rows[r, span] = s, segment.targets, segment.row
            sequence_ids[r, span] = segment.pair + (segment.branch_ids == 2) * len(number)
            start += len(segment)
    scored = np.flatnonzero(targets.ravel() != IGNORED)
    index, lengths = _sequence_index(sequence_ids.ravel()[scored], len(number) * (2 if pairs else 1))
    keys = mix32_array(data_rows) + grids["branch_ids"].astype(np.uint32) * np.uint32(0x632BE5AB)
    keys = mix32_array(mix32_array(keys) + grids["position_ids"].astype(np.uint32))
    return PackedBatch(
        **{name: torch.from_numpy(grid) for name, grid in grids.items()},
        segment_ids=torch.from_numpy(segment_ids),
        targets=torch.from_numpy(targets),
        dropout_keys=torch.from_numpy(keys.view(np.int32)),
        scored_positions=torch.from_numpy(scored),
        scored_targets=torch.from_numpy(targets.ravel()[scored]),
        sequence_index=torch.from_numpy(index),
        lengths=torch.from_numpy(lengths),
        data_rows=tuple(number[i] for i in range(len(number))),
        num_tokens=int((segment_ids != PADDING).sum()),
        num_scored=len(scored),
        plain=all(len(row) == 1 and bool((np.diff(row[0].position_ids) == 1).all()) for row in rows),
    )


def _sequence_index(owners: np.ndarray, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """Scored tokens by sequence, (S, L) padded with N, and the number of tokens of each, (S,)."""
    lengths = np.bincount(owners, minlength=sequences)
    index = np.full((sequences, max(1, lengths.max(initial=0))), len(owners), np.int64)
    for sequence in range(sequences):
        index[sequence, : lengths[sequence]] = np.flatnonzero(owners == sequence)
    return index, lengths.astype(np.int64)
