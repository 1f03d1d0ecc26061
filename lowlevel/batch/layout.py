"""The packed layout: examples as segments, segments in rows of fixed shape, and the one rule that makes every mask.

An SFT example is one segment. A preference pair is laid out as shared prompt, then chosen, then rejected: the prompt is
computed once. Its last token is repeated at the head of each branch, because it predicts two first tokens:

    position   0 ... p-2 | p-1   p  p+1 ... | p-1   p  p+1 ...
    branch     0 ... 0   | 1     1  1       | 2     2  2
    input      prompt    | last  chosen ... | last  rejected ...
    target     -         | chosen ......... | rejected .........

Rule: a query sees a key iff key <= query, same segment, and the key is in branch 0 or in the query's own branch.

The rule has two forms: `attention_mask`, the readable one, and spans (spans.py), for kernels that take no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.spans import build_spans
from lowlevel.hashing import mix32_array
from lowlevel.labels import IGNORED

PADDING = -1
# Separates a row's branches in the hash. Another number would give other dropout masks: no older run could be resumed
# or replayed.
BRANCH_STEP = 0x632BE5AB


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
    """A micro-batch. S sequences are scored: one an SFT example, two a pair (all chosen first, then all rejected).

    A batch that was filled up to a fixed shape (`Shape`) scores some positions that belong to no sequence, and holds
    examples that are not `real`: they reach no sum.
    """

    input_ids: Tensor  # (rows, T) int64
    position_ids: Tensor  # (rows, T) int64
    segment_ids: Tensor  # (rows, T) int64, PADDING where there is no token
    branch_ids: Tensor  # (rows, T) int64
    targets: Tensor  # (rows, T) int64, IGNORED where nothing is scored
    dropout_keys: Tensor  # (rows, T) int32, a hash of (data row, branch, position)
    scored_positions: Tensor  # (N,) int64, into the flattened rows
    scored_targets: Tensor  # (N,) int64
    sequence_index: Tensor  # (S, L) int64, into the N scored tokens; N itself stands for "none"
    sequence_ids: Tensor  # (N,) int64, the sequence of a scored token; S stands for "none"
    lengths: Tensor  # (S,) int64, scored tokens
    real: Tensor  # (examples,) bool
    span_queries: Tensor  # (G + 1,) int32: span g's queries are positions span_queries[g] to span_queries[g + 1]
    span_keys: Tensor  # (G + 1,) int32: its keys are those numbers of the list of keys
    key_index: Tensor | None  # (K,) int64: position of each listed key; None: the positions themselves
    key_uses: Tensor | None  # (2, rows * T) int64: where a position is listed; K stands for "nowhere"
    longest: int  # host: no span has more queries or keys
    data_rows: tuple[int, ...]  # host: data row of each real example
    num_tokens: int  # host: tokens that are not padding
    num_scored: int  # host: scored tokens that belong to a sequence
    row_values: Tensor | None = None  # (C, examples) fp32: numeric columns of the rows for a custom loss (data.columns)
    reference_logps: Tensor | None = None  # (S,) fp32, where a cache knows them (reference_cache.py); fillers 0
    content: str = ""  # host: hash of what the reference pass sees, where there is a cache

    @property
    def belongs(self) -> Tensor:
        """(N,) bool: the scored positions that are in sums; the others belong to no sequence and fill up a shape."""
        return self.sequence_ids < len(self.lengths)

    def values(self, columns: Sequence[str]) -> dict[str, Tensor]:
        """The rows' numeric columns by name, (examples,) fp32 each; 0 for dummy examples."""
        return {} if self.row_values is None else dict(zip(columns, self.row_values, strict=True))

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device; copies to a GPU do not wait for it."""
        pin = device.type == "cuda" and not self.input_ids.is_cuda
        return self.with_tensors(
            {n: (t.pin_memory() if pin else t).to(device, non_blocking=True) for n, t in self.tensors().items()}
        )

    def with_tensors(self, tensors: dict[str, Any]) -> PackedBatch:
        """The same batch with other tensors, by field name."""
        return replace(self, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def sequence_sums(self, token_values: Tensor) -> Tensor:
        """Sum values of the N scored tokens by sequence: (N,) -> (S,). Order of addition is fixed on every device."""
        sums: Tensor = _SequenceSums.apply(token_values, self.sequence_index, self.sequence_ids)  # type: ignore[no-untyped-call]
        return sums


class _SequenceSums(torch.autograd.Function):
    """Two gathers: autograd's own gradient of the indexing would sort the whole index."""

    @staticmethod
    def forward(ctx: Any, token_values: Tensor, sequence_index: Tensor, sequence_ids: Tensor) -> Tensor:
        ctx.save_for_backward(sequence_ids)
        return torch.cat([token_values, token_values.new_zeros(1)])[sequence_index].sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (sequence_ids,) = ctx.saved_tensors
        return torch.cat([grad, grad.new_zeros(1)])[sequence_ids], None, None


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


@dataclass(frozen=True)
class Shape:
    """How a batch is filled up, so that few different shapes occur and each can be captured once.

    Every size is rounded up: positions to a multiple of `positions`, scored tokens to three quarters of them or all,
    examples to a multiple of `examples`; `longest` bounds a sequence.
    """

    positions: int
    examples: int
    longest: int
    capacity: int  # most positions of a packed micro-batch


def build_batch(
    rows: Sequence[Sequence[Segment]],
    *,
    pairs: bool,
    shape: Shape | None = None,
    values: Sequence[Sequence[float]] | None = None,
) -> PackedBatch:
    """Lay segments out in rows as long as the longest, rounded up to a multiple of 8 (of `shape.positions`).

    Segment numbers must run from 0 over the whole batch; the two branches of a pair share one number. `values` are the
    numeric columns of each example, in the order of these numbers.
    """
    used = [sum(map(len, row)) for row in rows]
    width = _row_width(max(used), shape)
    row_of = {segment.pair: segment.row for row in rows for segment in row}
    examples = _round_up(len(row_of), shape.examples) if shape else len(row_of)
    sequences = examples * (2 if pairs else 1)
    grids = _fill_grids(rows, width, examples)
    owners, data_rows = grids.pop("owners"), grids.pop("data_rows")
    scored, sequence_ids, num_scored = _scored_tokens(grids["targets"], owners, sequences, shape)
    index, lengths = _sequence_index(sequence_ids, sequences, shape.longest if shape else None)
    branches = [[segment.branch_ids for segment in row] for row in rows]
    bound = shape.longest if shape else None
    count = sequences + len(rows) * -(-width // bound) if bound else None  # rows may be padding for the most part
    spans = build_spans(branches, width, count=count, longest=bound)
    arrays = {
        **grids,
        "dropout_keys": _dropout_keys(data_rows, grids["branch_ids"], grids["position_ids"]),
        "scored_positions": scored,
        "scored_targets": np.maximum(grids["targets"].ravel()[scored], 0),
        "sequence_index": index,
        "sequence_ids": sequence_ids,
        "lengths": lengths,
        "real": np.arange(examples) < len(row_of),
        "span_queries": spans.queries,
        "span_keys": spans.keys,
        "key_index": spans.key_index,
        "key_uses": spans.key_uses,
    }
    return PackedBatch(
        **{name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()},  # type: ignore[arg-type]
        longest=bound or spans.longest,
        data_rows=tuple(row_of[i] for i in range(len(row_of))),
        num_tokens=sum(used),
        num_scored=num_scored,
        row_values=None if values is None else _row_values(values, examples),
    )


def _row_values(values: Sequence[Sequence[float]], examples: int) -> Tensor:
    """(C, examples) fp32, 0 for dummy examples."""
    table = torch.tensor(values, dtype=torch.float32).T
    return torch.nn.functional.pad(table, (0, examples - len(values)))


def _row_width(longest: int, shape: Shape | None) -> int:
    """Positions of a row whose fullest one has `longest`."""
    width = _round_up(longest, 8)
    if shape is None:
        return width
    return min(_round_up(width, shape.positions), max(width, _round_up(shape.capacity, 8)))  # no row exceeds it


def _fill_grids(rows: Sequence[Sequence[Segment]], width: int, examples: int) -> dict[str, np.ndarray]:
    """What lies at each position, (rows, width) by name; "owners" are sequence numbers, scored or not."""
    size = len(rows), width
    grids = {name: np.zeros(size, np.int64) for name in ("input_ids", "position_ids", "branch_ids")}
    grids |= {"segment_ids": np.full(size, PADDING, np.int64), "targets": np.full(size, IGNORED, np.int64)}
    grids |= {"owners": np.full(size, PADDING, np.int64), "data_rows": np.zeros(size, np.uint32)}
    for r, row in enumerate(rows):
        start = 0
        for s, segment in enumerate(row):
            values = {
                "input_ids": segment.input_ids,
                "position_ids": segment.position_ids,
                "branch_ids": segment.branch_ids,
                "segment_ids": s,
                "targets": segment.targets,
                "owners": segment.pair + (segment.branch_ids == 2) * examples,
                "data_rows": segment.row,
            }
            for name, value in values.items():
                grids[name][r, start : start + len(segment)] = value
            start += len(segment)
    return grids


def _scored_tokens(
    targets: np.ndarray, owners: np.ndarray, sequences: int, shape: Shape | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Positions (N,) that are scored, the sequence of each, (N,), and how many belong to one.

    For a fixed shape, positions without a target fill N up to three quarters of all positions, or to all; their
    sequence is `sequences`, which stands for "none".
    """
    marked = targets.ravel() != IGNORED
    scored = np.flatnonzero(marked)
    sequence_ids, num_scored = owners.ravel()[scored], len(scored)
    if shape:
        part = targets.size * 3 // 4
        idle = np.flatnonzero(~marked)[: (targets.size if num_scored > part else part) - num_scored]
        scored = np.concatenate([scored, idle])
        sequence_ids = np.concatenate([sequence_ids, np.full(len(idle), sequences)])
    return scored, sequence_ids, num_scored


def _dropout_keys(data_rows: np.ndarray, branch_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """A hash of each position's data row, branch and position, (rows, width) int32."""
    by_row = mix32_array(data_rows)
    by_branch = mix32_array(by_row + branch_ids.astype(np.uint32) * np.uint32(BRANCH_STEP))
    return mix32_array(by_branch + position_ids.astype(np.uint32)).view(np.int32)


def _sequence_index(owners: np.ndarray, sequences: int, longest: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Scored tokens by sequence, (S, L) filled with N, and the number of tokens of each, (S,); a filler has one."""
    lengths = np.bincount(owners, minlength=sequences)[:sequences]
    index = np.full((sequences, longest or max(1, lengths.max(initial=0))), len(owners), np.int64)
    for sequence in np.flatnonzero(lengths):
        index[sequence, : lengths[sequence]] = np.flatnonzero(owners == sequence)
    return index, np.maximum(lengths, 1 if longest else 0).astype(np.int64)  # losses by length divide by it


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
