"""Deterministic mode: the same run on the same kind of GPU gives the same bits.

On a CPU that is always so. On a GPU three things add in an order that changes from run to run, and are told not to:

    attention's gradient    flash and efficient kernels sum dQ (dK, dV) over blocks by atomic additions
    matrix products         cuBLAS picks a workspace a stream; CUBLAS_WORKSPACE_CONFIG makes it a fixed one
    compiled reductions     Inductor times several block sizes and keeps the fastest, which may differ each time

Dropout, sums by sequence, the gradient of repeated keys and Triton's kernels here have a fixed order anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lowlevel import workspaces


@contextmanager
def deterministic_mode(wanted: bool) -> Iterator[None]:
    """Switch torch to deterministic algorithms within the block; do nothing if not `wanted`.

    To be entered before the process first multiplies on a GPU: cuBLAS reads its setting once, so that one stays in the
    environment. A workspace that is set there and not deterministic is replaced.
    """
    if not wanted:
        yield
        return
    if os.environ.get(workspaces.ENVIRONMENT) not in workspaces.FIXED:
        os.environ[workspaces.ENVIRONMENT] = workspaces.FIXED[0]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # no kernel here reads what it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def compiler_options() -> Mapping[str, Any]:
    """Inductor's settings in the mode that is on now: no choice by timing, so the same kernels in every process."""
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
