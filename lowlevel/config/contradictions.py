"""Settings that contradict each other, and keys that the run would not read: both are errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lowlevel.config import METHODS
from lowlevel.config.schema import ONLINE, PAIRED, RunConfig, other_section
from lowlevel.redaction import holds_secret

LARGEST_BATCH = 1_048_576  # examples a step
# With lora.init_from, the adapter has its own.
ADAPTER_SHAPE = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "init_lora_weights")
DORA = 'set model.adapter_mode = "original", or merge it first (lowlevel merge)'
LOFTQ = 'lora.init_lora_weights = "loftq"'
TRACE_DETAILS = ("level", "gradients")
PLANNED = ("recomputed_layers", "micro_batch_positions", "dequantize_once")  # set by memory_budget
PAIRS = ("preference", "hh", "orca")  # formats that only dpo has
UNREAD = {  # keys of grpo that a loss_type does not read
    "cispo": ("epsilon", "delta", "importance_sampling_level"),
    "sapo": ("epsilon", "epsilon_high", "delta", "importance_sampling_level"),
}
Check = tuple[bool, str]  # whether it is wrong, and what to say


def contradictions(config: RunConfig, tables: Mapping[str, Any]) -> list[str]:
    """One line for each contradiction; `tables` holds the keys that were given."""
    given = {f"{s}.{k}" for s, table in tables.items() if isinstance(table, Mapping) for k in table}
    given |= {key for key in tables if key in METHODS}
    checks = [
        *_method_and_model(config, given),
        *_data(config),
        *_sources(config, given),
        *_train(config, given),
        *_trace(config, given),
        *_reference(config),
        *_online(config, given),
        *_full(config, given),
    ]
    return [message for wrong, message in checks if wrong]


def secrets_in(tables: Mapping[str, Any]) -> list[str]:
    """One line for each value that holds a password or token: the run folder keeps all values in config.toml."""
    hint = "holds a password or token; set HF_TOKEN or log in with `hf auth login` instead"
    return [f"{key}: {hint}" for key, text in _texts(tables, "") if holds_secret(text)]


def empty_texts(tables: Mapping[str, Any]) -> list[str]:
    """One line for each empty path or name: an empty path would be the current folder. Filter values may be empty."""
    texts = (found for found in _texts(tables, "") if ".filters" not in found[0])
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
    sft, kto, online = config.method == "sft", config.method == "kto", config.method in ONLINE
    paired = config.method in PAIRED and not online
    model, data, mode = config.model, config.data, config.model.adapter_mode
    others = [method for method in METHODS if method != config.method and method in given]
    keys = (name.partition(".")[2] for name in sorted(given) if name.startswith(tuple(f"{other}." for other in others)))
    hint = next((f"; {found}" for found in (other_section(key, config.method) for key in keys) if found), "")
    no_adapter, continued = model.adapter is None, config.lora.init_from is not None
    loftq, stacked = config.lora.init_lora_weights == "loftq", mode == "stack" and not no_adapter
    quantisation = bool({"model.bnb_4bit_quant_type", "model.bnb_4bit_use_double_quant"} & given)
    pairs, others_say = data.format in PAIRS, "dpo, kto and reward"
    columns = "data.columns is for sft, dpo and reward; reward functions receive all columns"
    messages = 'data.format = "messages" is for sft and kto'
    together = not kto and config.train.data_order == "shuffled_pairs"
    needed_mode = no_adapter and "model.adapter_mode" in given and mode != "none"
    return [
        (bool(others), f'[{"], [".join(others)}] is not used when method = "{config.method}"{hint}'),
        (sft and bool(model.adapter), "model.adapter is not for sft: lora.init_from continues an adapter"),
        (
            (sft or online) and pairs,
            f'data.format = "{data.format}" is for {others_say}; {config.method} takes "auto" or "messages"',
        ),
        (not paired and "data.max_prompt_length" in given, "data.max_prompt_length is for dpo and reward"),
        (not sft and "data.weight_column" in given, "data.weight_column is for sft"),
        (not (sft or config.method == "dpo") and data.supervise == "all", 'data.supervise = "all" is for sft and dpo'),
        (together, 'train.data_order = "shuffled_pairs" is for kto: in other methods a pair is one example'),
        ((kto or online) and bool(data.columns), columns),
        (paired and data.format == "messages", f'{messages}; {config.method} takes "preference"'),
        (not no_adapter and mode == "none", 'model.adapter is set, but model.adapter_mode = "none" ignores it'),
        (needed_mode, f'model.adapter_mode = "{mode}" needs model.adapter'),
        (not model.load_in_4bit and quantisation, "model.bnb_4bit_* keys need model.load_in_4bit = true"),
        (loftq and config.has_reference, f"{LOFTQ} is for sft and reward: {config.method} starts as its reference"),
        (loftq and config.lora.use_dora, f"{LOFTQ} is not for lora.use_dora: its lengths are those of the base's rows"),
        (stacked and config.lora.use_dora, f"lora.use_dora cannot stand on model.adapter: {DORA}"),
        (loftq and not model.load_in_4bit, f"{LOFTQ} needs model.load_in_4bit = true: it starts from the error"),
        *((continued and f"lora.{key}" in given, f"lora.{key} comes from lora.init_from") for key in ADAPTER_SHAPE),
    ]


def _reference(config: RunConfig) -> list[Check]:
    dpo = config.dpo
    moves, cached = dpo.ref_model_sync_steps is not None, dpo.reference_cache is not None
    return [
        (not moves and dpo.ref_model_mixup_alpha is not None, "dpo.ref_model_mixup_alpha needs ref_model_sync_steps"),
        (moves and cached, "dpo.reference_cache is for a reference that stays: leave it out or ref_model_sync_steps"),
    ]


def _online(config: RunConfig, given: set[str]) -> list[Check]:
    own, batch = config.sampled, "train.per_device_train_batch_size * gradient_accumulation_steps"
    if own is None:
        return []
    name, group, longest, prompt = config.method, own.group, own.max_completion_length, config.data.max_length
    unread_keys = UNREAD.get(config.grpo.loss_type, ()) if name == "grpo" else ()
    unread = next((key for key in unread_keys if f"grpo.{key}" in given), "")
    estimator = "grpo.kl_estimator" in given and own.beta == 0
    functions, weights = len(own.reward), len(own.reward_weights)
    gspo = f'grpo.loss_type: {own.loss_type} is set by grpo.importance_sampling_level = "sequence"'
    return [
        (name == "grpo" and own.loss_type.lower() == "gspo", gspo),
        (
            config.rows_per_step % group != 0,
            f"{batch} = {config.rows_per_step} completions are not a multiple of {name}.num_generations {group}",
        ),
        (longest >= prompt, f"{name}.max_completion_length {longest} leaves no prompt: data.max_length is {prompt}"),
        (not own.reward, f"{name}.reward is empty"),
        (len({*own.reward}) < functions, f"{name}.reward has a name twice: rename it, or set reward_weights"),
        (bool(unread), f'grpo.{unread} is not read by loss_type = "{config.grpo.loss_type}"'),
        (estimator, "grpo.kl_estimator needs grpo.beta above 0"),
        (weights not in (0, functions), f"{name}.reward_weights has {weights} numbers for {functions} functions"),
        (
            ("format" in own.reward) != (own.reward_pattern is not None),
            f'{name}.reward: "format" and reward_pattern belong together',
        ),
        (config.train.memory_budget is not None, f"train.memory_budget does not know what sampling ({name}) needs"),
    ]


def _full(config: RunConfig, given: set[str]) -> list[Check]:
    full, model = 'train.finetuning_type = "full"', config.model
    start = f"{full} starts from model.name, a whole model (RUN_DIR/model, or lowlevel merge), not model.adapter"
    checks = [
        (
            config.method not in ("sft", "dpo", "kto"),
            f"{full} is for sft, dpo and kto, not {config.method}",
        ),
        (model.load_in_4bit, f"{full} needs model.load_in_4bit = false: 4-bit weights cannot be trained"),
        (model.adapter is not None, start),
        (model.embeddings_on_host, f"{full} also trains the input embedding: leave out model.embeddings_on_host"),
        (config.dpo.ref_model_sync_steps is not None, f"{full} has a reference that stays: no ref_model_sync_steps"),
        *((True, f"{key} is not used with {full}") for key in sorted(given) if key.startswith("lora.")),
    ]
    return checks if config.full else []


def _data(config: RunConfig) -> list[Check]:
    data, train = config.data, config.train
    prompt, has_evaluation = data.max_prompt_length or 0, data.eval_source is not None
    patience, holdout = train.early_stopping_patience, data.eval_source == "holdout"
    return [
        (prompt > data.max_length, f"data.max_prompt_length {prompt} > data.max_length {data.max_length}"),
        (bool(data.eval_limit) and not has_evaluation, "data.eval_limit needs data.eval_source"),
        (holdout and not data.eval_limit, 'data.eval_source = "holdout" needs data.eval_limit'),
        (bool(train.eval_steps) and not has_evaluation, "train.eval_steps needs data.eval_source"),
        (bool(patience) and not train.eval_steps, "train.early_stopping_patience needs train.eval_steps"),
    ]


def _sources(config: RunConfig, given: set[str]) -> list[Check]:
    parts, unfit = config.data.sources, PAIRS if config.method in ("sft", *ONLINE) else ("messages",)
    if not parts:
        return []
    unweighted = next((f"{i} ({part.source})" for i, part in enumerate(parts, 1) if part.weight is None), None)
    rows = any(not isinstance(part.source, str) for part in parts)
    formats = (part.format for part in parts if part.format in unfit)
    return [
        ("data.source" in given, "data.source and data.sources are both set: give one of them"),
        ("data.split" in given, "data.split is not used with data.sources: give each source its split"),
        (rows, "data.sources takes files and hub names; rows given in Python go into data.source"),
        (any(part.source == "holdout" for part in parts), '"holdout" is a value of data.eval_source'),
        (
            unweighted is not None and any(part.weight for part in parts),
            f"data.sources: source {unweighted} has no weight: give all sources a weight, or none",
        ),
        *((True, f'data.sources: format "{other}" does not fit {config.method}') for other in formats),
    ]


def _train(config: RunConfig, given: set[str]) -> list[Check]:
    train, packing, sequence, examples = config.train, config.data.packing, config.row_positions, config.rows_per_step
    warmup, steps, positions = train.warmup_steps, train.max_steps, train.micro_batch_positions
    recomputing, layers, offload = train.gradient_checkpointing, train.recomputed_layers, train.offload_activations
    budget, planned = train.memory_budget or "", train.memory_budget is not None
    batch = "train.per_device_train_batch_size * gradient_accumulation_steps"
    size = f'train.memory_budget: expected a size like "15GiB" or "800MiB", got {budget!r}'
    chosen = "train.memory_budget chooses the recomputed layers: leave out train.gradient_checkpointing = false"
    unused = "train.offload_activations needs recomputed layers, but train.recomputed_layers = 0"
    small = f"train.micro_batch_positions {positions} is less than one sequence ({sequence})"
    return [
        (examples > LARGEST_BATCH, f"{batch} = {examples:,} examples a step; at most {LARGEST_BATCH:,}"),
        (steps is not None and warmup > steps, f"train.warmup_steps {warmup} > max_steps {steps}"),
        (bool(layers) and not recomputing, "train.recomputed_layers needs train.gradient_checkpointing = true"),
        (offload and not recomputing, "train.offload_activations needs train.gradient_checkpointing = true"),
        (offload and layers == 0, unused),
        (positions is not None and not packing, "train.micro_batch_positions needs data.packing = true"),
        (positions is not None and positions < sequence, small),
        (planned and not parse_size(budget), size),
        (planned and not packing, "train.memory_budget needs data.packing = true"),
        *((planned and f"train.{key}" in given, f"train.{key} is set by train.memory_budget") for key in PLANNED),
        (planned and not recomputing, chosen),
    ]


def _trace(config: RunConfig, given: set[str]) -> list[Check]:
    off = not (config.trace.every or config.trace.steps)
    sums = config.trace.level == "token" and config.dpo.reference_cache is not None
    need = 'trace.level = "token" needs reference token log-probabilities; dpo.reference_cache holds only sums'
    rewards = config.method == "reward" and config.trace.level == "token"
    return [
        (rewards, 'trace.level = "token": a reward model reads one token of a completion; use "pair"'),
        *((f"trace.{key}" in given and off, f"trace.{key} needs trace.every or trace.steps") for key in TRACE_DETAILS),
        (sums, need),
    ]


def parse_size(text: str) -> int | None:
    """Bytes of "15GiB", "15GB", "800MiB" or "800MB"; None for any other text."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(i?)B\s*", text)
    if not found:
        return None
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** {"M": 2, "G": 3}[prefix])
