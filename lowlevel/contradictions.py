"""Settings that are valid alone and not together: a key that the run would not read is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowlevel.config import RunConfig

ADAPTER_SHAPE = ("r", "lora_alpha", "target_modules")  # an adapter that is trained on brings its own
PLANNED = ("recomputed_layers", "micro_batch_positions", "dequantize_once")  # what a memory budget chooses


def contradictions(config: RunConfig, tables: Mapping[str, Any]) -> list[str]:
    """Settings that are valid alone and not together: a key that the run would not read is an error."""
    method, data, train = config.method, config.data, config.train
    sequence = data.max_length * (2 if method == "dpo" else 1)
    given = {f"{s}.{k}" for s, table in tables.items() if isinstance(table, Mapping) for k in table}
    checks = [
        (method == "sft" and "dpo" in tables, '[dpo] is not used when method = "sft"'),
        (
            method == "sft" and bool(config.model.adapter),
            "model.adapter is for dpo; to go on training use lora.init_from",
        ),
        (method == "sft" and data.format == "orca", 'data.format = "orca" holds preferences; sft needs "messages"'),
        (
            method == "sft" and data.format == "preference",
            'data.format = "preference" is for dpo; sft needs "messages"',
        ),
        (method == "sft" and "data.max_prompt_length" in given, "data.max_prompt_length is for dpo"),
        (method == "dpo" and data.format == "messages", 'dpo needs data.format = "preference" or "orca"'),
        (
            config.model.adapter is not None and config.model.adapter_mode == "none",
            'model.adapter is set, but adapter_mode = "none" would ignore it',
        ),
        (
            config.model.adapter is None and "model.adapter_mode" in given and config.model.adapter_mode != "none",
            f'model.adapter_mode = "{config.model.adapter_mode}" needs model.adapter',
        ),
        (
            data.max_prompt_length is not None and data.max_prompt_length > data.max_length,
            f"data.max_prompt_length {data.max_prompt_length} > data.max_length {data.max_length}",
        ),
        (
            train.recomputed_layers is not None and train.recomputed_layers > 0 and not train.gradient_checkpointing,
            "train.recomputed_layers needs gradient_checkpointing = true",
        ),
        (
            train.micro_batch_positions is not None and not data.packing,
            "train.micro_batch_positions needs data.packing = true",
        ),
        (
            train.micro_batch_positions is not None and train.micro_batch_positions < sequence,
            f"train.micro_batch_positions {train.micro_batch_positions} is less than one sequence ({sequence})",
        ),
        (
            train.memory_budget is not None and not parse_size(train.memory_budget),
            f'train.memory_budget: expected a size like "15GiB" or "800MiB", got {train.memory_budget!r}',
        ),
        *(
            (train.memory_budget is not None and f"train.{key}" in given, f"train.{key} is chosen by memory_budget")
            for key in PLANNED
        ),
        (train.memory_budget is not None and not data.packing, "train.memory_budget needs data.packing = true"),
        (data.eval_limit is not None and data.eval_source is None, "data.eval_limit needs data.eval_source"),
        (
            data.eval_source == "holdout" and data.eval_limit is None,
            'data.eval_source = "holdout" needs data.eval_limit',
        ),
        (train.eval_steps is not None and data.eval_source is None, "train.eval_steps needs data.eval_source"),
        (
            train.early_stopping_patience is not None and train.eval_steps is None,
            "train.early_stopping_patience needs train.eval_steps",
        ),
        (
            train.max_steps is not None and train.warmup_steps > train.max_steps,
            f"train.warmup_steps {train.warmup_steps} > max_steps {train.max_steps}",
        ),
        *(
            (config.lora.init_from is not None and f"lora.{key}" in given, f"lora.{key} comes from lora.init_from")
            for key in ADAPTER_SHAPE
        ),
        (
            not config.model.load_in_4bit
            and bool({"model.bnb_4bit_quant_type", "model.bnb_4bit_use_double_quant"} & given),
            "model.bnb_4bit_* keys need load_in_4bit = true",
        ),
        *(
            (
                f"trace.{key}" in given and not (config.trace.every or config.trace.steps),
                f"trace.{key} needs trace.every or trace.steps",
            )
            for key in ("level", "gradients")
        ),
        (
            config.trace.level == "token" and config.dpo.reference_cache is not None,
            'trace.level = "token" needs the reference\'s tokens, of which dpo.reference_cache holds sums alone',
        ),
    ]
    return [message for wrong, message in checks if wrong]


def parse_size(text: str) -> int | None:
    """Bytes of "15GiB", "15GB", "800MiB" or "800MB"; None for another form."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(i?)B\s*", text)
    if not found:
        return None
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** {"M": 2, "G": 3}[prefix])
