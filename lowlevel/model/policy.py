"""The policy: a frozen base, an optional frozen adapter (the parent), and the trained adapter.

The reference is the same model with the trained adapter switched off; a moving one (moving_reference.py) has an adapter
of its own in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from lowlevel.kernels import token_scores
from lowlevel.losses.reward import head_rewards
from lowlevel.model.attention_choice import Attention
from lowlevel.model.dropout import CounterDropout, DropoutState
from lowlevel.model.layers import DecoderLayers
from lowlevel.model.linear import quantised_state
from lowlevel.model.moving_reference import Following, MovingReference
from lowlevel.model.placement import Placement

TRAINED = "trained"  # the adapter in training
PARENT = "parent"  # the frozen adapter that it is stacked on
REFERENCE = "reference"  # the adapter of a moving reference
SCORE = "base_model.model.score.weight"  # the reward head (1, D), under PEFT's key for it


@dataclass(frozen=True)
class FlatParameters:
    """All trainable weights in one buffer and all gradients in another, so an optimizer step is a few kernels."""

    weights: nn.Parameter  # (n,) fp32, with a gradient (n,) fp32
    views: Mapping[str, nn.Parameter]  # the adapter's parameters, views of both
    parts: tuple[tuple[nn.Parameter, float], ...]  # for the optimizer: views of both, and factors of the learning rate

    @property
    def grad(self) -> Tensor:
        """The flat gradient, never None; backward passes add to it."""
        assert self.weights.grad is not None
        return self.weights.grad

    def named_grads(self) -> dict[str, Tensor]:
        """Gradient of each parameter, as a view."""
        return {name: view.grad for name, view in self.views.items() if view.grad is not None}


@dataclass(frozen=True)
class Policy:
    """The model of a training step."""

    model: PeftModel
    flat: FlatParameters
    placement: Placement
    dropout: DropoutState
    lora_layers: tuple[LoraLayer, ...]
    has_parent: bool
    attention: Attention
    layers: DecoderLayers
    moving: MovingReference | None = None
    start: str = "default"  # lora.init_lora_weights of the trained adapter's beginning
    reward_head: nn.Parameter | None = None  # (1, D) fp32, one of the flat parameters

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model inside PEFT's wrapper."""
        return cast("PreTrainedModel", self.model.get_base_model())

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D)."""
        head = self.causal_lm.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head.weight

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
        names = [PARENT] * (parent and self.has_parent) + [TRAINED] * trained + [REFERENCE] * reference
        for layer in self.lora_layers:
            layer.set_adapter(names, inference_mode=True)
        for parameter in self.flat.views.values():
            parameter.requires_grad_(True)

    def trainable_names(self) -> list[str]:
        """Names of the parameters that receive gradients."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]


def is_base(name: str) -> bool:
    """Whether a parameter of this name belongs to the base, and not to an adapter."""
    return ".lora_" not in name and name not in (SCORE, "score.weight")


def quantised_weights(policy: Policy) -> tuple[int, int]:
    """Number of the base's weights that were loaded in 4 bits, and of all, without input embedding and LM head.

    bitsandbytes only quantises linear layers. Layers that `dequantize_once` changed count as quantised.
    """
    base, quantised, total = policy.causal_lm, 0, 0
    embeddings = [*base.get_input_embeddings().parameters(), *base.get_output_embeddings().parameters()]
    left_out = {id(parameter) for parameter in embeddings}
    for name, parameter in base.named_parameters():
        if id(parameter) in left_out or not is_base(name):
            continue
        in_4_bits = isinstance(parameter, bnb.nn.Params4bit)
        size = cast(Any, parameter).quant_state.shape.numel() if in_4_bits else parameter.numel()
        total += size
        quantised += size if in_4_bits or name.endswith(".base_layer.weight") else 0
    return quantised, total


def dequantize_once(policy: Policy) -> None:
    """Replace the 4-bit weights of the adapted layers by dequantised ones, with the same results."""
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
    """Replace the trained adapter's `lora_dropout` by `CounterDropout`; the other adapters get no dropout."""
    for salt, name in enumerate(sorted(layers)):
        layer = layers[name]
        features = cast(int, layer.in_features)
        layer.lora_dropout[TRAINED] = CounterDropout(p, salt, features, state, device) if p > 0 else nn.Identity()
        for other in layer.lora_dropout.keys() - {TRAINED}:
            layer.lora_dropout[other] = nn.Identity()


def flatten(parameters: Mapping[str, nn.Parameter], ratio: float | None = None) -> FlatParameters:
    """Move parameters into one buffer and make them views of it. Raises ValueError: none, or one that is not fp32.

    `ratio`: learning rate of every B relative to that of every A (LoRA+). All A then come before all B, so that each
    kind is one contiguous part; without a ratio the order is the given one.
    """
    if not parameters:
        raise ValueError("no trainable parameters")
    wrong = [name for name, parameter in parameters.items() if parameter.dtype != torch.float32]
    if wrong:
        raise ValueError(f"trainable parameters must be fp32, and {wrong[0]} is {parameters[wrong[0]].dtype}")
    up = {name: parameter for name, parameter in parameters.items() if ratio is not None and ".lora_B." in name}
    parameters = {name: parameter for name, parameter in parameters.items() if name not in up} | up
    weights = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()]))
    weights.grad = torch.zeros_like(weights)
    start = 0
    for parameter in parameters.values():
        span = slice(start, start + parameter.numel())
        parameter.data = weights.data[span].view_as(parameter)
        parameter.grad = weights.grad[span].view_as(parameter)
        start = span.stop
    if ratio is None:
        return FlatParameters(weights, dict(parameters), ((weights, 1.0),))
    parts = []
    middle = weights.numel() - sum(parameter.numel() for parameter in up.values())
    for span, factor in ((slice(0, middle), 1.0), (slice(middle, None), ratio)):
        part = nn.Parameter(weights.data[span])
        part.grad = weights.grad[span]
        parts.append((part, factor))
    return FlatParameters(weights, dict(parameters), tuple(parts))


def moving_reference(model: nn.Module, flat: FlatParameters, following: Following) -> MovingReference:
    """The start of a moving reference: A of the trained adapter and B = 0, in the model's adapter `REFERENCE`."""
    parameters, weights, start = dict(model.named_parameters()), flat.weights.detach().clone(), 0
    for name, view in flat.views.items():
        span = slice(start, start + view.numel())
        if ".lora_B." in name:
            weights[span] = 0.0
        parameters[name.replace(f".{TRAINED}.", f".{REFERENCE}.")].data = weights[span].view_as(view)
        start = span.stop
    return MovingReference(weights, following)
