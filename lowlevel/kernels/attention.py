"""Attention over packed rows without a mask: each span of queries attends causally to its own list of keys.

With a (T, T) mask, a kernel computes all scores and discards most of them. The layout only needs causal attention of
neighbouring positions to a list of keys: an SFT example attends to itself, a prompt and its first completion to
themselves, each other completion to the prompt and itself. Kernels for sequences of different lengths in one row
("varlen") do exactly this: they take cumulative lengths of queries and keys, and align the causal triangle to the
bottom right.

Kernels: `flash` (FlashAttention 2; compute capability 8.0 or higher, fp16 and bf16), `efficient` (CUTLASS; 5.0 or
higher, so it runs on a T4) and `math` (plain torch, one span at a time, on any device; tests compare the others with
it). All of them are part of torch; the operator below adds one signature, a gradient and a shape rule for the compiler.

A beginning that many sequences share is attended to apart, by all queries at once, so that its keys are neither listed
nor copied. From two softmaxes over different keys, with outputs o and logsumexps l, follows the one over both::

    o = w o_beginning + (1 - w) o_own        w = sigmoid(l_beginning - l_own)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowlevel.kernels.operators import operator

KERNELS = ("flash", "efficient", "math")
CAUSAL_BOTTOM_RIGHT = 2  # `custom_mask_type` of torch's efficient attention


def span_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, longest: int, scale: float, kernel: str,
    beginning: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """Causal attention of each span of queries over its list of keys.

    Args:
        query: (M, H, D); span g has rows queries[g] to queries[g + 1].
        key, value: (K, H_kv, D), H a multiple of H_kv; span g sees rows keys[g] to keys[g + 1]. With q queries and k
            keys, query i sees the first k - q + i + 1 of them.
        queries, keys: (G + 1,) int32, cumulative. Spans may be empty; every query must belong to a span.
        longest: upper bound on the queries and keys of a span.
        beginning: keys and values (P, H_kv, D) that all queries see before their own, and the bounds [0, n] of those
            that count, (2,) int32. With them there is no gradient.

    Returns:
        (M, H, D), in the dtype of `query`. Differentiable once in query, key and value.
    """
    output, logsumexp = _attend(query, key, value, queries, keys, longest, scale, kernel)
    if not beginning:
        return output
    size, longest = len(query), max(len(query), len(beginning[0]))
    together = size * torch.arange(2, dtype=torch.int32, device=query.device)  # all queries as one span
    first, of_first = _attend(query, *beginning[:2], together, beginning[2], longest, scale, kernel, causal=False)
    gap = _by_query(of_first, together, size, kernel) - _by_query(logsumexp, queries, size, kernel)
    return torch.lerp(output.float(), first.float(), gap[..., None].sigmoid()).to(output.dtype)


def _by_query(logsumexp: Tensor, queries: Tensor, size: int, kernel: str) -> Tensor:
    """The logsumexp of `_attend` as (M, H)."""
    if kernel != "efficient":
        return logsumexp.T
    order = torch.arange(size, dtype=torch.int32, device=queries.device)
    span = torch.searchsorted(queries, order, right=True) - 1  # queries[0] is 0
    return logsumexp[span, :, order - queries[span]]


@operator("list_keys")
def list_keys(values: Tensor, key_index: Tensor, key_uses: Tensor) -> Tensor:
    """Gather keys or values in the order of the spans' list: (M, H_kv, D) -> (K, H_kv, D).

    With `key_uses` (U, M), the places of each position in the list, the gradient is a sum of U gathers; `index_add`
    would add in varying order. (Not an autograd.Function, for the reason in CounterDropout.)
    """
    return values.index_select(0, key_index)


@torch.library.register_fake("lowlevel::list_keys")
def _(values: Tensor, key_index: Tensor, key_uses: Tensor) -> Tensor:
    return values.new_empty(key_index.shape[0], values.shape[1], values.shape[2])


@operator("list_keys_backward")
def _list_keys_backward(grad: Tensor, key_uses: Tensor) -> Tensor:
    padded = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])  # row K: an unused place
    total = padded.index_select(0, key_uses[0])
    for places in key_uses[1:]:
        total += padded.index_select(0, places)
    return total


@torch.library.register_fake("lowlevel::list_keys_backward")
def _(grad: Tensor, key_uses: Tensor) -> Tensor:
    return grad.new_empty(key_uses.shape[1], grad.shape[1], grad.shape[2])


def _save_uses(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _sum_uses(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _list_keys_backward(grad, ctx.saved_tensors[0]), None, None


torch.library.register_autograd("lowlevel::list_keys", _sum_uses, setup_context=_save_uses)


@operator("span_attention")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, longest: int, scale: float, kernel: str,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (M, H, D) and logsumexp, whose shape depends on the kernel. Without `causal`, a query sees all its keys,
    and there is no gradient.
    """
    if kernel == "flash":
        output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, queries, keys, longest, longest, 0.0, causal, False, scale=scale
        )
        return output, logsumexp
    if kernel == "efficient":
        groups = query.shape[1] // key.shape[1]
        bounds = min(longest, len(query)), min(longest, len(key))  # torch 2.11 refuses bounds above the row's length
        output, logsumexp, *_ = torch.ops.aten._efficient_attention_forward(
            query[None], _expand(key, groups)[None], _expand(value, groups)[None], None, queries, keys, *bounds, 0.0,
            CAUSAL_BOTTOM_RIGHT if causal else 0, True, scale=scale,
        )  # fmt: skip
        return output[0].contiguous(), pad(logsumexp, (0, _aligned(longest) - logsumexp.shape[-1]))
    output, logsumexp = torch.zeros_like(query), query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)
    for q, k in _spans(queries, keys):
        output[q], logsumexp[:, q] = _math(query[q], key[k], value[k], scale, causal)
    return output, logsumexp


@torch.library.register_fake("lowlevel::span_attention")
def _(query, key, value, queries, keys, longest, scale, kernel, causal=True):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    heads, positions = query.shape[1], query.shape[0]
    shape = (queries.shape[0] - 1, heads, _aligned(longest)) if kernel == "efficient" else (heads, positions)
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(shape, dtype=torch.float32)


@operator("span_attention_backward")
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, queries: Tensor,
    keys: Tensor, longest: int, scale: float, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query (M, H, D), key and value (K, H_kv, D)."""
    if kernel == "flash":
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), query, key, value, output, logsumexp, queries, keys, longest, longest, 0.0, True, unused,
            torch.empty(0, device=query.device), scale=scale,
        )  # fmt: skip
    if kernel == "efficient":
        groups = query.shape[1] // key.shape[1]
        zero = torch.zeros((), dtype=torch.int64, device=query.device)
        bounds = min(longest, len(query)), min(longest, len(key))
        grad_query, grad_key, grad_value, _ = torch.ops.aten._efficient_attention_backward(
            grad.contiguous()[None], query[None], _expand(key, groups)[None], _expand(value, groups)[None], None,
            output[None], queries, keys, *bounds, logsumexp[..., : _aligned(bounds[0])].contiguous(), 0.0, zero, zero,
            CAUSAL_BOTTOM_RIGHT, False, scale=scale,
        )  # fmt: skip
        return grad_query[0].contiguous(), _reduce(grad_key[0], groups), _reduce(grad_value[0], groups)
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for q, k in _spans(queries, keys):
        parts = _math_backward(grad[q], query[q], key[k], value[k], scale)
        for total, span, part in zip(grads, (q, k, k), parts, strict=True):
            total[span] = part
    return grads


@torch.library.register_fake("lowlevel::span_attention_backward")
def _(grad, query, key, value, output, logsumexp, queries, keys, longest, scale, kernel):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, queries, keys, ctx.longest, ctx.scale, ctx.kernel, _ = inputs
    ctx.save_for_backward(query, key, value, *output, queries, keys)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, output, logsumexp, queries, keys = ctx.saved_tensors
    grads = _attend_backward(
        grad, query, key, value, output, logsumexp, queries, keys, ctx.longest, ctx.scale, ctx.kernel
    )
    return *grads, None, None, None, None, None, None


torch.library.register_autograd("lowlevel::span_attention", _gradient, setup_context=_save)


def _math(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """One span in plain torch: (q, H, D) over (k, H_kv, D), softmax in fp32 or better; and its logsumexp (H, q).

    A CPU has a kernel that skips the hidden scores; on a GPU the product in full is what other kernels are tested with.
    """
    q, k = len(query), len(key)
    if not query.is_cuda:
        seen = None if q == k or not causal else torch.full((q, k), -torch.inf, dtype=query.dtype).triu(k - q + 1)
        states, keys, values = (part.transpose(0, 1)[None] for part in (query, key.to(query), value.to(query)))
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            states, keys, values, 0.0, causal and q == k, attn_mask=seen, scale=scale
        )  # what scaled_dot_product_attention calls
        return output[0].transpose(0, 1), logsumexp[0]
    value = _expand(value, query.shape[1] // value.shape[1])
    scores = _scores(query, key, scale, causal)
    output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.to(scores.dtype))
    return output.to(query.dtype), scores.logsumexp(-1)


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool = True) -> Tensor:
    """scale Q K^T under the causal triangle, (H, q, k); -inf where a query does not see a key."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = _expand(key, query.shape[1] // key.shape[1])
    scores = torch.einsum("qhd,khd->hqk", query.to(dtype), key.to(dtype)) * scale
    q, k = scores.shape[-2:]
    hidden = torch.ones(q, k, dtype=torch.bool, device=query.device).triu(k - q + 1)
    return scores.masked_fill(hidden, float("-inf")) if causal else scores


def _math_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dV = P^T dO; dP = dO V^T; dS = P (dP - rowsum(P dP)); dQ = scale dS K; dK = scale dS^T Q."""
    groups = query.shape[1] // key.shape[1]
    weights = _scores(query, key, scale).softmax(-1)
    q, k, v, g = (part.to(weights.dtype) for part in (query, _expand(key, groups), _expand(value, groups), grad))
    grad_value = torch.einsum("hqk,qhd->khd", weights, g)
    grad_weights = torch.einsum("qhd,khd->hqk", g, v)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
    grad_query = torch.einsum("hqk,khd->qhd", grad_scores, k)
    grad_key = torch.einsum("hqk,qhd->khd", grad_scores, q)
    grads = grad_query, _reduce(grad_key, groups), _reduce(grad_value, groups)
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(key.dtype)


def _aligned(longest: int) -> int:
    """Row length of the logsumexp of the efficient kernel."""
    return -(-longest // 32) * 32


def _expand(values: Tensor, groups: int) -> Tensor:
    """(K, H_kv, D) -> (K, H, D): repeat each head for the query heads of its group."""
    return values if groups == 1 else values.repeat_interleave(groups, dim=1)


def _reduce(grad: Tensor, groups: int) -> Tensor:
    """(K, H, D) -> (K, H_kv, D): the gradient of `_expand`."""
    return grad.contiguous() if groups == 1 else grad.unflatten(1, (-1, groups)).sum(2)


def _spans(queries: Tensor, keys: Tensor) -> list[tuple[slice, slice]]:
    bounds = pairwise(zip(queries.tolist(), keys.tolist(), strict=True))
    return [(slice(q0, q1), slice(k0, k1)) for (q0, k0), (q1, k1) in bounds if q1 > q0]
