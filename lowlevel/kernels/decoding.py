"""Attention of one new token a sequence over a cache of keys and values: a Triton kernel, with a torch twin.

A cache of one layer is (2, S, H_kv, C, D): keys and values of S slots for up to C tokens. Row b of a decoding step is
the sequence in slot b; its new token has position p_b. It writes its key and value there, and attends to positions 0 to
p_b. All query heads of a group read the same keys, so a program handles one group of one row.

The tokens are split in chunks, one a program, so that few rows fill a GPU too. A chunk gives its own softmax and its
logsumexp l_s; a chunk behind p_b has l_s = -inf, and nothing of it is read. A second kernel combines them::

    o_s = sum_(j in s) exp(z_j - l_s) v_j        o = sum_s exp(l_s - logsumexp(l)) o_s

p_b is read on the device, so one captured CUDA graph serves every length. A program is one warp, which
holds its keys and values in registers, in the layout of their loads, and sums by shuffles. Sums across warps wait at
barriers, and made this kernel 10 times slower. No `tl.dot` (kernels/__init__.py): memory is the bound.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowlevel.kernels.operators import operator

MOST_QUERIES = 8  # of a program
KEPT = 2048  # features of keys, and of values, that a program holds: 64 a thread each; with more, registers spill
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@operator("decode_attention", writes=("cache",))
def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """Write the new keys and values into the cache; attention of the new tokens, (B, H, D) in the query's dtype.

    Args:
        query: (B, H, D); row b belongs to slot b.
        key, value: (B, H_kv, D), of the same tokens.
        cache: (2, S, H_kv, C, D) with S >= B, in the dtype of the key; each slot contiguous; C a multiple of 64.
        positions: (B,) int64, below C.
        scale: of the scores.
    """
    run = launch if _kernel_takes(query, key, value, cache) else decode_attention_reference
    return run(query, key, value, cache, positions, scale)


@torch.library.register_fake("lowlevel::decode_attention")
def _(query: Tensor, key: Tensor, value: Tensor, cache: Tensor, positions: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def decode_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """The same numbers in plain torch, on any device; softmax in fp32 or better."""
    rows, dtype = len(query), torch.promote_types(query.dtype, torch.float32)
    store(cache, key, value, torch.arange(rows, device=query.device), positions)
    used = cache.shape[3] if query.is_cuda else int(positions.max()) + 1  # a GPU would have to wait for the number
    keys, values = cache[:, :rows, :, :used].to(dtype)  # each (B, H_kv, used, D)
    groups = query.to(dtype).unflatten(1, (keys.shape[1], -1))  # (B, H_kv, G, D)
    scores = torch.einsum("bhgd,bhcd->bhgc", groups, keys) * scale
    hidden = torch.arange(used, device=query.device) > positions.view(-1, 1, 1, 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhgc,bhcd->bhgd", weights, values).reshape(query.shape).to(query.dtype)


@operator("store_in_cache", writes=("cache",))
def store(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Write keys and values (T, H_kv, D) at slots and positions (T,) int64 of a cache (2, S, H_kv, C, D)."""
    for half, new in zip(cache, (key, value), strict=True):
        half.transpose(1, 2).index_put_((slots, positions), new.to(cache.dtype))


@torch.library.register_fake("lowlevel::store_in_cache")
def _(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor, positions: Tensor) -> None:
    return None


class Kernels(NamedTuple):
    """Triton functions, as in kernels/vocabulary.py."""

    decode: Any
    combine: Any


@functools.cache
def kernels() -> Kernels:
    """Import Triton and define the kernels, as `lowlevel.kernels.vocabulary.kernels`."""
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
        outputs = (row * kv_heads * group + first) * chunks + part
        if begin <= position:
            d = tl.arange(0, width)
            known = d < features
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
            own = query + (row * kv_heads * group + first) * features + d
            for g in tl.static_range(queries):
                q = tl.load(own + g * features, mask=known, other=0.0).to(tl.float32) * scale
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
                tl.store(lse + outputs + g * chunks, float("-inf"))

    @triton.jit
    def combine(parts, lse, out, chunks, features: tl.constexpr, width: tl.constexpr, most: tl.constexpr):
        query = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, most)
        d = tl.arange(0, width)
        known = d < features
        weights = tl.load(lse + query * chunks + c, mask=c < chunks, other=float("-inf"))
        weights = tl.exp(weights - tl.max(weights, 0))
        mask = (weights > 0)[:, None] & known[None, :]  # a chunk without tokens wrote no part
        where = (query * chunks + c)[:, None] * features + d[None, :]
        o = tl.sum(weights[:, None] * tl.load(parts + where, mask=mask, other=0.0), 0) / tl.sum(weights, 0)
        tl.store(out + query * features + d, o.to(out.dtype.element_ty), mask=known)

    return Kernels(decode, combine)


@functools.cache
def usable(device: torch.device, dtype: torch.dtype, group: int, features: int) -> bool:
    """Whether the kernels compile and launch on this device, tried before a CUDA graph needs them; else warns once."""
    cache = torch.zeros(2, 1, 1, 256, features, dtype=dtype, device=device)
    query, new = cache[0, :, 0, :1].expand(1, group, features).contiguous(), cache[0, :, 0, :1].clone()
    try:
        launch(query, new, new, cache, torch.zeros(1, dtype=torch.int64, device=device), 1.0)
    except Exception as error:  # Triton's errors have no common class: missing package, no driver, compiler, ptxas
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(f"plain torch instead of Triton's kernels on {device} in {dtype}: {reason}", stacklevel=2)
        return False
    return True


def launch_sizes(group: int, features: int) -> dict[str, int]:
    """Sizes of a program of `decode`: query heads, features rounded up to a power of two, and tokens."""
    queries, width = max(n for n in range(1, MOST_QUERIES + 1) if group % n == 0), 1 << (features - 1).bit_length()
    return {"queries": queries, "width": width, "chunk": min(64, KEPT // width)}


def launch(query: Tensor, key: Tensor, value: Tensor, cache: Tensor, positions: Tensor, scale: float) -> Tensor:
    """`decode_attention` by the kernels."""
    rows, heads, features = query.shape
    kv_heads, capacity = cache.shape[2:4]
    sizes = launch_sizes(heads // kv_heads, features)
    chunks, out = capacity // sizes["chunk"], torch.empty_like(query, memory_format=torch.contiguous_format)
    parts = torch.empty(rows, heads, chunks, features, dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, heads, chunks, dtype=torch.float32, device=query.device)
    most = 1 << (chunks - 1).bit_length()
    with torch.cuda.device_of(query):  # Triton launches on the current device
        kernels().decode[(rows, heads // sizes["queries"], chunks)](
            query.contiguous(), key.contiguous(), value.contiguous(), cache, positions, parts, lse, scale,
            *cache.stride()[:3], kv_heads, heads // kv_heads, features, **sizes, num_warps=1,
        )  # fmt: skip
        warps = max(1, min(8, most * sizes["width"] // KEPT))
        kernels().combine[(rows * heads,)](parts, lse, out, chunks, features, sizes["width"], most, num_warps=warps)
    return out


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> bool:
    same = query.dtype == key.dtype == value.dtype == cache.dtype and query.dtype in DTYPES
    features = query.shape[2]
    fits = query.is_cuda and same and cache.stride(4) == 1 and cache.stride(3) == features
    return fits and usable(query.device, query.dtype, query.shape[1] // key.shape[1], features)
