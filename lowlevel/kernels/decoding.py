"""Attention of one new token a sequence over a cache of keys and values: a Triton kernel, with a torch twin.

A cache of one layer is (2, S, H_kv, C, D): keys and values of S slots for up to C tokens. Row b of a decoding step is
the sequence in slot b; its new token has position p_b. It writes its key and value there, and attends to positions 0 to
p_b. All query heads of a group read the same keys, so a program handles one group of one row.

The tokens are split in chunks, one a program, so that few rows fill a GPU too. A chunk gives its own softmax and its
logsumexp l_s; a chunk behind p_b has l_s = -inf, and its program reads nothing::

    o_s = sum_(j in s) exp(z_j - l_s) v_j        o = sum_s exp(l_s - logsumexp(l)) o_s

p_b is read on the device, so one captured CUDA graph serves every length. A program holds its keys and values in
registers, in the layout of their loads, and takes one query after the other: products of three dimensions would be
summed across warps, 5 times slower on an H200. No `tl.dot` (kernels/__init__.py): memory is the bound.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowlevel.kernels.operators import launches, operator

CHUNK = 64  # tokens of the smallest chunk; a cache's C is a multiple of `chunk_of(C)`
MOST_QUERIES = 8  # of a program
A_WARP = 1024  # keys' features that a warp holds
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def chunk_of(capacity: int) -> int:
    """Tokens of a chunk: more in a larger cache, whose chunks would be many."""
    return CHUNK if capacity <= 512 else 2 * CHUNK if capacity <= 2048 else 4 * CHUNK


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """Write the new keys and values into the cache; attention of the new tokens, (B, H, D) in the query's dtype.

    Args:
        query: (B, H, D); row b belongs to slot b.
        key, value: (B, H_kv, D), of the same tokens.
        cache: (2, S, H_kv, C, D) with S >= B, in the dtype of the key; each slot contiguous.
        positions: (B,) int64, below C.
        scale: of the scores.
    """
    if not (query.is_cuda or torch.compiler.is_compiling()):
        return _attend_on_cpu(query, key, value, cache, positions, scale)
    parts, lse = _attend(query, key, value, cache, positions, scale)
    return (parts * lse.softmax(-1)[..., None]).sum(2).to(query.dtype)


def _attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, cache: Tensor, positions: Tensor, scale: float) -> Tensor:
    """By torch's own attention, without chunks: it reads the cache in place, up to the last token of any row."""
    rows, heads, features = query.shape
    store(cache, key, value, torch.arange(rows), positions)
    used = int(positions.max()) + 1
    keys, values = cache[:, :rows, :, :used]  # (B, H_kv, used, D)
    seen = (torch.arange(used) <= positions[:, None])[:, None, None]  # (B, 1, 1, used)
    groups = query.to(cache.dtype).view(rows, key.shape[1], -1, features)  # a group's heads: queries of the same keys
    output = scaled_dot_product_attention(groups, keys, values, seen, scale=scale)
    return output.reshape(rows, heads, features).to(query.dtype)


@operator("decode_attention", writes=("cache",))
def _attend(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, positions: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Each chunk's output (B, H, chunks, D) and logsumexp (B, H, chunks), fp32; float64 for float64."""
    run = _launch if _kernel_takes(query, key, value, cache) else attend_reference
    return run(query, key, value, cache, positions, scale)


@torch.library.register_fake("lowlevel::decode_attention")
def _(query: Tensor, key: Tensor, value: Tensor, cache: Tensor, positions: Tensor, scale: float):  # type: ignore[no-untyped-def]  # noqa: ANN202
    rows, heads, features = query.shape
    dtype, chunks = torch.promote_types(query.dtype, torch.float32), cache.shape[3] // chunk_of(cache.shape[3])
    parts = query.new_empty((rows, heads, chunks, features), dtype=dtype)
    return parts, query.new_empty((rows, heads, chunks), dtype=dtype)


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, positions: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same numbers in plain torch, on any device."""
    rows, heads, features = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    store(cache, key, value, torch.arange(rows, device=query.device), positions)
    chunk = chunk_of(cache.shape[3])
    keys, values = (part.to(dtype).unflatten(2, (-1, chunk)) for part in cache[:, :rows])  # (B, H_kv, S, chunk, D)
    groups = query.to(dtype).unflatten(1, (keys.shape[1], -1))  # (B, H_kv, G, D)
    scores = torch.einsum("bhgd,bhscd->bhgsc", groups, keys) * scale
    order = torch.arange(keys.shape[2] * chunk, device=query.device).view(-1, chunk)
    scores = scores.masked_fill(order > positions.view(-1, 1, 1, 1, 1), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp(min=torch.finfo(dtype).min)[..., None]).exp()  # a chunk without tokens: 0
    parts = torch.einsum("bhgsc,bhscd->bhgsd", weights, values)
    return parts.reshape(rows, heads, -1, features), lse.reshape(rows, heads, -1)


@operator("store_in_cache", writes=("cache",))
def store(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Write keys and values (T, H_kv, D) at slots and positions (T,) int64 of a cache (2, S, H_kv, C, D)."""
    for half, new in zip(cache, (key, value), strict=True):
        half.transpose(1, 2).index_put_((slots, positions), new.to(cache.dtype))


@torch.library.register_fake("lowlevel::store_in_cache")
def _(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor, positions: Tensor) -> None:
    return None


@functools.cache
def kernel() -> Any:
    """Import Triton and define the kernel, as `lowlevel.kernels.vocabulary.kernels`."""
    import triton
    import triton.language as tl

    @triton.jit
    def decode(
        query, key, value, cache, positions, parts, lse, scale, half, slot, head,
        kv_heads: tl.constexpr, group: tl.constexpr, features: tl.constexpr, queries: tl.constexpr,
        width: tl.constexpr, chunk: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        first = tl.program_id(1) * queries  # of the row's query heads
        part = tl.program_id(2)
        chunks = tl.num_programs(2)
        kv = first // group
        position = tl.load(positions + row).to(tl.int32)
        begin = part * chunk
        d = tl.arange(0, width)
        known = d < features
        outputs = (row * kv_heads * group + first) * chunks + part
        query += (row * kv_heads * group + first) * features + d
        if begin <= position:
            new_at = (row * kv_heads + kv) * features + d
            new_k = tl.load(key + new_at, mask=known, other=0.0)
            new_v = tl.load(value + new_at, mask=known, other=0.0)
            keys = cache + row * slot + kv * head
            values = keys + half
            at = begin + tl.arange(0, chunk)
            where = at[:, None] * features + d[None, :]
            stored = (at < position)[:, None] & known[None, :]
            is_new = (at == position)[:, None]
            k = tl.where(is_new, new_k[None, :], tl.load(keys + where, mask=stored, other=0.0))
            v = tl.where(is_new, new_v[None, :], tl.load(values + where, mask=stored, other=0.0))
            for g in tl.static_range(queries):
                q = tl.load(query + g * features, mask=known, other=0.0).to(tl.float32) * scale
                z = tl.sum(q[None, :] * k.to(tl.float32), 1)
                z = tl.where(at <= position, z, float("-inf"))
                m = tl.max(z, 0)
                w = tl.exp(z - m)
                s = tl.sum(w, 0)
                o = tl.sum(w[:, None] * v.to(tl.float32), 0) / s
                tl.store(parts + (outputs + g * chunks) * features + d, o, mask=known)
                tl.store(lse + outputs + g * chunks, m + tl.log(s))
            if position < begin + chunk:
                tl.store(keys + position * features + d, new_k, mask=known)
                tl.store(values + position * features + d, new_v, mask=known)
        else:
            for g in tl.static_range(queries):
                tl.store(parts + (outputs + g * chunks) * features + d, tl.zeros([width], tl.float32), mask=known)
                tl.store(lse + outputs + g * chunks, float("-inf"))

    return decode


@functools.cache
def usable(device: torch.device, dtype: torch.dtype, group: int, features: int) -> bool:
    """Whether the kernel compiles and launches on this device, tried before a CUDA graph needs it; else warns once."""
    cache = torch.zeros(2, 1, 1, 2 * CHUNK, features, dtype=dtype, device=device)
    query, new = cache[0, :, 0, :1].expand(1, group, features).contiguous(), cache[0, :, 0, :1].clone()
    first = torch.zeros(1, dtype=torch.int64, device=device)
    return launches(lambda: _launch(query, new, new, cache, first, 1.0), device, dtype)


def launch_sizes(group: int, features: int, capacity: int) -> dict[str, int]:
    """Sizes of a program: query heads, features rounded up to a power of two, tokens, and warps."""
    queries = max(size for size in range(1, MOST_QUERIES + 1) if group % size == 0)
    width, chunk = 1 << (features - 1).bit_length(), chunk_of(capacity)
    return {"queries": queries, "width": width, "chunk": chunk, "num_warps": min(16, max(1, chunk * width // A_WARP))}


def _launch(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, positions: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    rows, heads, features = query.shape
    kv_heads, capacity = cache.shape[2:4]
    sizes = launch_sizes(heads // kv_heads, features, capacity)
    chunks = capacity // sizes["chunk"]
    parts = torch.empty(rows, heads, chunks, features, dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, heads, chunks, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        kernel()[(rows, heads // sizes["queries"], chunks)](
            query.contiguous(), key.contiguous(), value.contiguous(), cache, positions, parts, lse, scale,
            *cache.stride()[:3], kv_heads, heads // kv_heads, features, **sizes,
        )  # fmt: skip
    return parts, lse


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> bool:
    same = query.dtype == key.dtype == value.dtype == cache.dtype and query.dtype in DTYPES
    features = query.shape[2]
    fits = query.is_cuda and same and cache.stride(4) == 1 and cache.stride(3) == features
    return fits and usable(query.device, query.dtype, query.shape[1] // key.shape[1], features)
