"""Forecast and measured peak of every case that step.py ran, by component.

    python -m benchmarks.memory [--table benchmarks/results/step_h100.csv ...] --out out/memory

Needs no GPU: the forecast is that of `lowlevel plan`, for the plan that the row says it ran. Writes OUT/memory.csv and
OUT/memory.png, and prints the table; the last line is the largest error.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.cases import CASES, Case
from benchmarks.meter import GIB
from benchmarks.runner import read_tables
from benchmarks.workload import LENGTHS, case_config, llama_config, make_workload
from lowlevel.config.schema import RunConfig
from lowlevel.model.base import load_model_config
from lowlevel.model.memory import AdapterSize, Forecast, Plan, default_plan, forecast, model_shape
from lowlevel.model.placement import Placement

FP16 = Placement(torch.device("cuda"), "fp16")
PLAN_KEYS = ("positions", "recomputed", "dequantize_once")
# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#999999", "#CC79A7")


def plan_text(config: RunConfig) -> str:
    """The plan of a run, in a row of the table: positions at once, layers recomputed, dequantised once or not."""
    adapter = AdapterSize(config.lora.r, config.lora.target_modules)
    plan = default_plan(model_shape(load_model_config(config.model), adapter), config)
    return " ".join(f"{key}={int(getattr(plan, key))}" for key in PLAN_KEYS)


def read_plan(text: str) -> Plan:
    """What `plan_text` wrote."""
    values = {key: int(value) for key, _, value in (word.partition("=") for word in text.split())}
    return Plan(values["positions"], values["recomputed"], bool(values["dequantize_once"]))


def forecast_of(row: dict[str, str], case: Case, folder: Path) -> Forecast:
    """Forecast of a row's own plan."""
    config = case_config(case, folder, folder / "unused", 1)
    adapter = AdapterSize(config.lora.r, config.lora.target_modules)
    shape = model_shape(llama_config(row["shape"]), adapter, adapter if case.stacked else None)
    return forecast(shape, config, read_plan(row["plan"]), FP16)


def parts(found: Forecast) -> dict[str, float]:
    """GiB by component; of the step's phases the largest."""
    named = {**found.static, "activations": max(found.phases.values())}
    return {name: size / GIB for name, size in named.items()}


def compare(rows: Iterable[dict[str, str]], out: Path) -> list[dict[str, Any]]:
    """A row of the new table for each measured row that says its plan."""
    cases = {case.name: case for case in CASES}
    compared = []
    for row in rows:
        if row["status"] != "ok" or not row.get("plan") or row["case"] not in cases:
            continue
        folder = out / f"workload_{row['shape']}"
        make_workload(folder, row["shape"], LENGTHS.get(row["shape"], 512), 8, weights=False)
        found = forecast_of(row, cases[row["case"]], folder)
        measured, predicted = float(row["peak_allocated_gib"]), found.peak / GIB
        compared.append(
            {
                "case": row["case"],
                "setting": f"{row['method'].upper()} {row['setting']}",
                "plan": row["plan"],
                "measured_gib": measured,
                "forecast_gib": round(predicted, 3),
                "error": round(predicted / measured - 1, 4),
                **{name: round(size, 3) for name, size in parts(found).items()},
                "gpu": row["gpu"],
                "commit": row["commit"],
            }
        )
    return compared


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The forecast stacked by component, with the measured peak as a mark."""
    first, last = list(rows[0]).index("error") + 1, list(rows[0]).index("gpu")
    names, y = list(rows[0])[first:last], range(len(rows))
    figure = Figure(figsize=(9, 1.4 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for number, name in enumerate(names):
        sizes = [row[name] for row in rows]
        axes.barh(y, sizes, left=left, label=name, color=COLOURS[number])
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.plot([row["measured_gib"] for row in rows], y, "k|", markersize=14, markeredgewidth=2, label="measured peak")
    axes.set_yticks(y, [_short(row["setting"]) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="GiB allocated at the step's peak (paged optimizer state apart)", title=rows[0]["gpu"])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _short(setting: str) -> str:
    """As a label: all are captured graphs."""
    both = "embeddings on the host, layer inputs on the host"
    return setting.replace(", graphed", "").replace(both, "both on the host")


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results"
    parser.add_argument("--table", type=Path, nargs="+", default=[results / "step_h100.csv"], help="CSVs of step.py")
    parser.add_argument("--out", type=Path, default=Path("out/memory"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = compare(read_tables(options.table), options.out)
    if not rows:
        raise SystemExit(f"{', '.join(map(str, options.table))}: no measured row says its plan")
    with open(options.out / "memory.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, options.out / "memory.png")
    for row in rows:
        print(f"{row['case']:<40} {row['plan']:<52} {row['measured_gib']:7.3f} GiB, forecast {row['error']:+.1%}")
    print(f"largest error {max(abs(row['error']) for row in rows):.1%} of {len(rows)}")


if __name__ == "__main__":
    main()
