"""A check, and its bounds by precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One line of the table. A bound of 0 requires equality, of bits or of counts."""

    group: str
    name: str
    measured: float
    bound: float
    ok: bool
    note: str = ""


def check(group: str, name: str, measured: float, bound: float, note: str = "") -> Check:
    """A check that holds if measured <= bound; NaN never does."""
    return Check(group, name, measured, bound, math.isfinite(measured) and measured <= bound, note)


@dataclass(frozen=True)
class Bounds:
    """How far rounding may move a number. Origin of the bounds, by precision:

    fp32    4 to 100 times the largest error seen on a CPU (the demo at its start and after training)
    bf16    4 to 2,500 times the largest error seen there
    fp16    the demo meets them on an H100; `forward` and `worst_token` are 3 times the errors of SmolLM2 (30 layers,
            135M): 0.006 nats (rms of 793 tokens; worst 0.054) on a CPU, at most 0.078 in a pair on an H100
    """

    forward: float  # nats, rms of the tokens' log-probabilities against a whole forward pass in float64
    worst_token: float  # nats, the largest of these errors
    closed: float  # relative: gradient of a loss formula in fp32 against its closed form
    hidden: float  # relative, largest element: gradient of the hidden states from `token_logps`
    gradient: float  # relative l2: gradient of a whole step against float64
    layout_loss: float  # relative: the same step in another layout
    layout_gradient: float  # relative l2


BOUNDS = {
    "fp32": Bounds(3e-5, 1e-4, 1e-5, 1e-5, 1e-4, 1e-5, 1e-4),
    "fp16": Bounds(2e-2, 0.25, 1e-5, 5e-3, 3e-2, 2e-3, 3e-2),
    "bf16": Bounds(2e-1, 1.0, 1e-5, 4e-2, 2e-1, 2e-2, 2e-1),
}


def head_bound(largest_logit: float, dtype: torch.dtype) -> float:
    """Bound on the error of a token's log-probability, given its hidden state: nats.

    A logit is rounded once to `dtype`; its product and the log-sum-exp are accumulated in fp32.
    """
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    return max(1.0, largest_logit) * (rounding + 8 * torch.finfo(torch.float32).eps)


def largest(values: Tensor) -> float:
    """Largest absolute value; 0 if empty."""
    return float(values.detach().abs().max()) if values.numel() else 0.0


def relative(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected| in the l2 norm, float64; the plain difference if `expected` is 0."""
    expected = expected.detach().double().cpu()
    difference = float(torch.linalg.vector_norm(value.detach().double().cpu() - expected))
    return difference / (float(torch.linalg.vector_norm(expected)) or 1.0)
