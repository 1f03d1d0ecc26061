"""One pass over a block of logits: log-sum-exp forward, softmax gradient in place backward. Triton, with torch twins.

The idea. A chunk's logits (C, V) come from cuBLAS in the weight's dtype. Plain torch casts them to fp32 and goes over
them four times more; each kernel here touches a logit once and keeps fp32 in registers alone::

    forward     lse = log sum_v exp(z_v)       z_y                        C V reads
    backward    dz_v = g ([v = y] - exp(z_v - lse)), over z itself        C V reads, C V writes

Forward: one program a row, which walks along the vocabulary. Every lane keeps a maximum m and a sum s of its own
(online softmax, arXiv 1805.02867, algorithm 3) and the lanes meet once, at the end of the row: no barrier inside the
loop, and V / 4096 additions a lane instead of V. Of m and z the larger becomes the new m, so one of the two
exponentials of the textbook's update is always exp(0) = 1, and the other is exp(-|z - m|): one a logit::

    d = z - m      s <- s exp(-d) + 1  if d > 0,  s + exp(d)  otherwise      m <- max(m, z)

m starts at fp32's lowest finite number, not at -inf: a lane that has seen nothing must not compute inf - inf.
Backward: no sum, so a program takes one block of a row.

Dtypes. Logits are fp16, bf16 or fp32; all arithmetic is fp32; `dz` is multiplied by the incoming gradient in fp32
*and then* rounded, once, to the logits' dtype: without the factor most entries are below fp16's smallest number (6e-8)
and a loss scale could not bring them back. A `dz` above 65,504 becomes inf, which a loss scaler looks for; finite
logits and gradients never give NaN.

A target outside [0, V) is not read: its row gets NaN, as log-probability and as gradient, so the step shows a loss that
is not finite. (`lowlevel.losses` stops the process with a device assertion there, which leaves nothing to report.)

Left out: `tl.dot` (see `lowlevel.kernels`), several programs a row in the forward pass: with 64 registers a thread a
multiprocessor of a T4 holds four programs, so a chunk of 512 rows gives its 40 three rounds and an H100's 132 one.
"""

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # logits that the kernels take
BLOCK = 4096  # logits a program holds at a time: 16 a thread, two 16-byte loads of fp16
WARPS = 8
LAUNCH = {"block": BLOCK, "num_warps": WARPS, "enable_fp_fusion": True}  # Triton 3.9 warns unless fusion is chosen


def logsumexp_and_target(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`logits.logsumexp(1)` and `logits[i, targets[i]]`, in one read of the logits.

    Args:
        logits: (C, V), floating; the kernel takes contiguous fp16, bf16 or fp32 on CUDA, its twin all else.
        targets: (C,) int64. One outside [0, V) gives NaN as its target logit.

    Returns:
        lse (C,) and target_logit (C,), fp32; float64 for float64 logits. A +inf or NaN among a row's logits makes its
        lse inf or NaN. No host sync.
    """
    if not _kernels_take(logits):
        return logsumexp_and_target_reference(logits, targets)
    return _launch_logsumexp(logits, targets)


def logsumexp_and_target_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Give the numbers of `logsumexp_and_target` by plain torch, on any device and layout."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = _inside(targets, logits.shape[1])
    target_logit = logits.gather(1, targets.where(valid, 0)[:, None]).squeeze(1)
    return logits.logsumexp(dim=1), target_logit.where(valid, torch.nan)


def grad_logits_(logits: Tensor, targets: Tensor, lse: Tensor, grad_logps: Tensor) -> Tensor:
    """Overwrite logits z with `grad_logps (onehot(targets) - exp(z - lse))`: what z gets from `z[y] - lse`.

    Args:
        logits: (C, V), floating, overwritten; contiguous fp16, bf16 or fp32 on CUDA is what the kernel takes.
        targets: (C,) int64. One outside [0, V) makes its whole row NaN.
        lse: (C,) fp32, from `logsumexp_and_target` on the same logits.
        grad_logps: (C,) fp32, with the loss scale in it.

    Returns:
        `logits` itself, rounded once from fp32 (float64 for float64 logits); inf beyond the dtype's range. No host
        sync.
    """
    if not _kernels_take(logits):
        return grad_logits_reference_(logits, targets, lse, grad_logps)
    return _launch_grad_logits_(logits, targets, lse, grad_logps)


def grad_logits_reference_(logits: Tensor, targets: Tensor, lse: Tensor, grad_logps: Tensor) -> Tensor:
    """Give the numbers of `grad_logits_` by plain torch, in place as well, on any device and layout."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    valid = _inside(targets, logits.shape[1])
    grad_logits = (logits.to(dtype) - lse[:, None]).exp_().neg_()
    grad_logits.scatter_add_(1, targets.where(valid, 0)[:, None], torch.ones_like(lse, dtype=dtype)[:, None])
    return logits.copy_(grad_logits.mul_(grad_logps.to(dtype).where(valid, torch.nan)[:, None]))


@functools.cache
def usable(device: torch.device, dtype: torch.dtype, vocabulary: int) -> bool:
    """Whether both kernels compile and launch there; warns with the reason, once, if they do not.

    Tries them on one row, so that the answer is known before a training step relies on it. The real calls then find
    the kernels compiled: a CUDA graph that captures them needs one call of this before, as any graph needs a warm-up.
    """
    logits = torch.zeros(1, vocabulary, dtype=dtype, device=device)
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        lse, target_logit = _launch_logsumexp(logits, targets)
        _launch_grad_logits_(logits, targets, lse, target_logit)
    except Exception as error:  # Triton's errors have no common class: missing package, no driver, compiler, ptxas
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(f"plain torch instead of Triton's kernels on {device} in {dtype}: {reason}", stacklevel=2)
        return False
    return True


class Kernels(NamedTuple):
    """The compiled-on-demand Triton functions: launch them as `kernels().logsumexp[grid](...)`."""

    logsumexp: Any
    grad_logits: Any


@functools.cache
def kernels() -> Kernels:
    """Import Triton and define the kernels. Here and not at the top: Triton is no dependency, and an import costs time.

    Raises:
        ImportError: Triton is not installed.
    """
    import triton
    import triton.language as tl

    # these vectors are read one number a program: their alignment is not worth another compilation for an odd slice
    @triton.jit(do_not_specialize_on_alignment=("targets", "lse", "target_logit"))
    def logsumexp(logits, targets, lse, target_logit, vocabulary: tl.constexpr, block: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)  # C V may exceed 2^31
        logits += row * vocabulary
        lanes = tl.arange(0, block)
        m = tl.full([block], -3.4028234663852886e38, tl.float32)
        s = tl.zeros([block], tl.float32)
        for start in range(0, vocabulary, block):
            inside = start + lanes < vocabulary
            z = tl.load(logits + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
            d = z - m
            e = tl.exp(-tl.abs(d))
            s = tl.where(d > 0, s * e + 1.0, s + e)
            m = tl.maximum(m, z)
        row_m = tl.max(m, 0)
        tl.store(lse + row, row_m + tl.log(tl.sum(s * tl.exp(m - row_m), 0)))
        target = tl.load(targets + row)
        valid = (target >= 0) & (target < vocabulary)
        tl.store(target_logit + row, tl.load(logits + target, mask=valid, other=float("nan")).to(tl.float32))

    @triton.jit(do_not_specialize_on_alignment=("targets", "lse", "grad_logps"))
    def grad_logits(logits, targets, lse, grad_logps, vocabulary: tl.constexpr, block: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        inside = columns < vocabulary
        logits += row * vocabulary
        target = tl.load(targets + row)
        valid = (target >= 0) & (target < vocabulary)
        g = tl.where(valid, tl.load(grad_logps + row), float("nan"))
        z = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        onehot = tl.where(columns == target.to(tl.int32), 1.0, 0.0)
        dz = g * (onehot - tl.exp(z - tl.load(lse + row)))
        tl.store(logits + columns, dz.to(logits.dtype.element_ty), mask=inside)

    return Kernels(logsumexp, grad_logits)


def _kernels_take(logits: Tensor) -> bool:
    fits = logits.is_cuda and logits.is_contiguous() and logits.dtype in DTYPES and logits.numel() > 0
    return fits and usable(logits.device, logits.dtype, logits.shape[1])


def _launch_logsumexp(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    target_logit = torch.empty_like(lse)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        kernels().logsumexp[(rows,)](logits, targets.contiguous(), lse, target_logit, vocabulary, **LAUNCH)
    return lse, target_logit


def _launch_grad_logits_(logits: Tensor, targets: Tensor, lse: Tensor, grad_logps: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    vectors = (targets.contiguous(), lse.contiguous(), grad_logps.to(torch.float32).contiguous())
    with torch.cuda.device_of(logits):
        kernels().grad_logits[(rows, -(-vocabulary // BLOCK))](logits, *vectors, vocabulary, **LAUNCH)
    return logits


def _inside(targets: Tensor, vocabulary: int) -> Tensor:
    return (targets >= 0) & (targets < vocabulary)
