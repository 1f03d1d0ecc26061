"""Linear layers as compiled steps run them: the base's product, and the adapters' beside it.

    y  = x W^T + h B^T           h = x' A'^T        x' = drop(x)        A' = s A
    dx = dy W                    dh = dy B          dB = dy^T h         dA' = dh^T x'        dx' = dh A'

W is dequantised for each product. PEFT's own layer writes h B^T, its multiple by s = lora_alpha / r and the sum as
three tensors of y's size; here s goes into A, which is small, and cuBLAS adds h B^T to x W^T where that lies. Products
of rank r are too small to fill a GPU: they run on a second stream while dequantisation and the large product do on the
first. Uncompiled, the layers are PEFT's and bitsandbytes' own, which is what the compiled ones are tested against. (An
operator with a registered gradient and no autograd.Function: torch 2.11 compiles the gradient of one to zero in some
graphs.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import compress
from typing import TYPE_CHECKING, Any, cast

import bitsandbytes as bnb
import torch
from peft.tuners.lora import bnb as peft_bnb
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from lowlevel.kernels.dequantize import Quantised, dequantize
from lowlevel.kernels.operators import operator

if TYPE_CHECKING:
    Adapted = peft_layer.Linear
else:
    Adapted = object  # a mixin: the class beside it is PEFT's


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """A bitsandbytes layer whose compiled product is ours. Made by `install_dequantising_products` alone."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in the dtype of x; products in the layer's compute dtype."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        return product(self, x.to(self.compute_dtype or x.dtype), [], [], []).to(x.dtype)


def install_dequantising_products(model: nn.Module) -> None:
    """Change the class of each 4-bit layer, so that it compiles as above; weights and eager results stay the same."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = FrozenLinear4bit


class _SideBySide(Adapted):
    """An adapted layer of PEFT's whose compiled pass is the module's first line. Made by `install_side_by_side`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if not torch.compiler.is_compiling() or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        names = [name for name in self.active_adapters if name in self.lora_A]
        dropped = [self.lora_dropout[name](x).to(dtype) for name in names]
        down = [(cast(Tensor, self.lora_A[name].weight) * self.scaling[name]).to(dtype) for name in names]
        up = [cast(Tensor, self.lora_B[name].weight).to(dtype) for name in names]
        return product(cast(nn.Linear, self.base_layer), x.to(dtype), dropped, down, up).to(x.dtype)


class _AdaptedLinear4bit(_SideBySide, peft_bnb.Linear4bit):
    pass


class _AdaptedLinear(_SideBySide, peft_layer.Linear):
    pass


def install_side_by_side(model: nn.Module) -> None:
    """Change the class of each adapted layer, so that it compiles as above; names and eager results stay PEFT's."""
    for module in model.modules():
        if type(module) is peft_bnb.Linear4bit:
            module.__class__ = _AdaptedLinear4bit
        elif type(module) is peft_layer.Linear:
            module.__class__ = _AdaptedLinear


def product(layer: nn.Linear, x: Tensor, dropped: list[Tensor], down: list[Tensor], up: list[Tensor]) -> Tensor:
    """x W^T + sum_k (dropped_k down_k^T) up_k^T + bias.

    All in one dtype: x and dropped_k (..., I), down_k (r, I), up_k (O, r) -> (..., O). `layer` is frozen, in 4 bits or
    in that dtype.
    """
    if isinstance(layer, bnb.nn.Linear4bit):
        state = quantised_state(layer)
        nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (None, None, None)
        inner_block = state.state2.blocksize if state.nested else 1
        constants = (state.code, state.absmax, *nested, list(state.shape), state.blocksize, inner_block)
    else:
        constants = (None, None, None, None, None, list(layer.weight.shape), 1, 1)
    out = adapted_linear(x, dropped, down, up, layer.weight, *constants)[0]
    return out if layer.bias is None else out + layer.bias.to(out.dtype)


def quantised_state(module: Any) -> Any:
    """The quantisation state of a bitsandbytes Linear4bit, which its types leave out."""
    return module.weight.quant_state


@operator("adapted_linear")
def adapted_linear(
    x: Tensor, dropped: list[Tensor], down: list[Tensor], up: list[Tensor], packed: Tensor, code: Tensor | None,
    absmax: Tensor | None, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None, shape: list[int],
    blocksize: int, blocksize2: int,
) -> list[Tensor]:  # fmt: skip
    """y (..., O) of the module's first line, and of each adapter h (..., r). Arguments as in `product`; W (O, I) as in
    `Quantised`, or without `code` as it is. Differentiable once, in all but W.
    """
    inner = [one.new_empty(*one.shape[:-1], a.shape[0]) for one, a in zip(dropped, down, strict=True)]
    with _two_streams(dropped) as second:
        with second:
            for one, a, h in zip(dropped, down, inner, strict=True):
                torch.mm(_rows(one), a.T, out=_rows(h))
        y = _rows(x) @ _weight(x, packed, code, absmax, code2, absmax2, offset, shape, blocksize, blocksize2).T
    for h, b in zip(inner, up, strict=True):
        y.addmm_(_rows(h), b.T)
    return [y.view(*x.shape[:-1], shape[0]), *inner]


@operator("adapted_linear_backward")
def _backward(
    grad: Tensor, dropped: list[Tensor], inner: list[Tensor], down: list[Tensor], up: list[Tensor],
    trained: list[bool], packed: Tensor, code: Tensor | None, absmax: Tensor | None, code2: Tensor | None,
    absmax2: Tensor | None, offset: Tensor | None, shape: list[int], blocksize: int, blocksize2: int,
) -> list[Tensor]:  # fmt: skip
    """The module's second line: dx; dx' of each adapter; dA' of each in training; dB of each in training."""
    dy = _rows(grad)
    of_inner, of_dropped = _empty(inner), _empty(dropped)
    of_down, of_up = _empty(compress(down, trained)), _empty(compress(up, trained))
    with _two_streams(dropped) as second:
        with second:
            for dh, b, one, a in zip(of_inner, up, of_dropped, down, strict=True):
                torch.mm(dy, b, out=_rows(dh))
                torch.mm(_rows(dh), a, out=_rows(one))
            learning = (compress(part, trained) for part in (of_inner, dropped, inner))
            for dh, one, h, da, db in zip(*learning, of_down, of_up, strict=True):
                torch.mm(_rows(dh).T, _rows(one), out=da)
                torch.mm(dy.T, _rows(h), out=db)
        dx = dy @ _weight(grad, packed, code, absmax, code2, absmax2, offset, shape, blocksize, blocksize2)
    return [dx.view(*grad.shape[:-1], shape[1]), *of_dropped, *of_down, *of_up]


def _weight(like: Tensor, packed: Tensor, code: Tensor | None, absmax: Tensor | None, *others: Any) -> Tensor:
    """(O, I) in the dtype of `like`."""
    if code is None or absmax is None:
        return packed
    code2, absmax2, offset, shape, blocksize, blocksize2 = others
    weight = Quantised(packed, tuple(shape), code, absmax, blocksize, code2, absmax2, offset, blocksize2)
    return dequantize(weight, like.dtype)


def _empty(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Uninitialised contiguous tensors of the same shapes, for gradients."""
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def _rows(x: Tensor) -> Tensor:
    """(..., n) -> (rows, n), a view of what is contiguous."""
    return x.reshape(-1, x.shape[-1])


@cache
def _second_stream(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Event, torch.cuda.Event]:
    """The stream, and the events of its beginning and its end: made once, since that takes as long as a launch."""
    return torch.cuda.Stream(device), torch.cuda.Event(), torch.cuda.Event()


@contextmanager
def _two_streams(dropped: list[Tensor]) -> Iterator[AbstractContextManager[Any]]:
    """Yields a context whose kernels run on a second stream, at the same time as the rest of the block.

    Leaving the block makes the first stream wait for both.

    Every tensor that the second stream writes must have been allocated before the block: the allocator tracks only the
    first stream.
    """
    if not (dropped and dropped[0].is_cuda):
        yield nullcontext()
        return
    device = dropped[0].device
    first = torch.cuda.current_stream(device)
    second, begun, ended = _second_stream(device)
    begun.record(first)
    second.wait_event(begun)
    try:
        yield torch.cuda.stream(second)
    finally:
        ended.record(second)
        first.wait_event(ended)


@torch.library.register_fake("lowlevel::adapted_linear")
def _(x, dropped, down, up, packed, code, absmax, code2, absmax2, offset, shape, blocksize, blocksize2):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    sizes = [shape[0], *(a.shape[0] for a in down)]
    return [x.new_empty(*x.shape[:-1], size) for size in sizes]


@torch.library.register_fake("lowlevel::adapted_linear_backward")
def _(grad, dropped, inner, down, up, trained, *weight):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202
    shape = weight[6]
    parts = (dropped, compress(down, trained), compress(up, trained))
    return [grad.new_empty(*grad.shape[:-1], shape[1]), *(one for part in parts for one in _empty(part))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, dropped, down, up, *weight, ctx.shape, ctx.blocksize, ctx.blocksize2 = inputs
    inner = output[1:]
    ctx.adapters = len(inner)
    ctx.mark_non_differentiable(*inner)
    ctx.save_for_backward(*dropped, *inner, *down, *up, *weight)


def _gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    n, saved = ctx.adapters, list(ctx.saved_tensors)
    parts = [saved[i * n : (i + 1) * n] for i in range(4)]  # dropped, inner, down, up
    trained = list(ctx.needs_input_grad[3])
    weight = (*saved[4 * n :], ctx.shape, ctx.blocksize, ctx.blocksize2)
    dx, *found = _backward(grads[0], *parts, trained, *weight)
    of_dropped, found = found[:n], iter(found[n:])
    of_down, of_up = ([next(found) if learns else None for learns in trained] for _ in range(2))
    return dx, of_dropped, of_down, of_up, *[None] * len(weight)


torch.library.register_autograd("lowlevel::adapted_linear", _gradient, setup_context=_save)
