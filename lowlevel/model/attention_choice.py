"""The attention of a run, and span attention as a backend of transformers (its AttentionInterface)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PretrainedConfig, PreTrainedModel

from lowlevel.batch.layout import PackedBatch, attention_mask
from lowlevel.config.schema import ModelConfig
from lowlevel.errors import ConfigError
from lowlevel.kernels.attention import list_keys, span_attention
from lowlevel.model.placement import Placement
from lowlevel.model.targets import head_size

# Names of span attention in transformers, which downloads a kernel from the hub if a name contains "flash".
NAMES = {"flash": "lowlevel_fa2", "efficient": "lowlevel_efficient", "math": "lowlevel_math"}

# Arguments of attention kernels that span attention does not have: sinks (GPT-OSS), capped scores (Gemma 2).
MORE_THAN_A_SOFTMAX = ("s_aux", "softcap")


@dataclass(frozen=True)
class Attention:
    """The attention of a run, and the reason for this choice."""

    implementation: str  # as transformers names it: sdpa, eager, or one of NAMES
    reason: str
    beginnings: dict[nn.Module, Sequence[Tensor]] | None = None  # `beginning` of span_attention, by attention module.
    # A pass writes its own keys and values to the modules that are missing.

    @property
    def kernel(self) -> str | None:
        """The kernel of span attention; None if attention uses a mask."""
        return next((kernel for kernel, name in NAMES.items() if name == self.implementation), None)

    def arguments(self, batch: PackedBatch, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments for the decoder: spans, or a mask (rows, 1, T, T): boolean for sdpa, added to scores for eager."""
        if self.kernel:
            spans = (batch.span_queries, batch.span_keys, batch.key_index, batch.key_uses)
            more = {} if self.beginnings is None else {"beginnings": self.beginnings}
            return {"attention_mask": None, "spans": spans, "longest": batch.longest, **more}
        visible = attention_mask(batch)
        if self.implementation == "eager":
            visible = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        return {"attention_mask": visible}


MASKED = Attention("sdpa", "sdpa with an explicit mask: the run is on a CPU")


def choose_attention(config: ModelConfig, base: PretrainedConfig, placement: Placement) -> Attention:
    """The fastest attention that the device has. Raises ConfigError if it does not support the one asked for."""
    asked, on_gpu = config.attn_implementation, placement.device.type == "cuda"
    if asked == "eager":
        return Attention("eager", "eager attention: model.attn_implementation asks for it")
    if asked == "sdpa":
        return Attention("sdpa", "sdpa with an explicit mask: model.attn_implementation asks for it")
    if not on_gpu:
        if asked == "flash" or asked == "efficient":
            raise ConfigError(f'model.attn_implementation = "{asked}" needs a GPU, and none is visible')
        return MASKED
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base), None)
    if model is not None and not model._supports_attention_backend:  # Falcon, StableLM: a class for each attention
        reason = f"the code of this architecture ({base.model_type}) takes no other"
        if asked != "auto":
            raise ConfigError(f'model.attn_implementation = "{asked}": {reason} than eager and sdpa')
        return Attention("sdpa", f"sdpa with an explicit mask: {reason}")
    head = head_size(base)
    if head % 8:
        return Attention("sdpa", f"sdpa with an explicit mask: heads have {head} features, not a multiple of 8")
    major, minor = torch.cuda.get_device_capability(placement.device)
    lacks = ""
    if major < 8:
        lacks = f"FlashAttention 2 needs compute capability 8.0, this GPU has {major}.{minor}"
    elif placement.precision == "fp32":
        lacks = "FlashAttention 2 has no fp32"
    elif head > 256:
        lacks = f"FlashAttention 2 takes heads of up to 256 features, these have {head}"
    if asked == "flash" and lacks:
        raise ConfigError(f'model.attn_implementation = "flash": {lacks}')
    if asked == "efficient" or lacks:
        return Attention(NAMES["efficient"], f"spans, memory-efficient kernel: {lacks or 'asked for'}")
    return Attention(NAMES["flash"], f"spans, flash kernel (compute capability {major}.{minor})")


def check_sdpa(model: PreTrainedModel) -> None:
    """Raise ConfigError if a model's code only supports eager attention."""
    if not model._supports_sdpa:
        what = f"this architecture ({model.config.model_type}) only supports eager attention"
        raise ConfigError(f'{what}; set model.attn_implementation = "eager"')


def register() -> None:
    """Register span attention with transformers, under one name per kernel."""
    for kernel, name in NAMES.items():
        AttentionInterface.register(name, partial(_forward, kernel=kernel))


@contextmanager
def plain_attention(base: Any) -> Iterator[None]:
    """Use sdpa or eager attention within the block, for calls without a PackedBatch."""
    before = base.config._attn_implementation
    base.set_attn_implementation("sdpa" if before in NAMES.values() else before)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _forward(
    module: nn.Module,
    query: Tensor,  # (rows, H, T, D)
    key: Tensor,  # (rows, H_kv, T, D)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    kernel: str,
    spans: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
    longest: int = 0,
    beginnings: dict[nn.Module, Sequence[Tensor]] | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns (rows, T, H, D)."""
    if spans is None:
        raise RuntimeError("span attention needs the spans of a PackedBatch; for plain calls set sdpa attention")
    unknown = sorted(name for name in MORE_THAN_A_SOFTMAX if kwargs.get(name) is not None)
    if unknown:
        raise ConfigError(f'the base\'s attention has {unknown[0]}; set model.attn_implementation = "eager"')
    queries, keys, key_index, key_uses = spans
    rows, heads, width, features = query.shape
    flat = [part.transpose(1, 2).reshape(rows * width, -1, features) for part in (query, key, value)]
    flat = [part.to(value.dtype) for part in flat]  # trained norms of queries and keys (Qwen 3) give fp32
    if key_index is not None and key_uses is not None:
        flat[1:] = [list_keys(part, key_index, key_uses) for part in flat[1:]]
    first = beginnings.get(module, ()) if beginnings else ()
    output = span_attention(flat[0], flat[1], flat[2], queries, keys, longest, scaling, kernel, first)
    if beginnings is not None and not first:
        beginnings[module] = flat[1], flat[2], keys[:2]
    return output.view(rows, width, heads, features), None
