"""One way of measuring for all tools: wall time from step end to step end, memory, and the row of the table."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Job

GIB = 2**30
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass
class Meter:
    """Seconds of each step, and the most device memory seen at a step's end.

    The device is waited for at each step's end, in every tool alike. `device_used_gib` is what the driver says is in
    use beyond what was before the process's first allocation: it holds paged optimizer state, cached blocks and graph
    pools, which `max_memory_allocated` does not all count. `rehearsal` is what a tool does before its first step and
    others do in it: compiling, capturing.
    """

    seconds: list[float] = field(default_factory=list)
    rehearsal: float = 0.0
    device_used_gib: float = 0.0
    baseline: int = field(default_factory=lambda: _device_used())
    started: float | None = None

    def begin(self) -> None:
        """The first step begins; a later call changes nothing."""
        if self.started is None:
            synchronize()
            self.started = time.perf_counter()

    def end_step(self) -> None:
        """A step has ended, its update included."""
        assert self.started is not None
        synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        self.device_used_gib = max(self.device_used_gib, (_device_used() - self.baseline) / GIB)
        self.started = time.perf_counter()


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device_used() -> int:
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def limit_memory(cap_gib: float) -> None:
    """Let the allocator have no more than a small card's memory."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total))


def machine() -> dict[str, str]:
    """GPU and library versions, for every row."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
    return {"gpu": gpu, **{name: installed(name) for name in LIBRARIES}}


def installed(package: str) -> str:
    """A package's version, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Measured:
    """What a tool reports of its run: lists have one entry a step."""

    version: str
    tokens: Sequence[int]  # as fed: whole sequences, a prompt once for each completion, no padding
    losses: Sequence[float]
    computed: float  # positions that are not padding, of all steps; a shared prompt counts once
    positions: float  # with padding
    trouble: str = ""  # it ran, but not as the case says
    plan: str = ""  # lowlevel only: see benchmarks/memory.py


def row(job: Job, meter: Meter, measured: Measured) -> dict[str, Any]:
    """A finished case as a row of the table: medians over the steps after the warm-up."""
    case, steps = job.case, len(meter.seconds)
    if not steps == len(measured.tokens) == len(measured.losses):
        counts = f"{steps} steps, {len(measured.tokens)} token counts, {len(measured.losses)} losses"
        raise ValueError(f"the run is incomplete: {counts}")
    timed = range(min(job.warmup, steps - 1), steps)
    seconds = [meter.seconds[i] for i in timed]
    expected = expected_tokens(job)[: len(measured.tokens)]
    status = measured.trouble or "ok"
    if list(measured.tokens) != expected and not case.variant:  # a variant may have another length
        status = f"other tokens: {sum(measured.tokens)} != {sum(expected)}"
    share = measured.computed / sum(measured.tokens)
    speed = statistics.median(measured.tokens[i] / meter.seconds[i] for i in timed)
    cuda = torch.cuda.is_available()
    return {
        **case.identity,
        "version": measured.version,
        "plan": measured.plan,
        "tokens_per_second": round(speed),
        "computed_tokens_per_second": round(speed * share),
        "seconds_per_step": round(statistics.median(seconds), 5),
        "seconds_p10": round(quantile(seconds, 10), 5),
        "seconds_p90": round(quantile(seconds, 90), 5),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if cuda else 0.0,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3) if cuda else 0.0,
        "device_used_gib": round(meter.device_used_gib, 3),
        "loss_first": round(measured.losses[0], 4),
        "loss_last": round(measured.losses[-1], 4),
        "losses": ";".join(f"{loss:.5f}" for loss in measured.losses),
        "first_step_seconds": round(meter.rehearsal + meter.seconds[0], 3),
        "tokens": sum(measured.tokens),
        "positions_per_step": round(measured.positions / steps),
        "padding_share": round(1 - measured.computed / measured.positions, 4),
        "timed_steps": len(seconds),
        "status": status,
        **machine(),
    }


def quantile(values: Sequence[float], percent: int) -> float:
    """A percentile, linear between values."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def expected_tokens(job: Job) -> list[int]:
    """Tokens of each step as the workload counted them."""
    from benchmarks.workload import by_step

    tokens = json.loads((Path(job.workload) / "workload.json").read_text())["tokens"]
    return by_step(tokens[job.case.method], job.case.batch * job.case.accumulation)


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300]


def work(measure: Callable[[Job, Meter], Measured], *, first: str = "") -> None:
    """Body of a worker process: read the job, measure, write the row or the error's first line.

    Args:
        measure: does the work.
        first: a module that must be imported before the device is touched.
    """
    job = Job.read(Path(sys.argv[1]))
    try:
        if first:
            importlib.import_module(first)
        limit_memory(job.cap_gib)
        meter = Meter()
        result = row(job, meter, measure(job, meter))
    except BaseException as error:  # noqa: B036 - a peer may leave by SystemExit; its row says so
        traceback.print_exc()
        result = {**job.case.identity, "status": f"failed: {first_line(error)}", **machine()}
    Path(job.result).write_text(json.dumps(result), encoding="utf-8")
