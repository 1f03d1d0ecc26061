"""Settings that contradict each other, and keys that the run would not read: both are errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lowlevel.redaction import holds_secret

if TYPE_CHECKING:
    from lowlevel.config.schema import RunConfig

LARGEST_BATCH = 1_048_576  # examples a step
ADAPTER_SHAPE = ("r", "lora_alpha", "target_modules")  # with lora.init_from, the adapter has its own
TRACE_DETAILS = ("level", "gradients")
PLANNED = ("recomputed_layers", "micro_batch_positions", "dequantize_once")  # set by memory_budget


Check = tuple[bool, str]  # whether it is wrong, and what to say


def contradictions(config: RunConfig, tables: Mapping[str, Any]) -> list[str]:
    """One line for each contradiction; `tables` holds the keys that were given."""
    given = {f"{s}.{k}" for s, table in tables.items() if isinstance(table, Mapping) for k in table}
    given |= {key for key in tables if key in ("sft", "dpo")}
    checks = [*_method_and_model(config, given), *_data(config), *_train(config, given), *_trace(config, given)]
    return [message for wrong, message in checks if wrong]


def secrets_in(tables: Mapping[str, Any]) -> list[str]:
    """One line for each value that holds a password or token: the run folder keeps all values in config.toml."""
    hint = "holds a password or token; set HF_TOKEN or log in with `hf auth login` instead"
    return [f"{key}: {hint}" for key, text in _texts(tables, "") if holds_secret(text)]


def empty_texts(tables: Mapping[str, Any]) -> list[str]:
    """One line for each empty path or name: an empty path would be the current folder. Filter values may be empty."""
    texts = (found for found in _texts(tables, "") if not found[0].startswith("data.filters"))
    return [f"{key}: is empty; leave the key out for its default" for key, text in texts if not text.strip()]


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in nested tables and lists, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)


def _method_and_model(config: RunConfig, given: set[str]) -> list[Check]:
    sft, model, data = config.method == "sft", config.model, config.data
    quantisation = {"model.bnb_4bit_quant_type", "model.bnb_4bit_use_double_quant"}
    return [
        (sft and "dpo" in given, '[dpo] is not used when method = "sft"'),
        (not sft and "sft" in given, '[sft] is not used when method = "dpo"'),
        (sft and bool(model.adapter), "model.adapter is for dpo; to continue training an adapter use lora.init_from"),
        (sft and data.format == "orca", 'data.format = "orca" holds preferences; sft needs "messages"'),
        (sft and data.format == "preference", 'data.format = "preference" is for dpo; sft needs "messages"'),
        (sft and "data.max_prompt_length" in given, "data.max_prompt_length is for dpo"),
        (not sft and data.format == "messages", 'dpo needs data.format = "preference" or "orca"'),
        (
            model.adapter is not None and model.adapter_mode == "none",
            'model.adapter is set, but model.adapter_mode = "none" ignores it',
        ),
        (
            model.adapter is None and "model.adapter_mode" in given and model.adapter_mode != "none",
            f'model.adapter_mode = "{model.adapter_mode}" needs model.adapter',
        ),
        (
            not model.load_in_4bit and bool(quantisation & given),
            "model.bnb_4bit_* keys need model.load_in_4bit = true",
        ),
        *(
            (config.lora.init_from is not None and f"lora.{key}" in given, f"lora.{key} comes from lora.init_from")
            for key in ADAPTER_SHAPE
        ),
    ]


def _data(config: RunConfig) -> list[Check]:
    data, train = config.data, config.train
    return [
        (
            data.max_prompt_length is not None and data.max_prompt_length > data.max_length,
            f"data.max_prompt_length {data.max_prompt_length} > data.max_length {data.max_length}",
        ),
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
    ]


def _train(config: RunConfig, given: set[str]) -> list[Check]:
    train, packing = config.train, config.data.packing
    examples = config.rows_per_step
    sequence = config.row_positions
    return [
        (
            examples > LARGEST_BATCH,
            f"train.per_device_train_batch_size * gradient_accumulation_steps = {examples:,} examples a step; "
            f"at most {LARGEST_BATCH:,}",
        ),
        (
            train.max_steps is not None and train.warmup_steps > train.max_steps,
            f"train.warmup_steps {train.warmup_steps} > max_steps {train.max_steps}",
        ),
        (
            bool(train.recomputed_layers) and not train.gradient_checkpointing,
            "train.recomputed_layers needs train.gradient_checkpointing = true",
        ),
        (
            train.offload_activations and not train.gradient_checkpointing,
            "train.offload_activations needs train.gradient_checkpointing = true",
        ),
        (
            train.offload_activations and train.recomputed_layers == 0,
            "train.offload_activations needs recomputed layers, but train.recomputed_layers = 0",
        ),
        (
            train.micro_batch_positions is not None and not packing,
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
        (train.memory_budget is not None and not packing, "train.memory_budget needs data.packing = true"),
        *(
            (
                train.memory_budget is not None and f"train.{key}" in given,
                f"train.{key} is set by train.memory_budget",
            )
            for key in PLANNED
        ),
        (
            train.memory_budget is not None and not train.gradient_checkpointing,
            "train.memory_budget chooses the recomputed layers: leave out train.gradient_checkpointing = false",
        ),
    ]


def _trace(config: RunConfig, given: set[str]) -> list[Check]:
    off = not (config.trace.every or config.trace.steps)
    return [
        *((f"trace.{key}" in given and off, f"trace.{key} needs trace.every or trace.steps") for key in TRACE_DETAILS),
        (
            config.trace.level == "token" and config.dpo.reference_cache is not None,
            'trace.level = "token" needs reference token log-probabilities; dpo.reference_cache holds only sums',
        ),
    ]


def parse_size(text: str) -> int | None:
    """Bytes of "15GiB", "15GB", "800MiB" or "800MB"; None for any other text."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(i?)B\s*", text)
    if not found:
        return None
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** {"M": 2, "G": 3}[prefix])
