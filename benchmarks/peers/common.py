"""What the peers share: the recipe's settings as TRL's trainers take them, and how their runs are read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import ROWS_PER_STEP, Job
from benchmarks.meter import Measured, Meter
from benchmarks.workload import by_step

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"lora_alpha": 32, "bias": "none", "target_modules": PROJECTIONS}
LEARNING_RATES = {"sft": 2e-4, "dpo": 1e-5}  # as in runs/tinyllama_*.toml
WARMUP_RATIO = {"sft": 0.0, "dpo": 0.1}


def read_rows(job: Job) -> list[dict[str, str]]:
    """The workload's rows as text, as many as the run will take."""
    lines = (Path(job.workload) / f"{job.case.method}_text.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: job.steps * job.case.batch * job.case.accumulation]]


def max_length(job: Job) -> int:
    """Tokens of a sequence."""
    length: int = json.loads((Path(job.workload) / "workload.json").read_text())["length"]
    return length


def trainer_settings(job: Job, precision: str) -> dict[str, Any]:
    """Arguments of SFTConfig and DPOConfig alike: the recipe, with a logged line a step."""
    case = job.case
    return {
        "output_dir": str(Path(job.scratch) / case.name),
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_checkpointing": case.checkpointing,
        "max_steps": job.steps,
        "max_length": max_length(job),
        "optim": "paged_adamw_32bit",
        "learning_rate": LEARNING_RATES[case.method],
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(job.steps * WARMUP_RATIO[case.method]),
        "max_grad_norm": 1.0,
        "fp16": precision == "fp16",
        "bf16": precision == "bf16",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 42,
    }


@dataclass
class Positions:
    """Counts what goes through the embedding: every token of every forward pass, padding included."""

    total: int = 0

    def watch(self, model: Any) -> None:
        """Count from now on; recomputation starts behind the embedding and is not counted."""
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: Any, arguments: tuple[Any, ...]) -> None:
        self.total += arguments[0].numel()


@dataclass
class Readings:
    """Losses as a trainer logs them."""

    losses: list[float] = field(default_factory=list)


def callback(meter: Meter, readings: Readings) -> Any:
    """A callback that reads the meter at each step's end, as lowlevel's case does."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.end_step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                readings.losses.append(float(logs["loss"]))

    return Callback()


def tokens_of(dataset: Any, method: str, limit: int) -> list[int]:
    """Tokens of each row that a trainer tokenised, at most `limit` a sequence; a prompt once for each completion."""
    if method == "sft":
        return [min(limit, len(ids)) for ids in dataset["input_ids"]]
    prompt, chosen, rejected = (_lengths(dataset, part) for part in ("prompt", "chosen", "rejected"))
    return [sum(min(limit, p + n) for n in both) for p, *both in zip(prompt, chosen, rejected, strict=True)]


def _lengths(dataset: Any, part: str) -> Sequence[int]:
    """TRL 1.15 and 1.16 name these columns differently."""
    name = next(name for name in dataset.column_names if name.startswith(part) and name.endswith("ids"))
    return [len(ids) for ids in dataset[name]]


def run_trainer(job: Job, meter: Meter, trainer: Any, readings: Readings, version: str) -> Measured:
    """Train and read what happened."""
    positions = Positions()
    positions.watch(trainer.model)
    case = job.case
    tokens = by_step(tokens_of(trainer.train_dataset, case.method, max_length(job)), case.batch * case.accumulation)
    trainer.train()
    passes = 1 if case.method == "sft" else 2  # policy and reference
    assert case.batch * case.accumulation == ROWS_PER_STEP
    return Measured(version, tokens, readings.losses, sum(tokens), positions.total / passes)
