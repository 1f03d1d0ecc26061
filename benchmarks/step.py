"""SFT and DPO steps of the recipe in lowlevel and its peers, beside each other in one run on one GPU.

    python -m benchmarks.step --out out/step [--cases 'lowlevel_*' trl_sft_2x4] [--site unsloth=/venv/bin/python]

Each case runs in a process of its own. Tokens are real tokens as fed, counted alike for all tools: padding is left out,
and a pair's prompt counts once for each completion. Medians over the steps after the warm-up. Writes OUT/step.csv after
each case; a case that fails has a row with the error's first line, and its log in OUT/jobs.

Without a GPU: `--shape tiny` tries everything at a small size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import ROWS_PER_STEP, Case, select
from benchmarks.runner import Runner, parse_sites, read_table, write_table
from benchmarks.workload import LENGTHS, SHAPES, workload_process

COLUMNS = {"tokens_per_second": 9, "seconds_per_step": 10, "peak_allocated_gib": 7, "device_used_gib": 7}


def measure_all(
    cases: Sequence[Case], runner: Runner, workload: Path, table: Path, *, shape: str, budget: float
) -> list[dict[str, Any]]:
    """Run the cases in order and keep the table current; after `budget` seconds no further case is started."""
    began = time.perf_counter()
    names = {case.name for case in cases}
    rows: list[dict[str, Any]] = [row for row in read_table(table) if row["case"] not in names]
    for case in cases:
        if time.perf_counter() - began > budget:
            row = {**case.identity, "status": f"not run: {budget:g} s were over"}
        else:
            row = runner.run(case, workload, shape=shape)
        rows.append(row)
        write_table(table, rows)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as one line."""
    numbers = "".join(f"{row.get(name, ''):>{width}}" for name, width in COLUMNS.items())
    return f"{row['case']:<34}{numbers}  {row.get('case_seconds', ''):>6}  {row['status'][:90]}"


def header() -> str:
    """What the lines hold."""
    return f"{'case':<34}{'tokens/s':>9}{'s/step':>10}{'peak':>7}{'used':>7}  {'s':>6}  status"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/step"))
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="NAME", help="names, or patterns of the table's cases (cases.py)"
    )
    parser.add_argument("--steps", type=int, default=24, help="steps a case, warm-up included")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--cap-gib", type=float, default=15.0, help="limit of the CUDA allocator")
    parser.add_argument("--timeout", type=float, default=180, help="seconds a case")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no case is started")
    parser.add_argument("--site", action="append", default=[], metavar="TOOL=PATH",
                        help="a tool's own Python, or a folder of packages that comes first for it")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    """Make the workload, measure, print the table."""
    options = arguments()
    cases = select(options.cases)
    runner = Runner(options.out, options.steps, options.warmup, options.cap_gib, options.timeout,
                    parse_sites(options.site))  # fmt: skip
    began = time.perf_counter()
    rows = max(24, options.steps) * ROWS_PER_STEP
    workload = options.out / "workload"
    workload_process(workload, options.shape, LENGTHS.get(options.shape, 512), rows, timeout=300)
    print(f"workload: {time.perf_counter() - began:.0f} s\n{header()}", flush=True)
    table = options.out / "step.csv"
    measured = measure_all(cases, runner, workload, table, shape=options.shape, budget=options.budget)
    print(f"\n{table}: {time.perf_counter() - began:.0f} s\n{header()}")
    print("\n".join(line(row) for row in measured))


if __name__ == "__main__":
    main()
