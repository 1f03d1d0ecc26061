"""A step's gradient taken apart: by layer, by projection, and for pairs into the chosen and the rejected term.

    dL/dtheta = sum_i dL/dc_i dc_i/dtheta + sum_i dL/dr_i dr_i/dtheta        c_i, r_i: log-probabilities of pair i

The first sum is one more forward and backward pass of the policy, with the numbers dL/dc_i in the place of the loss;
the second is the difference to the gradient that the step left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.methods import Method
from lowlevel.methods.dpo import DPO, completion_logps
from lowlevel.model.policy import Policy

NEAR_OVERFLOW = 65504 / 2  # half of the largest fp16 number
_CHUNK = 2**22  # entries compared at once: no temporary as large as the gradient
_LAYER = re.compile(r"\.layers\.(\d+)\..*?(\w+)\.lora_[AB]\.")


def measure(
    policy: Policy,
    method: Method,
    batches: Sequence[PackedBatch],
    pairs: Sequence[Mapping[str, Sequence[Any]]] | None,
    scale: float,
    dropout_key: int,
) -> dict[str, list[Any]]:
    """The gradient's columns of a steps table, each with one value; norms are those before clipping.

    Args:
        policy: holds the step's gradient, times `scale`; it is left as it is.
        method: the method.
        batches: the micro-batches of the step.
        pairs: columns by micro-batch, with "weight"; None for sft.
        scale: loss scale.
        dropout_key: of the step.
    """
    grad = policy.flat.grad
    columns: dict[str, list[Any]] = {"grad_norm": [_norm(grad) / scale], **_norms(policy, scale)}
    zero = sum(int((part == 0).sum()) for part in grad.split(_CHUNK))
    near = sum(int((part.abs() >= NEAR_OVERFLOW).sum()) for part in grad.split(_CHUNK))
    columns |= {"zero_share": [zero / grad.numel()], "near_fp16_overflow_share": [near / grad.numel()]}
    if isinstance(method, DPO) and pairs is not None:
        total = grad.clone()
        chosen = _chosen_term(policy, method, batches, pairs, scale, dropout_key)
        grad.copy_(total)
        rejected = total.sub_(chosen)
        lengths = _norm(chosen), _norm(rejected)
        cosine = float(torch.dot(chosen, rejected)) / (lengths[0] * lengths[1] or 1.0)
        columns |= {
            "chosen_grad_norm": [lengths[0] / scale],
            "rejected_grad_norm": [lengths[1] / scale],
            "grad_cosine": [cosine],
        }
    return columns


def _chosen_term(
    policy: Policy,
    method: DPO,
    batches: Sequence[PackedBatch],
    pairs: Sequence[Mapping[str, Sequence[Any]]],
    scale: float,
    dropout_key: int,
) -> Tensor:
    """The chosen term, (n,), times `scale`."""
    policy.flat.grad.zero_()
    factor = scale / sum(method.count(batch) for batch in batches)
    for batch, columns in zip(batches, pairs, strict=True):
        moved = batch.to(policy.placement.device)
        policy.dropout.set_micro_batch(moved.dropout_keys, dropout_key)
        if method.config.disable_dropout:
            policy.dropout.disable()
        chosen, _ = completion_logps(policy, moved)
        slopes = -method.config.beta * torch.as_tensor(columns["weight"], device=chosen.device)
        ((chosen[: len(slopes)] * slopes).sum() * factor).backward()
    return policy.flat.grad.clone()


def _norms(policy: Policy, scale: float) -> dict[str, list[Any]]:
    """Norms by layer, and by projection over all layers."""
    grads = policy.flat.named_grads()
    norms = torch.stack(torch._foreach_norm(list(grads.values()))).double().cpu() / scale
    layers: dict[int, float] = {}
    projections: dict[str, float] = {}
    for name, norm in zip(grads, norms.tolist(), strict=True):
        found = _LAYER.search(name)
        if found:
            layer, projection = int(found[1]), found[2]
            layers[layer] = layers.get(layer, 0.0) + norm**2
            projections[projection] = projections.get(projection, 0.0) + norm**2
    by_projection = {f"{name}_grad_norm": [square**0.5] for name, square in projections.items()}
    return {"layer_norms": [[layers[layer] ** 0.5 for layer in sorted(layers)]], **by_projection}


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))
