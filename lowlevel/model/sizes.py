"""Sizes from a base's configuration, and the error for unsupported architectures."""

from __future__ import annotations

from transformers import PretrainedConfig

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
