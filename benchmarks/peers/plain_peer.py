"""SFT without a trainer: transformers, PEFT and a loop by hand, with or without Liger's kernels in the model.

    python -m benchmarks.peers.plain_peer JOB.json

fp16 autocast over fp32 adapters with a gradient scaler, as lowlevel has it, but padded batches, PEFT's own dropout, one
tensor an adapter matrix, and the model's own loss. "liger" puts in Liger's RMS norm, rotary embedding, SwiGLU, and its
fused LM head and cross-entropy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Job
from benchmarks.meter import Measured, Meter, installed, work
from benchmarks.peers.common import LEARNING_RATES, LORA, Positions, read_rows
from benchmarks.workload import by_step

IGNORED = -100


def adapted_model(job: Job, device: torch.device, dtype: torch.dtype) -> Any:
    """The 4-bit base with fp32 adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if job.case.tool == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        Path(job.workload) / "model", dtype=dtype, device_map={"": device}, quantization_config=quantisation
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    torch.manual_seed(42)
    case = job.case
    model = get_peft_model(model, LoraConfig(r=case.rank, lora_dropout=case.dropout, task_type="CAUSAL_LM", **LORA))
    if case.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def padded(rows: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Rows as one batch, filled up on the right to the longest."""
    width = max(map(len, rows))
    filled = [ids + [0] * (width - len(ids)) for ids in rows]
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows])
    ids = torch.tensor(filled)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def measure(job: Job, meter: Meter) -> Measured:
    """Train by hand: a loss summed over the step's tokens, unscale, clip, update."""
    import bitsandbytes as bnb
    from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

    case, cuda = job.case, torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.float16 if cuda else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(Path(job.workload) / "model")
    rows = [tokenizer(row["text"])["input_ids"] for row in read_rows(job)]
    model = adapted_model(job, device, dtype)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW32bit(weights, lr=LEARNING_RATES["sft"], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, job.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=cuda)
    positions, losses, per_step = Positions(), [], case.batch * case.accumulation
    positions.watch(model)
    for step in range(job.steps):
        meter.begin()
        examples = rows[step * per_step : (step + 1) * per_step]
        scored = sum(len(ids) - 1 for ids in examples)
        total = torch.zeros((), device=device)
        for start in range(0, per_step, case.batch):
            with torch.autocast(device.type, dtype, enabled=cuda):
                batch = padded(examples[start : start + case.batch], device)
                loss = model(**batch, num_items_in_batch=scored).loss
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(total.item())
        meter.end_step()
    tokens = by_step([len(ids) for ids in rows], per_step)
    version = installed("liger-kernel") if case.tool == "liger" else installed("peft")
    return Measured(version, tokens, losses, sum(tokens), positions.total)


if __name__ == "__main__":
    work(measure)
