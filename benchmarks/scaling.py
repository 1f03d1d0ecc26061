"""How the cost of an SFT step grows: over sequence length, batch, rank and model size, one axis at a time.

    python -m benchmarks.scaling --out out/scaling [--axes length batch rank model] [--execution graphed]

Every point is a short run in a process of its own; from 2 x 512 tokens of the TinyLlama shape at r = 64, one setting
changes: the length of a sequence (one a step), the rows of a micro-batch (without checkpointing), the rank, the model's
shape (from here on with checkpointing). Writes OUT/scaling.csv and, with benchmarks.plots, its picture.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import FIELDS, ROWS_PER_STEP, Case
from benchmarks.runner import Runner, write_table
from benchmarks.step import header, line
from benchmarks.workload import LENGTHS, SHAPES, make_workload, workload_process

AXES = {
    "length": (256, 1024, 4096, 8192),
    "batch": (1, 4, 16),
    "rank": (8, 64, 256),
    "model": ("smollm2-135m", "tinyllama", "llama-3b", "llama-7b"),
}
TINY_AXES = {"length": (32, 64, 128), "batch": (1, 2), "rank": (4, 8), "model": ("tiny",)}
SCALING_FIELDS = ("axis", "value", *FIELDS)


@dataclass(frozen=True)
class Point:
    """One measurement: where on which axis, and the case with its model and length."""

    axis: str
    value: str
    case: Case
    shape: str
    length: int


def points(axes: list[str], execution: str, shape: str) -> Iterator[Point]:
    """All points, axis after axis."""
    values, usual = (TINY_AXES if shape == "tiny" else AXES), LENGTHS.get(shape, 512)
    for axis in axes:
        for value in values[axis]:
            name = f"scaling_{axis}_{value}"
            base: dict[str, Any] = {
                "name": name,
                "tool": "lowlevel",
                "method": "sft",
                "accumulation": 1,
                "execution": execution,
            }
            if axis == "length":
                yield Point(axis, str(value), Case(**base, batch=1), shape, int(value))
            elif axis == "batch":
                yield Point(axis, str(value), Case(**base, batch=int(value), checkpointing=False), shape, usual)
            elif axis == "rank":
                yield Point(axis, str(value), Case(**base, rank=int(value)), shape, usual)
            else:
                yield Point(axis, str(value), Case(**base), str(value), usual)


def measure(point: Point, runner: Runner) -> dict[str, Any]:
    """The row of a point; its model is made if no point before it has made it."""
    model = runner.out / point.shape
    workload_process(model, point.shape, LENGTHS.get(point.shape, 512), ROWS_PER_STEP, timeout=300)
    folder = runner.out / f"rows_{point.case.name}"
    make_workload(folder, point.shape, point.length, runner.steps * point.case.batch, model=model / "model")
    return runner.run(point.case, folder, shape=point.shape)


def main() -> None:
    """Measure point after point; a model that no further point needs is removed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/scaling"))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--execution", choices=("eager", "compiled", "graphed"), default="graphed")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--cap-gib", type=float, default=70.0, help="limit of the CUDA allocator")
    parser.add_argument("--timeout", type=float, default=150, help="seconds a point")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no point is started")
    options = parser.parse_args()
    runner = Runner(options.out, options.steps, options.warmup, options.cap_gib, options.timeout)
    todo = list(points(options.axes, options.execution, options.shape))
    began, rows = time.perf_counter(), []
    print(header(), flush=True)
    for number, point in enumerate(todo):
        if time.perf_counter() - began > options.budget:
            row = {**point.case.identity, "status": f"not run: {options.budget:g} s were over"}
        else:
            row = measure(point, runner)
            if all(later.shape != point.shape for later in todo[number + 1 :]):
                shutil.rmtree(options.out / point.shape)  # gigabytes
        rows.append({"axis": point.axis, "value": point.value, **row})
        write_table(options.out / "scaling.csv", rows, SCALING_FIELDS)
        print(line(row), flush=True)
    print(f"{options.out / 'scaling.csv'}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
