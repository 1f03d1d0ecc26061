"""From a configuration to tokenizer, data, base, adapters and method of a run. Cheap checks come first."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowlevel.batch.order import ORDER_VERSION, DataOrder
from lowlevel.config.contradictions import DORA
from lowlevel.config.schema import RunConfig
from lowlevel.data.prepare import ModelLimits, PreparedData, prepare
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.tokenizer import load_chat_tokenizer
from lowlevel.durable import replaced_folder, write_json
from lowlevel.errors import ConfigError
from lowlevel.heartbeat import working
from lowlevel.methods.choice import check_loss, run_loss
from lowlevel.model.adapters import adapter_sha256, is_reward_model, read_adapter_config
from lowlevel.model.attention_choice import Attention, check_sdpa, choose_attention
from lowlevel.model.base import empty_model, load_base, load_model_config, load_stored, public_name, resolve_name
from lowlevel.model.build import build_full_policy, build_policy, check_target_modules, check_trainable
from lowlevel.model.files import read_or_empty, refuse_no_weights
from lowlevel.model.memory import adapter_sizes, model_shape
from lowlevel.model.merging import merged_model
from lowlevel.model.moving_reference import Following, reads_reference
from lowlevel.model.offload import TIED, move_embeddings_to_host
from lowlevel.model.placement import Placement, choose_placement, dtype_name
from lowlevel.model.policy import Policy
from lowlevel.model.quantisation import KEYS, as_stored, lacks_16_bits
from lowlevel.model.quantisation_error import start_from_error
from lowlevel.model.suitability import attention_window, short_positions
from lowlevel.model.targets import size_of
from lowlevel.online import rewards
from lowlevel.ranks import ALONE, Ranks
from lowlevel.running.adapter_sources import check_frozen_under, find_adapter
from lowlevel.running.gpu_memory import usable_memory, with_plan, with_shards
from lowlevel.running.result_files import save_tokenizer
from lowlevel.running.run_folder import RunFolder
from lowlevel.running.trackers import check_trackers


@dataclass(frozen=True)
class Inputs:
    """Everything about a run that is known before the model is loaded."""

    tokenizer: ChatTokenizer
    data: PreparedData
    placement: Placement
    attention: Attention
    parent: Path | None  # PEFT folder of the frozen adapter
    init_from: Path | None  # PEFT folder whose training continues
    merged_adapter: str | None = None  # SHA-256 of the adapter that the base holds (adapter_mode "original")
    shards: Ranks | None = None  # the ranks that share the base's layers


def choose_execution(config: RunConfig, inputs: Inputs) -> str:
    """The mode of train.execution; "auto": CUDA graphs on a GPU, else eager. Raises ConfigError if it is impossible."""
    asked, on_gpu = config.train.execution, inputs.placement.device.type == "cuda"
    spans = inputs.attention.kernel is not None
    if asked == "auto":
        # of a sharded base no graph is captured: its passes are those of other GPUs too
        return "eager" if not (on_gpu and spans) else "compiled" if inputs.shards else "graphed"
    if asked == "graphed" and not on_gpu:
        raise ConfigError('train.execution = "graphed" needs a GPU, and none is visible: use "eager"')
    if asked != "eager" and not spans:
        raise ConfigError(
            f'train.execution = "{asked}" needs attention over spans: use "eager" ({inputs.attention.reason})'
        )
    return asked


def check_inputs(config: RunConfig) -> Inputs:
    """All checks that need no loaded model, the cheapest first. Raises ConfigError, DataError or CheckpointError."""
    check_loss(config)
    if config.sampled:
        rewards.check(config.sampled)
    check_trackers(config)
    placement = choose_placement(config.train.precision)
    base = load_model_config(config.model)
    if config.model.embeddings_on_host and base.to_dict().get("tie_word_embeddings"):
        raise ConfigError(TIED)
    parent = find_adapter(config.model.adapter, "model.adapter")
    init_from = find_adapter(config.lora.init_from, "lora.init_from")
    for folder in filter(None, (parent, init_from)):
        if read_adapter_config(folder).use_dora and parent and config.model.adapter_mode == "stack":
            raise ConfigError(f"{folder}: an adapter with use_dora is not stacked: {DORA}")
        if is_reward_model(folder) and not (folder == init_from and config.method == "reward"):
            raise ConfigError(f"{folder} is a reward model: start from an SFT or DPO adapter")
    check_frozen_under(parent, init_from)
    model = empty_model(base)
    if config.full:
        check_trainable(model, config.train.optim)
        if stored := load_stored(config.model):
            raise ConfigError(f'train.finetuning_type = "full" {lacks_16_bits(config.model.name, stored)}')
    elif init_from is None:
        check_target_modules(model, config.lora.target_modules)
    if config.lora.init_lora_weights == "loftq" and (stored := load_stored(config.model)):
        raise ConfigError(f'lora.init_lora_weights = "loftq" {lacks_16_bits(config.model.name, stored)}')
    tokenizer, data = prepare_data(config)
    if config.sampled:
        rewards.check_rows(config.sampled, [*data.train, *data.evaluation])
    DataOrder.of(config, data.train)  # refuses an endless number of epochs
    attention = choose_attention(config.model, base, placement)
    if attention.implementation != "eager":
        check_sdpa(model)
    return Inputs(tokenizer, data, placement, attention, parent, init_from)


def check_run(config: RunConfig, ranks: Ranks = ALONE) -> tuple[RunConfig, Inputs]:
    """`check_inputs`; the configuration gets what the folder of a pre-quantised base sets, and the memory plan."""
    config = with_stored(config)
    refuse_no_weights(Path(resolve_name(config.model.name)))
    inputs = check_inputs(config)
    if ranks.size > 1 or config.train.memory_budget is not None:
        sizes = adapter_sizes(config, inputs.parent, inputs.init_from)
        shape = model_shape(load_model_config(config.model), *sizes)
        shape = with_shards(shape, config, inputs.placement, ranks.size, usable_memory(config))
        inputs = replace(inputs, shards=ranks if shape.shards > 1 else None)
        config = with_plan(config, inputs.placement, inputs.attention, shape)
    choose_execution(config, inputs)
    return config, inputs


def with_stored(config: RunConfig) -> RunConfig:
    """The configuration with the quantisation of a pre-quantised base. Raises ConfigError if settings contradict it."""
    model = as_stored(config.model, load_stored(config.model))
    return config.model_copy(update={"model": model})


def check_start(config: RunConfig, scratch: Path) -> tuple[RunConfig, Inputs]:
    """`check_run` for a run without a folder; a merged base (adapter_mode "original") is written to `scratch`."""
    return with_merged_base(*check_run(config), RunFolder(scratch))


def prepare_data(config: RunConfig) -> tuple[ChatTokenizer, PreparedData]:
    """The tokenizer and the rows of a configuration; does not look at its adapters. Raises ConfigError, DataError."""
    base = load_model_config(config.model)
    tokenizer = load_run_tokenizer(config)
    vocabulary, positions = size_of(base, "vocab_size"), size_of(base, "max_position_embeddings")
    limits = ModelLimits(vocabulary, positions, attention_window(base), short_positions(base))
    with working(f"reading {config.data.names}"):
        return tokenizer, prepare(config, tokenizer, limits)


def load_run_tokenizer(config: RunConfig) -> ChatTokenizer:
    """The tokenizer and chat template of a configuration. Raises ConfigError."""
    model, data = config.model, config.data
    date = datetime.date.fromisoformat(data.template_date)
    return load_chat_tokenizer(resolve_name(model.name), model.revision, data.chat_template_from, date)


def with_merged_base(config: RunConfig, inputs: Inputs, folder: RunFolder) -> tuple[RunConfig, Inputs]:
    """For adapter_mode "original": the parent adapter is merged into the unquantised base, which is then quantised.

    The merged base is written to the run folder and becomes the run's base; the reference is that base alone. Raises
    ConfigError if the folder holds a base with another adapter.
    """
    if config.model.adapter_mode != "original" or inputs.parent is None:
        return config, inputs
    target, sha256 = folder.base, adapter_sha256(inputs.parent)
    if target.exists():
        if read_merged_adapter(folder) != sha256:
            raise ConfigError(f"{target} is not the base with {config.model.adapter} merged in: --restart removes it")
    else:
        with working("merging model.adapter into the base"):
            merged = merged_model(config.model, [inputs.parent], torch.float16)
        with replaced_folder(target) as temporary:
            merged.save_pretrained(temporary)
            save_tokenizer(inputs.tokenizer, temporary)
            write_json(temporary / folder.base_record.name, {"merged_adapter": sha256})
    own = {"name": str(target), "adapter": None, "revision": None, "adapter_mode": "none"}
    return config.changed(model=own), replace(inputs, parent=None, merged_adapter=sha256)


def read_merged_adapter(folder: RunFolder) -> str | None:
    """SHA-256 of the adapter in the merged base of a run folder; None if it cannot be read."""
    return read_or_empty(folder.base_record).get("merged_adapter")


def build_run_policy(config: RunConfig, inputs: Inputs) -> Policy:
    """The policy of `inputs`, for training."""
    sources: dict[str, Any] = {"parent": inputs.parent, "init_from": inputs.init_from, "shards": inputs.shards}
    return load_policy(config, inputs.placement, inputs.attention, **sources, keep_base=reads_reference(config))


def load_policy(
    config: RunConfig,
    placement: Placement,
    attention: Attention,
    *,
    parent: Path | None,
    init_from: Path | None,
    keep_base: bool = True,
    shards: Ranks | None = None,
) -> Policy:
    """Load the base and attach the adapters, without the data. `keep_base`: as in `build_full_policy`."""
    train = config.train
    shared: dict[str, Any] = {
        "init_from": init_from,
        "gradient_checkpointing": train.gradient_checkpointing,
        "recomputed": train.recomputed_layers,
        "offload": train.offload_activations,
        "attention": attention,
    }
    with working(f"loading {config.model.name}"):
        base = load_base(config.model, placement, attention=attention.implementation, shards=shards)
        if config.model.embeddings_on_host:
            move_embeddings_to_host(base)
        if config.full:
            return build_full_policy(base, placement, keep_base=keep_base, **shared)
        following, heads = Following.of(config), {"reward_head": config.method == "reward"}
        heads |= {"value_head": config.method == "ppo"}
        own: dict[str, Any] = {"seed": train.seed, "parent": parent, "following": following, **heads}
        policy = build_policy(base, config.lora, placement, **own, **shared)
    if config.lora.init_lora_weights == "loftq" and init_from is None:
        start_from_error(policy, config.model)
    return policy


def identity(config: RunConfig, inputs: Inputs, policy: Policy, base_hash: str) -> dict[str, Any]:
    """manifest.json: hashes of the run's base, adapters, data and loss. `base_hash`: `base_sha256` of the base."""
    model = config.model
    quantisation = {key: getattr(model, key) for key in KEYS if model.load_in_4bit or key == "load_in_4bit"}
    quantisation |= {"prequantised": True} if load_stored(model) else {}
    parent = adapter_sha256(inputs.parent) if inputs.parent else None
    evaluation, own_loss = inputs.data.report.evaluation, run_loss(config).sha256
    reference = "base + parent adapter" if parent else "base"
    if following := Following.of(config):
        reference = f"moving reference, at first {reference}; {following}"
    return {
        "method": config.method,
        **({"loss_sha256": own_loss} if own_loss else {}),
        **({"reward_sha256": rewards.sources_sha256(config.sampled)} if config.sampled else {}),
        "order_version": ORDER_VERSION,
        "base": {
            "name": public_name(model.name),
            "revision": model.revision,
            "sha256": base_hash,
            "dtype": dtype_name(inputs.placement.dtype),
            **quantisation,
            **({"merged_adapter": inputs.merged_adapter} if inputs.merged_adapter else {}),
        },
        "parent_adapter": parent,
        **({"finetuning_type": "full"} if config.full else {}),
        "reference": reference if reads_reference(config) else None,
        "trainable_parameters": policy.flat.weights.numel(),
        "data_sha256": inputs.data.report.train.fingerprint,
        "evaluation_sha256": evaluation.fingerprint if evaluation else None,
        "tokenizer_sha256": hashlib.sha256(inputs.tokenizer.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "chat_template_sha256": inputs.tokenizer.chat_template.sha256,
        "attention": inputs.attention.reason,
    }
