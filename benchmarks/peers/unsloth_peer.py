"""One case in Unsloth, as its notebooks set it up: `python -m benchmarks.peers.unsloth_peer JOB.json`.

fp16, which is what a T4 has. Its own checkpointing ("unsloth") where the case asks for any. Its fast kernels for LoRA
need dropout 0, so that is the setting of its rows in the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cases import Job
from benchmarks.meter import Measured, Meter, work
from benchmarks.peers.common import LORA, Readings, callback, max_length, read_rows, run_trainer, trainer_settings


def quantised_model(job: Job, dtype: Any) -> tuple[Any, Any]:
    """The base in 4 bits with its adapter, and the tokenizer."""
    from unsloth import FastLanguageModel

    length = max_length(job)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(Path(job.workload) / "model"), max_seq_length=length, dtype=dtype, load_in_4bit=True
    )
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=job.case.rank,
        lora_dropout=job.case.dropout,
        use_gradient_checkpointing="unsloth" if job.case.checkpointing else False,
        random_state=42,
        max_seq_length=length,
        **LORA,
    )
    return adapted, tokenizer


def measure(job: Job, meter: Meter) -> Measured:
    """Build the trainer and train."""
    import torch
    import trl
    import unsloth
    from datasets import Dataset

    case = job.case
    precision = "fp16" if case.precision == "auto" else case.precision
    model, tokenizer = quantised_model(job, torch.float16 if precision == "fp16" else torch.bfloat16)
    readings = Readings()
    settings = trainer_settings(job, precision)
    del settings["gradient_checkpointing"]  # its model was told
    parts: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_list(read_rows(job)),
        "callbacks": [callback(meter, readings)],
    }
    trainer: Any
    if case.method == "sft":
        config = trl.SFTConfig(dataset_text_field="text", packing=False, dataset_num_proc=1, **settings)
        trainer = trl.SFTTrainer(args=config, **parts)
    else:
        trainer = trl.DPOTrainer(args=trl.DPOConfig(beta=0.1, **settings), ref_model=None, **parts)
    return run_trainer(job, meter, trainer, readings, unsloth.__version__)


if __name__ == "__main__":
    work(measure, first="unsloth")  # it sets up the allocator, and rewrites the trainers that are imported after it
