"""The demo's SFT stage on a CPU, in lowlevel and in TRL, in turns in one process.

    python -m benchmarks.cpu --out out/cpu [--rounds 3] [--steps 12]

The same base (3 M parameters), rows, tokens, batch of 16, adapters and optimizer; fp32; once on the plain base and once
on it in 4 bits (where TRL turns the adapters into bf16). TRL pads a batch, lowlevel packs it. Prints and writes medians
of seconds a step over all rounds, and the ratio of each round, so that a busy machine shows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.lowlevel_case import run_metered
from benchmarks.meter import Meter, installed, machine
from benchmarks.peers.common import Readings, callback
from benchmarks.runner import commit, write_table
from lowlevel import __version__
from lowlevel.commands.demo import demo_configs
from lowlevel.config.file import config_from_tables, to_tables
from lowlevel.config.schema import RunConfig
from lowlevel.model.base import resolve_name
from lowlevel.running.assembly import prepare_data

WARMUP_STEPS = 2
FIELDS = ("base", "tool", "version", "seconds_per_step", "ratio_by_round", "loss_first", "loss_last", "threads", "gpu",
          "torch", "transformers", "peft", "bitsandbytes", "commit", "started")  # fmt: skip


def demo_sft(out: Path, steps: int, quantised: bool) -> RunConfig:
    """The demo's SFT run, cut short, without evaluation, on the base in 4 bits or plain."""
    tables = to_tables(demo_configs(out)[0])
    tables["train"] |= {"max_steps": steps, "logging_steps": 1, "data_order": "sequential"}
    tables["model"] = {"name": "demo", "load_in_4bit": quantised}
    tables["data"] |= {"limit": steps * tables["train"]["per_device_train_batch_size"]}
    del tables["data"]["eval_source"], tables["data"]["eval_limit"], tables["data"]["eval_split"]
    return config_from_tables(tables, "demo")


def lowlevel_round(config: RunConfig) -> tuple[list[float], list[float]]:
    """Seconds and losses of each step."""
    meter = Meter()
    records, _ = run_metered(config, meter)
    return meter.seconds, [record["loss"] for record in records]


def trl_round(config: RunConfig, out: Path) -> tuple[list[float], list[float]]:
    """The same steps in TRL's SFTTrainer."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    tokenizer, data = prepare_data(config)
    examples: list[Any] = list(data.train)
    rows = [
        {"input_ids": x.input_ids.tolist(), "completion_mask": (x.labels != -100).astype(int).tolist()}
        for x in examples
    ]
    meter, readings, train, lora = Meter(), Readings(), config.train, config.lora
    steps = train.max_steps or 0
    trainer = trl.SFTTrainer(
        model=plain_model(config),
        processing_class=tokenizer.tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=lora.r, lora_alpha=int(lora.lora_alpha), lora_dropout=lora.lora_dropout,
                               target_modules=list(lora.target_modules), task_type="CAUSAL_LM"),
        callbacks=[callback(meter, readings)],
        args=trl.SFTConfig(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=train.per_device_train_batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            gradient_checkpointing=train.gradient_checkpointing,
            learning_rate=train.learning_rate,
            lr_scheduler_type=train.lr_scheduler_type,
            warmup_steps=math.ceil(train.warmup_ratio * steps),
            optim=train.optim,
            max_length=None,
            completion_only_loss=True,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
    )  # fmt: skip
    trainer.train()
    return meter.seconds, readings.losses


def plain_model(config: RunConfig) -> Any:
    """The base as transformers loads it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"dtype": torch.float32}
    if config.model.load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=True,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(resolve_name(config.model.name), **settings)


def compare(quantised: bool, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Rounds in turns; one row a tool."""
    seconds: dict[str, list[float]] = {"lowlevel": [], "trl": []}
    losses: dict[str, list[float]] = {}
    ratios = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            config = demo_sft(Path(folder), steps, quantised)
            found = {"lowlevel": lowlevel_round(config), "trl": trl_round(config, Path(folder) / "trl")}
        medians = {}
        for tool, (times, loss) in found.items():
            seconds[tool] += times[WARMUP_STEPS:]
            medians[tool], losses[tool] = statistics.median(times[WARMUP_STEPS:]), loss
        ratios.append(medians["trl"] / medians["lowlevel"])
    shared = {**machine(), "commit": commit(), "started": datetime.now(UTC).isoformat(timespec="seconds"),
              "base": "4 bits" if quantised else "plain", "threads": torch.get_num_threads(),
              "ratio_by_round": ";".join(f"{ratio:.2f}" for ratio in ratios)}  # fmt: skip
    versions = {"lowlevel": __version__, "trl": installed("trl")}
    return [
        {
            **shared,
            "tool": tool,
            "version": versions[tool],
            "seconds_per_step": round(statistics.median(seconds[tool]), 4),
            "loss_first": round(losses[tool][0], 4),
            "loss_last": round(losses[tool][-1], 4),
        }
        for tool in seconds
    ]


def main() -> None:
    """Compare on both bases, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/cpu"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="steps a round, two of them warm-up")
    options = parser.parse_args()
    if torch.cuda.is_available():
        raise SystemExit("a GPU is visible; this compares CPUs: CUDA_VISIBLE_DEVICES= python -m benchmarks.cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [row for quantised in (False, True) for row in compare(quantised, options.rounds, options.steps)]
    write_table(options.out / "cpu.csv", rows, FIELDS)
    for row in rows:
        losses = f"loss {row['loss_first']:.4f} -> {row['loss_last']:.4f}"
        ratios = f"TRL / lowlevel by round: {row['ratio_by_round']}"
        print(f"{row['base']:<8}{row['tool']:<10}{row['seconds_per_step']:.4f} s a step, {losses}; {ratios}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
