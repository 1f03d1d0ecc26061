"""From a loaded base to a policy: adapters attached to it, or for full fine-tuning all its weights made trainable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from lowlevel.config.schema import LoraConfig, stands_alone
from lowlevel.errors import CheckpointError, ConfigError, one_line, quoted
from lowlevel.model.adapters import (
    VALUE_WEIGHTS,
    adapter_start,
    is_reward_model,
    load_adapter_weights,
    load_value_head,
    read_adapter_config,
    read_adapter_weights,
)
from lowlevel.model.attention_choice import MASKED, Attention
from lowlevel.model.base import base_sha256
from lowlevel.model.dropout import CounterDropout, DropoutState
from lowlevel.model.flat import FlatParameters, Untrained, flatten
from lowlevel.model.layers import DecoderLayers
from lowlevel.model.linear import install_side_by_side, prepare_dora
from lowlevel.model.moving_reference import Following, MovingReference
from lowlevel.model.offload import HostInputs
from lowlevel.model.placement import Placement
from lowlevel.model.policy import PARENT, REFERENCE, SCORE, TRAINED, VALUE, Policy
from lowlevel.model.suitability import check_base
from lowlevel.model.targets import linear_layers, matched

LARGEST = 2**31  # weights in one buffer, which bitsandbytes 0.50 counts in 32 bits
HEAD_STD = 0.02  # of a new reward head, as transformers initialises it
# Keys of [lora] that PEFT's LoraConfig lacks, or (init_lora_weights) reads otherwise: it would change the base.
NOT_PEFTS = {"init_from", "loraplus_lr_ratio", "init_lora_weights"}


def build_policy(
    base: PreTrainedModel,
    lora: LoraConfig,
    placement: Placement,
    *,
    seed: int,
    parent: Path | None = None,
    init_from: Path | None = None,
    gradient_checkpointing: bool = True,
    attention: Attention = MASKED,
    recomputed: int | None = None,
    offload: bool = False,
    following: Following | None = None,
    reward_head: bool = False,
    value_head: bool = False,
) -> Policy:
    """Attach the adapter to train to a base from `load_base`.

    Args:
        lora: size of the new adapter; with `init_from`, only its dropout.
        seed: of the new adapter's initialisation (A uniform, B zero: the policy starts equal to its reference).
        parent: PEFT folder of a frozen adapter that the trained one is stacked on.
        init_from: PEFT folder whose sizes and weights the trained adapter starts from.
        recomputed: with gradient checkpointing, how many layers are recomputed; None: all of them.
        offload: keep the inputs of these layers in host memory.
        following: give the policy a moving reference.
        value_head: also train a head that gives the value of a state, at first 0.
        reward_head: also train a head that gives a scalar, initialised by `seed` or from `init_from`.

    Raises:
        ConfigError: target modules that match no layer, or the LM head; an unsupported base.
        CheckpointError: an adapter folder that is damaged or does not fit.
    """
    # torch 2.11 prefers cuDNN's attention on an H100. With large scores its gradients are NaN for masked rows whose
    # length is not a multiple of 128 (benchmarks/attention_nan.py).
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.random.fork_rng([placement.device] if placement.device.type == "cuda" else []):  # the caller's stay
        torch.manual_seed(seed)
        head = _new_head(base, placement.device, seed) if reward_head else None
        model = _attach(base, lora, parent, init_from, head, moving=following is not None)
    if value_head:
        model.get_base_model().value = _new_head(base, placement.device, None)
    layers = _prepared_layers(model, placement.dtype, fresh=init_from is None)
    place_dropout(layers, lora.lora_dropout, state := DropoutState(), placement.device)
    trained = {name: p for name, p in model.named_parameters() if f".{TRAINED}." in name or name in (SCORE, VALUE)}
    flat = flatten(trained, lora.loraplus_lr_ratio)
    model.eval()  # no dropout or router noise in the base; the adapter's dropout only depends on its state
    host = HostInputs(placement.device) if offload else None
    decoder_layers = DecoderLayers(base, recomputed if gradient_checkpointing else 0, state, host)
    adapted, heads = tuple(layers.values()), (flat.views.get(SCORE), flat.views.get(VALUE))
    moving = moving_reference(model, flat, following) if following else None
    start = adapter_start(init_from) if init_from else lora.init_lora_weights
    policy = Policy(
        model, flat, placement, state, adapted, parent is not None, attention, decoder_layers, moving, start, *heads
    )
    policy.activate(parent=True, trained=True)
    if policy.value_head is not None and init_from and (init_from / VALUE_WEIGHTS).exists():
        load_value_head(policy.value_head, init_from)
    check_base(policy)
    return policy


def _prepared_layers(model: PeftModel, dtype: torch.dtype, *, fresh: bool) -> dict[str, LoraLayer]:
    """Give the adapted layers our products, and those with DoRA its row lengths; the layers by name."""
    install_side_by_side(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for layer in layers.values():
        if TRAINED in layer.lora_magnitude_vector:
            prepare_dora(layer, TRAINED, dtype, fresh=fresh)
    return layers


def _new_head(base: PreTrainedModel, device: torch.device, seed: int | None) -> nn.Linear:
    """A head (1, D) in fp32, of rewards by `seed`, of values 0. It has no bias, which would cancel in r+ - r-."""
    head = nn.Linear(base.get_output_embeddings().weight.shape[1], 1, bias=False)
    if seed is None:
        nn.init.zeros_(head.weight)
    else:
        nn.init.normal_(head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
    return head.to(device)


def _attach(
    base: PreTrainedModel,
    lora: LoraConfig,
    parent: Path | None,
    init_from: Path | None,
    head: nn.Linear | None,
    *,
    moving: bool,
) -> PeftModel:
    folder = init_from
    config, layers = read_adapter_config(init_from) if init_from else _new_config(base, lora), linear_layers(base)
    try:
        model: Any = get_peft_model(base, _expanded(config, layers), adapter_name=TRAINED, autocast_adapter_dtype=True)
        if moving:  # not before the trained one, whose random numbers must not change
            model.add_adapter(REFERENCE, _expanded(config, layers))
        if parent:
            folder = parent
            model.add_adapter(PARENT, _expanded(read_adapter_config(parent), layers))
    except ValueError as error:  # the folder's target modules match no layer; `_new_config` checks the others
        raise CheckpointError(f"{folder} does not fit the base: {one_line(error)}") from None
    if head is not None:
        model.get_base_model().score = head
    for adapter, source in ((TRAINED, init_from), (PARENT, parent)):
        if source:
            tensors = read_adapter_weights(source)
            if adapter == PARENT and not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
                raise CheckpointError(f"{source}: each lora_B is zero: it is untrained, or its values were not saved")
            if head is not None and adapter == TRAINED and not is_reward_model(source):  # an SFT adapter: a new head
                tensors[SCORE] = head.weight.detach()
            load_adapter_weights(model, adapter, tensors, str(source))
    return model


def _expanded(config: PeftLoraConfig, layers: Sequence[str]) -> PeftLoraConfig:
    """The same with the names of the layers that a pattern or "all-linear" matches; the saved adapter has the names."""
    targets = config.target_modules
    return replace(config, target_modules=matched(targets, layers)) if isinstance(targets, str) else config


def check_target_modules(base: nn.Module, targets: Sequence[str]) -> None:
    """Raise ConfigError if a name or pattern matches no linear layer, or the LM head; GPT-2 has no linear layers."""
    layers = linear_layers(base)
    if not layers:
        raise ConfigError(f"model.name: {type(base).__name__} is not supported: it has no linear layers to adapt")
    for target in targets:
        try:
            found = matched(targets if len(targets) == 1 else (target, target), layers)  # a pattern counts only alone
        except ValueError as error:
            raise ConfigError(f'lora.target_modules: "{quoted(target)}" {error}') from None
        if not found:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
            what = f'lora.target_modules: "{quoted(target)}" matches no layer'
            hint = "; a regular expression stands alone and matches the whole name" if stands_alone(target) else ""
            raise ConfigError(f"{what}; linear layers here: {known}{hint}")


def _new_config(base: nn.Module, lora: LoraConfig) -> PeftLoraConfig:
    check_target_modules(base, lora.target_modules)
    targets = list(lora.target_modules)
    alone = targets[0] if len(targets) == 1 and stands_alone(targets[0]) else targets
    settings = {**lora.model_dump(exclude=NOT_PEFTS), "target_modules": alone}
    return PeftLoraConfig(**settings, bias="none", task_type="CAUSAL_LM")


def build_full_policy(
    base: PreTrainedModel,
    placement: Placement,
    *,
    init_from: Path | None = None,
    keep_base: bool = True,
    gradient_checkpointing: bool = True,
    attention: Attention = MASKED,
    recomputed: int | None = None,
    offload: bool = False,
) -> Policy:
    """Make every weight of a base from `load_base` a trained one: full fine-tuning, without an adapter.

    The base is loaded as for an unquantised LoRA run, so both start from the same numbers. Its weights then move into
    the flat buffer, as fp32 masters that autocast rounds to 16 bits in each product (arXiv 1710.03740). The input
    embedding's output is rounded too, so hidden states have the dtype that they have with a frozen base. A tied LM head
    is one weight.

    Args:
        base: not quantised.
        init_from: checkpoint or result of such a run, with the weights to continue from.
        keep_base: also keep the weights as loaded, for a reference or for comparison.
        gradient_checkpointing, attention, recomputed, offload: as in `build_policy`.

    Raises:
        ConfigError: an unsupported base.
        CheckpointError: a folder that is damaged or does not fit.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in `build_policy`
    parameters = dict(base.named_parameters())
    untrained = Untrained(base, parameters, base_sha256(base))
    flat = flatten(parameters, masters=True)
    untrained.trains()
    embeddings = base.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output.to(placement.dtype))
    base.eval()
    state = DropoutState()
    for parameter in parameters.values():  # before the layers, which look at it
        parameter.requires_grad_(True)
    host = HostInputs(placement.device) if offload else None
    layers = DecoderLayers(base, recomputed if gradient_checkpointing else 0, state, host)
    policy = Policy(base, flat, placement, state, (), False, attention, layers, untrained=untrained)
    check_base(policy)
    if init_from:
        load_adapter_weights(base, TRAINED, read_adapter_weights(init_from), str(init_from))
    if not keep_base:
        untrained.kept = None
    return policy


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


def place_dropout(layers: dict[str, LoraLayer], p: float, state: DropoutState, device: torch.device) -> None:
    """Replace the trained adapter's `lora_dropout` by `CounterDropout`; the other adapters get no dropout."""
    for salt, name in enumerate(sorted(layers)):
        layer = layers[name]
        features = cast(int, layer.in_features)
        layer.lora_dropout[TRAINED] = CounterDropout(p, salt, features, state, device) if p > 0 else nn.Identity()
        for other in layer.lora_dropout.keys() - {TRAINED}:
            layer.lora_dropout[other] = nn.Identity()


def check_trainable(model: PreTrainedModel, optim: str) -> None:
    """Raise ConfigError if a model has more weights than the optimizer takes in one buffer."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if optim != "adamw" and count >= LARGEST:
        raise ConfigError(
            f"{count:,} weights, and train.optim = {optim!r} takes fewer than {LARGEST:,}: set train.finetuning_type "
            '= "lora"'
        )
