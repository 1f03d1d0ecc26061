"""Full fine-tuning (train.finetuning_type = "full"): all weights are trained, without an adapter.

The base is loaded as for an unquantised LoRA run, so both start from the same numbers. Its weights then move into the
flat buffer, as fp32 masters that autocast rounds to 16 bits in each product (arXiv 1710.03740). The input embedding's
output is rounded too, so hidden states have the dtype that they have with a frozen base. A tied LM head is one weight.

The reference of dpo and kto is the base as loaded: 2 more bytes a weight. `Policy.activate` exchanges the
tensors in the parameters; at the start both give equal bits, because the masters are exactly the base's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowlevel.errors import ConfigError
from lowlevel.model.adapters import load_adapter_weights, read_adapter_weights
from lowlevel.model.attention_choice import MASKED, Attention
from lowlevel.model.base import base_sha256
from lowlevel.model.dropout import DropoutState
from lowlevel.model.layers import DecoderLayers
from lowlevel.model.offload import HostInputs
from lowlevel.model.placement import Placement
from lowlevel.model.policy import TRAINED, Policy, flatten
from lowlevel.model.suitability import check_base

LARGEST = 2**31  # weights in one buffer, which bitsandbytes 0.50 counts in 32 bits


class Untrained:
    """The weights of the base as loaded, beside the trained ones.

    Attributes:
        sha256: `base_sha256` of them.
        kept: by parameter name; None if nothing reads them any more. Those that are rounded before use anyway (of
            products, the input embedding) are in the dtype that the base was loaded in, the others in fp32, so that
            the reference computes in the same dtypes as the policy.
    """

    def __init__(self, base: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> None:
        rounded = [module.weight for module in base.modules() if isinstance(module, nn.Linear)]
        short = {id(weight) for weight in [*rounded, *base.get_input_embeddings().parameters()]}
        self.sha256 = base_sha256(base)
        self.kept: dict[str, Tensor] | None = {
            name: p.data if id(p) in short else p.data.float() for name, p in parameters.items()
        }
        self._parameters = parameters
        self._masters: dict[str, Tensor] = {}

    def trains(self) -> None:
        """The parameters now hold the trained weights: remember these."""
        self._masters = {name: p.data for name, p in self._parameters.items()}

    def show(self, trained: bool) -> None:
        """Let the parameters hold the trained weights, or those of the base."""
        assert trained or self.kept is not None
        for name, tensor in (self._masters if trained else self.kept or {}).items():
            self._parameters[name].data = tensor

    @torch.no_grad()
    def restart(self) -> None:
        """Give the trained weights the values of the base."""
        for name, tensor in (self.kept or {}).items():
            self._masters[name].copy_(tensor)

    @property
    def unchanged(self) -> bool:
        """Whether the trained weights are those of the base."""
        kept = self.kept
        return kept is not None and all(torch.equal(self._masters[name], kept[name].float()) for name in kept)

    @property
    def nbytes(self) -> int:
        """Memory of the base's weights."""
        return sum(tensor.nbytes for tensor in (self.kept or {}).values())


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
    """Make every weight of a base from `load_base` a trained one.

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
    untrained = Untrained(base, parameters)
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


def check_trainable(model: PreTrainedModel, optim: str) -> None:
    """Raise ConfigError if a model has more weights than the optimizer takes in one buffer."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if optim != "adamw" and count >= LARGEST:
        raise ConfigError(
            f"{count:,} weights, and train.optim = {optim!r} takes fewer than {LARGEST:,}: set train.finetuning_type "
            '= "lora"'
        )
