"""Seconds of a GRPO step, split into sampling, rewarding and training, here and in TRL's GRPOTrainer.

    python -m benchmarks.grpo --model MODEL --data gsm8k.jsonl.gz --out out/grpo [--tools lowlevel trl]
    python -m benchmarks.grpo --model demo --new 16 --steps 3 --warmup 1        # a try without a GPU

Both take the same prompts in the same order, G completions each at temperature 1 of a 4-bit base with a new adapter on
seven projections, the same reward (`gsm8k`; `right_answer` for the demo), no KL term, one update a step. lowlevel
computes in fp16 on a GPU, TRL in bf16: its fp16 does not run on a 4-bit base. Where a completion ends is the model's
choice, so rows have the mean number of sampled tokens; with `--no-end` no token ends one, and both sample equally many.
Medians of the steps after `--warmup`. Each tool runs in a process of its own. Writes OUT/grpo.csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.meter import first_line, installed, machine, synchronize
from benchmarks.peers.common import PROJECTIONS
from benchmarks.runner import commit, write_table
from lowlevel.data.sources import read_source
from lowlevel.demo.world import right_answer
from lowlevel.model.base import resolve_name
from lowlevel.online.rewards import gsm8k

FIELDS = ("tool", "precision", "prompts", "generations", "new", "step_seconds", "sampling_seconds", "rewarding_seconds",
          "training_seconds", "completion_tokens", "tokens_per_second", "reward", "difference_mean", "difference_max",
          "peak_allocated_gib", "steps", "status", "model", "rank", "gpu", "torch", "transformers", "peft",
          "bitsandbytes", "trl", "commit", "started")  # fmt: skip
RATE = 1e-5
NEVER = -1  # a stop token that no vocabulary has


def prompts_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows with the prompt as messages, the reference, and the demo's answer."""
    demo = options.model == "demo"
    rows = []
    for row in read_source("demo" if demo else str(options.data), "train", "grpo" if demo else "sft").rows:
        said: Any = row.columns.get("messages") or [*row.columns["prompt"], *row.columns["completion"]]  # type: ignore[misc]
        more = {"answer": row.columns["answer"]} if demo else {}
        rows.append({"prompt": said[:-1], "reference_text": said[-1]["content"], **more})
    return rows[: options.prompts * (options.steps + options.warmup)]


def rewards_of(options: argparse.Namespace) -> Callable[..., list[float | None]]:
    """The reward as TRL calls it: completions are lists of messages."""

    def reward(completions: list[Any], reference_text: list[str], **columns: Any) -> list[float | None]:
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        found = right_answer(texts, columns["answer"]) if options.model == "demo" else gsm8k(texts, reference_text)
        return list(found)

    return reward


def median(values: list[float], options: argparse.Namespace) -> float:
    """Of the steps after the warm-up."""
    return statistics.median(values[options.warmup :])


def lowlevel_steps(options: argparse.Namespace) -> dict[str, Any]:
    """This project, by its Python API."""
    import lowlevel as ll
    import lowlevel.online.steps as online
    from lowlevel.sampling import build_sampler

    if options.no_end:
        online.build_sampler = lambda model, placement, stop_ids, note: build_sampler(model, placement, [NEVER], note)
    total: list[float] = []
    found: dict[str, list[float]] = {}
    began = time.perf_counter()
    made = ll.steps(
        "grpo", model=options.model, data=prompts_of(options), reward=rewards_of(options), console=quiet(),
        output_dir=str(options.out / "run"), restart=True, data_order="sequential", learning_rate=RATE,
        num_generations=options.generations, max_completion_length=options.new, max_length=options.max_length,
        per_device_train_batch_size=options.batch, logging_steps=1, r=options.rank, lora_dropout=0.0,
        gradient_accumulation_steps=options.prompts * options.generations // options.batch,
        max_steps=options.steps + options.warmup, gradient_checkpointing=options.checkpointing,
    )  # fmt: skip
    for step in made:
        synchronize()
        total.append(time.perf_counter() - began)
        began = time.perf_counter()
        for name, value in {**step.metrics, "tokens": float(step.supervised_tokens)}.items():
            found.setdefault(name, []).append(value)
    seconds = {name: median(found[name], options) for name in ("sampling_seconds", "rewarding_seconds")}
    training = [a - b - c for a, b, c in zip(total, found["sampling_seconds"], found["rewarding_seconds"], strict=True)]
    return {
        "precision": "fp16" if torch.cuda.is_available() else "fp32",
        "step_seconds": median(total, options),
        **seconds,
        "training_seconds": median(training, options),
        "completion_tokens": statistics.mean(found["tokens"][options.warmup :]),
        "reward": statistics.mean(found["reward"][options.warmup :]),
        "difference_mean": max(found["sampling/sampling_logp_difference/mean"]),
        "difference_max": max(found["sampling/sampling_logp_difference/max"]),
    }


def quiet() -> Any:
    """A console for errors only."""
    from rich.console import Console

    return Console(quiet=True)


def trl_trainer(options: argparse.Namespace, callback: Any) -> Any:
    """TRL's trainer as its users run it on a 4-bit base; generation by transformers."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    cuda, folder = torch.cuda.is_available(), resolve_name(options.model)
    dtype = torch.bfloat16 if cuda else torch.float32
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                                      bnb_4bit_use_double_quant=True)  # fmt: skip
    where = {"": 0 if cuda else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=where, quantization_config=quantisation
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings: dict[str, Any] = {"min_new_tokens": options.new} if options.no_end else {}
    config = trl.GRPOConfig(
        output_dir=str(options.out / "trl"), per_device_train_batch_size=options.batch, max_steps=options.steps
        + options.warmup, gradient_accumulation_steps=options.prompts * options.generations // options.batch,
        num_generations=options.generations, max_completion_length=options.new, temperature=1.0, beta=0.0,
        learning_rate=RATE, bf16=cuda, use_cpu=not cuda, logging_steps=1, save_strategy="no", report_to=[],
        shuffle_dataset=False, scale_rewards="none", gradient_checkpointing=options.checkpointing, disable_tqdm=True,
        optim="paged_adamw_32bit" if cuda else "adamw_torch", generation_kwargs=settings or None,
    )  # fmt: skip
    lora = LoraConfig(r=options.rank, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    rows = Dataset.from_list(prompts_of(options))
    return trl.GRPOTrainer(model, rewards_of(options), args=config, train_dataset=rows, processing_class=tokenizer,
                           peft_config=lora, callbacks=[callback])  # fmt: skip


def trl_steps(options: argparse.Namespace) -> dict[str, Any]:
    """The steps of `trl_trainer`, with a clock at their ends and around its methods that sample and reward."""
    from transformers import TrainerCallback

    total: list[float] = []
    parts: dict[str, list[float]] = {"_generate": [0.0], "_calculate_rewards": [0.0]}

    class Clock(TrainerCallback):  # type: ignore[misc, no-any-unimported]
        """Seconds from step end to step end."""

        def on_train_begin(self, *given: Any, **named: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            synchronize()
            total.append(time.perf_counter() - self.began)
            self.began = time.perf_counter()
            for values in parts.values():
                values.append(0.0)

    trainer = trl_trainer(options, Clock())

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            synchronize()
            began = time.perf_counter()
            result = call(*given, **named)
            synchronize()
            parts[name][-1] += time.perf_counter() - began
            return result

        return wrapped

    for name in parts:
        setattr(trainer, name, timed(name, getattr(trainer, name)))
    trainer.train()
    log = [record for record in trainer.state.log_history if "reward" in record]
    sampling, rewarding = parts["_generate"], parts["_calculate_rewards"]
    training = [a - b - c for a, b, c in zip(total, sampling, rewarding, strict=False)]
    lengths = [record["completions/mean_length"] * options.prompts * options.generations for record in log]
    return {
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
        "step_seconds": median(total, options),
        "sampling_seconds": median(sampling[: len(total)], options),
        "rewarding_seconds": median(rewarding[: len(total)], options),
        "training_seconds": median(training, options),
        "completion_tokens": statistics.mean(lengths[options.warmup :]),
        "reward": statistics.mean(record["reward"] for record in log[options.warmup :]),
        "trl": installed("trl"),
    }


TOOLS = {"lowlevel": lowlevel_steps, "trl": trl_steps}


def one(tool: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a tool, measured in this process."""
    row: dict[str, Any] = {"tool": tool, "prompts": options.prompts, "generations": options.generations,
                           "new": options.new, "steps": options.steps, "model": Path(options.model).name,
                           "rank": options.rank, "commit": commit(), **machine(),
                           "started": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    try:
        row |= {"status": "ok", **TOOLS[tool](options)}
    except Exception as error:
        return row | {"status": f"failed: {first_line(error)}"}
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    row |= {"tokens_per_second": row["completion_tokens"] / row["step_seconds"], "peak_allocated_gib": peak}
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/grpo_benchmark"))
    parser.add_argument("--model", default="demo", help='folder of a chat model, or "demo"')
    parser.add_argument("--data", type=Path, help="GSM8K's rows as messages or question and answer, JSON lines")
    parser.add_argument("--prompts", type=int, default=8, help="a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--new", type=int, default=256, help="most tokens of a completion")
    parser.add_argument("--max-length", type=int, default=512, help="of prompt and completion; demo: 128")
    parser.add_argument("--batch", type=int, default=16, help="completions of a micro-batch")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in both")
    parser.add_argument("--no-end", action="store_true", help="every completion has all its tokens")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--here", action="store_true", help="measure the one tool in this process, print its row")
    return parser


def main() -> None:
    """Measure, print, write the table."""
    options = arguments().parse_args()
    options.max_length = min(options.max_length, 128) if options.model == "demo" else options.max_length
    options.out.mkdir(parents=True, exist_ok=True)
    if options.here:
        print(json.dumps(one(options.tools[0], options)))
        return
    rows: list[dict[str, Any]] = []
    words = [word for word in sys.argv[1:] if word not in (*TOOLS, "--tools")]
    for tool in options.tools:
        command = [sys.executable, "-m", "benchmarks.grpo", *words, "--here", "--tools", tool]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"tool"')]
        row = json.loads(lines[-1]) if lines else {"tool": tool, "status": f"failed: exit code {done.returncode}"}
        rows.append(row)
        print("  ".join(f"{name} {row[name]}" for name in FIELDS[:17] if name in row), flush=True)
        write_table(options.out / "grpo.csv", rows, FIELDS)


if __name__ == "__main__":
    main()
