"""One flat buffer for all trainable weights, another for all their gradients; the adapter's parameters are views of
both.

The optimizer, clipping and unscaling then are single kernels over one tensor, instead of some for each of 308.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FlatParameters:
    """`weights` (n,) fp32 with `weights.grad` (n,) fp32, and the named parameters that are views of them."""

    weights: nn.Parameter
    views: Mapping[str, nn.Parameter]

    @property
    def grad(self) -> Tensor:
        """The flat gradient, never None: backward passes add into it."""
        assert self.weights.grad is not None
        return self.weights.grad

    def named_grads(self) -> dict[str, Tensor]:
        """Gradient of each parameter, as a view."""
        return {name: view.grad for name, view in self.views.items() if view.grad is not None}


def flatten(parameters: Mapping[str, nn.Parameter]) -> FlatParameters:
    """Move parameters into one buffer and make them views of it.

    Raises:
        ValueError: nothing to train, or a parameter that is not fp32 (fp16 weights cannot be unscaled or updated
            exactly).
    """
    if not parameters:
        raise ValueError("no trainable parameters")
    wrong = [name for name, parameter in parameters.items() if parameter.dtype != torch.float32]
    if wrong:
        raise ValueError(f"trainable parameters must be fp32, and {wrong[0]} is {parameters[wrong[0]].dtype}")
    weights = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()]))
    weights.grad = torch.zeros_like(weights)
    start = 0
    for parameter in parameters.values():
        span = slice(start, start + parameter.numel())
        parameter.data = weights.data[span].view_as(parameter)
        parameter.grad = weights.grad[span].view_as(parameter)
        start = span.stop
    return FlatParameters(weights, dict(parameters))
