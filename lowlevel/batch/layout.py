"""A micro-batch: tokens in rows of one width, the targets that are scored, and what each position attends to.

The plain form, which every trainer has, is one sequence per row, padded on the right. An SFT example is one row; a
preference pair is two: prompt + chosen and prompt + rejected (`data.packing = false`).

Packed rows are a faster form of the same batch, with the same log-probabilities: several segments share a row. A
`Segment` is a prompt with any number of completions (a preference pair has two), and the prompt is computed once. Its
last token is repeated at the head of each completion, because it predicts the first token of all:

    position   0 ... p-2 | p-1   p  p+1 ... | p-1   p  p+1 ... | ...
    branch     0 ... 0   | 1     1  1       | 2     2  2       | 3 ...
    input      prompt    | last  first ...  | last  second ... | ...
    target     -         | first .........  | second ......... | ...

A query sees a key if key <= query, both are in one segment, and the key is in branch 0 (the prompt) or in the query's
own branch. An SFT example is all branch 0. `attention_mask` is this rule as a mask; spans.py has it for kernels without
a mask. Each completion is a sequence of its own, whose log-probabilities `sequence_sums` adds up.

A `Shape` adds dummy tokens and examples until few different sizes remain, and execution.py compiles and captures each
set of sizes once. Losses only use `scored_positions`, `scored_targets`, and `sequence_sums`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lowlevel.batch.segments import Segment
from lowlevel.batch.spans import build_spans
from lowlevel.hashing import mix32_array
from lowlevel.labels import IGNORED

PADDING = -1
BRANCH_STEP = 0x632BE5AB  # per branch, in dropout keys; another number would change the masks of older runs


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch with S sequences to score: one per example, two per pair (all chosen, then all rejected).

    With a `Shape`, some scored positions belong to no sequence, and some examples are dummies (`real` is False); all
    sums exclude both.
    """

    input_ids: Tensor  # (rows, T) int64
    position_ids: Tensor  # (rows, T) int64
    segment_ids: Tensor  # (rows, T) int64, number in the row; PADDING at padding
    branch_ids: Tensor  # (rows, T) int64
    targets: Tensor  # (rows, T) int64, the next token; IGNORED if not scored
    dropout_keys: Tensor  # (rows, T) int32, a hash of (data row, branch, position)
    scored_positions: Tensor  # (N,) int64, into the flattened rows
    scored_targets: Tensor  # (N,) int64
    sequence_index: Tensor  # (S, L) int64, into the N scored tokens; N marks padding
    sequence_ids: Tensor  # (N,) int64, the sequence of each scored token; S marks a dummy token
    lengths: Tensor  # (S,) int64, scored tokens
    real: Tensor  # (examples,) bool
    span_queries: Tensor  # (G + 1,) int32: span g has the queries span_queries[g] to span_queries[g + 1]
    span_keys: Tensor  # (G + 1,) int32: and these entries of the list of keys
    key_index: Tensor | None  # (K,) int64: position of each listed key; None: the positions themselves
    key_uses: Tensor | None  # (U, rows * T) int64: places of each position in the list; K: unused
    longest: int  # host: upper bound on the queries and keys of a span
    data_rows: tuple[int, ...]  # host: data row of each real example
    num_tokens: int  # host: tokens without padding
    num_scored: int  # host: scored tokens that belong to a sequence
    row_values: Tensor | None = None  # (C, examples) fp32: the columns of data.columns, for a custom loss
    token_weights: Tensor | None = None  # (N,) fp32, of each scored token in the loss; None: 1
    total_weight: float | None = None  # host: their sum, without dummy tokens
    reference_logps: Tensor | None = None  # (S,) fp32, from reference_cache.py; 0 for dummies
    content: str = ""  # host: hash of what the reference pass reads, if there is a cache
    token_values: Tensor | None = None  # (C, N) fp32, sampled completions: methods/sampled.py; 0 for dummies
    facts: Mapping[str, float] = field(default_factory=dict)  # host, on a step's first: what is logged of its rollouts
    kl: Tensor | None = None  # () fp32, kto: mean log-ratio of the step's mismatched completions; None: it holds these
    mismatched: tuple[PackedBatch, ...] = ()  # host, kto: on the first micro-batch of a step, those that hold these

    @property
    def belongs(self) -> Tensor:
        """(N,) bool: scored positions that belong to a sequence."""
        return self.sequence_ids < len(self.lengths)

    @property
    def tied(self) -> Tensor:
        """(examples,) bool, of pairs: both completions are the same tokens, as in online_dpo for equal rewards."""
        targets = torch.cat([self.scored_targets, self.scored_targets.new_full((1,), IGNORED)])[self.sequence_index]
        chosen, rejected = targets.chunk(2)
        return (chosen == rejected).all(-1)

    def values(self, columns: Sequence[str]) -> dict[str, Tensor]:
        """The rows' numeric columns by name, (examples,) fp32 each; 0 for dummy examples."""
        return {} if self.row_values is None else dict(zip(columns, self.row_values, strict=True))

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device; copies to a GPU do not wait for it."""
        pin = device.type == "cuda"
        tensors = {n: t.pin_memory() if pin and not t.is_cuda else t for n, t in self.tensors().items()}
        return self.with_tensors({name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    def with_tensors(self, tensors: dict[str, Any]) -> PackedBatch:
        """The same batch with other tensors, by field name."""
        return replace(self, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by field name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def sequence_sums(self, token_values: Tensor) -> Tensor:
        """Sum the N scored tokens' values by sequence, (N,) -> (S,), in a fixed order on every device."""
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
    """The rule as a boolean mask, (rows, 1, T, T), True where a query sees a key."""
    segment, branch = batch.segment_ids, batch.branch_ids
    order = torch.arange(segment.shape[1], device=segment.device)
    causal = order[:, None] >= order[None, :]
    same_segment = segment[:, :, None] == segment[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return (causal & same_segment & visible).unsqueeze(1)


@dataclass(frozen=True)
class Shape:
    """How to round up the sizes of a batch, so that few different ones occur; methods/choice.py fits it to a run."""

    positions: int  # of a row: a multiple of this
    examples: int  # a multiple of this
    longest: int  # upper bound on the positions of a sequence
    capacity: int  # upper bound on the positions of a packed micro-batch
    shares: int = 1  # packed micro-batches of a step are alike in size, and a multiple of this; 0: as `pack` fills them
    fill: float = 0.75  # scored tokens are rounded up to this share of the positions, or to all of them


def build_batch(
    rows: Sequence[Sequence[Segment]],
    *,
    pairs: bool,
    shape: Shape | None = None,
    values: Sequence[Sequence[float]] | None = None,
) -> PackedBatch:
    """Lay segments out in rows, all as long as the longest, rounded up to a multiple of 8 (of `shape.positions`).

    The numbers of completions must run from 0 over the whole batch; with `pairs`, 2 n and 2 n + 1 are chosen and
    rejected of pair n. `values` are the numeric columns of each example (completion or pair), in their order.
    """
    used = [sum(map(len, row)) for row in rows]
    sides = 2 if pairs else 1
    row_of = {n // sides: segment.row for row in rows for segment in row for n in segment.numbers.tolist()}
    examples = _round_up(len(row_of), shape.examples) if shape else len(row_of)
    sequences = examples * sides
    longest, width = shape.longest if shape else None, row_width(max(used), shape)
    grids = _fill_grids(rows, width)
    sequence_of = grids["numbers"] // sides + grids["numbers"] % sides * examples
    room = int(grids["targets"].size * shape.fill) if shape else None
    scored, sequence_ids, num_scored = _scored_tokens(grids["targets"], sequence_of, sequences, room)
    weights = grids["weights"].ravel()[scored] if "weights" in grids else None
    index, lengths = _sequence_index(sequence_ids, sequences, longest)
    branches = [[segment.branch_ids for segment in row] for row in rows]
    count = sequences + len(rows) * -(-width // longest) if longest else None  # spans of examples and of padding
    spans = build_spans(branches, width, count=count, longest=longest)
    columns = None if values is None else torch.tensor(values, dtype=torch.float32).T
    tensor = torch.from_numpy
    return PackedBatch(
        input_ids=tensor(grids["input_ids"]),
        position_ids=tensor(grids["position_ids"]),
        segment_ids=tensor(grids["segment_ids"]),
        branch_ids=tensor(grids["branch_ids"]),
        targets=tensor(grids["targets"]),
        dropout_keys=tensor(_dropout_keys(grids["data_rows"], grids["branch_ids"], grids["position_ids"])),
        scored_positions=tensor(scored),
        scored_targets=tensor(np.maximum(grids["targets"].ravel()[scored], 0)),
        sequence_index=tensor(index),
        sequence_ids=tensor(sequence_ids),
        lengths=tensor(lengths),
        real=torch.arange(examples) < len(row_of),
        span_queries=tensor(spans.queries),
        span_keys=tensor(spans.keys),
        key_index=None if spans.key_index is None else tensor(spans.key_index),
        key_uses=None if spans.key_uses is None else tensor(spans.key_uses),
        longest=longest or spans.longest,
        data_rows=tuple(row_of[number] for number in range(len(row_of))),
        num_tokens=sum(used),
        num_scored=num_scored,
        row_values=None if columns is None else pad(columns, (0, examples - len(row_of))),
        token_weights=None if weights is None else tensor(weights),
        total_weight=None if weights is None else float(weights[:num_scored].sum(dtype=np.float64)),
    )


def row_width(longest: int, shape: Shape | None) -> int:
    """Positions of every row, if the longest needs `longest`."""
    width = _round_up(longest, 8)
    return min(_round_up(width, shape.positions), max(width, _round_up(shape.capacity, 8))) if shape else width


def _fill_grids(rows: Sequence[Sequence[Segment]], width: int) -> dict[str, np.ndarray]:
    """Values of each position by name, (rows, width)."""
    size = len(rows), width
    names = ["input_ids", "position_ids", "branch_ids", "numbers", "targets"]
    grids = {name: np.zeros(size, np.int64) for name in names}
    grids |= {"targets": np.full(size, IGNORED), "segment_ids": np.full(size, PADDING)}
    grids |= {"data_rows": np.zeros(size, np.uint32)}
    if any(segment.weights is not None for row in rows for segment in row):
        grids["weights"] = np.ones(size, np.float32)
    for r, row in enumerate(rows):
        start = 0
        for s, segment in enumerate(row):
            place = r, slice(start, start + len(segment))
            if segment.weights is not None:
                grids["weights"][place] = segment.weights
            for name in names:
                grids[name][place] = getattr(segment, name)
            grids["segment_ids"][place] = s
            grids["data_rows"][place] = segment.row
            start += len(segment)
    return grids


def _scored_tokens(
    targets: np.ndarray, sequence_of: np.ndarray, sequences: int, fill: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Scored positions (N,), followed by dummies up to `fill`; the sequence of each (N,); the number of real ones."""
    marked = targets.ravel() != IGNORED
    scored = np.flatnonzero(marked)
    sequence_ids, num_scored = sequence_of.ravel()[scored], len(scored)
    if fill is not None:
        idle = np.flatnonzero(~marked)[: (targets.size if num_scored > fill else fill) - num_scored]
        scored = np.concatenate([scored, idle])
        sequence_ids = np.concatenate([sequence_ids, np.full(len(idle), sequences)])
    return scored, sequence_ids, num_scored


def _dropout_keys(data_rows: np.ndarray, branch_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """A hash of each position's data row, branch and position, (rows, width) int32."""
    by_row = mix32_array(data_rows)
    by_branch = mix32_array(by_row + branch_ids.astype(np.uint32) * np.uint32(BRANCH_STEP))
    return mix32_array(by_branch + position_ids.astype(np.uint32)).view(np.int32)


def _sequence_index(sequence_ids: np.ndarray, sequences: int, longest: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Scored tokens of each sequence, (S, L) padded with N, and their number, (S,), which is 1 for dummies."""
    lengths = np.bincount(sequence_ids, minlength=sequences)[:sequences]
    index = np.full((sequences, longest or max(1, lengths.max(initial=0))), len(sequence_ids), np.int64)
    for sequence in np.flatnonzero(lengths):
        index[sequence, : lengths[sequence]] = np.flatnonzero(sequence_ids == sequence)
    return index, np.maximum(lengths, 1 if longest else 0).astype(np.int64)  # some losses divide by the length


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
