"""A base's own layers over a cache of keys and values: prompts are read in packed rows, then one token a slot a pass.

The layers are the trainer's: with its adapters, and compiled alike (model/layers.py), so that sampler and trainer
compute the same numbers. Only attention differs, and transformers calls the one that the configuration names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowlevel.config.schema import ModelConfig
from lowlevel.determinism import compiler_options
from lowlevel.errors import ConfigError, one_line
from lowlevel.kernels.attention import span_attention
from lowlevel.kernels.decoding import CHUNK, decode_attention, store
from lowlevel.model.attention_choice import MORE_THAN_A_SOFTMAX, choose_attention, plain_attention
from lowlevel.model.layers import COMPILER
from lowlevel.model.placement import Placement
from lowlevel.model.sizes import head_size, size_of

NAME = "lowlevel_cached"  # of this attention in transformers
TRIED = 9  # tokens


@dataclass(frozen=True)
class Prompts:
    """Tokens of several prompts side by side, T in all; tensors on the device, except that `longest` is a number."""

    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    slots: Tensor  # (T,) int64
    bounds: Tensor  # (G + 1,) int32: prompt g has the tokens bounds[g] to bounds[g + 1]; it may have none
    longest: int  # upper bound on the tokens of a prompt

    def tensors(self) -> list[Tensor]:
        """Every tensor."""
        return [self.ids, self.positions, self.slots, self.bounds]


class CachedModel:
    """A decoder with a cache of `slots` + 1 sequences; the last slot takes what fills up a row of prompts."""

    def __init__(self, base: PreTrainedModel, placement: Placement, slots: int) -> None:
        """The cache starts without room: see `reserve`."""
        AttentionInterface.register(NAME, _forward)
        self.base: Any = base
        self.placement, self.slots = placement, slots
        chosen = choose_attention(ModelConfig(), base.config, placement).kernel
        self.prompt_kernel = chosen or "math"  # on a CPU, where nothing is captured
        self.layers: Sequence[nn.Module] = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
        config, heads = base.config, size_of(base.config, "num_attention_heads")
        self.kv_heads: int = config.to_dict().get("num_key_value_heads") or heads
        self.features = head_size(config)
        self.cache: list[Tensor] = []  # of each layer, (2, slots + 1, H_kv, C, D)
        self.capacity = 0  # C
        self.compiled = False

    def slot_bytes(self, capacity: int) -> int:
        """Memory that one slot takes."""
        return 2 * len(self.layers) * self.kv_heads * self.features * capacity * self.placement.dtype.itemsize

    def reserve(self, capacity: int) -> bool:
        """Make room for sequences of `capacity` tokens; True: the cache was replaced, what it held is gone."""
        if capacity <= self.capacity:
            return False
        self.capacity = -(-capacity // CHUNK) * CHUNK
        self.cache = []  # freed before the new one is allocated
        shape = (len(self.layers), 2, self.slots + 1, self.kv_heads, self.capacity, self.features)
        self._whole = torch.zeros(shape, dtype=self.placement.dtype, device=self.placement.device)
        self.cache = list(self._whole)
        return True

    def copy(self, sources: Tensor, slots: Tensor, length: int) -> None:
        """Copy the first `length` tokens of slots `sources` (n,) to `slots` (n,), which may be in both."""
        part = self._whole[..., :length, :]
        part[:, :, slots] = part[:, :, sources]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The base runs over the cache within the block, and as before after it."""
        before = self.base.config._attn_implementation
        own = [layer.__dict__.get("forward") for layer in self.layers]  # the trainer's, which may recompute
        self.base.config._attn_implementation = NAME  # `set_attn_implementation` takes as long as a step
        for number, layer in enumerate(self.layers):
            layer.forward = self._over_cache(number, layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.base.config._attn_implementation = before
            for layer, forward in zip(self.layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward  # type: ignore[method-assign]

    def read(self, prompts: Prompts) -> None:
        """Write the keys and values of prompts into the cache."""
        where = {"slots": prompts.slots, "positions": prompts.positions, "bounds": prompts.bounds}
        self._hidden(prompts.ids, prompts.positions, where, prompts.longest)

    def next_logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, V) behind the tokens (B,) at `positions` (B,) of slots 0 to B - 1, in the head's dtype."""
        hidden = self._hidden(tokens, positions, {"positions": positions}, 0)
        head = self.base.get_output_embeddings().weight
        with torch.autocast(self.placement.device.type, enabled=False):
            return linear(hidden.to(head.dtype), head)

    def _hidden(self, tokens: Tensor, positions: Tensor, where: dict[str, Tensor], longest: int) -> Tensor:
        decoder = self.base.get_decoder()
        with self.placement.autocast():
            output = decoder(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                attention_mask=None,
                where=where,
                longest=longest,
                kernel=self.prompt_kernel,
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _over_cache(self, number: int, layer: nn.Module) -> Callable[..., Tensor]:
        forward = inspect.unwrap(type(layer).forward)
        if self.compiled:  # torch keeps compiled graphs by code object: all layers share them
            forward = torch.compile(forward, fullgraph=True, options={**COMPILER, **compiler_options()})
        own = partial(forward, layer)
        mark = torch._dynamo.maybe_mark_dynamic

        def run(hidden_states: Tensor, **arguments: Any) -> Tensor:
            if self.compiled:
                for tensor in (hidden_states, *(arguments.get("position_embeddings") or ()), arguments["position_ids"]):
                    mark(tensor, 1)
                for tensor in arguments["where"].values():
                    mark(tensor, 0)
                for size in (1, 3):
                    mark(self.cache[number], size)
            output: Tensor = own(hidden_states, cache=self.cache[number], **arguments)
            return output

        return run


@torch.no_grad()
def misfit(base: PreTrainedModel, placement: Placement) -> str | None:
    """Why this base cannot run over a cache: compares the logits of a few tokens with the base's own. None: it can."""
    model: Any = base
    if not model._supports_attention_backend:
        return f"the code of this architecture ({base.config.model_type}) takes no other attention"
    cached, device = CachedModel(base, placement, 2), placement.device
    if device.type == "cuda" and cached.prompt_kernel == "math":
        return "its heads do not fit the kernels for packed rows"
    ids = torch.arange(1, 7 * TRIED + 1, 7, device=device) % model.get_output_embeddings().weight.shape[0]
    order, zeros = torch.arange(TRIED, device=device), torch.zeros(TRIED - 1, dtype=torch.int64, device=device)
    try:
        with plain_attention(base), placement.autocast():
            expected = model(input_ids=ids[None], use_cache=False).logits[0, -1].float()
        cached.reserve(TRIED)
        bounds = torch.tensor([0, TRIED - 1], dtype=torch.int32, device=device)
        with cached.installed():
            cached.read(Prompts(ids[:-1], order[:-1], zeros, bounds, TRIED))
            found = cached.next_logits(ids[-1:], order[-1:])[0].float()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # the architecture's own code does not accept our arguments
        return f"its layers end with {type(error).__name__}: {one_line(error)}"
    difference = ((found - expected).norm() / expected.norm()).item()
    if not difference <= max(0.05, 32 * torch.finfo(placement.dtype).eps):
        return f"over a cache its logits differ by {difference:.0%}"
    return None


def _forward(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_kv, T, D)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cache: Tensor,
    where: dict[str, Tensor],
    longest: int,
    kernel: str,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns (1, T, H, D)."""
    unknown = sorted(name for name in MORE_THAN_A_SOFTMAX if kwargs.get(name) is not None)
    if unknown:
        raise ConfigError(f"the base's attention has {unknown[0]}")
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    if "bounds" not in where:
        return decode_attention(q, k, v, cache, where["positions"], scaling)[None], None
    store(cache, k, v, where["slots"], where["positions"])
    return span_attention(q, k, v, where["bounds"], where["bounds"], longest, scaling, kernel)[None], None
