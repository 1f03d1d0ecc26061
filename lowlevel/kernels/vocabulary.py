"""One pass over a block of logits: log-sum-exp forward, softmax gradient in place backward. Triton, with torch twins.

A chunk's logits (C, V) come from cuBLAS in the weight's dtype. Plain torch casts them to fp32 and then passes over them
four more times. Each kernel here touches a logit once, with fp32 only in registers::

    forward     lse = log sum_v exp(z_v)       z_y       statistics       C V reads
    backward    dz_v = g ([v = y] - p_v) + a p_v + u, over z itself       C V reads, C V writes

with p_v = exp(z_v - lse). a and u are the gradients of the statistics of `lowlevel.losses.token_scores`. Without them,
the kernels are compiled without their instructions.

Forward: one program per row. Every lane has its own maximum m and sum s (online softmax, arXiv 1805.02867, algorithm
3); the lanes are combined at the end of the row, so the loop has no barrier. The larger of m and z is the new m, so one
of the textbook's two exponentials is exp(0) = 1: one exponential per logit::

    d = z - m      s <- s exp(-d) + 1  if d > 0,  s + exp(d)  otherwise      m <- max(m, z)

The sum of squares, for log sum_v p_v^2, does the same with the square of that exponential.

m starts at the lowest finite fp32 number instead of -inf: a lane without logits must not compute inf - inf.
Backward: no sum, so one program handles one block of a row.

Dtypes. Logits are fp16, bf16 or fp32; all arithmetic is fp32. `dz` is rounded to the logits' dtype after its
multiplication by the incoming gradient, for the reason in `lowlevel.losses.token_logps`; finite logits and gradients
never give NaN.

A target outside [0, V) is not read: its row gets NaN as log-probability and gradient, and the step reports it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowlevel.kernels.operators import launches
from lowlevel.losses.token_logps import STATISTICS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of logits that the kernels accept
BLOCK = 4096  # logits per program at a time: 16 per thread, two 16-byte loads of fp16
WARPS = 8
LAUNCH = {"block": BLOCK, "num_warps": WARPS, "enable_fp_fusion": True}  # Triton 3.9 warns if fusion is not set


def logsumexp_and_target(logits: Tensor, targets: Tensor, needs: Sequence[str] = ()) -> tuple[Tensor, ...]:
    """`logits.logsumexp(1)` and `logits[i, targets[i]]`, in one read of the logits. No host sync.

    Args:
        logits: (C, V), floating; contiguous fp16, bf16 or fp32 on CUDA for the kernel, anything else for its twin.
        targets: (C,) int64. One outside [0, V) gives NaN as its target logit.
        needs: names of statistics, keys of `lowlevel.losses.token_logps.STATISTICS`.

    Returns:
        lse (C,), target_logit (C,) and each statistic (C,), fp32; float64 for float64 logits. A +inf or NaN logit makes
        lse inf or NaN.
    """
    run = _launch_logsumexp if _kernels_take(logits) else logsumexp_and_target_reference
    return run(logits, targets, needs)


def logsumexp_and_target_reference(logits: Tensor, targets: Tensor, needs: Sequence[str] = ()) -> tuple[Tensor, ...]:
    """The same numbers in plain torch, on any device and layout."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = _inside(targets, logits.shape[1])
    target_logit = logits.gather(1, targets.where(valid, 0)[:, None]).squeeze(1)
    lse = logits.logsumexp(dim=1)
    return lse, target_logit.where(valid, torch.nan), *(STATISTICS[name](logits, lse) for name in needs)


def grad_logits_(logits: Tensor, targets: Tensor, lse: Tensor, grad_logps: Tensor, *of_statistics: Tensor) -> Tensor:
    """Overwrite logits z with `grad_logps (onehot(targets) - p) + of_p p + uniform`, p = exp(z - lse).

    Args:
        logits: (C, V), floating, overwritten; the kernel needs contiguous fp16, bf16 or fp32 on CUDA.
        targets: (C,) int64. One outside [0, V) makes its whole row NaN.
        lse: (C,) fp32, from `logsumexp_and_target` on the same logits.
        grad_logps: (C,) fp32, including the loss scale.
        *of_statistics: of_p and uniform, (C,) fp32 likewise, from `statistic_gradients`; none without statistics.

    Returns:
        `logits` itself, rounded once from fp32 (float64 for float64 logits); inf beyond its range. No host sync.
    """
    run = _launch_grad_logits_ if _kernels_take(logits) else grad_logits_reference_
    return run(logits, targets, lse, grad_logps, *of_statistics)


def grad_logits_reference_(
    logits: Tensor, targets: Tensor, lse: Tensor, grad_logps: Tensor, *of_statistics: Tensor
) -> Tensor:
    """The same numbers in plain torch, also in place, on any device and layout."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    valid = _inside(targets, logits.shape[1])
    p = (logits.to(dtype) - lse[:, None]).exp_()
    columns = [part.to(dtype)[:, None] for part in of_statistics]
    others = p * columns[0] + columns[1] if columns else None
    grad_logits = p.neg_()
    grad_logits.scatter_add_(1, targets.where(valid, 0)[:, None], torch.ones_like(lse, dtype=dtype)[:, None])
    grad_logits.mul_(grad_logps.to(dtype).where(valid, torch.nan)[:, None])
    return logits.copy_(grad_logits if others is None else grad_logits.add_(others))


@functools.cache
def usable(device: torch.device, dtype: torch.dtype, vocabulary: int) -> bool:
    """Whether both kernels compile and launch, tried before a CUDA graph needs them; if not, warns once why."""
    logits = torch.zeros(1, vocabulary, dtype=dtype, device=device)
    targets = torch.zeros(1, dtype=torch.int64, device=device)

    def trial() -> None:
        lse, target_logit = _launch_logsumexp(logits, targets)
        _launch_grad_logits_(logits, targets, lse, target_logit)

    return launches(trial, device, dtype)


class Kernels(NamedTuple):
    """Triton functions, compiled on demand; launch them as `kernels().logsumexp[grid](...)`."""

    logsumexp: Any
    grad_logits: Any


@functools.cache
def kernels() -> Kernels:
    """Import Triton, which is optional, and define the kernels. Raises ImportError if it is not installed."""
    import triton
    import triton.language as tl

    # Each program reads one number of these vectors: their alignment is not worth another compilation. A vector that is
    # None is a constant of the kernel.
    @triton.jit(do_not_specialize_on_alignment=("targets", "lse", "target_logit", "mean_logp", "log_square_sum"))
    def logsumexp(
        logits, targets, lse, target_logit, mean_logp, log_square_sum, vocabulary: tl.constexpr, block: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)  # C V may exceed 2^31
        logits += row * vocabulary
        lanes = tl.arange(0, block)
        m = tl.full([block], -3.4028234663852886e38, tl.float32)
        s = tl.zeros([block], tl.float32)
        squares = tl.zeros([block], tl.float32)
        total = tl.zeros([block], tl.float32)
        for start in range(0, vocabulary, block):
            inside = start + lanes < vocabulary
            z = tl.load(logits + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
            d = z - m
            e = tl.exp(-tl.abs(d))
            s = tl.where(d > 0, s * e + 1.0, s + e)
            if log_square_sum is not None:
                squares = tl.where(d > 0, squares * (e * e) + 1.0, squares + e * e)
            if mean_logp is not None:
                total += tl.where(inside, z, 0.0)
            m = tl.maximum(m, z)
        row_m = tl.max(m, 0)
        above = tl.exp(m - row_m)
        log_s = tl.log(tl.sum(s * above, 0))
        tl.store(lse + row, row_m + log_s)
        if mean_logp is not None:
            tl.store(mean_logp + row, tl.sum(total, 0) / vocabulary - (row_m + log_s))
        if log_square_sum is not None:  # row_m cancels
            tl.store(log_square_sum + row, tl.log(tl.sum(squares * (above * above), 0)) - 2.0 * log_s)
        target = tl.load(targets + row)
        valid = (target >= 0) & (target < vocabulary)
        tl.store(target_logit + row, tl.load(logits + target, mask=valid, other=float("nan")).to(tl.float32))

    @triton.jit(do_not_specialize_on_alignment=("targets", "lse", "grad_logps", "of_p", "uniform"))
    def grad_logits(logits, targets, lse, grad_logps, of_p, uniform, vocabulary: tl.constexpr, block: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        inside = columns < vocabulary
        logits += row * vocabulary
        target = tl.load(targets + row)
        valid = (target >= 0) & (target < vocabulary)
        g = tl.where(valid, tl.load(grad_logps + row), float("nan"))
        z = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        onehot = tl.where(columns == target.to(tl.int32), 1.0, 0.0)
        p = tl.exp(z - tl.load(lse + row))
        dz = g * (onehot - p)
        if of_p is not None:
            dz += tl.load(of_p + row) * p + tl.load(uniform + row)
        tl.store(logits + columns, dz.to(logits.dtype.element_ty), mask=inside)

    return Kernels(logsumexp, grad_logits)


def _kernels_take(logits: Tensor) -> bool:
    fits = logits.is_cuda and logits.is_contiguous() and logits.dtype in DTYPES and logits.numel() > 0
    return fits and usable(logits.device, logits.dtype, logits.shape[1])


def _launch_logsumexp(logits: Tensor, targets: Tensor, needs: Sequence[str] = ()) -> tuple[Tensor, ...]:
    rows, vocabulary = logits.shape
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    target_logit = torch.empty_like(lse)
    written = {name: torch.empty_like(lse) for name in needs if name != "lse"}
    vectors = (targets.contiguous(), lse, target_logit, written.get("mean_logp"), written.get("log_square_sum"))
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        kernels().logsumexp[(rows,)](logits, *vectors, vocabulary, **LAUNCH)
    return lse, target_logit, *(written.get(name, lse) for name in needs)


def _launch_grad_logits_(
    logits: Tensor, targets: Tensor, lse: Tensor, grad_logps: Tensor, *of_statistics: Tensor
) -> Tensor:
    rows, vocabulary = logits.shape
    floats = [v.to(torch.float32).contiguous() for v in (lse, grad_logps, *of_statistics)]
    vectors = (targets.contiguous(), *floats, *([] if of_statistics else [None, None]))
    with torch.cuda.device_of(logits):
        kernels().grad_logits[(rows, -(-vocabulary // BLOCK))](logits, *vectors, vocabulary, **LAUNCH)
    return logits


def _inside(targets: Tensor, vocabulary: int) -> Tensor:
    return (targets >= 0) & (targets < vocabulary)
