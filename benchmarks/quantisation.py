"""Full fine-tuning, LoRA on a 16-bit base and QLoRA beside each other: memory by component, speed, held-out loss.

    python -m benchmarks.quantisation --model DIR --train rows.jsonl --held-out held.jsonl --out quantisation.csv
    python -m benchmarks.quantisation --shape tinyllama --steps 12 --out quantisation.csv     (memory and speed alone)
    python -m benchmarks.quantisation ... --task FILE.yaml            (also accuracy before and after, by lm-eval)

Each case runs `lowlevel sft` with the same rows in the same order, 2x4 rows of up to 512 tokens a step, every layer
recomputed, the adapter of the recipe (r = 64, all projections) and the default learning rate of its kind (full: a tenth
of an adapter's). Memory in GiB, from the run's rehearsal (memory.json) and the allocator:

    weights      trained and frozen ones with quantisation constants; `share` of the weights is trained
    gradient, state   of the trained weights; state is that of AdamW, in paged memory
    activations  the rest of the allocator's peak
    needed       all four: what has to fit the card, beside 1 to 2 GiB of driver and captured graphs

With a new OUT the table begins with a header; an existing one gets more rows.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lowlevel as ll
from benchmarks.meter import GIB, machine
from benchmarks.runner import commit
from benchmarks.workload import LENGTHS, SHAPES, workload_process
from lowlevel.evaluation.tasks import evaluate_run
from lowlevel.model.base import load_model_config
from lowlevel.model.memory import model_shape

CASES: Mapping[str, Mapping[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "full_8bit_adamw": {"finetuning_type": "full", "optim": "paged_adamw_8bit"},
    "lora_16bit": {"load_in_4bit": False},
    "qlora": {},
}


def measure(name: str, settings: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """Train a case and return its row."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        run = ll.sft(output_dir=Path(folder) / "run", console=Console(quiet=True), **settings, **CASES[name])
        config, memory = run.folder.read_config(), Path(folder) / "run" / "memory.json"
        report = json.loads(memory.read_text()) if memory.exists() else None
        steps = [record for record in run.metrics if "loss" in record]
        held_out = [record["eval_loss"] for record in run.metrics if "eval_loss" in record]
        speeds = sorted(record["tokens_per_second"] for record in steps[len(steps) // 4 :])
        trained = int(run.folder.read_manifest()["trainable_parameters"])
        return {
            "case": name,
            "trained": trained,
            "share": round(trained / model_shape(load_model_config(config.model), None).trained, 4),
            "learning_rate": config.train.learning_rate,
            "steps": len(steps),
            **(parts(report) if report else {}),
            "tokens_per_second": round(speeds[len(speeds) // 2]),
            "train_loss": round(steps[-1]["loss"], 4),
            "held_out_before": round(held_out[0], 4) if held_out else "",
            "held_out_after": round(held_out[-1], 4) if held_out else "",
            **(accuracy(run.folder.path, task) if task else {}),
            "execution": run.summary["execution"],
        }


def accuracy(run: Path, task: str) -> dict[str, float]:
    """Accuracy of the base and of the trained model on the items of a task file, and the standard error of the gain."""
    rows = evaluate_run(run, Console(quiet=True), tasks=[task])["rows"]
    found = next(row for row in rows if row["metric"] == "acc")
    named = {"accuracy_before": found["stages"]["base"], "accuracy_after": found["stages"]["sft"]}
    gain = {"accuracy_gain_error": found["differences"][0]["stderr"]}
    return {"items": found["items"]} | {name: one["value"] for name, one in named.items()} | gain


def parts(report: Mapping[str, Any]) -> dict[str, float]:
    """Memory by component in GiB, from memory.json and the allocator's peak of the steps."""
    sizes = dict(report["components"])
    gradient, state = sizes.pop("gradient"), sizes.pop("optimizer state", 0)
    peak, weights = torch.cuda.max_memory_allocated(), sum(sizes.values())
    found = {
        "weights": weights,
        "gradient": gradient,
        "state": state,
        "activations": peak - weights - gradient,
        "peak_allocated": peak,
        "needed": peak + state,
        "device_used": report["device_used"],
    }
    return {f"{name}_gib": round(size / GIB, 3) for name, size in found.items()}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a real model")
    parser.add_argument("--train", default="demo", help="conversations to train on")
    parser.add_argument("--held-out", help="other conversations")
    parser.add_argument("--held-out-rows", type=int, default=200)
    parser.add_argument("--task", help="multiple-choice task file of lm-eval (YAML)")
    parser.add_argument("--shape", choices=SHAPES, help="instead of a model: random weights and rows of this shape")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure the cases and append their rows."""
    options = arguments()
    settings = {"model": options.model or "demo", "data": options.train, "max_length": options.max_length}
    if options.held_out:
        settings |= {"eval_data": options.held_out, "eval_limit": options.held_out_rows}
    if options.shape:
        workload = options.out.parent / f"workload_{options.shape}"
        length = LENGTHS.get(options.shape, options.max_length)
        workload_process(workload, options.shape, length, 8 * options.steps, timeout=300)
        settings |= {"model": str(workload / "model"), "data": str(workload / "sft.jsonl"), "max_length": length}
    settings |= {"max_steps": options.steps, "logging_steps": 1, "warmup_ratio": 0.03, "on_bad_row": "skip"}
    for seed in options.seeds:
        for name in options.cases:
            row = {"model": options.shape or Path(settings["model"]).name, "seed": seed}
            row |= measure(name, {**settings, "seed": seed}, options.task)
            row |= {**machine(), "commit": commit()}
            print(row, flush=True)
            new = not options.out.exists()
            with options.out.open("a", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(row), lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
