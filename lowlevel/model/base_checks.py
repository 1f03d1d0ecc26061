"""Whether a base is what its folder says, once it is loaded: names, shapes, quantised layers, finite numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowlevel.errors import CheckpointError, ConfigError, how_many
from lowlevel.kernels.dequantize import Quantised, dequantize_reference
from lowlevel.model.files import SHOWN, is_finite
from lowlevel.model.linear import quantised_state, quantised_states
from lowlevel.model.placement import dtype_name
from lowlevel.ranks import here

NO_HEAD = "; config.json says tie_word_embeddings = false: set true there if the head is the input embedding"


def check_loading(name: str, info: dict[str, Any]) -> None:
    """Refuse missing, additional and wrongly shaped tensors; `info` is what transformers says. CheckpointError."""
    kinds = {"missing_keys": "missing", "unexpected_keys": "left over", "mismatched_keys": "of another shape"}
    for key, what in kinds.items():
        names = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(key) or ())
        if names:
            hint = NO_HEAD if what == "missing" and names == ["lm_head.weight"] else ""
            raise CheckpointError(f"base {name!r}: {len(names)} tensors {what}: {', '.join(names[:5])}{hint}")


@cache
def _reads_ragged_rows() -> bool:
    """Whether bitsandbytes dequantises rows that end inside a block correctly; 0.50 does not on CPUs with AVX-512."""
    values = torch.arange(1.0, 4 * 96 + 1).view(4, 96)
    packed, state = bnb.functional.quantize_4bit(values, quant_type="nf4", blocksize=64)
    expected = dequantize_reference(Quantised.of(packed, state), torch.float32)
    return torch.equal(bnb.functional.dequantize_4bit(packed, state), expected)


def check_quantised_layers(name: str, model: nn.Module, device: torch.device) -> None:
    """Check shapes, which transformers 5.23 does not do for weights that it quantises, and `_reads_ragged_rows`."""
    for module_name, module in model.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        if quantised_state(module) is None:  # pre-quantised folder
            hint = "correct llm_int8_skip_modules there"
            raise CheckpointError(f"base {name!r}: config.json says that {module_name} is quantised; it is not: {hint}")
        state = quantised_state(module)
        found, expected = tuple(state.shape), (module.out_features, module.in_features)
        if found != expected:
            shapes = f"{module_name}.weight {found}, not {expected}"
            raise CheckpointError(f"base {name!r}: 1 tensors of another shape: {shapes}")
        if device.type == "cpu" and module.in_features % state.blocksize and not _reads_ragged_rows():
            raise ConfigError(
                f"model.load_in_4bit: {module_name} has {module.in_features} inputs, not a multiple of "
                f"{state.blocksize}, which bitsandbytes reads wrongly on this CPU; set load_in_4bit = false"
            )


def check_finite(name: str, model: PreTrainedModel) -> None:
    """Refuse weights that overflow in the dtype (1e5 of an fp32 file is infinite in fp16) or were not finite before."""
    states = quantised_states(model)
    values = ((name, _float_values(here(p), states.get(name))) for name, p in model.named_parameters())
    bad = sorted(name for name, value in values if not is_finite(value))
    if bad:
        what = f"{how_many(len(bad), 'tensors')} not finite in {dtype_name(model.dtype)}"
        raise CheckpointError(f"base {name!r}: {what}: {', '.join(bad[:SHOWN])}")


def _float_values(parameter: Tensor, state: Any) -> Tensor:
    """A parameter's values; of a 4-bit weight the largest of each block, in the dtype that it is dequantised to."""
    if state is None:
        return parameter
    largest = state.absmax
    if state.nested:
        largest = bnb.functional.dequantize_blockwise(largest, state.state2) + state.offset
    return largest.to(state.dtype)  # type: ignore[no-any-return]
