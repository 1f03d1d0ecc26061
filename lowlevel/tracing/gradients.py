"""A step's gradient, split by layer, by projection, and for pairs into a chosen and a rejected term.

    dL/dtheta = sum_t dL/dl_t dl_t/dtheta        l_t: log-probability of scored token t

The chosen term is the part of this sum over the tokens of chosen completions. It costs one more forward and backward
pass of the policy, with the numbers dL/dl_t as factors. The rejected term is the rest of the step's gradient.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.losses import LossSums
from lowlevel.methods import Method
from lowlevel.methods.dpo import DPO, kept_pair_logps
from lowlevel.model.policy import SCORE, Policy

NEAR_OVERFLOW = 65504 / 2  # half of the largest fp16 number
_CHUNK = 2**22  # entries compared at once: no temporary as large as the gradient
_LAYER = re.compile(r"\.layers\.(\d+)\..*?(\w+)\.lora_[AB]\.")


Part = tuple[PackedBatch, LossSums]  # a micro-batch and its result with details, on the CPU


def measure(
    policy: Policy, method: Method, parts: Sequence[Part], scale: float, dropout_key: int
) -> dict[str, list[Any]]:
    """The gradient's columns of the steps table, one value each; norms are those before clipping.

    Args:
        policy: holds the step's gradient, times `scale`; it is left unchanged.
        parts: of the step.
        scale: loss scale.
        dropout_key: of the step.
    """
    grad = policy.flat.grad
    columns: dict[str, list[Any]] = {"grad_norm": [_norm(grad) / scale], **_norms(policy, scale)}
    zero = sum(int((part == 0).sum()) for part in grad.split(_CHUNK))
    near = sum(int((part.abs() >= NEAR_OVERFLOW).sum()) for part in grad.split(_CHUNK))
    columns |= {"zero_share": [zero / grad.numel()], "near_fp16_overflow_share": [near / grad.numel()]}
    if isinstance(method, DPO):
        total = grad.clone()
        chosen = _chosen_term(policy, method, parts, scale, dropout_key)
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


def _chosen_term(policy: Policy, method: DPO, parts: Sequence[Part], scale: float, dropout_key: int) -> Tensor:
    """The chosen term, (n,), times `scale`."""
    policy.flat.grad.zero_()
    factor = scale / sum(method.count(batch) for batch, _ in parts)
    for batch, sums in parts:
        moved = batch.to(policy.placement.device)
        policy.dropout.set_micro_batch(moved.dropout_keys, dropout_key)
        if method.config.disable_dropout:
            policy.dropout.disable()
        slopes = torch.where(batch.sequence_ids < len(batch.real), _token_slopes(method, batch, sums), 0.0)
        ((policy.token_logps(moved) * slopes.to(moved.input_ids.device)).sum() * factor).backward()
    return policy.flat.grad.clone()


def _token_slopes(method: DPO, batch: PackedBatch, kept: LossSums) -> Tensor:
    """dL/dl_t of each scored token, (N,), by autograd through the configured loss."""
    leaf = kept.tokens["logps"].clone().requires_grad_()
    chosen, rejected = torch.where(batch.real.repeat(2), batch.sequence_sums(leaf), -1.0).chunk(2)
    pairs = kept_pair_logps(batch, kept, method.columns)
    pairs = replace(pairs, chosen_logps=chosen, rejected_logps=rejected, token_logps=leaf)
    (slopes,) = torch.autograd.grad(method.preference_loss(pairs).losses[batch.real].sum(), leaf)
    return slopes


def _norms(policy: Policy, scale: float) -> dict[str, list[Any]]:
    """Norms by layer, and by projection over all layers."""
    grads = policy.flat.named_grads()
    norms = torch.stack(torch._foreach_norm(list(grads.values()))).double().cpu() / scale
    layers: dict[int, float] = defaultdict(float)
    projections: dict[str, float] = defaultdict(float)
    for name, norm in zip(grads, norms.tolist(), strict=True):
        if found := _LAYER.search(name):
            layers[int(found[1])] += norm**2
            projections[found[2]] += norm**2
        elif name == SCORE:
            projections["reward_head"] += norm**2
    by_projection = {f"{name}_grad_norm": [square**0.5] for name, square in projections.items()}
    return {"layer_norms": [[layers[layer] ** 0.5 for layer in sorted(layers)]], **by_projection}


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))
