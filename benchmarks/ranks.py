"""A step shared among 1, 2 and 4 GPUs: tokens per second, share of the all-reduce, memory, and losses against one GPU.

    python -m benchmarks.ranks --out out/ranks [--ranks 1 2] [--methods sft dpo] [--rows 8 16] [--shape tiny]

SFT and DPO of the TinyLlama shape at 2 pairs or rows a micro-batch, 8 and 16 a step, as a run computes them (graphs,
checkpointing, dropout 0.1 in SFT, r = 64), each under torchrun. On rank 0, wall time from step end to step end. An
all-reduce is timed by CUDA events on each rank: the least of the ranks is the transfer, the rest of rank 0's is waiting
for a slower rank. `speedup` is against one GPU with the same step; `speedup_same_work` against one GPU with the step's
rows divided by the ranks. Writes OUT/ranks.csv. Without GPUs, ranks are processes that talk through gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.cases import Case
from benchmarks.runner import ROOT, commit, last_line, write_table
from benchmarks.workload import LENGTHS, SHAPES, workload_process

FIELDS = (
    "case", "method", "rows_per_step", "ranks", "tokens_per_second", "speedup", "speedup_same_work",
    "seconds_per_step", "allreduce_share", "transfer_share", "peak_allocated_gib", "largest_difference", "losses",
    "same_weights", "execution", "status", "shape", "gpu", "torch", "transformers", "peft", "bitsandbytes", "commit",
    "started",
)  # fmt: skip
STEPS, WARMUP = 20, 5


def in_rank(job: dict[str, Any]) -> None:
    """Run a case in this rank and write what it measured to OUT/RANK.json."""
    import torch

    import lowlevel.running.training
    from benchmarks.lowlevel_case import run_metered
    from benchmarks.meter import Meter, machine, synchronize
    from benchmarks.workload import case_config
    from lowlevel.hashing import checksum
    from lowlevel.ranks import Ranks

    rank, out = int(os.environ["RANK"]), Path(job["out"])
    case = Case("ranks", "lowlevel", job["method"], 2, job["rows"] // 2, execution="auto")
    config = case_config(case, Path(job["workload"]), out / "run", job["steps"])
    spans: list[tuple[Any, Any]] = []
    steps_of: list[int] = []  # step of each span
    meter, plain, found = Meter(), Ranks.sum_, dict[str, Any]()
    cuda = torch.cuda.is_available()

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self: Ranks, values: Any) -> Any:
        began = now()
        plain(self, values)
        spans.append((began, now()))
        steps_of.append(len(meter.seconds))
        return values

    def kept(start: Any, job: Any, *rest: Any) -> Any:
        summary = yield from steps(start, job, *rest)
        found["weights"] = checksum([job.policy.flat.weights])
        return summary or {"execution": ""}

    steps = lowlevel.running.training._steps
    with patch.object(Ranks, "sum_", timed), patch("lowlevel.running.training._steps", kept):
        records, mode = run_metered(config, meter)
    synchronize()
    reduce = [0.0] * len(meter.seconds)
    for step, (began, ended) in zip(steps_of, spans, strict=True):
        if step < len(reduce):
            reduce[step] += began.elapsed_time(ended) / 1e3 if cuda else ended - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    row = {"seconds": meter.seconds, "reduce": reduce, "peak": peak, "mode": mode, **found, "machine": machine()}
    row |= {"losses": [record["loss"] for record in records], "tokens": records[-1]["num_tokens"]} if rank == 0 else {}
    (out / f"{rank}.json").write_text(json.dumps(row), encoding="utf-8")


def measure(method: str, rows: int, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run a case in its own processes; its row, without comparisons."""
    out = (options.out / f"{method}-{rows}-{ranks}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob("*.json"):
        left.unlink()
    job = {"method": method, "rows": rows, "out": str(out), "steps": options.steps,
           "workload": str((options.out / "workload").resolve())}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    command += ["--nproc-per-node", str(ranks), "-m", "benchmarks.ranks", "--job", json.dumps(job)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    same = {"case": f"{method} 2x{rows // 2}, {ranks} ranks", "method": method, "rows_per_step": rows, "ranks": ranks}
    with open(out / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its processes, each of which has its own group
            process.wait(60)
    files = [out / f"{rank}.json" for rank in range(ranks)]
    if not all(file.exists() for file in files):
        return {**same, "status": f"failed: {last_line(out / 'log')}"}
    each = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    first, timed = each[0], slice(min(WARMUP, options.steps - 1), None)
    seconds = statistics.median(first["seconds"][timed])
    waits, transfers = (
        first["reduce"][timed],
        [min(own) for own in zip(*(one["reduce"][timed] for one in each), strict=True)],
    )
    share = [part / sum(first["seconds"][timed]) for part in (sum(waits), sum(transfers))]
    return {
        **same,
        "tokens_per_second": round(first["tokens"] / len(first["seconds"]) / seconds),
        "seconds_per_step": round(seconds, 5),
        "allreduce_share": round(share[0], 4),
        "transfer_share": round(share[1], 4),
        "peak_allocated_gib": round(max(one["peak"] for one in each), 3),
        "losses": ";".join(f"{loss:.7f}" for loss in first["losses"]),
        "same_weights": len({tuple(one["weights"]) for one in each}) == 1,
        "execution": first["mode"],
        "status": "ok",
        **first["machine"],
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with speed and losses against one rank."""
    good = {(row["method"], row["rows_per_step"], row["ranks"]): row for row in rows if row["status"] == "ok"}
    for (method, size, ranks), row in good.items():
        if alone := good.get((method, size, 1)):
            row["speedup"] = round(row["tokens_per_second"] / alone["tokens_per_second"], 3)
            pairs = zip(*(map(float, one["losses"].split(";")) for one in (row, alone)), strict=True)
            row["largest_difference"] = f"{max(abs(one - other) for one, other in pairs):.1e}"
        if alone := good.get((method, size // ranks, 1)):
            row["speedup_same_work"] = round(row["tokens_per_second"] / alone["tokens_per_second"], 3)
    return rows


def main() -> None:
    """Make the workload, measure each case, keep the table current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/ranks"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", default=["sft", "dpo"])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16], help="examples a step")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--timeout", type=float, default=150, help="seconds a case")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        in_rank(json.loads(options.job))
        return
    workload = options.out / "workload"
    rows_needed = max(options.rows) * options.steps
    workload_process(workload, options.shape, LENGTHS.get(options.shape, 512), rows_needed, timeout=300)
    more = {"shape": options.shape, "commit": commit(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    rows: list[dict[str, Any]] = []
    for method in options.methods:
        for size in options.rows:
            for ranks in options.ranks:
                began = time.perf_counter()
                rows = compared([*rows, measure(method, size, ranks, options) | more])
                write_table(options.out / "ranks.csv", rows, FIELDS)
                shown = {key: rows[-1].get(key, "") for key in FIELDS[4:12]}
                print(
                    f"{rows[-1]['case']}: {rows[-1]['status']}  {shown}  {time.perf_counter() - began:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
