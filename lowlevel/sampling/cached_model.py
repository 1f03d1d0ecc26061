"""A base's own layers over a cache of keys and values: prompts are read in packed rows, then one token a slot a pass.

The layers are the trainer's: with its adapters, and compiled alike (model/layers.py), so that sampler and trainer
compute the same numbers. Only attention differs, and transformers calls the one that the configuration names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowlevel.config.schema import ModelConfig
from lowlevel.determinism import compiler_options
from lowlevel.errors import ConfigError, one_line
from lowlevel.kernels.attention import span_attention
from lowlevel.kernels.decoding import decode_attention, store
from lowlevel.model.attention_choice import MORE_THAN_A_SOFTMAX, choose_attention, plain_attention
from lowlevel.model.layers import COMPILER
from lowlevel.model.placement import Placement
from lowlevel.sampling.joined import JoinedLayers, joined_bytes
from lowlevel.sampling.plain import without_dropout

NAME = "lowlevel_cached"  # of this attention in transformers
TRIED = 9  # tokens
ROUND = 256  # tokens, to which a capacity is rounded up
LEAST_SLOTS = 2  # a size of 1 would be another graph for compilers
SHARE = 0.25  # of a GPU's free memory that the cache may take, and copies of the weights too


@dataclass(frozen=True)
class Prompts:
    """Tokens of several prompts side by side, T in all; tensors on the device."""

    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    slots: Tensor  # (T,) int64
    bounds: Tensor  # (G + 1,) int32: prompt g has the tokens bounds[g] to bounds[g + 1]; it may have none
    beginning: Tensor | None = None  # (2,) int32: 0 and the number of tokens before those, which every slot has

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


class CachedModel:
    """A decoder with a cache of `slots` + 1 sequences; the last slot takes what fills up a row of prompts."""

    def __init__(self, base: PreTrainedModel, placement: Placement) -> None:
        """The cache starts without room: see `reserve`."""
        AttentionInterface.register(NAME, _forward)
        self.base: Any = base
        self.placement = placement
        chosen = choose_attention(ModelConfig(), base.config, placement).kernel
        self.prompt_kernel = chosen or "math"  # on a CPU, where nothing is captured
        self.layers: Sequence[nn.Module] = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._whole = torch.empty(0)
        self.cache: list[Tensor] = []  # its parts: of each layer, (2, slots + 1, H_kv, C, D)
        self.slots, self.capacity = 0, 0  # C of every slot
        self.compiled = False
        self.joined: JoinedLayers | None = None
        self.kv_heads, self.features = self._key_shape()

    @torch.no_grad()
    def _key_shape(self) -> tuple[int, int]:
        """Heads and features of the keys. Raises ConfigError unless every layer has one attention, all alike."""
        seen: list[torch.Size] = []
        first = torch.zeros(2, dtype=torch.int64, device=self.placement.device)
        with without_dropout(self.base), self.installed():
            self._hidden(first, first, {}, seen)
        shapes = {(shape[1], shape[3]) for shape in seen}
        if len(seen) != len(self.layers) or len(shapes) != 1:
            raise ConfigError(f"{len(self.layers)} layers have {len(seen)} attentions, of {len(shapes)} sizes")
        return shapes.pop()

    @torch.no_grad()
    def join(self) -> None:
        """Copy the weights of the linear layers and join those with the same input."""
        first = torch.zeros(2, dtype=torch.int64, device=self.placement.device)
        with without_dropout(self.base), self.installed():
            self.joined = JoinedLayers(self.layers, lambda: self._hidden(first, first, {}, []), self.placement.dtype)

    def joined_bytes(self) -> int:
        """Memory that `join` takes."""
        return joined_bytes(self.layers, self.placement.dtype)

    def active_adapters(self) -> tuple[str, ...]:
        """The adapters that a pass has, which a captured graph keeps; joined layers read it anew (`refresh`)."""
        if self.joined:
            self.joined.refresh()
            return ()
        layers = [module for module in self.base.modules() if isinstance(module, LoraLayer)]
        return tuple(name for layer in layers[:1] if not layer.disable_adapters for name in layer.active_adapters)

    def reserve(self, slots: int, capacity: int) -> bool:
        """Make room for `slots` sequences of `capacity` tokens, for fewer if a GPU lacks the memory (`SHARE`).

        True: the cache was replaced, and what it held is gone.
        """
        capacity = max(self.capacity, -(-capacity // ROUND) * ROUND)
        slots, device = max(self.slots, slots, LEAST_SLOTS), self.placement.device
        size = 2 * len(self.layers) * self.kv_heads * self.features * capacity * self.placement.dtype.itemsize
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0] + self._whole.nbytes
            slots = max(LEAST_SLOTS, min(slots, int(SHARE * free / size) - 1))
        if capacity == self.capacity and slots <= self.slots:
            return False
        self.slots, self.capacity, self.cache = slots, capacity, []
        self._whole = torch.empty(0)  # freed before the new one is allocated
        shape = (len(self.layers), 2, slots + 1, self.kv_heads, capacity, self.features)
        self._whole = torch.zeros(shape, dtype=self.placement.dtype, device=device)
        self.cache = list(self._whole)
        return True

    def copy(self, sources: Tensor, slots: Tensor, length: int) -> None:
        """Copy the first `length` tokens of slots `sources` (n,) to `slots` (n,), which may be in both."""
        for layer in self.cache:  # one by one: what is copied is gathered first
            part = layer[..., :length, :]
            part[:, slots] = part[:, sources]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The base runs over the cache within the block, and as before after it."""
        before = self.base.config._attn_implementation
        own = [layer.__dict__.get("forward") for layer in self.layers]  # the trainer's, which may recompute
        self.base.config._attn_implementation = NAME  # `set_attn_implementation` takes as long as a step
        for number, layer in enumerate(self.layers):
            layer.forward = self._over_cache(number, layer)  # type: ignore[method-assign]
        try:
            with self.joined.installed() if self.joined else nullcontext():
                yield
        finally:
            self.base.config._attn_implementation = before
            for layer, forward in zip(self.layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward  # type: ignore[method-assign]

    def read(self, prompts: Prompts) -> None:
        """Write the keys and values of prompts into the cache."""
        self._hidden(prompts.ids, prompts.positions, prompts.tensors())

    def next_logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, V) behind the tokens (B,) at `positions` (B,) of slots 0 to B - 1, in the head's dtype."""
        hidden = self._hidden(tokens, positions, {"positions": positions})
        head = self.base.get_output_embeddings().weight
        with torch.autocast(self.placement.device.type, enabled=False):
            return linear(hidden.to(head.dtype), head)

    def _hidden(
        self, tokens: Tensor, positions: Tensor, where: dict[str, Tensor], seen: list[torch.Size] | None = None
    ) -> Tensor:
        decoder = self.base.get_decoder()
        with self.placement.autocast():
            output = decoder(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                attention_mask=None,
                where=where,
                kernel=self.prompt_kernel,
                seen=seen,
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
            output: Tensor = own(hidden_states, cache=self.cache[number] if self.cache else None, **arguments)
            return output

        return run


@torch.no_grad()
def misfit(base: PreTrainedModel, placement: Placement) -> str | None:
    """Why this base cannot run over a cache: compares the logits of a few tokens with the base's own. None: it can."""
    model: Any = base
    if not model._supports_attention_backend:
        return f"the code of this architecture ({base.config.model_type}) takes no other attention"
    device = placement.device
    try:
        cached, words = CachedModel(base, placement), model.get_output_embeddings().weight.shape[0]
        if device.type == "cuda" and cached.prompt_kernel == "math":
            return "its heads do not fit the kernels for packed rows"
        ids, order = torch.arange(1, 7 * TRIED + 1, 7, device=device) % words, torch.arange(TRIED, device=device)
        bounds = torch.tensor([0, TRIED - 1], dtype=torch.int32, device=device)
        with plain_attention(base), without_dropout(base), placement.autocast():
            expected = model(input_ids=ids[None], use_cache=False).logits[0, -1].float()
        cached.reserve(1, TRIED)
        with without_dropout(base), cached.installed():
            cached.read(Prompts(ids[:-1], order[:-1], 0 * order[:-1], bounds))
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
    cache: Tensor | None,
    where: dict[str, Tensor],
    kernel: str,
    seen: list[torch.Size] | None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns (1, T, H, D)."""
    unknown = sorted(name for name in MORE_THAN_A_SOFTMAX if kwargs.get(name) is not None)
    if unknown:
        raise ConfigError(f"the base's attention has {unknown[0]}")
    if cache is None:  # a pass that only looks at sizes
        assert seen is not None
        seen.append(key.shape)
        return query.transpose(1, 2), None
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    if "bounds" not in where:
        return decode_attention(q, k, v, cache, where["positions"], scaling)[None], None
    store(cache, k, v, where["slots"], where["positions"])
    bounds, longest = where["bounds"], cache.shape[3]
    beginning = (*cache[:, 0].transpose(1, 2), where["beginning"]) if "beginning" in where else ()
    return span_attention(q, k, v, bounds, bounds, longest, scaling, kernel, beginning)[None], None
