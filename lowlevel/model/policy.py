"""The policy: a frozen base, an optional frozen adapter, and the adapter in training; and its reference, the same
weights with the training adapter switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lowlevel.dropout import CounterDropout, DropoutState
from lowlevel.errors import ConfigError
from lowlevel.layout import PackedBatch, attention_mask
from lowlevel.model.base import Placement
from lowlevel.model.flat import FlatParameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    causal_kernel: bool  # plain rows may leave the mask to the attention kernel

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
        plain = self.causal_kernel and batch.plain
        with self.placement.autocast():
            hidden = decoder(
                input_ids=batch.input_ids,
                attention_mask=None if plain else self.attention_mask(batch),
                position_ids=None if plain else batch.position_ids,
                use_cache=False,
            ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.scored_positions)

    def attention_mask(self, batch: PackedBatch) -> Tensor:
        """The layout's mask as the implementation takes it: boolean for sdpa, added to the scores for eager."""
        return model_mask(batch, self.placement.dtype, eager=self.model.config._attn_implementation == "eager")

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
        """Choose the adapters that take part in a forward pass; gradients go to the trained one alone, as ever."""
        names = [PARENT] * (parent and self.has_parent) + [TRAINED] * trained
        for layer in self.lora_layers:
            layer.set_adapter(names, inference_mode=True)
        for parameter in self.flat.views.values():
            parameter.requires_grad_(True)

    def trainable_names(self) -> list[str]:
        """Names of the parameters that receive gradients."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]


def model_mask(batch: PackedBatch, dtype: torch.dtype, *, eager: bool) -> Tensor:
    """The layout's mask (rows, 1, T, T): boolean for sdpa; for eager attention numbers that are added to the scores."""
    visible = attention_mask(batch)
    if not eager:
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def place_dropout(layers: dict[str, LoraLayer], p: float, state: DropoutState, device: torch.device) -> None:
    """Put counter dropout in the place of the trained adapter's `lora_dropout`; the frozen adapter has none."""
    for salt, name in enumerate(sorted(layers)):
        layer = layers[name]
        features = cast(int, layer.in_features)
        replacement = CounterDropout(p, salt, features, state, device) if p > 0 else nn.Identity()
        layer.lora_dropout[TRAINED] = replacement
        if PARENT in layer.lora_dropout:
            layer.lora_dropout[PARENT] = nn.Identity()


def check_lm_head(policy: Policy) -> None:
    """Raise ConfigError unless the model's own logits are `hidden @ lm_head.T`, as every loss here assumes.

    A model may scale, cap or shift its logits after the LM head; training would then follow another distribution
    silently.
    """
    weight = policy.lm_head_weight
    tokens = torch.arange(8, device=weight.device).unsqueeze(0) % weight.shape[0]
    with policy.reference(), policy.placement.autocast():
        base = policy.causal_lm
        logits = base(input_ids=tokens, use_cache=False).logits.float()
        hidden = base.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        expected = (hidden.to(weight.dtype) @ weight.T).float()
    error = (logits - expected).abs().max().item()
    if not error <= 1e-2 * expected.abs().max().item():
        raise ConfigError(f"model.name: the model's logits are not hidden @ lm_head.T (largest difference {error:.3g})")
