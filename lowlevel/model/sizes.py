"""What a base's configuration says of its sizes, and how a base that does not fit this trainer is refused."""

from __future__ import annotations

from transformers import PretrainedConfig

from lowlevel.errors import ConfigError


def unsupported(config: PretrainedConfig, why: str) -> ConfigError:
    """The refusal of a whole architecture."""
    return ConfigError(f"model.name: this architecture ({config.model_type}) is not supported: {why}")


def size_of(config: PretrainedConfig, key: str) -> int:
    """A size by transformers' common name for it: `hidden_size` is GPT-2's `n_embd`.

    Raises:
        ConfigError: the configuration has none.
    """
    try:
        value = getattr(config, key)
    except AttributeError:
        value = None
    if not isinstance(value, int):
        raise unsupported(config, f"its configuration has no {key}")
    return value


def head_size(config: PretrainedConfig) -> int:
    """Features of an attention head. Raises ConfigError, as `size_of`."""
    given = config.to_dict().get("head_dim")
    return given or size_of(config, "hidden_size") // size_of(config, "num_attention_heads")
