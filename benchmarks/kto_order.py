"""Positions of KTO's steps in both shuffled orders, counted on any machine from files of preference pairs.

    python -m benchmarks.kto_order --model DIR --data pairs.jsonl other.jsonl --out out/kto_order

KTO reads a pair as two rows. In one step they share their prompt, and the completion of another prompt that z0 needs.
Counted are positions with a token, of the step's rows (reference, policy, gradient) and of the mismatched completions
(reference, policy), each divided by DPO's positions of the same pairs. Writes OUT/kto_order.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.runner import commit, write_table
from benchmarks.shapes import SPANS
from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.order import DataOrder
from lowlevel.config.file import config_from_tables
from lowlevel.methods.choice import build_method
from lowlevel.running.assembly import prepare_data


def positions(batches: Iterable[PackedBatch]) -> int:
    """Positions that hold a token."""
    return sum(batch.num_tokens for batch in batches)


def count(model: Path, source: Path, method: str, order: str) -> tuple[int, int, int]:
    """Rows of an epoch, positions of its steps, and those of the mismatched completions."""
    train = {"data_order": order, "num_train_epochs": 1, "output_dir": "unused"}
    data = {"source": str(source), "max_length": 512}
    tables: dict[str, Any] = {"method": method, "model": {"name": str(model)}, "data": data, "train": train}
    config = config_from_tables(tables, "benchmark")
    rows = list(prepare_data(config)[1].train)
    layout, steps = build_method(config, SPANS), DataOrder.of(config, rows)
    own = other = 0
    for step in range(steps.steps_per_epoch):
        batches = layout.micro_batches([rows[i] for i in steps.step_rows(step)])
        own += positions(batches)
        other += sum(positions(batch.mismatched) for batch in batches)
    return len(rows), own, other


def main() -> None:
    """Count every file in both orders, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="its tokenizer and chat template are used")
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("out/kto_order"))
    options = parser.parse_args()
    table = []
    for source in options.data:
        pairs, dpo, _ = count(options.model, source, "dpo", "shuffled")
        for order in ("shuffled", "shuffled_pairs"):
            rows, own, other = count(options.model, source, "kto", order)
            scale = 2 * pairs / rows / dpo  # truncation can lose a row of a pair
            table.append({"data": source.name.split(".")[0], "order": order, "rows": rows, "own": round(own * scale, 3),
                          "mismatched": round(other * scale, 3), "positions_of_dpo": round((own + other) * scale, 3),
                          "commit": commit()})  # fmt: skip
            print("  ".join(f"{key} {value}" for key, value in table[-1].items()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_table(options.out / "kto_order.csv", table, tuple(table[0]))


if __name__ == "__main__":
    main()
