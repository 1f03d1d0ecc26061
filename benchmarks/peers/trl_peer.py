"""One case in TRL's own trainers, with the recipe's settings: `python -m benchmarks.peers.trl_peer JOB.json`.

bf16 where the case leaves the precision open: TRL 1.16 turns LoRA weights into bf16 on a 4-bit base, so its fp16 run
raises when the scaler meets their gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Job
from benchmarks.meter import Measured, Meter, work
from benchmarks.peers.common import LORA, Readings, callback, read_rows, run_trainer, trainer_settings


def quantised_model(job: Job, dtype: torch.dtype) -> Any:
    """The base in 4 bits, prepared as the recipe does it."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        Path(job.workload) / "model",
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        ),
    )
    model.config.use_cache = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=job.case.checkpointing)


def measure(job: Job, meter: Meter) -> Measured:
    """Build the trainer and train."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    case, cuda = job.case, torch.cuda.is_available()
    precision = ("bf16" if cuda else "fp32") if case.precision == "auto" else case.precision
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    readings = Readings()
    settings = {**trainer_settings(job, precision), "use_cpu": not cuda}
    parts: dict[str, Any] = {
        "model": quantised_model(job, dtype),
        "processing_class": AutoTokenizer.from_pretrained(Path(job.workload) / "model"),
        "train_dataset": Dataset.from_list(read_rows(job)),
        "peft_config": LoraConfig(r=case.rank, lora_dropout=case.dropout, task_type="CAUSAL_LM", **LORA),
        "callbacks": [callback(meter, readings)],
    }
    trainer: Any
    if case.method == "sft":
        trainer = trl.SFTTrainer(args=trl.SFTConfig(dataset_text_field="text", packing=False, **settings), **parts)
    else:
        trainer = trl.DPOTrainer(args=trl.DPOConfig(beta=0.1, **settings), **parts)
    return run_trainer(job, meter, trainer, readings, trl.__version__)


if __name__ == "__main__":
    work(measure)
