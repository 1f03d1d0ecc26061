"""Rows of a table in pinned host memory, read by the GPU over PCIe: a Triton kernel, with a torch twin.

A micro-batch reads a few thousand of the V rows of an input embedding. A GPU can read pinned host memory directly
(unified addressing), so the table does not need GPU memory. There is no host sync, so a CUDA graph can capture it.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from lowlevel.kernels.operators import operator

COLUMNS = 1024  # per program
LAUNCH = {"size": COLUMNS, "num_warps": 4}


@operator("host_rows")
def host_rows(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]` on the device of `index`, (*index.shape, D) in the table's dtype. Not differentiable.

    Args:
        table: (V, D), contiguous; pinned if it is in host memory and `index` on a GPU.
        index: int64 of any shape, in [0, V).
    """
    if not index.is_cuda or table.is_cuda:
        return host_rows_reference(table, index)
    out = torch.empty(*index.shape, table.shape[1], dtype=table.dtype, device=index.device)
    if index.numel():
        with torch.cuda.device_of(index):  # Triton launches on the current device
            grid = (index.numel(), -(-table.shape[1] // COLUMNS))
            kernel()[grid](table, index.contiguous(), out, table.shape[1], **LAUNCH)
    return out


@torch.library.register_fake("lowlevel::host_rows")
def _(table: Tensor, index: Tensor) -> Tensor:
    return torch.empty(*index.shape, table.shape[1], dtype=table.dtype, device=index.device)


def host_rows_reference(table: Tensor, index: Tensor) -> Tensor:
    """The same rows in plain torch, on any device."""
    return table[index.to(table.device)].to(index.device)


@functools.cache
def kernel() -> Any:
    """Import Triton and define the kernel, as `lowlevel.kernels.vocabulary.kernels`."""
    import triton
    import triton.language as tl

    @triton.jit
    def gather_rows(table, index, out, width, size: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * size + tl.arange(0, size)
        inside = columns < width
        source = tl.load(index + row)
        tl.store(out + row * width + columns, tl.load(table + source * width + columns, mask=inside), mask=inside)

    return gather_rows
