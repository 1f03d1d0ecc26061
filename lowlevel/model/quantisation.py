"""Bases whose folder is already quantised: which kinds can be trained, and what has to change after loading.

Only 4-bit bitsandbytes weights can be trained (nf4 or fp4, with or without double quantisation). transformers 5.23
takes their kind from the folder and ignores settings that are passed. It also keeps the folder's dtypes: its
deserialiser claims every tensor whose name contains "weight", quantised or not, and loads it without a cast.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from lowlevel.config.schema import ModelConfig
from lowlevel.errors import CheckpointError, ConfigError, quoted
from lowlevel.model.files import weight_names
from lowlevel.model.linear import quantised_state, quantised_states

KEYS = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
TRAINABLE = "trainable are 16-bit and 32-bit weights, and 4-bit bitsandbytes ones (nf4, fp4)"
PACKED = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
NESTED = ".nested_absmax"
# Ends of the names of quantised weights: bitsandbytes, GPTQ and AWQ, FP8 and compressed-tensors, HQQ, AQLM.
QUANTISED = re.compile(
    r".*\.(absmax|quant_state\.\w+|SCB|qweight|qzeros|weight_scale(_inv)?|weight_packed|W_q|codebooks)"
)


@dataclass(frozen=True)
class StoredQuantisation:
    """The 4-bit weights of a pre-quantised folder, as its config.json describes them."""

    quant_type: str  # nf4 or fp4
    double_quant: bool
    skipped: list[str] | None  # modules left in 16 bits, in transformers' patterns; None: the LM head

    def __str__(self) -> str:
        return _kind(self.quant_type, self.double_quant)

    def in_words(self) -> str:
        """For headers and model cards, after "4-bit"."""
        return f"{self.quant_type} base, pre-quantised {double_quantisation(self.double_quant)}"

    def unquantised(self, model: Any) -> list[str]:
        """Names of the linear layers of `model`, without the LM head, that the folder leaves in 16 bits."""
        head = model.get_output_embeddings()
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        return [name for name, _ in layers if not should_convert_module(name, self.skipped)]


def stored_quantisation(base: PretrainedConfig, name: str) -> StoredQuantisation | None:
    """How a base's weights are quantised already; None: not. `name` is for messages.

    Raises ConfigError: in any way but bitsandbytes' 4 bits.
    """
    settings = base.to_dict()
    tables = (settings, settings.get("text_config") or {})
    keys = ("quantization_config", "compression_config")  # the second: compressed-tensors, formerly
    found = next((t[key] for t in tables for key in keys if t.get(key) is not None), None)
    if found is None:
        return None
    where = f"model.name {name!r}"
    method = found.get("quant_method") or ("bitsandbytes" if found.get("load_in_4bit") else None)
    if method != "bitsandbytes":
        kind = quoted(str(method)) if method else "an unnamed method"
        raise ConfigError(f"{where}: its weights are quantised with {kind}; {TRAINABLE}: use the original model")
    if found.get("load_in_8bit") or not found.get("load_in_4bit"):
        bits = "8-bit" if found.get("load_in_8bit") else "not 4-bit"
        raise ConfigError(f"{where}: its weights are {bits} bitsandbytes ones; {TRAINABLE}: use the original model")
    kind = found.get("bnb_4bit_quant_type", "fp4")  # absent keys: the defaults of BitsAndBytesConfig
    if kind not in ("nf4", "fp4"):
        raise ConfigError(f"{where}: bnb_4bit_quant_type {quoted(repr(kind))} in its config.json; known: nf4, fp4")
    skipped = found.get("llm_int8_skip_modules")
    double = found.get("bnb_4bit_use_double_quant") is True
    return StoredQuantisation(kind, double, None if skipped is None else list(map(str, skipped)))


def check_stored(stored: StoredQuantisation | None, folder: Path, name: str) -> None:
    """Check that the names of a local folder's weights agree with its config.json. Raises ConfigError.

    Reads only the headers of the files. A hub name is checked when it is loaded (`to_precision`).
    """
    names, where = weight_names(folder), f"model.name {name!r}"
    packed = {found[1]: found[2] for found in map(PACKED.fullmatch, names) if found}
    if stored is None:
        strange = next(filter(QUANTISED.fullmatch, names), None)
        if strange:
            lacks = "but config.json has no quantization_config, which says how; download the folder again"
            raise ConfigError(f"{where}: its weights are quantised ({strange}), {lacks}")
    elif names and not packed:
        raise ConfigError(
            f"{where}: config.json says 4-bit bitsandbytes weights, but the files hold none: remove its "
            "quantization_config"
        )
    elif packed:
        nested = {f"{weight}{NESTED}" in set(names) for weight in packed}
        _agree(stored, {(kind, double) for kind in packed.values() for double in nested}, where)
        if "lm_head.weight" in packed:
            raise ConfigError(f"{where}: its LM head is quantised, and the losses need it in 16 bits; use another copy")


def _agree(stored: StoredQuantisation, found: set[tuple[str, bool]], where: str) -> None:
    if found != {(stored.quant_type, stored.double_quant)}:
        kinds = " and ".join(sorted(_kind(*one) for one in found))
        raise ConfigError(f"{where}: config.json says {stored}, its weights are {kinds}: correct config.json")


def _kind(quant_type: str, double: bool) -> str:
    return f"{quant_type} {double_quantisation(double)}"


def double_quantisation(double: bool) -> str:
    """Whether the scales of the blocks are quantised too, in words."""
    return f"{'with' if double else 'without'} double quantisation"


def as_stored(model: ModelConfig, stored: StoredQuantisation | None) -> ModelConfig:
    """The settings with the quantisation keys of a pre-quantised folder. `stored` None: the settings as they are.

    Raises ConfigError: a key that was set contradicts the folder, or adapter_mode needs 16-bit weights.
    """
    if stored is None:
        return model
    own = dict(zip(KEYS, (True, stored.quant_type, stored.double_quant), strict=True))
    for key in KEYS:
        if key in model.model_fields_set and getattr(model, key) != own[key]:
            value = str(getattr(model, key)).lower()
            raise ConfigError(
                f"model.{key} = {value} contradicts {model.name!r}, which is already quantised to 4 bits ({stored}): "
                "leave the key out, or use the original model"
            )
    if model.adapter_mode == "original" and model.adapter is not None:
        hint = 'set model.name to the original model, or model.adapter_mode = "stack"'
        raise ConfigError(f'model.adapter_mode = "original" {lacks_16_bits(model.name, stored)}: {hint}')
    return model.model_copy(update=own)


def lacks_16_bits(name: str, stored: StoredQuantisation) -> str:
    """What to say when something needs the 16-bit weights of a pre-quantised base."""
    return f"needs the base's 16-bit weights, and {name!r} holds only 4-bit ones ({stored.quant_type})"


def check_kinds(model: PreTrainedModel, stored: StoredQuantisation, name: str) -> None:
    """Raise ConfigError if a layer of a loaded folder `name` is not quantised as its config.json says (`stored`), and
    CheckpointError if the LM head is quantised.
    """
    states = quantised_states(model).values()
    _agree(stored, {(state.quant_type, state.nested) for state in states}, f"model.name {name!r}")
    if isinstance(model.get_output_embeddings(), bnb.nn.Linear4bit):
        raise CheckpointError(f"base {name!r}: its LM head is quantised, and the losses need it in 16 bits")


def to_precision(part: nn.Module, compute: torch.dtype, dtype: torch.dtype | None, kept: Iterable[str]) -> None:
    """Change a pre-quantised model or layer to the dtypes that it has if it is quantised while it is loaded: `compute`
    for products with 4-bit weights, `dtype` (None: any) for other parameters, fp32 for those with a pattern in `kept`.
    """
    for module in part.modules():
        if isinstance(module, bnb.nn.Linear4bit) and quantised_state(module) is not None:
            weight, state = module.weight, quantised_state(module)
            module.quant_storage = weight.quant_storage = torch.uint8  # type: ignore[assignment, attr-defined]
            module.compute_dtype, module.compute_type_is_set = compute, True
            state.dtype = compute
            for constants in filter(None, (state, state.state2)):
                constants.code = constants.code.float()
                if constants.absmax.is_floating_point():  # with double quantisation, the first is in 8 bits
                    constants.absmax = constants.absmax.float()
            if weight.dtype != torch.uint8:
                weight.data = weight.data.view(torch.uint8).view(-1, 1)  # the bytes, whatever bnb_4bit_quant_storage is
    for name, parameter in part.named_parameters() if dtype else ():
        wanted = torch.float32 if any(re.search(pattern.replace("*", ".*"), name) for pattern in kept) else dtype
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
