"""`lowlevel.losses.token_logps` on a CUDA GPU, without any fp32 buffer of logits.

The equations are those of `lowlevel.losses.token_logps`; here a chunk's logits stay in the weight's dtype, from the
product that computes them to the product that reads their gradient::

    forward, per chunk     z = h W^T (cuBLAS)     lse, z_y = one read of z      logp = z_y - lse
    backward, per chunk    z = h W^T (cuBLAS)     dz over z, in place           dh = dz W (cuBLAS)
                           for a trained W also   dW += dz^T h (summed over chunks in fp32)

So a logit is written and read once in the forward pass, and twice in the backward pass, at 2 bytes each.
`lowlevel.losses` makes several passes at 4 bytes, over a buffer of twice the size.

Conditions of the fast path: all tensors on one CUDA device, a weight in fp16, bf16 or fp32, at least one row, and a
Triton that compiles for the GPU. Every other call goes to `lowlevel.losses`. The choice does not depend on gradients: a
policy pass and a reference pass under `no_grad` run the same kernels, so equal weights give equal bits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lowlevel import losses
from lowlevel.kernels import vocabulary as ops
from lowlevel.losses.token_logps import NOT_DIFFERENTIABLE, statistic_gradients

CHUNK_BYTES = 32 * 2**20  # of logits: they stay in an H100's L2 (50 MB), and the products still fill the GPU
ROW_STEP = 64  # rows of a cuBLAS tile; with fewer, reading the weight dominates the product


def chunk_rows(vocabulary: int, itemsize: int) -> int:
    """Rows per chunk: the largest multiple of 64 whose logits (`itemsize` bytes each) fit in 32 MiB, at least 64."""
    return max(CHUNK_BYTES // (max(vocabulary, 1) * itemsize) // ROW_STEP, 1) * ROW_STEP


def token_logps(hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """`log softmax(hidden @ lm_head_weight.T)[targets]` of each row; fused under the module's conditions.

    Arguments, result and errors of `lowlevel.losses.token_logps`, but on the fast path a target outside [0, V) gives
    NaN, and `chunk_size` None means `chunk_rows`. After one warm-up call a CUDA graph can capture it.
    """
    return token_scores(hidden, lm_head_weight, targets, chunk_size=chunk_size)[0]


def token_scores(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, needs: Sequence[str] = (), *, chunk_size: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`token_logps`, and the statistics of `lowlevel.losses.token_scores` that `needs` names, in the same passes."""
    if not _is_fast(hidden, lm_head_weight, targets, chunk_size):
        options = {} if chunk_size is None else {"chunk_size": chunk_size}
        return losses.token_scores(hidden, lm_head_weight, targets, needs, **options)
    rows = chunk_size or chunk_rows(lm_head_weight.shape[0], lm_head_weight.element_size())
    logps, *values = _FusedTokenScores.apply(hidden, lm_head_weight, targets, rows, tuple(needs))  # type: ignore[no-untyped-call]
    return logps, dict(zip(needs, values, strict=True))


def _is_fast(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int | None) -> bool:
    """Whether the arguments are valid (if not, `lowlevel.losses` raises the error) and the kernels accept them."""
    shapes = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    shapes = shapes and targets.shape == hidden.shape[:1] and hidden.shape[0] > 0 and weight.shape[0] > 0
    dtypes = hidden.is_floating_point() and weight.dtype in ops.DTYPES and targets.dtype == torch.int64
    placed = hidden.is_cuda and hidden.device == weight.device == targets.device
    fits = shapes and dtypes and placed and (chunk_size is None or chunk_size >= 1)
    return fits and ops.usable(weight.device, weight.dtype, weight.shape[0])


class _FusedTokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, needs: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        chunks = [
            ops.logsumexp_and_target(_logits(part, weight), part_targets, needs)  # frees the logits before the next one
            for part, part_targets in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        ]
        lse, target_logit, *statistics = (torch.cat(parts) for parts in zip(*chunks, strict=True))  # (N,) each
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.chunk_size, ctx.needs = chunk_size, needs
        named = zip(needs, statistics, strict=True)
        ctx.mark_non_differentiable(*(values for name, values in named if name in NOT_DIFFERENTIABLE))
        return target_logit.sub_(lse), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        of_statistics = statistic_gradients(dict(zip(ctx.needs, grads, strict=True)), weight.shape[0]) or ()
        vectors = (part.split(ctx.chunk_size) for part in (targets, lse, grad_logps.contiguous(), *of_statistics))
        parts = zip(hidden.split(ctx.chunk_size), grad_hidden.split(ctx.chunk_size), *vectors, strict=True)
        with torch.autocast(hidden.device.type, enabled=False):
            for part, part_grad, *part_vectors in parts:
                grad_logits = ops.grad_logits_(_logits(part, weight), *part_vectors)
                part_grad.copy_(grad_logits @ weight)
                if grad_weight is not None:
                    grad_weight += grad_logits.T @ part.to(weight.dtype)
                del grad_logits  # before the next chunk's logits
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """`hidden @ weight.T` in the weight's dtype, a new (chunk, V) tensor."""
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden.to(weight.dtype), weight)
