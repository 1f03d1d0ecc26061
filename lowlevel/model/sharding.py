"""A base that is too large for one GPU, on several (train.shard_base): each holds a part of every decoder layer.

torch's FSDP2 shards the frozen weights of the layers, 4-bit bytes or not. It gathers a layer's while the layer before
it runs, in the forward pass and again for the backward pass, and frees them afterwards. Everything else is whole on
every GPU: quantisation constants, embeddings, LM head, adapters with their gradient, and what a micro-batch computes.
All run a layer at the same time, so each computes equally many micro-batches of a step (`Ranks.deal`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook as when_made
from torch.nn.modules.module import register_module_parameter_registration_hook as when_set
from transformers import PreTrainedModel, modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from lowlevel.ranks import Ranks, here


@contextmanager
def sharded_when_loaded(ranks: Ranks, prepare: Callable[[nn.Module], None]) -> Iterator[None]:
    """While the block loads a model, shard each decoder layer when its last weight is there, after `prepare`.

    transformers 5.23 loads layer by layer, so no GPU holds more than one that is whole.
    """
    layers: list[nn.Module] = []

    def note(_: nn.Module, __: str, made: nn.Module | None) -> None:
        if isinstance(made, GradientCheckpointingLayer):
            layers.append(made)

    def shard_loaded(*_: object) -> None:  # called before each weight is set
        while layers and not any(parameter.is_meta for parameter in layers[0].parameters()):
            prepare(layers[0])
            shard_layer(layers.pop(0), ranks)

    # Its threads would load further layers meanwhile, and its warm-up would reserve memory for the whole base.
    in_turn = patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1")
    lean = patch.object(modeling_utils, "caching_allocator_warmup")
    with in_turn, lean, when_made(note), when_set(shard_loaded):
        yield
    shard_loaded()


def shard_layer(layer: nn.Module, ranks: Ranks) -> None:
    """Keep this rank's part of a layer's weights, which are all on the device."""
    layer.requires_grad_(False)
    before = dict(layer.named_parameters())
    ranks.shard(layer)
    for name, parameter in layer.named_parameters():  # transformers and PEFT read these: quant_type, ...
        parameter.__dict__.update(before[name].__dict__)


def join_layers(model: PreTrainedModel, ranks: Ranks) -> None:
    """Let the sharded layers of a model know each other, so that each is gathered while another runs."""
    decoder = model.get_decoder()
    ranks.shard(decoder, [parameter for parameter in decoder.parameters() if here(parameter) is parameter])
