"""4-bit weights to 16 bits in one pass. Triton, with a torch twin.

The idea. bitsandbytes keeps a weight as two 4-bit codes a byte and one constant (absmax) a block of 64 weights; with
double quantisation that constant is an 8-bit code itself, with an fp32 constant for each 256 of them and one offset::

    c_b = code2[q_b] absmax2[b / 256] + offset        w_i = code[q_i] c_(i / 64)

Its own kernels take three passes: constants to fp32, add the offset, weights. For the small matrices of a small model
each of them ends before the GPU is full, and a step of the recipe dequantises 1,848 matrices. Here one kernel reads
codes and constants and writes weights: 0.52 bytes read and 2 written a weight.

Exactness. The same fp32 operations in the same order, none fused into another (a fused multiply-add would round once
instead of twice), and one rounding to the weight's dtype: bit for bit what bitsandbytes computes.
"""

import functools
import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BYTES = 1024  # codes of a program: 2,048 weights, 16 a thread
LAUNCH = {"size": BYTES, "num_warps": 4, "enable_fp_fusion": False}


class Quantised(NamedTuple):  # made for each product, faster than a dataclass
    """A 4-bit weight and all that its values depend on, as bitsandbytes keeps it.

    packed: uint8, the first of two weights in a byte's high bits. code: (16,) fp32. absmax: a block's constant, fp32;
    with double quantisation its 8-bit code, and then code2 (256,), absmax2 and offset () are given, all fp32.
    """

    packed: Tensor
    shape: tuple[int, ...]
    code: Tensor
    absmax: Tensor
    blocksize: int
    code2: Tensor | None = None
    absmax2: Tensor | None = None
    offset: Tensor | None = None
    blocksize2: int = 1

    @classmethod
    def of(cls, packed: Tensor, state: Any) -> "Quantised":
        """From a bitsandbytes weight and its QuantState."""
        shape, blocksize = tuple(state.shape), state.blocksize
        if not state.nested:
            return cls(packed, shape, state.code, state.absmax, blocksize)
        inner = state.state2
        nested = (inner.code, inner.absmax, state.offset, inner.blocksize)
        return cls(packed, shape, state.code, state.absmax, blocksize, *nested)


def dequantize(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, a new tensor of its shape. No host sync.

    The kernel takes uint8 codes on a CUDA device and blocks of a power of two; its twin all else.
    """
    if not _kernel_takes(weight, dtype):
        return dequantize_reference(weight, dtype)
    return _launch(weight, dtype)


def dequantize_reference(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """Give the numbers of `dequantize` by plain torch, on any device."""
    absmax = weight.absmax
    if weight.code2 is not None and weight.absmax2 is not None and weight.offset is not None:
        outer = weight.absmax2.repeat_interleave(weight.blocksize2)[: absmax.numel()]
        absmax = weight.code2[absmax.long()] * outer + weight.offset
    codes = weight.packed.reshape(-1).view(torch.uint8)
    pairs = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1)[: _count(weight)]
    constants = absmax.repeat_interleave(weight.blocksize)[: pairs.numel()]
    return (weight.code[pairs.long()] * constants).to(dtype).view(weight.shape)


@functools.cache
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel compiles and launches there; warns with the reason, once, if it does not."""
    packed = torch.zeros(32, 1, dtype=torch.uint8, device=device)
    constants = torch.ones(16, device=device)
    nested = (torch.ones(256, device=device), constants[:1], constants[0], 256)
    double = Quantised(packed, (1, 64), constants, packed.view(-1)[:1], 64, *nested)
    try:
        _launch(Quantised(packed, (1, 64), constants, constants[:1], 64), dtype)
        _launch(double, dtype)
    except Exception as error:  # Triton's errors have no common class: missing package, no driver, compiler, ptxas
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(f"plain torch instead of Triton's kernels on {device} in {dtype}: {reason}", stacklevel=2)
        return False
    return True


@functools.cache
def kernel() -> Any:
    """Import Triton and define the kernel (see `lowlevel.kernels.vocabulary.kernels`)."""
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize_on_alignment=("code", "absmax", "code2", "absmax2", "offset"))
    def dequantize_4bit(
        packed, code, absmax, code2, absmax2, offset, out, count,
        blocksize: tl.constexpr, blocksize2: tl.constexpr, nested: tl.constexpr, size: tl.constexpr,
    ):  # fmt: skip
        first = tl.program_id(0).to(tl.int64) * size
        at = first + tl.arange(0, size)
        codes = tl.load(packed + at, mask=2 * at < count, other=0).to(tl.int32)
        block = 2 * at // blocksize
        known = 2 * at < count
        if nested:
            inner = tl.load(absmax + block, mask=known, other=0).to(tl.int32)
            constant = tl.load(code2 + inner) * tl.load(absmax2 + block // blocksize2, mask=known, other=0.0)
            constant += tl.load(offset)
        else:
            constant = tl.load(absmax + block, mask=known, other=0.0)
        high = tl.load(code + (codes >> 4)) * constant
        low = tl.load(code + (codes & 15)) * constant
        both = tl.interleave(high, low).to(out.dtype.element_ty)
        where = 2 * first + tl.arange(0, 2 * size)
        tl.store(out + where, both, mask=where < count)

    return dequantize_4bit


def _launch(weight: Quantised, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    nested = weight.code2 is not None
    inner = (weight.code2, weight.absmax2, weight.offset) if nested else (weight.code, weight.absmax, weight.code)
    grid = (-(-_count(weight) // (2 * BYTES)),)
    current = out.get_device() == torch.cuda.current_device()
    with nullcontext() if current else torch.cuda.device_of(out):  # Triton launches on the current device
        kernel()[grid](
            weight.packed, weight.code, weight.absmax, *inner, out, _count(weight),
            weight.blocksize, weight.blocksize2, nested, **LAUNCH,
        )  # fmt: skip
    return out


def _kernel_takes(weight: Quantised, dtype: torch.dtype) -> bool:
    """One constant for both weights of a byte: blocks are even, and powers of two make the divisions shifts."""
    even = weight.blocksize >= 2 and weight.blocksize & (weight.blocksize - 1) == 0
    contiguous = weight.packed.is_contiguous() and weight.absmax.is_contiguous()
    fits = weight.packed.is_cuda and weight.packed.dtype == torch.uint8 and dtype in DTYPES and contiguous
    return fits and even and usable(weight.packed.device, dtype)


def _count(weight: Quantised) -> int:
    count = 1
    for size in weight.shape:
        count *= size
    return count
