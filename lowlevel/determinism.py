"""Deterministic mode: the same run on the same kind of GPU gives the same bits.

On a CPU this always holds. On a GPU three operations sum in varying order, which this mode fixes:

    attention's gradient    flash and efficient kernels sum dQ (dK, dV) over blocks by atomic additions
    matrix products         cuBLAS chooses workspaces by stream, unless CUBLAS_WORKSPACE_CONFIG is set
    compiled reductions     Inductor times several block sizes and keeps the fastest, which can vary

Dropout, sums by sequence, the gradient of repeated keys and our Triton kernels always have a fixed order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

ENVIRONMENT = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it once, at a process's first product on a GPU
SMALL = ":4096:2:16:8"  # torch's default before Hopper; Hopper's is four times as large
FIXED = (":4096:8", ":16:8")  # the two that NVIDIA documents as deterministic


def workspace_bytes(setting: str) -> int:
    """Bytes of one cuBLAS workspace, of which each stream and thread has one; settings are pairs of KiB and count."""
    sizes = [int(number) for number in setting.strip(":").split(":")]
    return 1024 * sum(size * count for size, count in zip(sizes[::2], sizes[1::2], strict=True))


@contextmanager
def deterministic_mode(wanted: bool) -> Iterator[None]:
    """Switch torch to deterministic algorithms within the block; do nothing if not `wanted`.

    Enter it before the process's first product on a GPU: cuBLAS reads its environment variable once, which stays set.
    """
    if not wanted:
        yield
        return
    if os.environ.get(ENVIRONMENT) not in FIXED:
        os.environ[ENVIRONMENT] = FIXED[0]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # no kernel here reads uninitialised memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def compiler_options() -> Mapping[str, Any]:
    """Inductor's settings: in deterministic mode it does not choose kernels by timing."""
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
