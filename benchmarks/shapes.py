"""How many batch shapes a whole run meets, and how many positions stay empty: counted on any machine, in seconds.

    python -m benchmarks.shapes --out out/shapes

Captured graphs are one for each shape. A step that meets a new one takes as long as the capture, and medians over steps
leave that out; how often it happens is counted here, in a run of 40 steps and in one of the recipe's length, on rows of
benchmarks/workload. Before the first step a run captures the largest shape, which counts here if a step meets it.
Writes OUT/shapes.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import ROWS_PER_STEP, Case
from benchmarks.runner import commit, write_table
from benchmarks.workload import LENGTHS, case_config, make_workload
from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.order import DataOrder
from lowlevel.config.schema import RunConfig
from lowlevel.execution import signature_of
from lowlevel.methods.choice import build_method
from lowlevel.model.attention_choice import NAMES, Attention
from lowlevel.running.assembly import prepare_data

STEPS = {"sft": 375, "dpo": 200}  # of the recipe
TRIAL = 40  # steps of a short run
SPANS = Attention(NAMES["efficient"], "as on a T4; which kernel it is changes no shape")


def batches_of(config: RunConfig, rows: list[Any], steps: int) -> Iterable[list[PackedBatch]]:
    """The micro-batches of each step, as training lays them out on a GPU."""
    method, order = build_method(config, SPANS, rows), DataOrder.of(config, rows)
    for step in range(steps):
        yield method.micro_batches([rows[i] for i in order.step_rows(step)])


def count(steps: Iterable[list[PackedBatch]]) -> dict[str, Any]:
    """Shapes, steps that meet a new one, and the share of positions that hold no token."""
    seen: set[Any] = set()
    taken = new_in = positions = tokens = 0
    for batches in steps:
        taken += 1
        found = {signature_of(batch) for batch in batches}
        new_in += not found <= seen
        seen |= found
        positions += sum(batch.input_ids.numel() for batch in batches)
        tokens += sum(batch.num_tokens for batch in batches)
    return {"steps": taken, "shapes": len(seen), "steps_with_a_new_shape": new_in,
            "padding_share": round(1 - tokens / positions, 4)}  # fmt: skip


def main() -> None:
    """Count the recipe's two steps at 2x4 and with everything at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/shapes"))
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--steps", type=int, help="fewer steps than the recipe's")
    options = parser.parse_args()
    length = LENGTHS.get(options.shape, 512)
    steps = {method: min(most, options.steps or most) for method, most in STEPS.items()}
    make_workload(options.out / "workload", options.shape, length, ROWS_PER_STEP * max(steps.values()), weights=False)
    table = []
    for method in STEPS:
        for batch in (2, ROWS_PER_STEP):
            case = Case(f"{method}_{batch}x{ROWS_PER_STEP // batch}", "lowlevel", method, batch, ROWS_PER_STEP // batch)
            for planned in sorted({min(TRIAL, steps[method]), steps[method]}):
                config = case_config(case, options.out / "workload", options.out / "unused", planned)
                rows = list(prepare_data(config)[1].train)[: ROWS_PER_STEP * planned]
                table.append({"case": case.name, **count(batches_of(config, rows, planned)), "commit": commit()})
                print("  ".join(f"{key} {value}" for key, value in table[-1].items()), flush=True)
    write_table(options.out / "shapes.csv", table, tuple(table[0]))


if __name__ == "__main__":
    main()
