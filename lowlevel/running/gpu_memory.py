"""The memory of a run's GPUs: whether they share the base, and the plan of train.memory_budget."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowlevel.config.contradictions import parse_size
from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError
from lowlevel.model.attention_choice import Attention
from lowlevel.model.memory import ModelShape, best_plan, forecast, planned, plans
from lowlevel.model.placement import Placement


def usable_memory(config: RunConfig) -> int:
    """Bytes that a run may use of each GPU, the same on every rank; 0: there is none."""
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    least = min(gpus) * torch.cuda.get_per_process_memory_fraction() - 2**30 if gpus else 0  # driver, NCCL
    return parse_size(config.train.memory_budget or "") or int(least)


def with_shards(shape: ModelShape, config: RunConfig, placement: Placement, gpus: int, memory: int) -> ModelShape:
    """The shape as `gpus` GPUs hold it: sharded if train.shard_base says so, or if `memory` bytes are too few for one.

    Raises ConfigError: sharded, but with a setting that needs the whole base, or passes of one GPU alone.
    """
    needed = min(forecast(shape, config, plan, placement).peak for plan in plans(shape, config))
    asked = config.train.shard_base
    if gpus == 1 or not (needed > memory > 0 if asked is None else asked):
        return shape
    impossible = {
        'train.finetuning_type = "full"': config.full,
        config.method: config.sampled,
        'train.execution = "graphed"': config.train.execution == "graphed",
        "train.dequantize_once": config.train.dequantize_once,
        "lora.use_dora": shape.scaled > 0,
        'lora.init_lora_weights = "loftq"': config.lora.init_lora_weights == "loftq",
        "dpo.reference_cache": config.dpo.reference_cache,
        "trace.gradients": config.trace.gradients,
    }
    if wrong := next((setting for setting, is_set in impossible.items() if is_set), None):
        why = "train.shard_base" if asked else f"one needs {needed / 2**30:.2f} GiB, and has {memory / 2**30:.2f}"
        what = f"{wrong} does not work while {gpus} GPUs share the base ({why})"
        raise ConfigError(f"{what}: leave it out, or set train.shard_base = false")
    return replace(shape, shards=gpus)


def with_plan(config: RunConfig, placement: Placement, attention: Attention, shape: ModelShape) -> RunConfig:
    """train.memory_budget, if any, replaced by the settings of the fastest plan that fits. Raises ConfigError: none."""
    budget = parse_size(config.train.memory_budget or "")
    if budget is None:
        return config
    if placement.device.type != "cuda":
        raise ConfigError("train.memory_budget is for a GPU, and none is visible")
    if attention.kernel is None:
        raise ConfigError(f"train.memory_budget needs attention over spans, this run has {attention.reason}")
    return planned(config, best_plan(shape, config, placement, budget))
