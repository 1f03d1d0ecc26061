"""Merge adapters into 16-bit weights, never into 4-bit ones: quantisation rounds small updates away.

After 8 steps of SFT on GSM8K, PEFT's `merge_and_unload` into the 4-bit SmolLM2-135M keeps -0.2 % of the gain on
held-out loss, the dequantised base 100 %, the merged original quantised anew 94 % (benchmarks/merge.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowlevel.config.schema import ModelConfig
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.model.adapters import (
    ADAPTER_CONFIG,
    DEFAULT,
    adapter_start,
    read_adapter_config,
    read_adapter_weights,
    write_adapter,
)
from lowlevel.model.base import load_base
from lowlevel.model.linear import quantised_state
from lowlevel.model.placement import Placement
from lowlevel.model.policy import SCORE

LARGEST_ROUNDING = 0.3  # of a weight matrix by quantisation to 4 bits, relative
PREFIX, SUFFIX_A, SUFFIX_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
LENGTHS = ".lora_magnitude_vector"


def adapter_updates(folder: Path) -> dict[str, Tensor]:
    """The weight update of each adapted layer, scaling * B A in fp32, by module name. Raises as `scaled_pairs`."""
    return {stem.removeprefix(PREFIX): b @ a for stem, (a, b) in scaled_pairs(folder).items()}


def row_lengths(folder: Path) -> dict[str, Tensor]:
    """DoRA's length of each row (out,), fp32, by module name; empty for other adapters. Raises CheckpointError."""
    weights = read_adapter_weights(folder)
    found = {key.removesuffix(LENGTHS): value.float() for key, value in weights.items() if key.endswith(LENGTHS)}
    return {stem.removeprefix(PREFIX): value for stem, value in found.items()}


def scaled_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Each layer's A (r, in) and scaling * B (out, r), fp32, by PEFT's key without its end. Raises CheckpointError."""
    config, weights = read_adapter_config(folder), read_adapter_weights(folder)
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    stems = sorted(key.removesuffix(SUFFIX_A) for key in weights if key.endswith(SUFFIX_A))
    for stem in stems:
        if stem + SUFFIX_B not in weights:
            raise CheckpointError(f"{folder}: {stem + SUFFIX_B} is missing")
        ranks = (weights[stem + SUFFIX_A].shape[0], weights[stem + SUFFIX_B].shape[1])
        if ranks != (config.r, config.r):
            found = f"{stem} has rank {ranks[0]} and {ranks[1]}"
            raise CheckpointError(f"{folder}: {found}, {ADAPTER_CONFIG} says r = {config.r}")
    return {stem: (weights[stem + SUFFIX_A].float(), scaling * weights[stem + SUFFIX_B].float()) for stem in stems}


def write_stacked_adapter(lower: Path, upper: Path, out: Path) -> None:
    """One PEFT adapter equal to two stacked ones; its rank is the sum of theirs. Raises as `scaled_pairs`.

    s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]. Layers that only one of them changes get zeros for the other.
    """
    first, second = scaled_pairs(lower), scaled_pairs(upper)
    configs = [read_adapter_config(folder) for folder in (lower, upper)]
    tensors = {}
    for stem in sorted(first.keys() | second.keys()):
        parts = [pairs.get(stem) for pairs in (first, second)]
        known_a, known_b = next(part for part in parts if part is not None)
        filled = [
            part or (known_a.new_zeros(config.r, known_a.shape[1]), known_b.new_zeros(known_b.shape[0], config.r))
            for part, config in zip(parts, configs, strict=True)
        ]
        tensors[stem + SUFFIX_A] = torch.cat([a for a, _ in filled], 0)
        tensors[stem + SUFFIX_B] = torch.cat([b for _, b in filled], 1)
    rank = sum(config.r for config in configs)
    targets = {target for config in configs for target in config.target_modules or ()}
    if any(isinstance(config.target_modules, str) for config in configs):  # a pattern: the weights name its layers
        targets = {stem.removeprefix(PREFIX) for stem in first.keys() | second.keys()}
    stacked = {"r": rank, "lora_alpha": rank, "use_rslora": False, "target_modules": targets, "lora_dropout": 0.0}
    raw = json.loads((upper / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    kept = {key: raw.get(key) for key in ("base_model_name_or_path", "revision", "task_type", "modules_to_save")}
    tensors |= {key: tensor for key, tensor in read_adapter_weights(upper).items() if key == SCORE}
    start = next((start for start in map(adapter_start, (lower, upper)) if start != DEFAULT), DEFAULT)
    write_adapter(out, tensors, {**configs[1].to_dict(), **stacked, **kept}, start=start)


def dequantized_weights(model: nn.Module) -> dict[str, Tensor]:
    """The dequantised weights of a model's 4-bit layers, fp32 on the CPU, by module name."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, quantised_state(module))
            weights[name.removeprefix(PREFIX).removesuffix(".base_layer")] = weight.float().cpu()
    return weights


def check_is_original(config: ModelConfig, quantised: nn.Module) -> None:
    """Check that a base has the 16-bit weights of which a model has the 4-bit ones. Raises ConfigError.

    Quantisation to 4 bits moves a weight matrix by 7 to 14 % of its norm, and weights of other models differ by more
    than 100 %. Fine-tuned versions of one model can be closer than that.
    """
    where = f"--base {config.name!r}"
    unquantised = config.model_copy(update={"load_in_4bit": False})
    original = load_base(unquantised, Placement(torch.device("cpu"), "fp32"), dtype="auto").state_dict()
    rounded = {f"{name}.weight": weight for name, weight in dequantized_weights(quantised).items()}
    plain = {name.removeprefix(PREFIX).replace(".base_layer.", "."): p for name, p in quantised.named_parameters()}
    for name, found in {**plain, **rounded}.items():
        if ".lora_" in name:
            continue
        weight = original.get(name)
        if weight is None or weight.shape != found.shape:
            shape = "is missing" if weight is None else f"is {tuple(weight.shape)}"
            raise ConfigError(f"{where}: {name} {shape}, and the run's base has {tuple(found.shape)}: another model")
        difference = float((weight.float() - found).norm() / weight.float().norm()) if name in rounded else 0.0
        if not difference < LARGEST_ROUNDING:
            raise ConfigError(f"{where}: {name} differs by {difference:.0%} from the run's base: another model")


def refuse_quantisation_errors(adapters: Sequence[Path]) -> None:
    """Raise ConfigError for adapters that correct the error of a 4-bit base: the original weights do not have it."""
    for folder in adapters:
        if adapter_start(folder) == "loftq":
            raise ConfigError(
                f'{folder} started from the quantisation error of its 4-bit base (lora.init_lora_weights = "loftq"), '
                "so it does not belong to the 16-bit weights: merge with --into dequantized"
            )


def merged_model(
    config: ModelConfig, adapters: Sequence[Path], dtype: torch.dtype, *, quantised: nn.Module | None = None
) -> PreTrainedModel:
    """The base on the CPU with the updates of all PEFT folders `adapters`: added in fp32, rounded once to `dtype`.

    The weights are those of the base's files, but those of the 4-bit layers of `quantised` (the trained model) are its
    dequantised ones. Raises CheckpointError if an adapter changes a layer that the base lacks or has in another shape,
    ConfigError as `refuse_quantisation_errors`.
    """
    if quantised is None:
        refuse_quantisation_errors(adapters)
    unquantised = config.model_copy(update={"load_in_4bit": False})
    model = load_base(unquantised, Placement(torch.device("cpu"), "fp32"), dtype="auto")
    if any(isinstance(parameter, bnb.nn.Params4bit) for parameter in model.parameters()):  # a pre-quantised folder
        model = model.dequantize(torch.float32)
        # transformers 5.23 still has the folder's deserialiser here, and cannot reverse it when it saves the model.
        model._weight_conversions = None
    weights = dequantized_weights(quantised) if quantised is not None else {}
    modules = dict(model.named_modules())
    for folder in adapters:
        lengths = row_lengths(folder)
        for name, update in adapter_updates(folder).items():
            original = _weight(name, update, modules)
            weights[name] = weights.get(name, original) + update
            if name in lengths:
                weights[name] *= (lengths[name] / weights[name].norm(dim=1))[:, None]
    for name, weight in weights.items():
        modules[name].weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    model.to(dtype)  # type: ignore[arg-type]  # transformers 5.23 hides the argument behind a decorator
    return model


def _weight(name: str, update: Tensor, modules: dict[str, nn.Module]) -> Tensor:
    """The base's weight that an update changes, in fp32. Raises CheckpointError if there is none of its shape."""
    layer = modules.get(name)
    if not isinstance(layer, nn.Linear):
        raise CheckpointError(f"the adapter changes {name}, which is not a linear layer of this base")
    if layer.weight.shape != update.shape:
        shapes = f"{tuple(update.shape)}, the base has {tuple(layer.weight.shape)}"
        raise CheckpointError(f"the adapter does not fit the base: {name} is {shapes}")
    return layer.weight.detach().float()
