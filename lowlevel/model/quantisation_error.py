"""LoftQ (arXiv 2310.08659): an adapter that starts from the error of the base's quantisation.

    scaling * B A = the best approximation of rank r of W - Q(W), by singular values

The base keeps its bytes: this is the paper's algorithm with one iteration (further ones would quantise W - B A), and
PEFT's `replace_lora_weights_loftq`. The saved adapter is a plain one. Its update belongs to the quantised base: added
to W it would correct an error that is not there, so such adapters are not merged into the original weights.
"""

from __future__ import annotations

from typing import cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from lowlevel.config.schema import ModelConfig
from lowlevel.heartbeat import counted
from lowlevel.model.base import load_base
from lowlevel.model.linear import quantised_state
from lowlevel.model.placement import Placement
from lowlevel.model.policy import TRAINED, Policy


@torch.no_grad()
def start_from_error(policy: Policy, config: ModelConfig) -> None:
    """Overwrite a new adapter; layers that are not in 4 bits keep theirs. Needs host memory for the 16-bit weights."""
    unquantised = config.model_copy(update={"load_in_4bit": False})
    weights = dict(load_base(unquantised, Placement(torch.device("cpu"), "fp32"), dtype="auto").named_parameters())
    names = {id(module): name for name, module in policy.causal_lm.named_modules()}
    for layer in counted("measuring the quantisation error", policy.lora_layers, "layers"):
        base = layer.get_base_layer()
        if isinstance(base, bnb.nn.Linear4bit):
            quantised = bnb.functional.dequantize_4bit(base.weight.data, quantised_state(base)).double()
            up, down = low_rank(weights[f"{names[id(layer)]}.weight"].to(quantised) - quantised, layer.r[TRAINED])
            cast(nn.Linear, layer.lora_A[TRAINED]).weight[: len(down)] = down
            cast(nn.Linear, layer.lora_B[TRAINED]).weight[:, : len(down)] = up / layer.scaling[TRAINED]


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(O, r) and (r, I), whose product is the closest to `matrix` (O, I) float64 of that rank, at most min(O, I).

    From the eigenvectors of the smaller Gram matrix: several times as fast as a singular value decomposition, and in
    float64 exact enough for the largest singular values. Both factors get the roots of these.
    """
    if matrix.shape[0] > matrix.shape[1]:
        down, up = low_rank(matrix.T, rank)
        return up.T, down.T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending
    roots = values[-rank:].clamp(min=1e-30) ** 0.25
    vectors = vectors[:, -rank:]
    return vectors * roots, (vectors / roots).T @ matrix
