"""A 4-bit linear layer as compiled steps run it: dequantise in one kernel, multiply in cuBLAS, keep nothing.

    y = x W^T        dx = dy W        W = dequantize(codes), made anew for each product

Uncompiled, the layer is bitsandbytes' own, which is what the compiled one is tested against. (An operator with a
registered gradient and no autograd.Function: torch 2.11 compiles the gradient of one to zero in some graphs.)
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowlevel.kernels.dequantize import Quantised, dequantize


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """A bitsandbytes layer that calls `linear_4bit` where it is compiled. Made by `with_one_kernel` alone."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in the dtype of x; products in the layer's compute dtype."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        state = quantised_state(self)
        compute = self.compute_dtype or x.dtype
        nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (None, None, None)
        inner = state.state2.blocksize if state.nested else 1
        out = linear_4bit(
            x.to(compute), self.weight, state.code, state.absmax, *nested, list(state.shape), state.blocksize, inner
        )
        return (out if self.bias is None else out + self.bias.to(compute)).to(x.dtype)


def with_one_kernel(model: nn.Module) -> None:
    """Let every 4-bit layer of a model be compiled as above. Its weights and its uncompiled pass stay what they are."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = FrozenLinear4bit


def quantised_state(module: Any) -> Any:
    """The quantisation state of a bitsandbytes Linear4bit, which its types leave out."""
    return module.weight.quant_state


@torch.library.custom_op("lowlevel::linear_4bit", mutates_args=())
def linear_4bit(
    x: Tensor, packed: Tensor, code: Tensor, absmax: Tensor, code2: Tensor | None, absmax2: Tensor | None,
    offset: Tensor | None, shape: list[int], blocksize: int, blocksize2: int,
) -> Tensor:  # fmt: skip
    """x (..., I) in the compute dtype, a weight (O, I) as in `Quantised` -> (..., O). Differentiable once, in x."""
    weight = Quantised(packed, tuple(shape), code, absmax, blocksize, code2, absmax2, offset, blocksize2)
    return linear(x, dequantize(weight, x.dtype))


@linear_4bit.register_fake
def _(x, packed, code, absmax, code2, absmax2, offset, shape, blocksize, blocksize2):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op("lowlevel::linear_4bit_backward", mutates_args=())
def _backward(
    grad: Tensor, packed: Tensor, code: Tensor, absmax: Tensor, code2: Tensor | None, absmax2: Tensor | None,
    offset: Tensor | None, shape: list[int], blocksize: int, blocksize2: int,
) -> Tensor:  # fmt: skip
    """dy (..., O) -> dx (..., I)."""
    weight = Quantised(packed, tuple(shape), code, absmax, blocksize, code2, absmax2, offset, blocksize2)
    return grad @ dequantize(weight, grad.dtype)


@_backward.register_fake
def _(grad, packed, code, absmax, code2, absmax2, offset, shape, blocksize, blocksize2):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return grad.new_empty(*grad.shape[:-1], shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.shape, ctx.blocksize, ctx.blocksize2 = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = _backward(grad, *ctx.saved_tensors, ctx.shape, ctx.blocksize, ctx.blocksize2)
    return dx, *[None] * 9


linear_4bit.register_autograd(_gradient, setup_context=_save)
