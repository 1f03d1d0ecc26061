"""The policy: a frozen base, an optional frozen adapter, and the adapter in training; and its reference, the same
weights with the training adapter switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowlevel.batch.layout import PackedBatch
from lowlevel.kernels import token_logps
from lowlevel.model.attention_choice import Attention
from lowlevel.model.dropout import CounterDropout, DropoutState
from lowlevel.model.flat import FlatParameters
from lowlevel.model.layers import DecoderLayers
from lowlevel.model.linear import quantised_state
from lowlevel.model.placement import Placement

TRAINED = "trained"  # the adapter in training
PARENT = "parent"  # the frozen adapter under it: what DPO started from


@dataclass(frozen=True)
class Policy:
    """Everything a training step needs of the model."""

    model: PeftModel
    flat: FlatParameters
    placement: Placement
    dropout: DropoutState
    lora_layers: tuple[LoraLayer, ...]
    has_parent: bool
    attention: Attention
    layers: DecoderLayers

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The model under the adapters: Hugging Face's own class."""
        return cast("PreTrainedModel", self.model.get_base_model())

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D)."""
        head = self.causal_lm.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head.weight

    def scored_hidden_states(self, batch: PackedBatch) -> Tensor:
        """Final hidden states at the scored positions alone, (N, D): the LM head is applied to nothing else."""
        decoder = self.causal_lm.get_decoder()
        with self.placement.autocast():
            hidden = decoder(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                **self.attention.arguments(batch, self.placement.dtype),
            ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.scored_positions)

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Log-probability of each of the N scored tokens, (N,) fp32: what every loss here is made of."""
        return token_logps(self.scored_hidden_states(batch), self.lm_head_weight, batch.scored_targets)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen reference: training adapter off, dropout off, no gradient.

        PEFT 0.21's `disable_adapter()` would also turn the frozen adapter off, and on leaving turn `requires_grad` on
        for every adapter weight; this switch touches the active set alone and puts the trainable set back as it was.
        """
        keys, self.dropout.token_keys = self.dropout.token_keys, None
        self.activate(parent=True, trained=False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.activate(parent=True, trained=True)
            self.dropout.token_keys = keys

    def activate(self, *, parent: bool, trained: bool) -> None:
        """Choose the adapters that take part in a forward pass. Only the trained one ever receives a gradient."""
        names = [PARENT] * (parent and self.has_parent) + [TRAINED] * trained
        for layer in self.lora_layers:
            layer.set_adapter(names, inference_mode=True)
        for parameter in self.flat.views.values():
            parameter.requires_grad_(True)

    def trainable_names(self) -> list[str]:
        """Names of the parameters that receive gradients."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]


def quantised_weights(policy: Policy) -> tuple[int, int]:
    """How many of the base's weights were loaded in 4 bits, and of how many; without input embedding and LM head.

    bitsandbytes quantises linear layers alone: experts that are one 3-D parameter a layer stay as they are. Adapted
    layers count as quantised if they were dequantised once.
    """
    base, quantised, total = policy.causal_lm, 0, 0
    embeddings = [*base.get_input_embeddings().parameters(), *base.get_output_embeddings().parameters()]
    left_out = {id(parameter) for parameter in embeddings}
    for name, parameter in base.named_parameters():
        if id(parameter) in left_out or ".lora_" in name:
            continue
        in_4_bits = isinstance(parameter, bnb.nn.Params4bit)
        size = cast(Any, parameter).quant_state.shape.numel() if in_4_bits else parameter.numel()
        total += size
        quantised += size if in_4_bits or name.endswith(".base_layer.weight") else 0
    return quantised, total


def dequantize_once(policy: Policy) -> None:
    """Keep the dequantised weights of the adapted layers, in the place of their 4-bit ones: 2 bytes a weight for 0.5.

    The products see the same numbers; on an H100 dequantising them in each pass takes as long as the products of
    some 500 positions.
    """
    for layer in policy.lora_layers:
        quantised = cast(Any, layer).base_layer
        if not isinstance(quantised, bnb.nn.Linear4bit):
            continue
        weight = bnb.functional.dequantize_4bit(quantised.weight.data, quantised_state(quantised))
        plain = nn.Linear(quantised.in_features, quantised.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(policy.placement.dtype), requires_grad=False)
        plain.bias = quantised.bias
        cast(Any, layer).base_layer = plain


def place_dropout(layers: dict[str, LoraLayer], p: float, state: DropoutState, device: torch.device) -> None:
    """Put counter dropout in the place of the trained adapter's `lora_dropout`; the frozen adapter has none."""
    for salt, name in enumerate(sorted(layers)):
        layer = layers[name]
        features = cast(int, layer.in_features)
        replacement = CounterDropout(p, salt, features, state, device) if p > 0 else nn.Identity()
        layer.lora_dropout[TRAINED] = replacement
        if PARENT in layer.lora_dropout:
            layer.lora_dropout[PARENT] = nn.Identity()
