"""Speed of `lowlevel eval` beside lm-eval's own `hf` model at equal memory.

    python -m benchmarks.evaluation RUN_DIR --out out/evaluation.csv [--items 200] [--batches 1,4,16,64]
                                    [--sampler default|first_n]

RUN_DIR is a finished SFT or DPO run; both models get its base (in 4 bits if the run has it so), its adapter and its
chat template, and the same questions, replies and texts of the demo's world, with five examples in the prompt, which
are the same for all items (first_n, as in MMLU) or drawn for each (default, as in gsm8k). Each setting runs in a
process of its own, after a warm-up. On a GPU, seconds are wall time and the peak is the allocator's; on a CPU, which
others may use too, they are CPU time, and the peak is the process's resident memory. The last lines give, for each
task, the fastest `hf` whose peak is not above that of lowlevel.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.meter import GIB, machine, synchronize
from benchmarks.runner import commit, write_table
from benchmarks.world_tasks import write_tasks
from lowlevel.evaluation import continuations
from lowlevel.evaluation.tasks import evaluate_stage, load_tasks
from lowlevel.model.dequantised import dequantize_as_set
from lowlevel.running.reopening import LoadedRun, load_run

FIELDS = ("task", "sampler", "tool", "batch", "seconds", "requests_per_second", "peak_gib", "run", "gpu", "torch",
          "transformers", "peft", "bitsandbytes", "commit", "started")  # fmt: skip
OWN, HF = "lowlevel", "lm-eval hf"
WARMUP = 8  # items


def hf_model(run: LoadedRun, batch_size: int) -> Any:
    """lm-eval's model of the same base and adapter."""
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lowlevel.model.base import resolve_name

    dtype, model = run.policy.placement.dtype, run.config.model
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    device = {"": str(run.policy.placement.device)}
    base = AutoModelForCausalLM.from_pretrained(
        resolve_name(model.name),
        dtype=dtype,
        device_map=device,
        quantization_config=quantisation if model.load_in_4bit else None,
    )
    stacked = run.folder.stacked
    adapted = PeftModel.from_pretrained(base, str(stacked if stacked.exists() else run.folder.adapter)).eval()
    tokenizer = run.tokenizer.tokenizer
    tokenizer.chat_template = run.tokenizer.chat_template.text
    return HFLM(pretrained=adapted, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=batch_size)


def measure(run_dir: Path, tool: str, batch: int, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds, requests and peak memory by task. `batch`: positions for lowlevel, requests for `hf`."""
    from lowlevel.evaluation.harness import RunLM

    run = load_run(run_dir)
    if tool == OWN:
        continuations.POSITIONS[run.policy.placement.device.type] = batch
        dequantize_as_set(run.policy, run.config.train.dequantize_once)
        model = RunLM(run)
    else:
        model = hf_model(run, batch)
        del run  # its memory is not part of the measurement
        gc.collect()
    spent = timed(model)
    found = {}
    for name in ("choices", "replies", "texts"):
        loaded = load_tasks([str(folder / f"{name}.yaml")], 0 if name == "texts" else 5)
        evaluate_stage(model, loaded, WARMUP, True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        spent.clear()
        result = evaluate_stage(model, loaded, None, True)
        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident()
        requests = sum(len(one["arguments"]) for samples in result["samples"].values() for one in samples)
        found[name] = {"seconds": sum(spent), "requests": requests, "peak_gib": used / GIB}
    return found


def timed(model: Any) -> list[float]:
    """Seconds of each call of the model: prompts and metrics, lm-eval's own work, are the same for both tools."""
    clock, spent = time.perf_counter if torch.cuda.is_available() else time.process_time, list[float]()

    def wrapped(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(requests: Any) -> Any:
            synchronize()
            start = clock()
            answers = method(requests)
            synchronize()
            spent.append(clock() - start)
            return answers

        return call

    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, name, wrapped(getattr(model, name)))
    return spent


def _resident() -> int:
    """Bytes of resident memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each task and setting."""
    shared = {**machine(), "commit": commit(), "started": datetime.now(UTC).isoformat(timespec="seconds"),
              "run": arguments.run_dir.name, "sampler": arguments.sampler}  # fmt: skip
    settings = [(OWN, size) for size in arguments.positions] + [(HF, size) for size in arguments.batches]
    rows = []
    for tool, batch in settings:
        again = [sys.executable, "-m", "benchmarks.evaluation", str(arguments.run_dir), "--measure", tool]
        done = subprocess.run([*again, "--batch", str(batch), "--tasks", str(folder)], capture_output=True, text=True)
        if done.returncode:
            print(f"{tool} {batch}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
            continue
        for task, one in json.loads(done.stdout.splitlines()[-1]).items():
            speed = one["requests"] / one["seconds"]
            row = {"task": task, "tool": tool, "batch": batch, "seconds": f"{one['seconds']:.2f}"}
            rows.append({**row, "requests_per_second": f"{speed:.1f}", "peak_gib": f"{one['peak_gib']:.3f}", **shared})
            print(
                f"{task:>8} {tool:>10} {batch:>6}: {speed:8.1f} requests/s, peak {one['peak_gib']:.3f} GiB", flush=True
            )
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """For each task and setting of lowlevel: its speed over that of the fastest `hf` with no higher peak."""
    lines = []
    for own in (row for row in rows if row["tool"] == OWN):
        peak, speed = float(own["peak_gib"]), float(own["requests_per_second"])
        others = [row for row in rows if row["tool"] == HF and row["task"] == own["task"]]
        fitting = [row for row in others if float(row["peak_gib"]) <= peak]
        what, chosen = ("with no higher peak", fitting) if fitting else ("of any peak", others)
        if chosen:
            best = max(chosen, key=lambda row: float(row["requests_per_second"]))
            ratio = speed / float(best["requests_per_second"])
            lines.append(f"{own['task']}, {own['batch']} positions: {ratio:.2f} times hf at its fastest {what} (batch "
                         f"{best['batch']}, {best['peak_gib']} GiB against {own['peak_gib']})")  # fmt: skip
    return lines


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure all settings, or one of them for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation.csv"), metavar="FILE")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--positions", type=numbers, default=[2048, 8192], help="of a batch of lowlevel's")
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16, 64], help="requests in a batch of hf's")
    parser.add_argument("--sampler", choices=("default", "first_n"), default="first_n")
    for name, kind in (("measure", str), ("batch", int), ("tasks", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.run_dir, arguments.measure, arguments.batch, arguments.tasks)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), arguments.items, texts=max(2, arguments.items // 4), sampler=arguments.sampler)
        rows = table(arguments, Path(folder))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_table(arguments.out, rows, FIELDS)
    print("\n".join(ratios(rows)))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
