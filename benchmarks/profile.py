"""Where the time of a step goes, by kind of kernel: `python -m benchmarks.profile --case lowlevel_sft_fast`.

A case of `benchmarks.step`, its shapes captured first; then some steps under torch's profiler. Kernels of two streams
overlap, so the kinds add up to more than the time in which the GPU was busy. Needs a GPU.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import ROWS_PER_STEP, select
from benchmarks.runner import commit
from benchmarks.workload import LENGTHS, case_config, workload_process
from lowlevel.execution import WithFallback
from lowlevel.loop import optimizer_step
from lowlevel.methods.choice import build_method
from lowlevel.model.dequantised import dequantize_as_set
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer
from lowlevel.running.assembly import build_run_policy, check_run, choose_execution

KINDS = (  # the first pattern that a kernel's name contains
    ("attention", r"flash|fmha|attention"),
    ("products", r"gemm|cutlass|nvjet|xmma|splitk|cublas"),
    ("dequantise", r"dequant"),
    ("vocabulary", r"logsumexp|vocab|token_logp|grad_logits"),
    ("optimizer", r"adam|optimizer32bit|kOptimizer"),
    ("copies", r"memcpy|memset"),
    ("compiled", r"^triton_"),
)


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def busy_milliseconds(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans, given in microseconds."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total / 1000


def measure(case: str, shape: str, steps: int) -> list[dict[str, Any]]:
    """Milliseconds a step and launches a step, by kind; and the largest kernels of each kind."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, (chosen,) = Path(scratch), select([case])
        workload_process(folder, shape, LENGTHS.get(shape, 512), steps * ROWS_PER_STEP, 300)
        config, inputs = check_run(case_config(chosen, folder, folder / "run", steps))
        policy = build_run_policy(config, inputs)
        method: Any = build_method(config, inputs.attention)
    dequantize_as_set(policy, config.train.dequantize_once)
    execution = WithFallback(policy, method, choose_execution(config, inputs), print)
    optimizer = build_optimizer(policy.flat.weights, config.train)
    scale, size, rows = LossScale.for_precision(policy.placement.precision), config.rows_per_step, inputs.data.train
    taken = [method.micro_batches(rows[start : start + size]) for start in range(0, steps * size, size)]

    def take() -> float:
        began = time.perf_counter()
        for step, batches in enumerate(taken):
            optimizer_step(execution, optimizer, batches, scale, seed=0, step=step, max_grad_norm=1.0)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps * 1000

    take()
    wall = take()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        take()
    spans: list[tuple[float, float]] = []
    times, launches, names = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            length, kind = event.time_range.elapsed_us(), kind_of(event.name)
            spans.append((event.time_range.start, event.time_range.end))
            times[kind] += length
            launches[kind] += 1
            names[kind, event.name[:90]] += length
    rows_out = [{"case": case, "kind": "wall clock", "ms": wall, "launches": sum(launches.values()) / steps}]
    rows_out.append({"case": case, "kind": "GPU busy", "ms": busy_milliseconds(spans) / steps, "launches": 0})
    for kind, spent in times.most_common():
        rows_out.append({"case": case, "kind": kind, "ms": spent / steps / 1000, "launches": launches[kind] / steps})
    for (kind, name), spent in names.most_common(40):
        print(f"   {kind:<12}{spent / steps / 1000:8.3f} ms  {name}")
    return rows_out


def main() -> None:
    """Measure each case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["lowlevel_sft_fast", "lowlevel_dpo_fast"])
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    table = [row for case in options.case for row in measure(case, options.shape, options.steps)]
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit()}
    with options.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*table[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in table)
    for row in table:
        print(f"{row['case']:<28}{row['kind']:<14}{row['ms']:9.3f} ms {row['launches']:8.0f} launches")


if __name__ == "__main__":
    main()
