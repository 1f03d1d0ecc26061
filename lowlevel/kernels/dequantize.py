"""4-bit weights to 16 bits in one pass: a Triton kernel, with a torch twin.

bitsandbytes stores a weight as two 4-bit codes per byte and one constant (absmax) per block of 64 weights. With double
quantisation this constant is itself an 8-bit code, with one fp32 constant per 256 of them and one offset::

    c_b = code2[q_b] absmax2[b / 256] + offset        w_i = code[q_i] c_(i / 64)

Its own kernels take three passes: constants to fp32, add the offset, weights. The matrices of a small model are too
small to fill a GPU in such a pass. This kernel reads 0.52 bytes and writes 2 per weight. A thread takes 32-bit words of
8 codes: one constant for 8 weights, and 8 weights next to each other to write, which need no exchange between threads.

The result equals that of bitsandbytes bit for bit: the same fp32 operations in the same order, without fused
multiply-adds (they round once instead of twice), and one rounding to the weight's dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowlevel.kernels.operators import launches

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WORDS = 512  # of a program: 4,096 weights, 32 a thread
LAUNCH = {"size": WORDS, "num_warps": 4, "enable_fp_fusion": False}


class Quantised(NamedTuple):  # made for each product, faster than a dataclass
    """A 4-bit weight with the constants that its values depend on, as bitsandbytes stores them."""

    shape: tuple[int, ...]
    blocksize: int  # weights per constant of absmax
    blocksize2: int  # constants of absmax per constant of absmax2; 1 without double quantisation
    packed: Tensor  # uint8; the first of a byte's two weights is in its high bits
    code: Tensor  # (16,) fp32
    absmax: Tensor  # fp32; with double quantisation uint8 codes
    code2: Tensor | None = None  # (256,) fp32; only with double quantisation, as the next two
    absmax2: Tensor | None = None  # fp32
    offset: Tensor | None = None  # () fp32

    @classmethod
    def of(cls, packed: Tensor, state: Any) -> Quantised:
        """From a bitsandbytes weight and its QuantState."""
        shape, inner = tuple(state.shape), state.state2
        if not state.nested:
            return cls(shape, state.blocksize, 1, packed, state.code, state.absmax)
        constants = (state.code, state.absmax, inner.code, inner.absmax, state.offset)
        return cls(shape, state.blocksize, inner.blocksize, packed, *constants)

    def pack(self) -> tuple[list[Tensor], list[int]]:
        """Two lists for an operator's schema: 3 tensors (6 with double quantisation), and the sizes."""
        tensors = (self.packed, self.code, self.absmax, self.code2, self.absmax2, self.offset)
        return [tensor for tensor in tensors if tensor is not None], [*self.shape, self.blocksize, self.blocksize2]

    @classmethod
    def unpack(cls, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Quantised:
        """The inverse of `pack`."""
        *shape, blocksize, blocksize2 = sizes
        return cls(tuple(shape), blocksize, blocksize2, *tensors)


def dequantize(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, a new tensor of its shape; by the kernel if it accepts it. No host sync."""
    return _launch(weight, dtype) if _kernel_takes(weight, dtype) else dequantize_reference(weight, dtype)


def dequantize_reference(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """The same numbers in plain torch, on any device."""
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
    """Whether the kernel compiles and launches on this device; if not, warns once with the reason."""
    packed = torch.zeros(32, 1, dtype=torch.uint8, device=device)
    ones = torch.ones(256, device=device)
    nested = (ones[:16], packed.view(-1)[:1], ones, ones[:1], ones[0])
    plain = Quantised((1, 64), 64, 1, packed, ones[:16], ones[:1])
    weights = plain, Quantised((1, 64), 64, 256, packed, *nested)
    return launches(lambda: [_launch(weight, dtype) for weight in weights], device, dtype)


@functools.cache
def kernel() -> Any:
    """Import Triton and define the kernel, as `lowlevel.kernels.vocabulary.kernels`."""
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize_on_alignment=("code", "absmax", "code2", "absmax2", "offset"))
    def dequantize_4bit(
        words, code, absmax, code2, absmax2, offset, out, count,
        blocksize: tl.constexpr, blocksize2: tl.constexpr, nested: tl.constexpr, size: tl.constexpr,
    ):  # fmt: skip
        word = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
        known = word < count
        codes = tl.load(words + word, mask=known, other=0)
        block = word * 8 // blocksize
        if nested:
            inner = tl.load(absmax + block, mask=known, other=0).to(tl.int32)
            constant = tl.load(code2 + inner) * tl.load(absmax2 + block // blocksize2, mask=known, other=0.0)
            constant += tl.load(offset)
        else:
            constant = tl.load(absmax + block, mask=known, other=0.0)
        place = tl.arange(0, 8)  # of a weight; a byte's first one is in its high bits
        nibble = (codes[:, None] >> ((place ^ 1) * 4)[None, :]) & 15
        values = (tl.load(code + nibble) * constant[:, None]).to(out.dtype.element_ty)
        tl.store(out + word[:, None] * 8 + place[None, :], values, mask=known[:, None])

    return dequantize_4bit


def _launch(weight: Quantised, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    nested = weight.code2 is not None
    inner = (weight.code2, weight.absmax2, weight.offset) if nested else (weight.code, weight.absmax, weight.code)
    words = weight.packed.view(-1).view(torch.int32)
    grid = (-(-len(words) // WORDS),)
    current = not out.is_cuda or out.get_device() == torch.cuda.current_device()
    with nullcontext() if current else torch.cuda.device_of(out):  # Triton launches on the current device
        kernel()[grid](
            words, weight.code, weight.absmax, *inner, out, len(words),
            weight.blocksize, weight.blocksize2, nested, **LAUNCH,
        )  # fmt: skip
    return out


def _kernel_takes(weight: Quantised, dtype: torch.dtype) -> bool:
    """Whole words, each with one constant; powers of two turn the divisions into shifts."""
    even = weight.blocksize >= 8 and weight.blocksize & (weight.blocksize - 1) == 0
    words = _count(weight) % 8 == 0 and weight.packed.data_ptr() % 4 == 0
    contiguous = weight.packed.is_contiguous() and weight.absmax.is_contiguous()
    fits = weight.packed.is_cuda and weight.packed.dtype == torch.uint8 and dtype in DTYPES and contiguous
    return fits and even and words and usable(weight.packed.device, dtype)


def _count(weight: Quantised) -> int:
    return math.prod(weight.shape)
