"""The policy: a frozen base, an optional frozen adapter (the parent), and the trained adapter.

The reference is the same model with the trained adapter switched off; a moving one (moving_reference.py) has an adapter
of its own in its place. In full fine-tuning all weights are trained, and the reference has those of the base (flat.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowlevel.batch.layout import PackedBatch
from lowlevel.kernels import token_scores
from lowlevel.losses.reward import head_rewards
from lowlevel.model.attention_choice import Attention
from lowlevel.model.dropout import DropoutState
from lowlevel.model.flat import FlatParameters, Untrained
from lowlevel.model.layers import DecoderLayers
from lowlevel.model.moving_reference import MovingReference
from lowlevel.model.placement import Placement

AnyModel = PeftModel | PreTrainedModel  # the latter in full fine-tuning
TRAINED = "trained"  # the adapter in training
PARENT = "parent"  # the frozen adapter that it is stacked on
REFERENCE = "reference"  # the adapter of a moving reference
SCORE = "base_model.model.score.weight"  # the reward head (1, D), under PEFT's key for it
VALUE = "base_model.model.value.weight"  # PPO's value head (1, D), which is no part of the adapter


@dataclass(frozen=True)
class Policy:
    """The model of a training step."""

    model: AnyModel
    flat: FlatParameters
    placement: Placement
    dropout: DropoutState
    lora_layers: tuple[LoraLayer, ...]  # none in full fine-tuning
    has_parent: bool
    attention: Attention
    layers: DecoderLayers
    moving: MovingReference | None = None
    start: str = "default"  # lora.init_lora_weights of the trained adapter's beginning
    reward_head: nn.Parameter | None = None  # (1, D) fp32, one of the flat parameters
    value_head: nn.Parameter | None = None  # likewise
    untrained: Untrained | None = None  # full fine-tuning: the base as loaded

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model, without PEFT's wrapper."""
        return plain_model(self.model)

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D); of a trained head the rounded copy that the products use."""
        head = self.causal_lm.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head.weight if self.untrained is None else head.weight.to(self.placement.dtype)

    def scored_hidden_states(self, batch: PackedBatch) -> Tensor:
        """Final hidden states at the scored positions, (N, D): the only ones that the LM head reads."""
        decoder = self.causal_lm.get_decoder()
        with self.placement.autocast():
            hidden = decoder(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                **self.attention.arguments(batch, self.placement.dtype),
            ).last_hidden_state
        hidden = hidden if self.untrained is None else hidden.to(self.placement.dtype)  # a trained norm gives fp32
        return hidden.flatten(0, 1).index_select(0, batch.scored_positions)

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Log-probability of each of the N scored tokens, (N,) fp32. All losses start from these."""
        return self.token_scores(batch)[0]

    def rewards(self, batch: PackedBatch) -> Tensor:
        """Reward of each of the S sequences, (S,) fp32; 0 for dummies."""
        return batch.sequence_sums(self.token_scores(batch)[0])

    def token_scores(self, batch: PackedBatch, needs: Sequence[str] = ()) -> tuple[Tensor, Mapping[str, Tensor]]:
        """`scores` of the N scored tokens."""
        return self.scores(self.scored_hidden_states(batch), batch.scored_targets, needs)

    def scores(self, hidden: Tensor, targets: Tensor, needs: Sequence[str] = ()) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What losses read of hidden states (N, D): log-probabilities of the targets, and by name the statistics of the
        vocabulary that a loss needs, (N,) fp32 each. With a reward head: rewards (N,), and no statistics.
        """
        if self.reward_head is not None:
            return head_rewards(hidden, self.reward_head), {}
        return token_scores(hidden, self.lm_head_weight, targets, needs)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Switch to the reference within the block: trained adapter off, dropout off, no gradient.

        PEFT 0.21's `disable_adapter()` also turns the parent off, and sets `requires_grad` on every adapter weight.
        """
        keys, self.dropout.token_keys = self.dropout.token_keys, None
        self.activate(parent=True, trained=False, reference=self.moving is not None)
        try:
            with torch.no_grad():
                yield
        finally:
            self.activate(parent=True, trained=True)
            self.dropout.token_keys = keys

    def move_reference(self, step: int) -> None:
        """After `step` updates: let a moving reference follow, if it is due."""
        if self.moving is not None:
            self.moving.follow(self.flat.weights, step)

    def activate(self, *, parent: bool, trained: bool, reference: bool = False) -> None:
        """Choose the adapters of a forward pass. Only the trained one receives gradients."""
        if self.untrained is not None:
            self.untrained.show(trained)
        names = [PARENT] * (parent and self.has_parent) + [TRAINED] * trained + [REFERENCE] * reference
        for layer in self.lora_layers:
            layer.set_adapter(names, inference_mode=True)
        for parameter in self.flat.views.values():
            parameter.requires_grad_(True)

    def trainable_names(self) -> list[str]:
        """Names of the parameters that receive gradients."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]


def plain_model(model: AnyModel) -> PreTrainedModel:
    """The model without PEFT's wrapper."""
    return cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)


def is_base(name: str) -> bool:
    """Whether a parameter of this name belongs to the base, and not to an adapter."""
    return ".lora_" not in name and name not in (SCORE, "score.weight", VALUE, "value.weight")
