"""Operations of one optimizer step, kernel by kernel: floating-point operations and bytes of device memory.

The counts are those of the compiled and captured step, where neighbouring elementwise operations are one kernel. M
positions go through L layers of hidden size D, intermediate size F, with adapters of rank r; a linear layer in -> out:

    pass        base product         adapter products              LM head (N scored positions, V words)
    forward     2 M in out           2 M r (in + out)              2 N D V
    backward    2 M in out           4 M r (in + out)              4 N D V   (logits again, then their gradient)
    recompute   the forward again, inside the backward, with gradient checkpointing

Attention counts the pairs of query and key that the layout's rule lets see each other: 4 pairs H d forward, 10 backward
(the kernels compute the scores again). Bytes are of fp16 activations, read and written once by each kernel that touches
them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowlevel.kernels import chunk_rows
from lowlevel.losses.token_logps import CHUNK_ROWS

HALF, FULL = 2, 4  # bytes
QUANT_BLOCK = 64  # weights that share a scale
CAST_KERNELS = 2  # Inductor joins at most 8 kernels, and a layer has 14 casts
# Bytes a logit and kernels a chunk, forward and backward. torch: product, cast, the passes of logsumexp; and product,
# cast, subtract, exp, multiply, cast, product. Fused: product, one read; and product, one read and write, product.
HEAD_TRAFFIC = {"torch": ((24, 8), (40, 9)), "fused": ((4, 3), (8, 4))}


@dataclass(frozen=True)
class Op:
    """`count` equal kernels. Each takes the longer of its two times, and the time of an empty kernel."""

    component: str
    flops: float = 0.0
    bytes: float = 0.0
    count: int = 1
    link_bytes: float = 0.0  # over PCIe


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama and its adapters."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rank: int

    @classmethod
    def of(cls, config: Any, rank: int) -> ModelShape:
        """From transformers' configuration."""
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.vocab_size,
            rank,
        )

    @property
    def kv(self) -> int:
        """Features of keys, and of values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's projections."""
        d, f = self.hidden, self.intermediate
        return {"q": (d, d), "k": (d, self.kv), "v": (d, self.kv), "o": (d, d), "gate": (d, f), "up": (d, f),
                "down": (f, d)}  # fmt: skip

    @property
    def trainable(self) -> int:
        """Adapter weights."""
        return self.layers * sum(self.rank * (i + o) for i, o in self.linears.values())


@dataclass(frozen=True)
class Work:
    """What one micro-batch asks for."""

    positions: int  # M, padding included
    scored: int  # N, positions whose logits are computed
    pairs: int  # of query and key, in one head

    @classmethod
    def of(cls, batch: Any) -> Work:
        """From a PackedBatch."""
        pairs = visible_pairs(batch.segment_ids.numpy(), batch.branch_ids.numpy())
        return cls(batch.input_ids.numel(), batch.scored_positions.numel(), pairs)


@dataclass(frozen=True)
class Settings:
    """What else the count depends on."""

    method: str  # sft or dpo
    recomputed: int  # layers
    dropout: bool  # in SFT; DPO's policy has none
    stacked: bool = False  # a frozen adapter under the trained one
    dequantised_once: bool = False  # at the run's start
    head: str = "fused"  # a key of HEAD_TRAFFIC
    compiled: bool = True  # a compiled layer is recomputed to its end; an eager one to the last tensor needed
    input_gradient: bool = True  # the first layer's input asks for a gradient, as compiled layers' does
    resident: bool = True  # paged optimizer state stays on the device, as it does where memory is not short


def visible_pairs(segment_ids: np.ndarray, branch_ids: np.ndarray) -> int:
    """Pairs of query and key under the layout's rule; padding attends causally to the padding of its row."""
    pairs = 0
    for segments, branches in zip(segment_ids, branch_ids, strict=True):
        for segment in np.unique(segments):
            inside = branches[segments == segment]
            shared, *ends = np.bincount(inside, minlength=1).tolist()
            pairs += shared * (shared + 1) // 2 + sum(n * shared + n * (n + 1) // 2 for n in ends)
    return pairs


def step_ops(shape: ModelShape, works: Sequence[Work], settings: Settings) -> list[Op]:
    """All kernels of one optimizer step over its micro-batches."""
    ops = list(optimizer(shape.trainable, settings.resident))
    dropout = settings.dropout and settings.method == "sft"
    for work in works:
        if settings.method == "dpo":  # the reference: no trained adapter, no backward
            ops += _layers(shape, forward(shape, work, adapters=int(settings.stacked), dropout=False))
            ops += head_forward(shape, work, settings.head)
        once = list(forward(shape, work, adapters=1 + settings.stacked, dropout=dropout))
        ops += _layers(shape, once)
        ops += (once if settings.compiled else recompute(once)) * settings.recomputed
        ops += head_forward(shape, work, settings.head)
        ops += head_backward(shape, work, settings.head)
        for layer in range(shape.layers):
            ops += backward(shape, work, first=layer == 0 and not settings.input_gradient,
                            stacked=settings.stacked)  # fmt: skip
    return [op for op in ops if not (settings.dequantised_once and op.component == "dequantise")]


def _layers(shape: ModelShape, ops: Iterable[Op]) -> list[Op]:
    return list(ops) * shape.layers


def forward(shape: ModelShape, work: Work, *, adapters: int, dropout: bool) -> Iterator[Op]:
    """One decoder layer."""
    m, d, f, kv = work.positions, shape.hidden, shape.intermediate, shape.kv
    for size_in, size_out in shape.linears.values():
        yield from dequantise(size_in * size_out)
        yield product("base products", m, size_in, size_out)
        for _ in range(adapters):
            yield product("adapter products", m, size_in, shape.rank)
            yield product("adapter products", m, shape.rank, size_out, added=True)
    for _ in range(adapters):
        yield adapter_casts(shape)
    yield elementwise(m, 4 * d + 3 * d * dropout)  # residual, norm, the inputs of q, k, v
    yield elementwise(m, 2 * (d + 2 * kv), count=3)  # rotary embedding
    yield elementwise(m, 2 * d * dropout, count=int(dropout))  # the input of o
    yield elementwise(m, 4 * d + 2 * d * dropout)  # residual, norm, the inputs of gate and up
    yield elementwise(m, 3 * f + f * dropout)  # SwiGLU, the input of down
    yield attention(shape, work, 4, tensors=2 * d + 2 * kv, count=1)


def recompute(ops: Sequence[Op]) -> list[Op]:
    """A forward again, as torch's checkpoint stops it: the product behind the last tensor needed is left out."""
    last = max(i for i, op in enumerate(ops) if op.component == "adapter products")
    return [op for i, op in enumerate(ops) if i != last]


def backward(shape: ModelShape, work: Work, *, first: bool, stacked: bool) -> Iterator[Op]:
    """One decoder layer's gradients, without what checkpointing computes again."""
    m, d, f, kv, r = work.positions, shape.hidden, shape.intermediate, shape.kv, shape.rank
    for name, (size_in, size_out) in shape.linears.items():
        to_input = not (first and name in "qkv")
        yield product("adapter products", m, size_out, r)  # gradient of A's output
        yield product("adapter products", r, m, size_out)  # gradient of B
        yield product("adapter products", r, m, size_in)  # gradient of A
        yield Op("gradient sums", bytes=18 * r * (size_in + size_out) / 4, count=4)  # cast to fp32, add to the buffer
        if to_input:
            yield from dequantise(size_in * size_out)
            yield product("base products", m, size_out, size_in)
            yield product("adapter products", m, r, size_in)
        if stacked and to_input:
            yield product("adapter products", m, size_out, r)
            yield product("adapter products", m, r, size_in)
    for _ in range(1 + stacked):
        yield adapter_casts(shape)
    parts = 2 + stacked  # gradients to add for each projection's input
    yield elementwise(m, (parts + 6) * f)  # SwiGLU's gradients from gate and up
    yield elementwise(m, (2 * parts + 3) * d, count=2)  # into the second norm and the residual
    yield elementwise(m, (parts + 1) * d)  # into attention's output
    yield elementwise(m, 2 * (d + 2 * kv), count=2)  # rotary embedding
    yield elementwise(m, 3 * (parts * (not first) + 1) * d, count=2)  # into the first norm and the residual
    yield attention(shape, work, 10, tensors=4 * d + 4 * kv, count=3)


def product(component: str, rows: int, inner: int, columns: int, *, added: bool = False) -> Op:
    """A matrix product in fp16, perhaps added to what is there."""
    traffic = HALF * (rows * inner + inner * columns + (1 + added) * rows * columns)
    return Op(component, 2.0 * rows * inner * columns, traffic)


def dequantise(weights: int) -> Iterator[Op]:
    """NF4 with double quantisation to fp16, in one kernel: codes and 8-bit constants in, weights out."""
    yield Op("dequantise", bytes=weights * (0.5 + HALF) + weights / QUANT_BLOCK)


def adapter_casts(shape: ModelShape) -> Op:
    """Autocast's fp16 copies of a layer's fp32 adapter weights: small kernels that the compiler joins to a few."""
    return Op("adapter casts", bytes=shape.trainable / shape.layers * (FULL + HALF) / CAST_KERNELS, count=CAST_KERNELS)


def elementwise(positions: int, features: float, count: int = 1) -> Op:
    """`count` kernels that together read and write so many fp16 features a position."""
    return Op("elementwise", bytes=HALF * positions * features / max(1, count), count=count)


def attention(shape: ModelShape, work: Work, factor: int, *, tensors: int, count: int) -> Op:
    """Scores and weighted sums."""
    return Op("attention", factor * work.pairs * shape.hidden / count, HALF * work.positions * tensors / count, count)


def head_forward(shape: ModelShape, work: Work, kind: str) -> list[Op]:
    """Logits of the scored positions and their log-probabilities, in chunks; the last norm."""
    return _head(shape, work, kind, *HEAD_TRAFFIC[kind][0], products=1)


def head_backward(shape: ModelShape, work: Work, kind: str) -> list[Op]:
    """Logits again, their gradient, and the hidden states' gradient."""
    return _head(shape, work, kind, *HEAD_TRAFFIC[kind][1], products=2)


def _head(shape: ModelShape, work: Work, kind: str, traffic: int, kernels: int, *, products: int) -> list[Op]:
    n, d, v = work.scored, shape.hidden, shape.vocabulary
    rows_at_once = chunk_rows(v, HALF) if kind == "fused" else CHUNK_ROWS
    chunks = -(-n // rows_at_once)
    rows = n / chunks if chunks else 0
    flops, weight = 2.0 * rows * d * v, HALF * (d * v + 2 * rows * d)
    others = kernels - products
    return [
        Op("LM head", flops, weight, chunks * products),
        Op("LM head", bytes=traffic * rows * v / others, count=chunks * others),
        elementwise(work.positions, 4 * d, count=2),
    ]


def optimizer(weights: int, resident: bool) -> Iterator[Op]:
    """Zero, norm, clip with unscale, and AdamW on the flat buffers; paged state that is not resident comes and goes."""
    for traffic in (FULL, FULL, 2 * FULL, 7 * FULL):
        yield Op("optimizer", bytes=weights * traffic)
    if not resident:
        yield Op("optimizer", link_bytes=weights * 2 * 2 * FULL)


def totals(ops: Iterable[Op]) -> dict[str, tuple[float, float, int]]:
    """FLOPs, bytes and kernels by component."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for op in ops:
        found[op.component][0] += op.flops * op.count
        found[op.component][1] += op.bytes * op.count
        found[op.component][2] += op.count
    return {name: (flops, moved, int(kernels)) for name, (flops, moved, kernels) in found.items()}
