"""Linear layers for decoding: those that read the same tensor become one product, with a 16-bit copy of their weights.

A decoding step multiplies a few rows with every weight, so it takes the time to read the weights, and the time to
launch its kernels. Of n layers with the same input x (queries, keys and values; gate and up), each with adapters::

    [y_1 ... y_n  h_1 ... h_m] = x [W_1 ... W_n  A'_1 ... A'_m]^T        A' = s A
    [y_1 ... y_n] += [h_1 ... h_m] U^T         U (O, R): B_j in the rows of its layer and the columns of h_j, else 0

That is two launches instead of 3 n. W is dequantised once, when the layers are joined. A' and U are written anew before
sampling (`refresh`), in place, so captured graphs see every update; of an adapter that is switched off, U has zeros.
The numbers are those of model/linear.py: the same products in the same dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lowlevel.kernels.dequantize import Quantised, dequantize
from lowlevel.kernels.operators import operator
from lowlevel.model.linear import FrozenLinear4bit, quantised_state

PLAIN = (nn.Linear, bnb.nn.Linear4bit, FrozenLinear4bit)  # classes derived from these (routers) do more than a product


class Place(NamedTuple):
    """Where a linear layer is: its parent module and its name there."""

    parent: nn.Module
    name: str

    @property
    def layer(self) -> Any:
        """The layer: PEFT's, or a plain one."""
        return getattr(self.parent, self.name)

    @property
    def base(self) -> nn.Linear:
        """The frozen layer, without adapters."""
        layer = self.layer
        return cast("nn.Linear", layer.base_layer if isinstance(layer, LoraLayer) else layer)


class Joined:
    """Layers with the same input."""

    def __init__(self, places: Sequence[Place], dtype: torch.dtype) -> None:
        """Copies the weights in `dtype`."""
        self.places, self.dtype = places, dtype
        layers, bases = [place.layer for place in places], [place.base for place in places]
        self.adapters = [(n, layer, name) for n, layer in enumerate(layers) for name in _adapters(layer)]
        sizes = [base.out_features for base in bases]
        self.out, self.rank = sum(sizes), sum(_down(layer, name).shape[0] for _, layer, name in self.adapters)
        device, inputs = bases[0].weight.device, bases[0].in_features
        self.weight = torch.empty(self.out + self.rank, inputs, dtype=dtype, device=device)
        self.up = torch.zeros(self.out, self.rank, dtype=dtype, device=device)
        biased = any(base.bias is not None for base in bases)
        self.bias = torch.zeros(self.out + self.rank, dtype=dtype, device=device) if biased else None
        starts, start = [], 0
        for base, size in zip(bases, sizes, strict=True):
            self.weight[start : start + size] = dense_weight(base, dtype)
            if self.bias is not None and base.bias is not None:
                self.bias[start : start + size] = base.bias
            starts.append(start)
            start += size
        self.found: Tensor | None = None  # the result, from the first layer's call to the last one's
        ends = [*starts[1:], self.out]
        self.parts = [Part(self, n, *span) for n, span in enumerate(zip(starts, ends, strict=True))]
        self._downs: list[Tensor] = []  # of each adapter: its rows of `weight`
        self._ups: list[Tensor] = []  # its block of `up`
        column = 0
        for n, layer, name in self.adapters:
            end = column + _down(layer, name).shape[0]
            self._downs.append(self.weight[self.out + column : self.out + end])
            self._ups.append(self.up[starts[n] : ends[n], column:end])
            column = end

    def refreshed(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """What `refresh` copies: a part of `weight` or `up`, its source, and a factor."""
        for (_, layer, name), down, up in zip(self.adapters, self._downs, self._ups, strict=True):
            active = name in layer.active_adapters and not layer.disable_adapters
            yield down, _down(layer, name), layer.scaling[name]
            yield up, layer.lora_B[name].weight, 1.0 if active else 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O + R): the outputs side by side, and what else the product gives."""
        rows = joined_linear(x.to(self.dtype).flatten(0, -2), self.weight, self.up, self.bias)
        return rows.view(*x.shape[:-1], -1).to(x.dtype)


class Part(nn.Module):
    """Takes the place of one of the layers. The first one computes all outputs, the last one lets go of them."""

    def __init__(self, joined: Joined, number: int, start: int, end: int) -> None:
        super().__init__()
        self.joined, self.number, self.start, self.end = joined, number, start, end
        self.last = number == len(joined.places) - 1

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I), the same tensor for all layers -> (..., out_features)."""
        if self.number == 0:
            self.joined.found = self.joined(x)
        found = self.joined.found
        assert found is not None
        if self.last:
            self.joined.found = None
        return found[..., self.start : self.end]


class JoinedLayers:
    """All linear layers of the decoder layers, joined."""

    def __init__(self, layers: Sequence[nn.Module], run: Callable[[], Any], dtype: torch.dtype) -> None:
        """`run` makes a forward pass, in which it is seen which layers read the same tensor."""
        self.groups = [Joined(places, dtype) for places in _with_same_input(layers, run)]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the adapters' values and which of them are active."""
        copies = [one for group in self.groups for one in group.refreshed()]
        if copies:
            targets, sources, factors = zip(*copies, strict=True)
            scaled = torch._foreach_mul(sources, factors)
            torch._foreach_copy_(targets, scaled)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The parts are in the places of the layers within the block."""
        parts = [(place, part) for group in self.groups for place, part in zip(group.places, group.parts, strict=True)]
        own = [place.layer for place, _ in parts]
        for place, part in parts:
            place.parent._modules[place.name] = part
        try:
            yield
        finally:
            for (place, _), layer in zip(parts, own, strict=True):
                place.parent._modules[place.name] = layer


def dense_weight(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """W (O, I) of a frozen layer."""
    if isinstance(base, bnb.nn.Linear4bit):
        return dequantize(Quantised.of(base.weight, quantised_state(base)), dtype)
    return base.weight.to(dtype)


def joined_bytes(layers: Sequence[nn.Module], dtype: torch.dtype) -> int:
    """Memory of the copies, adapters left out."""
    bases = [place.base for layer in layers for place in _places(layer)]
    return sum(base.in_features * base.out_features for base in bases) * dtype.itemsize


@operator("joined_linear")
def joined_linear(x: Tensor, weight: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """The equations of the module's docstring: x (T, I), weight (O + R, I), up (O, R) -> (T, O + R)."""
    y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    if up.shape[1]:
        y[:, : up.shape[0]].addmm_(y[:, up.shape[0] :], up.T)
    return y


@torch.library.register_fake("lowlevel::joined_linear")
def _(x: Tensor, weight: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _adapters(layer: Any) -> list[str]:
    return list(layer.lora_A) if isinstance(layer, LoraLayer) else []


def _down(layer: Any, name: str) -> Tensor:
    return cast(Tensor, layer.lora_A[name].weight)


def _places(layer: nn.Module) -> list[Place]:
    """The linear layers of a decoder layer; PEFT's count as one."""
    found = []
    for name, child in layer.named_children():
        if isinstance(child, LoraLayer) or type(child) in PLAIN:
            found.append(Place(layer, name))
        else:
            found += _places(child)
    return found


def _with_same_input(layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[list[Place]]:
    """The linear layers of each decoder layer in the order of their calls, those with the same input together."""
    groups: dict[tuple[int, int], list[Place]] = defaultdict(list)
    inputs = []

    def note(number: int, place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs.append(given[0])  # kept, so that no two have the same id
            groups[number, id(given[0])].append(place)

        return hook

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            for place in _places(layer):
                hooks.enter_context(place.layer.register_forward_pre_hook(note(number, place)))
        run()
    return list(groups.values())
