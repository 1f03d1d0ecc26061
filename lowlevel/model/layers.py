"""How decoder layers run: recomputed in the backward pass or not, compiled or not.

All layers of a model share one compiled function: their weights are inputs of its graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lowlevel.determinism import compiler_options
from lowlevel.model.dropout import DropoutState
from lowlevel.model.offload import HostInputs

Forward = Callable[..., Tensor]
# Inductor's settings. combo_kernels: independent small kernels (casts of adapter weights) in one launch.
# emulate_precision_casts: round where eager layers do, so that the policy of a fresh adapter equals its reference.
COMPILER: Mapping[str, Any] = {"combo_kernels": True, "emulate_precision_casts": True}


class DecoderLayers:
    """The decoder layers of a model. Their `forward` is replaced: checkpointed, compiled, or both."""

    def __init__(
        self, base: nn.Module, recomputed: int | None, dropout: DropoutState, host: HostInputs | None = None
    ) -> None:
        """`recomputed`: how many layers, from the first, keep only their input (in `host` if given); None: all."""
        self.dropout = dropout
        self.host = host
        self.layers: Sequence[nn.Module] = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.recomputed = len(self.layers) if recomputed is None else recomputed
        self.compiled = False
        self._hook: Any = None
        self._base = base
        self.use(compiled=False)

    def use(self, *, compiled: bool) -> None:
        """Run the layers compiled or eager."""
        if compiled:  # dynamo's limit of 8 counts all models of this process, also deleted ones
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for number, layer in enumerate(self.layers):
            forward = inspect.unwrap(type(layer).forward)  # transformers 5.23 wraps it in a checkpoint of its own
            keep = partial(self.host.keeping, number) if self.host else nullcontext
            run = _bind(forward, layer, number < self.recomputed, keep)
            if compiled:  # torch keeps compiled graphs by code object: all layers share them
                fast = torch.compile(forward, fullgraph=True, options={**COMPILER, **compiler_options()})
                run = self._with_marks(_bind(fast, layer, number < self.recomputed, keep), run)
            layer.forward = run  # type: ignore[method-assign]
        self._require_input_grads(compiled)
        self.compiled = compiled

    def _with_marks(self, forward: Forward, plain: Forward) -> Forward:
        """Mark the sizes that change between batches as dynamic, so that one graph serves every shape.

        `plain` runs where there is no batch, as in Hugging Face's generate.
        """
        mark = torch._dynamo.maybe_mark_dynamic

        def run(hidden_states: Tensor, **arguments: Any) -> Tensor:
            if "spans" not in arguments:
                return plain(hidden_states, **arguments)
            rotary, spans = arguments["position_embeddings"], arguments["spans"]
            for tensor in (hidden_states, *rotary, arguments["position_ids"], self.dropout.token_keys, spans[3]):
                if tensor is not None:
                    mark(tensor, 1)
            for index in spans[:3]:
                if index is not None:
                    mark(index, 0)
            return forward(hidden_states, **arguments)

        return run

    def _require_input_grads(self, wanted: bool) -> None:
        """Let the first layer's input require a gradient like all others; otherwise it needs its own graph.

        That of a trained embedding does.
        """
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        embeddings = self._base.get_input_embeddings()  # type: ignore[operator]
        frozen = isinstance(embeddings, nn.Module) and not any(p.requires_grad for p in embeddings.parameters())
        if wanted and frozen:
            anchor = torch.zeros((), requires_grad=True)
            self._hook = embeddings.register_forward_hook(lambda _, __, output: _AskForGrad.apply(output, anchor))


class _AskForGrad(torch.autograd.Function):
    """The identity, with an output that requires a gradient because `anchor` does; the gradient is dropped.

    `requires_grad_()` would make the output a leaf, whose gradient stays in memory until the step's end.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, anchor: Tensor) -> Tensor:
        return hidden_states.clone()  # a view would need another compiled graph

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _bind(
    forward: Forward, layer: nn.Module, recompute: bool, keep: Callable[[], AbstractContextManager[None]]
) -> Forward:
    """`layer.forward`, recomputed in the backward pass or not; `keep` decides where its input lies until then."""

    def run(hidden_states: Tensor, *others: Any, **kwargs: Any) -> Tensor:
        if others:  # GPT-BigCode, Gemma 4: their meaning is not known here
            raise TypeError(f"its layers take {1 + len(others)} positional arguments; only one is supported")
        if recompute and torch.is_grad_enabled():
            settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # dropout is a hash
            with keep():
                return checkpoint(forward, layer, hidden_states, **settings, **kwargs)
        return forward(layer, hidden_states, **kwargs)

    return run
