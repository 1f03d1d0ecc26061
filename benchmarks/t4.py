"""Step times on a T4: predicted from counted operations on any machine, measured on a T4.

    python -m benchmarks.t4 --table benchmarks/results/step_h100.csv --ceilings benchmarks/results/kernels_h100.csv

The model: a kernel takes the longer of FLOPs / (a P) and bytes / (b B), and the time of an empty kernel inside a graph.
P and B are this GPU's measured ceilings (a large product, a large copy); the two fractions a and b are fitted to half
of the table's captured steps and checked on the other half. For a T4, P and B are its data sheet's 65 TFLOP/s and 320
GB/s, times what this GPU's ceilings are of its own data sheet. Everything that comes out of it is marked "predicted".

The same steps are predicted a second time from a profile of another GPU (profile.py): each kind of kernel takes as much
longer as the T4's data sheet is below that GPU's, and kernels do not overlap. That is a lower bound of the speed where
the other GPU idles in small kernels, which fill a T4's 40 multiprocessors.

Eager steps are bound by the host that launches the kernels; no count of the device's work predicts them.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import CASES, ROWS_PER_STEP, Case
from benchmarks.counting import ModelShape, Op, Settings, Work, step_ops, totals
from benchmarks.memory import read_plan
from benchmarks.timing import Ceilings
from lowlevel.model.memory import Plan

# Dense fp16 FLOP/s and bytes/s of NVIDIA's data sheets.
DATASHEETS = {
    "H100": (989.4e12, 3.35e12),  # SXM
    "H200": (989.4e12, 4.8e12),
    "A100": (312e12, 2.04e12),  # SXM, 80 GB
    "L4": (121e12, 300e9),
    "T4": (65e12, 320e9),
}
COMPUTED = ("products", "attention")  # kinds of a profile that FLOP/s bound; bytes/s bound the others
T4_LINK = 12e9  # PCIe 3.0 x16, what copies reach of its 15.8 GB/s
TOLERANCE = 0.15
PREDICTED = ("lowlevel_sft_2x4_graphed", "lowlevel_sft_8x1_nockpt_graphed", "lowlevel_dpo_2x4_graphed",
             "lowlevel_dpo_8x1_nockpt_graphed", "lowlevel_dpo_2x4_stacked_graphed")  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """The median step of a case: tokens as fed, and its kernels, equal ones joined."""

    case: Case
    tokens: int
    ops: tuple[Op, ...]

    @classmethod
    def of(cls, case: Case, tokens: int, ops: Sequence[Op]) -> Counted:
        """Join equal kernels."""
        joined: Counter[Op] = Counter()
        for op in ops:
            joined[replace(op, count=1)] += op.count
        return cls(case, tokens, tuple(replace(op, count=n) for op, n in joined.items()))

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """FLOPs, bytes and link bytes a kernel, and how many there are."""
        rows = [(op.flops, op.bytes, op.link_bytes, op.count) for op in self.ops]
        return tuple(np.array(column, dtype=float) for column in zip(*rows, strict=True))

    def seconds(self, ceilings: Ceilings, fractions: tuple[float, float]) -> float:
        """The model's time of the step."""
        flops, moved, link, count = self.arrays
        compute = flops / (fractions[0] * ceilings.matmul_flops)
        memory = moved / (fractions[1] * ceilings.copy_bytes)
        kernels = np.maximum(compute, memory) + ceilings.kernel_seconds + link / ceilings.link_bytes
        return float((count * kernels).sum())


def count_case(case: Case, shape: str, folder: Path, head: str, plan: Plan | None = None) -> Counted:
    """Count the case's step of median size, from the same rows as were measured; needs no weights.

    Without a `plan` it is the one that the case would run by now.
    """
    from benchmarks.workload import case_config, llama_config, make_workload, peer_tokens
    from lowlevel.config.contradictions import parse_size
    from lowlevel.methods.choice import build_method
    from lowlevel.model.attention_choice import NAMES, Attention
    from lowlevel.model.memory import AdapterSize, best_plan, default_plan, model_shape, planned
    from lowlevel.model.placement import Placement
    from lowlevel.running.assembly import prepare_data

    steps = 24
    make_workload(folder, shape, _length(shape), steps * ROWS_PER_STEP, weights=False)
    config = case_config(case, folder, folder / "unused", steps)
    model = llama_config(shape)
    adapter = AdapterSize(config.lora.r, config.lora.target_modules)
    sizes = model_shape(model, adapter, adapter if case.stacked else None)
    if budget := parse_size(config.train.memory_budget or ""):
        plan = plan or best_plan(sizes, config, Placement(torch.device("cuda"), "fp16"), budget)
        config = planned(config, plan)
    plan = default_plan(sizes, config)
    examples: Any = prepare_data(config)[1].train
    parts = [examples[i : i + ROWS_PER_STEP] for i in range(0, len(examples), ROWS_PER_STEP)]
    tokens = [sum(peer_tokens(part, case.method)) for part in parts]
    median = tokens.index(statistics.median_low(tokens))
    spans = Attention(NAMES["flash"], "counted for a GPU, whatever this machine is")
    works = [Work.of(batch) for batch in build_method(config, spans).micro_batches(parts[median])]
    dropout = config.lora.lora_dropout > 0
    settings = Settings(case.method, plan.recomputed, dropout, case.stacked, plan.dequantize_once, head)
    return Counted.of(case, tokens[median], step_ops(ModelShape.of(model, config.lora.r), works, settings))


def _length(shape: str) -> int:
    from benchmarks.workload import LENGTHS

    return LENGTHS.get(shape, 512)


def fit(counted: Sequence[Counted], measured: Sequence[float], ceilings: Ceilings) -> tuple[float, float]:
    """The two fractions of the ceilings that fit best, by least squares of the logarithms on a grid of 1 %."""
    grid = np.arange(0.02, 1.001, 0.01)

    def error(fractions: tuple[float, float]) -> float:
        pairs = zip(counted, measured, strict=True)
        return sum(math.log(c.seconds(ceilings, fractions) / seconds) ** 2 for c, seconds in pairs)

    coarse = min(((a, b) for a in grid[::7] for b in grid[::7]), key=error)
    near = [grid[abs(grid - center) < 0.08] for center in coarse]
    best = min(((a, b) for a in near[0] for b in near[1]), key=error)
    return float(best[0]), float(best[1])


def usable_rows(tables: Sequence[Path], gpu: str) -> list[dict[str, str]]:
    """Measured captured steps of this GPU, in the tables' order."""
    from benchmarks.runner import read_tables

    captured = ("graphed", "auto")  # auto is graphed on a GPU, and a row that ran otherwise is not ok
    rows = [r for r in read_tables(tables) if r["status"] == "ok" and r["execution"] in captured and r["gpu"] == gpu]
    known = {case.name for case in CASES}
    return [row for row in rows if row["case"] in known]


def check(rows: Sequence[dict[str, str]], counted: Sequence[Counted], ceilings: Ceilings) -> tuple[float, float]:
    """Fit on every other row, print the errors of all, and return the fractions."""
    measured = [float(row["seconds_per_step"]) for row in rows]
    fractions = fit(counted[::2], measured[::2], ceilings)
    print(f"{ceilings.gpu}: product {ceilings.matmul_flops / 1e12:.0f} TFLOP/s, copy {ceilings.copy_bytes / 1e9:.0f} "
          f"GB/s, empty kernel {ceilings.kernel_seconds * 1e6:.2f} us; fitted fractions {fractions[0]:.2f} and "
          f"{fractions[1]:.2f}")  # fmt: skip
    worst = 0.0
    for i, (row, c, seconds) in enumerate(zip(rows, counted, measured, strict=True)):
        error = c.seconds(ceilings, fractions) / seconds - 1
        worst = max(worst, abs(error) * (i % 2))
        kind = "checked" if i % 2 else "fitted"
        print(f"  {row['case']:<36} measured {seconds:.4f} s, model {error:+.1%}  ({kind})")
    verdict = "no row left to check" if len(rows) < 2 else f"largest error on checked rows {worst:.1%}"
    print(f"  {verdict}{'' if worst <= TOLERANCE else ': THE MODEL DOES NOT HOLD (15 % asked for)'}")
    return fractions


def t4_ceilings(here: Ceilings) -> Ceilings:
    """A T4's ceilings: its data sheet times what this GPU reaches of its own."""
    name = next((name for name in DATASHEETS if name in here.gpu), None)
    if name is None:
        raise SystemExit(f"no data sheet for {here.gpu!r}; known: {', '.join(DATASHEETS)}")
    flops, moved = DATASHEETS[name]
    t4_flops, t4_moved = DATASHEETS["T4"]
    return replace(here, gpu="Tesla T4", matmul_flops=t4_flops * here.matmul_flops / flops,
                   copy_bytes=t4_moved * here.copy_bytes / moved, link_bytes=T4_LINK)  # fmt: skip


def read_ceilings(path: Path) -> Ceilings:
    """Ceilings from a CSV of kernels.py. Raises SystemExit where it holds none."""
    from benchmarks.runner import read_table

    rows = {row["component"]: row for row in read_table(path)}
    if "ceiling: product" not in rows:
        raise SystemExit(f"{path} holds no ceilings: run python -m benchmarks.kernels on the GPU of the table first")
    return Ceilings(
        gpu=rows["ceiling: product"]["gpu"],
        matmul_flops=float(rows["ceiling: product"]["tflops"]) * 1e12,
        copy_bytes=float(rows["ceiling: copy"]["gb_per_s"]) * 1e9,
        kernel_seconds=float(rows["ceiling: kernel in a graph"]["median_us"]) / 1e6,
        launch_seconds=float(rows["ceiling: launch from Python"]["median_us"]) / 1e6,
        link_bytes=float(rows["ceiling: host to device"]["gb_per_s"]) * 1e9,
    )


def scaled(profile: Path, counted: Mapping[str, Counted]) -> list[dict[str, object]]:
    """Rows of a profile's cases: its times by kind of kernel, longer by what the data sheets say."""
    from benchmarks.runner import read_table

    by_case = defaultdict[str, float](float)
    for row in read_table(profile):
        if row["kind"] not in ("wall clock", "GPU busy"):
            here, t4 = (DATASHEETS[name] for name in (next(n for n in DATASHEETS if n in row["gpu"]), "T4"))
            ceiling = 0 if row["kind"] in COMPUTED else 1
            by_case[row["case"]] += float(row["ms"]) / 1000 * here[ceiling] / t4[ceiling]
    return [
        {
            "case": case,
            "kind": "predicted from a profile",
            "gpu": "Tesla T4",
            "seconds_per_step": round(seconds, 3),
            "tokens_per_second": round(counted[case].tokens / seconds),
        }
        for case, seconds in by_case.items()
    ]


def show_prediction(counted: Counted, ceilings: Ceilings, fractions: tuple[float, float]) -> dict[str, object]:
    """Print a case's predicted time with its parts, and return its row."""
    seconds = counted.seconds(ceilings, fractions)
    row = {"case": counted.case.name, "kind": "predicted", "gpu": ceilings.gpu, "seconds_per_step": round(seconds, 3),
           "tokens_per_second": round(counted.tokens / seconds)}  # fmt: skip
    print(f"{counted.case.name:<36} predicted {seconds:7.3f} s a step, {row['tokens_per_second']:>6} tokens/s")
    for name, (flops, moved, kernels) in totals(counted.ops).items():
        part = replace(counted, ops=tuple(op for op in counted.ops if op.component == name))
        print(f"    {name:<18}{part.seconds(ceilings, fractions):8.3f} s {flops / 1e12:8.2f} TFLOP "
              f"{moved / 1e9:8.1f} GB {kernels:>7} kernels")  # fmt: skip
    return row


def measure_here(out: Path) -> list[dict[str, object]]:
    """The same cases on this GPU."""
    from benchmarks.cases import select
    from benchmarks.runner import Runner
    from benchmarks.step import measure_all
    from benchmarks.workload import workload_process

    runner = Runner(out, steps=24, warmup=4, cap_gib=15.0, timeout=1200)
    workload_process(out / "workload", "tinyllama", 512, 24 * ROWS_PER_STEP, timeout=1200)
    rows = measure_all(select(PREDICTED), runner, out / "workload", out / "step.csv", shape="tinyllama", budget=1e9)
    keys = ("case", "gpu", "seconds_per_step", "tokens_per_second")
    return [{"kind": "measured", **{key: row.get(key, "") for key in keys}} for row in rows if row["status"] == "ok"]


def main() -> None:
    """Check the model, predict, and on a T4 measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results"
    parser.add_argument("--table", type=Path, nargs="+", default=[results / "step_h100.csv"], help="CSVs of step.py")
    parser.add_argument("--ceilings", type=Path, default=results / "kernels_h100.csv", help="CSV of kernels.py")
    parser.add_argument("--profile", type=Path, default=results / "profile_h200.csv", help="CSV of profile.py")
    parser.add_argument("--out", type=Path, default=Path("out/t4"))
    parser.add_argument("--head", choices=("torch", "fused"), default="fused", help="how log-probabilities are taken")
    parser.add_argument("--shape", default="tinyllama")
    options = parser.parse_args()
    here = read_ceilings(options.ceilings)
    rows = usable_rows(options.table, here.gpu)
    if not rows:
        raise SystemExit(f"{', '.join(map(str, options.table))}: no captured step of {here.gpu}")
    cases = {case.name: case for case in CASES}
    folder = options.out / "workload_counted"
    plans = {row["case"]: read_plan(row["plan"]) for row in rows if row.get("plan")}
    counted = {name: count_case(cases[name], options.shape, folder, options.head, plans.get(name))
               for name in dict.fromkeys([*(row["case"] for row in rows), *PREDICTED])}  # fmt: skip
    fractions = check(rows, [counted[row["case"]] for row in rows], here)
    t4 = t4_ceilings(here)
    print(f"\nTesla T4, predicted: product {t4.matmul_flops / 1e12:.0f} TFLOP/s, copy {t4.copy_bytes / 1e9:.0f} GB/s")
    found = [show_prediction(counted[name], t4, fractions) for name in PREDICTED]
    found += scaled(options.profile, counted)
    if torch.cuda.is_available() and "T4" in torch.cuda.get_device_name():
        found += measure_here(options.out)
    with open(options.out / "t4.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("case", "kind", "gpu", "seconds_per_step", "tokens_per_second"))
        writer.writeheader()
        writer.writerows(found)
    lines = (
        f"{r['case']:<34}{r['kind']:<26}{r['seconds_per_step']:>7} s {r['tokens_per_second']:>6} tokens/s"
        for r in found
    )
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
