"""The trained weights in one buffer, and in full fine-tuning beside them those of the base as loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TAIL = 1024  # numbers behind the flat gradient


@dataclass(frozen=True)
class FlatParameters:
    """All trainable weights in one buffer and all gradients in another, so an optimizer step is a few kernels."""

    weights: nn.Parameter  # (n,) fp32, with a gradient (n,) fp32
    views: Mapping[str, nn.Parameter]  # the trained parameters, views of both
    parts: tuple[tuple[nn.Parameter, float], ...]  # for the optimizer: views of both, and factors of the learning rate
    with_tail: Tensor  # (n + TAIL,): the gradient, and room for numbers that several GPUs sum with it (ranks.py)

    @property
    def grad(self) -> Tensor:
        """The flat gradient, never None; backward passes add to it."""
        assert self.weights.grad is not None
        return self.weights.grad

    @property
    def tail(self) -> Tensor:
        """The room behind the gradient, (TAIL,)."""
        return self.with_tail[self.weights.numel() :]

    def named_grads(self) -> dict[str, Tensor]:
        """Gradient of each parameter, as a view."""
        return {name: view.grad for name, view in self.views.items() if view.grad is not None}


def flatten(
    parameters: Mapping[str, nn.Parameter], ratio: float | None = None, *, masters: bool = False
) -> FlatParameters:
    """Move parameters into one buffer and make them views of it. Raises ValueError: none, or one that is not fp32.

    Args:
        parameters: by name.
        ratio: learning rate of every B relative to that of every A (LoRA+). All A then come before all B, so that each
            kind is one contiguous part; without a ratio the order is the given one.
        masters: parameters in 16 bits become fp32.
    """
    if not parameters:
        raise ValueError("no trainable parameters")
    wrong = [name for name, parameter in parameters.items() if parameter.dtype != torch.float32]
    if wrong and not masters:
        raise ValueError(f"trainable parameters must be fp32, and {wrong[0]} is {parameters[wrong[0]].dtype}")
    up = {name: parameter for name, parameter in parameters.items() if ratio is not None and ".lora_B." in name}
    parameters = {name: parameter for name, parameter in parameters.items() if name not in up} | up
    device = next(iter(parameters.values())).device
    weights = nn.Parameter(torch.empty(sum(p.numel() for p in parameters.values()), dtype=torch.float32, device=device))
    with_tail = torch.zeros(weights.numel() + TAIL, device=device)
    weights.grad = with_tail[: weights.numel()]
    start = 0
    for parameter in parameters.values():
        span = slice(start, start + parameter.numel())
        parameter.data = weights.data[span].view_as(parameter).copy_(parameter.data)
        parameter.grad = weights.grad[span].view_as(parameter)
        start = span.stop
    if ratio is None:
        return FlatParameters(weights, dict(parameters), ((weights, 1.0),), with_tail)
    parts = []
    middle = weights.numel() - sum(parameter.numel() for parameter in up.values())
    for span, factor in ((slice(0, middle), 1.0), (slice(middle, None), ratio)):
        part = nn.Parameter(weights.data[span])
        part.grad = weights.grad[span]
        parts.append((part, factor))
    return FlatParameters(weights, dict(parameters), tuple(parts), with_tail)


class Untrained:
    """The weights of the base as loaded, beside the trained ones of full fine-tuning: the reference of dpo and kto.

    They take 2 more bytes a weight. At the start both give equal bits, because the masters are exactly the base's
    numbers.

    Attributes:
        sha256: `base_sha256` of them.
        kept: by parameter name; None if nothing reads them any more. Those that are rounded before use anyway (of
            products, the input embedding) are in the dtype that the base was loaded in, the others in fp32, so that
            the reference computes in the same dtypes as the policy.
    """

    def __init__(self, base: PreTrainedModel, parameters: Mapping[str, nn.Parameter], sha256: str) -> None:
        rounded = [module.weight for module in base.modules() if isinstance(module, nn.Linear)]
        short = {id(weight) for weight in [*rounded, *base.get_input_embeddings().parameters()]}
        self.sha256 = sha256
        self.kept: dict[str, Tensor] | None = {
            name: p.data if id(p) in short else p.data.float() for name, p in parameters.items()
        }
        self._parameters = parameters
        self._masters: dict[str, Tensor] = {}
        self._grads: dict[str, Tensor | None] = {}

    def trains(self) -> None:
        """The parameters now hold the trained weights: remember these."""
        self._masters = {name: p.data for name, p in self._parameters.items()}
        self._grads = {name: p.grad for name, p in self._parameters.items()}

    def show(self, trained: bool) -> None:
        """Let the parameters hold the trained weights, or those of the base."""
        assert trained or self.kept is not None
        for name, tensor in (self._masters if trained else self.kept or {}).items():
            self._parameters[name].data = tensor
            self._parameters[name].grad = self._grads[name] if trained else None  # the compiler wants equal dtypes

    @torch.no_grad()
    def restart(self) -> None:
        """Give the trained weights the values of the base."""
        for name, tensor in (self.kept or {}).items():
            self._masters[name].copy_(tensor)

    @property
    def unchanged(self) -> bool:
        """Whether the trained weights are those of the base."""
        kept = self.kept
        return kept is not None and all(torch.equal(self._masters[name], kept[name].float()) for name in kept)

    @property
    def nbytes(self) -> int:
        """Memory of the base's weights."""
        return sum(tensor.nbytes for tensor in (self.kept or {}).values())
