"""Linear layers of compiled steps: the frozen base's product plus the products of its adapters.

    y  = x W^T + h B^T           h = x' A'^T        x' = drop(x)        A' = s A
    dx = dy W                    dh = dy B          dB = dy^T h         dA' = dh^T x'        dx' = dh A'

W is dequantised for each product. PEFT's own layer writes three tensors of y's size: h B^T, its multiple by
s = lora_alpha / r, and the sum. Here s scales A, which is small, and cuBLAS adds h B^T to x W^T in place. Products of
rank r are too small to fill a GPU, so they run on a second stream, in parallel with dequantisation and the large
product. Uncompiled layers run the code of PEFT and bitsandbytes, with which tests compare the compiled ones.
These are operators because torch 2.11 compiles the gradient of some autograd.Functions to zero.

DoRA (arXiv 2402.09353) learns the length of each row of W + B A' apart, m. Lengths are constants to the gradient, as in
the paper's section 4.3 and in PEFT, and need no product of W's size but W A'^T, of r columns:

    y = m / |W + B A'| * (x W^T + h B^T)        |W + B A'|^2 = |W|^2 + rowsum(B * (2 W A'^T + B A' A'^T))

PEFT forms W + B A' and, in training, drops inputs of W too; here dropout is on the adapter's input alone, as in LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import compress, islice
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
    Adapted = object  # a mixin for PEFT's classes


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """A bitsandbytes layer that uses our product when compiled."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in the dtype of x; products in the layer's compute dtype."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        return product(self, x.to(self.compute_dtype or x.dtype), [], [], []).to(x.dtype)


def install_dequantising_products(model: nn.Module) -> None:
    """Change the class of each 4-bit layer to `FrozenLinear4bit`; weights and eager results stay the same."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = FrozenLinear4bit


class _SideBySide(Adapted):
    """A PEFT layer that computes the first line of the module's docstring when compiled, and in inference mode."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        own = torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or len(self.lora_magnitude_vector) > 0
        if not own or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        names = [name for name in self.active_adapters if name in self.lora_A]
        dropped = [self.lora_dropout[name](x).to(dtype) for name in names]
        down = [(cast(Tensor, self.lora_A[name].weight) * self.scaling[name]).to(dtype) for name in names]
        up = [cast(Tensor, self.lora_B[name].weight).to(dtype) for name in names]
        dora = [Dora.of(self, name) for name in names if name in self.lora_magnitude_vector]
        return product(cast(nn.Linear, self.base_layer), x.to(dtype), dropped, down, up, *dora).to(x.dtype)


@dataclass(frozen=True)
class Dora:
    """What DoRA adds to an adapter's product, fp32."""

    magnitude: Tensor  # m (O,)
    squares: Tensor  # |W|^2 by row, (O,)
    down: Tensor  # A' (r, I)
    up: Tensor  # B (O, r)

    @classmethod
    def of(cls, layer: Any, name: str) -> Dora:
        """The parts of a layer's adapter."""
        down, up = (part[name].weight.detach() for part in (layer.lora_A, layer.lora_B))
        return cls(layer.lora_magnitude_vector[name].weight, layer.weight_squares, down * layer.scaling[name], up)

    def scale(self, across: Tensor) -> Tensor:
        """m / |W + B A'|, (O,), given A' W^T (r, O)."""
        with torch.autocast(across.device.type, enabled=False):
            change = 2 * across.float().T + self.up @ (self.down @ self.down.T)
            squares = self.squares + (self.up * change).sum(1)
        return self.magnitude / squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


@torch.no_grad()
def prepare_dora(layer: Any, name: str, dtype: torch.dtype, *, fresh: bool) -> None:
    """Measure W's rows once; a `fresh` adapter's m is their length, so that it starts as the base. B must be 0."""
    squares = _dense(*_packed(layer.base_layer), dtype).float().square().sum(1)
    layer.register_buffer("weight_squares", squares, persistent=False)
    if fresh:
        layer.lora_magnitude_vector[name].weight.copy_(squares.sqrt())


class _AdaptedLinear4bit(_SideBySide, peft_bnb.Linear4bit):
    pass


class _AdaptedLinear(_SideBySide, peft_layer.Linear):
    pass


def install_side_by_side(model: nn.Module) -> None:
    """Change the class of each adapted layer to one of these; names and eager results stay PEFT's."""
    classes: dict[type, type] = {peft_bnb.Linear4bit: _AdaptedLinear4bit, peft_layer.Linear: _AdaptedLinear}
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))


def product(
    layer: nn.Linear, x: Tensor, dropped: list[Tensor], down: list[Tensor], up: list[Tensor], dora: Dora | None = None
) -> Tensor:
    """x W^T + sum_k (dropped_k down_k^T) up_k^T + bias, for a frozen layer in 4 bits or in the dtype of x.

    x and dropped_k (..., I), down_k (r, I), up_k (O, r) -> (..., O), all in one dtype. `dora` scales all but the bias.
    """
    weight, sizes = _packed(layer)
    out, *rest = adapted_linear(x, dropped, down, up, weight, sizes, dora is not None)
    if dora is not None:
        out = (out.float() * dora.scale(rest[-1])).to(out.dtype)
    return out if layer.bias is None else out + layer.bias.to(out.dtype)


def _packed(layer: nn.Linear) -> tuple[list[Tensor], list[int]]:
    """`weight` and `sizes` of `adapted_linear`."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return Quantised.of(layer.weight, quantised_state(layer)).pack()
    return [layer.weight], list(layer.weight.shape)


def quantised_state(module: Any) -> Any:
    """The QuantState of a bitsandbytes Linear4bit, or None; its weight has it too, but not one that FSDP2 gathered."""
    return module.quant_state


def quantised_states(model: nn.Module) -> dict[str, Any]:
    """The QuantState of each 4-bit weight, by the weight's name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    return {f"{name}.weight": quantised_state(layer) for name, layer in layers.items()}


@operator("adapted_linear")
def adapted_linear(
    x: Tensor, dropped: list[Tensor], down: list[Tensor], up: list[Tensor], weight: list[Tensor], sizes: list[int],
    across: bool,
) -> list[Tensor]:  # fmt: skip
    """y (..., O) and each adapter's h (..., r). Arguments as in `product`; differentiable once, in all but `weight`.

    `weight` and `sizes` are `Quantised.pack()`, or [W] and [O, I] for a weight that is not quantised. `across`: also
    down_k W^T (r, O) of the last adapter.
    """
    inner = [one.new_empty(*one.shape[:-1], a.shape[0]) for one, a in zip(dropped, down, strict=True)]
    with _two_streams(dropped) as second:
        with second:
            for one, a, h in zip(dropped, down, inner, strict=True):
                torch.mm(_rows(one), a.T, out=_rows(h))
        dense = _dense(weight, sizes, x.dtype)
        y = _rows(x) @ dense.T
    for h, b in zip(inner, up, strict=True):
        y.addmm_(_rows(h), b.T)
    return [y.view(*x.shape[:-1], sizes[0]), *inner, *([down[-1] @ dense.T] if across else [])]


@operator("adapted_linear_backward")
def _backward(
    grad: Tensor, dropped: list[Tensor], inner: list[Tensor], down: list[Tensor], up: list[Tensor],
    trained: list[bool], weight: list[Tensor], sizes: list[int],
) -> list[Tensor]:  # fmt: skip
    """dx; dx' of every adapter; dA' of each trained one; dB of each trained one."""
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
        dx = dy @ _dense(weight, sizes, grad.dtype)
    return [dx.view(*grad.shape[:-1], sizes[1]), *of_dropped, *of_down, *of_up]


def _dense(weight: list[Tensor], sizes: list[int], dtype: torch.dtype) -> Tensor:
    """W (O, I): dequantised to `dtype`, or the tensor itself if it is not quantised."""
    return weight[0] if len(weight) == 1 else dequantize(Quantised.unpack(weight, sizes), dtype)


def _empty(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Uninitialised contiguous tensors of the same shapes, for gradients."""
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def _rows(x: Tensor) -> Tensor:
    """(..., n) -> (rows, n); a view if x is contiguous."""
    return x.reshape(-1, x.shape[-1])


@cache
def _second_stream(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Event, torch.cuda.Event]:
    """A stream with events for its start and its end, cached because making them takes as long as a launch."""
    return torch.cuda.Stream(device), torch.cuda.Event(), torch.cuda.Event()


@contextmanager
def _two_streams(dropped: list[Tensor]) -> Iterator[AbstractContextManager[Any]]:
    """Yield a context whose kernels run on a second stream; at the block's end the first stream waits for it.

    Allocate the tensors that the second stream writes before the block: the allocator only tracks the first stream.
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
def _(x, dropped, down, up, weight, sizes, across):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    made = [x.new_empty(*x.shape[:-1], size) for size in (sizes[0], *(a.shape[0] for a in down))]
    return [*made, *([x.new_empty(down[-1].shape[0], sizes[0])] if across else [])]


@torch.library.register_fake("lowlevel::adapted_linear_backward")
def _(grad, dropped, inner, down, up, trained, weight, sizes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    parts = (dropped, compress(down, trained), compress(up, trained))
    return [grad.new_empty(*grad.shape[:-1], sizes[1]), *(one for part in parts for one in _empty(part))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, dropped, down, up, weight, ctx.sizes, _ = inputs
    inner = output[1 : len(down) + 1]
    ctx.adapters = len(inner)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*dropped, *inner, *down, *up, *weight)


def _gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    dropped, inner, down, up = (list(islice(saved, ctx.adapters)) for _ in range(4))
    weight = list(saved)
    trained = list(ctx.needs_input_grad[3])
    found = iter(_backward(grads[0], dropped, inner, down, up, trained, weight, ctx.sizes))
    dx, of_dropped = next(found), list(islice(found, ctx.adapters))
    of_down, of_up = ([next(found) if learns else None for learns in trained] for _ in range(2))
    return dx, of_dropped, of_down, of_up, [None] * len(weight), None, None


torch.library.register_autograd("lowlevel::adapted_linear", _gradient, setup_context=_save)
