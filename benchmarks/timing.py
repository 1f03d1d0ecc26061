"""Timing of single calls with device events, and the ceilings that they are compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # more than any cache
QUEUE_CYCLES = 2_000_000  # the device sleeps about a millisecond while the host queues the call's kernels
CEILING_SIZE = 4096  # of the matrix product


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best; seconds, operations and bytes."""

    gpu: str
    matmul_flops: float  # FLOP/s of a large fp16 product
    copy_bytes: float  # B/s of a large device-to-device copy, read plus written
    kernel_seconds: float  # of an empty kernel inside a CUDA graph
    launch_seconds: float  # of an empty kernel launched from Python
    link_bytes: float  # B/s from pinned host memory


def seconds_of(call: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> list[float]:
    """Seconds of each of `repeats` calls after a warm-up, each with a cold cache and no wait for the host."""
    for _ in range(warmup):
        call()
    if not torch.cuda.is_available():
        return [_host_seconds(call) for _ in range(repeats)]
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in events:
        scratch.zero_()
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _host_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_ceilings(device: torch.device, size: int = CEILING_SIZE) -> Ceilings:
    """The ceilings of this device; on a CPU, at a small `size`, those of the CPU."""
    cuda = device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    matmul = statistics.median(seconds_of(lambda: a @ b))
    source = torch.empty(size * size * 32, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = statistics.median(seconds_of(lambda: target.copy_(source)))
    host = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=cuda).random_()
    link = statistics.median(seconds_of(lambda: target.copy_(host, non_blocking=True), 5))
    return Ceilings(
        gpu=torch.cuda.get_device_name() if cuda else "none (CPU)",
        matmul_flops=2 * size**3 / matmul,
        copy_bytes=2 * source.numel() / copy,
        kernel_seconds=graph_kernel_seconds(device) if cuda else launch_seconds(device),
        launch_seconds=launch_seconds(device),
        link_bytes=host.numel() / link,
    )


def launch_seconds(device: torch.device, launches: int = 2000) -> float:
    """Host time of one small operation from Python."""
    x = torch.zeros(1, device=device)
    for _ in range(100):
        x.add_(1)
    start = time.perf_counter()
    for _ in range(launches):
        x.add_(1)
    return (time.perf_counter() - start) / launches


def graph_kernel_seconds(device: torch.device, kernels: int = 500) -> float:
    """Device time of one small kernel inside a captured graph, the gap to its neighbour included."""
    x = torch.zeros(1, device=device)
    x.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            x.add_(1)
    return statistics.median(seconds_of(graph.replay)) / kernels
