"""7B and 13B shapes within the memory of one small GPU: forecast, measured peak and tokens/s of SFT and DPO steps.

    python -m benchmarks.large --shapes llama-7b llama-13b --budget 13GiB --out benchmarks/results/large.csv

The recipe's step: 8 rows of 512 tokens, or 8 pairs, an adapter of r = 64 on all projections, 8-bit paged AdamW, fp16.
Weights are random, drawn and quantised layer by layer on the device. The plan is that of train.memory_budget for the
budget, which leaves the rest of 15 GiB to optimizer state, driver and captured graphs; `needed` is the measured peak
plus optimizer state. Without a GPU: `--shapes tiny` tries it at a small size.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.largest import random_base
from benchmarks.meter import GIB, limit_memory, machine, synchronize
from benchmarks.runner import commit
from benchmarks.workload import LENGTHS, SHAPES, llama_config
from lowlevel.config.contradictions import parse_size
from lowlevel.config.data import DataConfig
from lowlevel.config.schema import RunConfig, TrainConfig
from lowlevel.execution import WithFallback
from lowlevel.loop import optimizer_step
from lowlevel.methods.choice import build_method
from lowlevel.model.attention_choice import NAMES, Attention, choose_attention
from lowlevel.model.build import build_policy
from lowlevel.model.dequantised import dequantize_as_set
from lowlevel.model.memory import AdapterSize, best_plan, forecast, model_shape, planned
from lowlevel.model.placement import choose_placement
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer
from lowlevel.running.assembly import choose_execution
from lowlevel.running.rehearsal import components

ROWS = 8


def rows_of(method: str, length: int, vocabulary: int) -> list[Any]:
    """Rows of `length` tokens; pairs with a quarter of it as prompt, and completions of three and two eighths."""
    rng = np.random.default_rng(0)

    def ids(size: int) -> np.ndarray:
        return rng.integers(3, vocabulary, size)

    if method == "sft":
        made = [ids(length) for _ in range(ROWS)]
        return [SimpleNamespace(row=i, input_ids=x, labels=x, weights=None) for i, x in enumerate(made)]
    prompt, chosen, rejected = length // 4, 3 * length // 8, 2 * length // 8
    return [
        SimpleNamespace(row=i, prompt_ids=ids(prompt), chosen_ids=ids(chosen), rejected_ids=ids(rejected))
        for i in range(ROWS)
    ]


def measure(name: str, method: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Take some steps and say what they took."""
    placement, settings = choose_placement("auto"), llama_config(name)
    cuda, length = placement.device.type == "cuda", LENGTHS.get(name, 512)
    kind: dict[str, Any] = {"format": "preference"} if method == "dpo" else {}
    config = RunConfig(
        method=method, data=DataConfig(max_length=length, **kind), train=TrainConfig(optim="paged_adamw_8bit")
    )
    shape = model_shape(settings, AdapterSize(config.lora.r, config.lora.target_modules))
    plan = best_plan(shape, config, placement, parse_size(options.budget) or 0)
    predicted, config = forecast(shape, config, plan, placement), planned(config, plan)
    attention = choose_attention(config.model, settings, placement) if cuda else Attention(NAMES["math"], "no GPU")
    policy = build_policy(
        random_base(settings, placement, attention, None),
        config.lora,
        placement,
        seed=0,
        attention=attention,
        gradient_checkpointing=config.train.gradient_checkpointing,
        recomputed=config.train.recomputed_layers,
    )
    dequantize_as_set(policy, config.train.dequantize_once)
    optimizer, built = build_optimizer(policy.flat.weights, config.train), build_method(config, attention)
    inputs: Any = SimpleNamespace(placement=placement, attention=attention, shards=None)
    execution = WithFallback(policy, built, choose_execution(config, inputs), lambda line: print(line, file=sys.stderr))
    rows = rows_of(method, length, settings.vocab_size)
    batches = built.micro_batches(rows)
    tokens = sum(len(ids) for row in rows for key, ids in vars(row).items() if key.endswith("_ids"))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, scale = [], [], LossScale.for_precision(placement.precision)
    for step in range(options.steps):
        began = time.perf_counter()
        result = optimizer_step(execution, optimizer, batches, scale, seed=0, step=step, max_grad_norm=1.0)
        synchronize()
        seconds.append(time.perf_counter() - began)
        losses.append(result.metrics["loss"])
    median = statistics.median(seconds[options.steps // 2 :])
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    state = components(policy, optimizer).get("optimizer state", 0)
    return {
        "shape": name,
        "method": method,
        "parameters": shape.linear + shape.other,
        "positions": plan.positions,
        "recomputed_layers": plan.recomputed,
        "forecast_gib": round(predicted.peak / GIB, 3),
        "peak_allocated_gib": round(peak / GIB, 3) if cuda else "",
        "state_gib": round(state / GIB, 3),
        "needed_gib": round((peak + state) / GIB, 3) if cuda else "",
        "seconds_per_step": round(median, 4),
        "tokens_per_second": round(tokens / median),
        "execution": execution.mode,
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "budget": options.budget,
        **machine(),
        "commit": commit(),
    }


def main() -> None:
    """Measure each shape with each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-7b", "llama-13b"])
    parser.add_argument("--methods", nargs="+", choices=("sft", "dpo"), default=["sft", "dpo"])
    parser.add_argument("--budget", default="13GiB", help="of the allocator's peak")
    parser.add_argument("--cap-gib", type=float, default=15.0, help="limit of the CUDA allocator")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    limit_memory(options.cap_gib)
    with options.out.open("w", newline="", encoding="utf-8") as stream:
        writer = None
        for name in options.shapes:
            for method in options.methods:
                row = measure(name, method, options)
                print(row, flush=True)
                writer = writer or csv.DictWriter(stream, list(row), lineterminator="\n")
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
                stream.flush()
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
