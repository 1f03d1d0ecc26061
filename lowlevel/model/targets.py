"""What a base's configuration and modules say: sizes, and the target modules of an adapter, named as in PEFT."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from lowlevel.config.schema import ALL_LINEAR, stands_alone
from lowlevel.errors import ConfigError


def unsupported(config: PretrainedConfig, why: str) -> ConfigError:
    """The error for an unsupported architecture."""
    return ConfigError(f"model.name: this architecture ({config.model_type}) is not supported: {why}")


def size_of(config: PretrainedConfig, key: str) -> int:
    """A size by its common name in transformers (GPT-2's `hidden_size` is `n_embd`). Raises ConfigError if missing."""
    try:
        value = getattr(config, key)
    except AttributeError:
        value = None
    if not isinstance(value, int):
        raise unsupported(config, f"its configuration has no {key}")
    return value


def head_size(config: PretrainedConfig) -> int:
    """Features of an attention head. Raises as `size_of`."""
    given = config.to_dict().get("head_dim")
    return given or size_of(config, "hidden_size") // size_of(config, "num_attention_heads")


def linear_layers(model: Any) -> list[str]:
    """Names of a decoder's linear layers, without the LM head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def matched(targets: str | Collection[str], layers: Iterable[str]) -> list[str]:
    """The layers that an adapter changes.

    `targets`: names or their ends ("q_proj", "self_attn.q_proj"); or, as a text or alone in a list, "all-linear" or a
    regular expression for a whole name. Raises ValueError if that is not one.
    """
    alone = targets if isinstance(targets, str) else next(iter(targets)) if len(targets) == 1 else ""
    if alone.lower() == ALL_LINEAR:
        return list(layers)
    if isinstance(targets, str) or stands_alone(alone):
        try:
            pattern = re.compile(alone)
        except re.error as error:
            raise ValueError(f"is not a regular expression ({error})") from None
        return [name for name in layers if pattern.fullmatch(name)]
    ends = tuple(f".{target}" for target in targets)
    return [name for name in layers if f".{name}".endswith(ends)]
