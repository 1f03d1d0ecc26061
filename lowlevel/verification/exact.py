"""Examples as plain sequences, their log-probabilities in float64 from the model's hidden states, and the whole model
in float64: dequantised weights with the adapters merged in by arithmetic, one plain row at a time.

The whole model uses no packing, no mask or kernel of this package and no PEFT: W + s B A replaces each adapted layer,
on the CPU. The logits come from the model itself, with all that its forward pass adds after `hidden @ lm_head.T`.
Rotary angles stay in fp32, as the model defines them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowlevel.batch.layout import PackedBatch
from lowlevel.config.schema import ModelConfig
from lowlevel.labels import IGNORED
from lowlevel.model.base import empty_model, load_model_config
from lowlevel.model.linear import quantised_state, quantised_states
from lowlevel.model.policy import PARENT, SCORE, TRAINED, Policy, is_base

ROWS = 256  # of float64 logits at once: 65 MB for 32,000 words


@dataclass(frozen=True)
class Scored:
    """A sequence of L tokens, and which of them are scored."""

    ids: np.ndarray  # (L,)
    places: np.ndarray  # (n,) index of each scored token; token t is predicted from the tokens before it


@dataclass(frozen=True)
class HeadScores:
    """Scores of one example's n tokens: log-probability, and the K statistics that the loss reads, in its order.

    Both are in float64, from hidden states in the run's precision. Of a reward model it is the reward, and K = 0.
    """

    path: Tensor  # (n, 1 + K) from the training path's `Policy.scores`
    exact: Tensor  # (n, 1 + K) float64, from the upcast hidden states and head
    sides: Tensor  # (n,) branch of each token: 0 sft, 1 chosen, 2 rejected
    largest_logit: float  # in absolute value; of a reward the sum of its absolute products


def sequences_of(example: Any, paired: bool, rewards: bool = False) -> list[Scored]:
    """One sequence of a conversation; two of a pair, chosen and rejected.

    With `rewards` a sequence of L tokens has the place L: its hidden state is that of the last token.
    """
    if not paired:
        scored = np.flatnonzero(example.labels != IGNORED)
        return [Scored(example.input_ids, scored[scored > 0])]
    first = len(example.prompt_ids)
    wholes = [np.concatenate([example.prompt_ids, ids]) for ids in (example.chosen_ids, example.rejected_ids)]
    return [Scored(ids, np.array([len(ids)]) if rewards else np.arange(first, len(ids))) for ids in wholes]


def head_scores(policy: Policy, batch: PackedBatch, needs: Sequence[str] = (), temperature: float = 1.0) -> HeadScores:
    """Score a micro-batch's tokens twice from the same hidden states: by the training path, and in float64.

    Targets are read from `batch.targets`; dummy positions are left out. Logits are divided by `temperature`.
    """
    policy.dropout.disable()
    with torch.no_grad():
        hidden = policy.scored_hidden_states(batch) / temperature
        scores, statistics = policy.scores(hidden, batch.scored_targets, needs)
        path = torch.stack([scores, *statistics.values()], dim=1)
        targets = batch.targets.flatten()[batch.scored_positions]
        real = targets != IGNORED
        if policy.reward_head is not None:
            products = hidden[real].double() * policy.reward_head.double()
            exact, largest_logit = products.sum(-1, keepdim=True), float(products.abs().sum(-1).max())
        else:
            exact, largest_logit = scores64(hidden[real], policy.lm_head_weight, targets[real], needs)
    sides = batch.branch_ids.flatten()[batch.scored_positions][real]
    return HeadScores(path[real].double().cpu(), exact.cpu(), sides.cpu(), largest_logit)


def scores64(hidden: Tensor, weight: Tensor, targets: Tensor, needs: Sequence[str]) -> tuple[Tensor, float]:
    """Scores in float64: hidden (N, D), weight (V, D), targets (N,) -> (N, 1 + K), and the largest |logit|."""
    head = weight.detach().double()
    parts, largest_logit = [hidden.new_zeros(0, 1 + len(needs), dtype=torch.float64)], 0.0
    for states, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        if not len(wanted):
            continue
        logits = states.double() @ head.T  # (rows, V)
        largest_logit = max(largest_logit, float(logits.detach().abs().max()))
        parts.append(scores_of(logits, wanted, needs))
    return torch.cat(parts), largest_logit


def scores_of(logits: Tensor, targets: Tensor, needs: Sequence[str]) -> Tensor:
    """Scores (n, 1 + K) of logits (n, V) by their definitions: log-softmax at the targets (n,), then statistics."""
    logps = logits.log_softmax(-1)
    statistics = {
        "lse": lambda: (logits - logps)[:, 0],
        "mean_logp": lambda: logps.mean(-1),
        "log_square_sum": lambda: logps.detach().exp().square().sum(-1).log(),
    }
    return torch.stack([logps.gather(1, targets[:, None])[:, 0], *(statistics[name]() for name in needs)], dim=1)


PREFIX = "base_model.model."


class KeepDouble(TorchFunctionMode):
    """transformers casts norms and softmaxes to fp32; within this mode a float64 tensor stays float64."""

    def __torch_function__(
        self, func: Any, types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip casts of float64 tensors to a shorter floating dtype."""
        kwargs = kwargs or {}
        double = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if double and func is Tensor.float:
            return args[0]
        if double and func is Tensor.to and any(_shorter(v) for v in (*args[1:], *kwargs.values())):
            return args[0]
        if double and _shorter(kwargs.get("dtype")):
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _shorter(value: object) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point and value != torch.float64


def updated(weight: Tensor, a: Tensor, b: Tensor, scaling: float, m: Tensor | None = None) -> Tensor:
    """A weight (out, in) with an adapter's scaling * B A; of DoRA its rows have the lengths m (out,)."""
    changed = weight + scaling * (b @ a)
    return changed if m is None else (m / changed.detach().norm(dim=1))[:, None] * changed


@dataclass(frozen=True)
class ExactModel:
    """float64 on the CPU. `statistics`: those that the loss reads."""

    model: Any
    fixed: dict[str, Tensor]  # by name, with the frozen adapter merged in
    views: Mapping[str, tuple[slice, torch.Size]]  # of the flat weights, by their names in the policy
    layers: Mapping[str, tuple[str, float]]  # weights under the trained adapter: its layer's name, and its scaling
    whole: Mapping[str, str]  # weights that are trained themselves: their names in the policy
    statistics: tuple[str, ...]

    def weights(self, flat: Tensor | None) -> dict[str, Tensor]:
        """Merged weights by name: with the trained adapter at `flat` (n,) float64, or without it.

        A moving reference is the trained adapter at other weights.
        """
        if flat is None:
            return self.fixed
        own = {name: flat[span].view(shape) for name, (span, shape) in self.views.items()}
        merged = self.fixed | {name: own[view] for name, view in self.whole.items()}
        for name, (stem, scaling) in self.layers.items():
            a, b = (own[f"{stem}.lora_{which}.{TRAINED}.weight"] for which in "AB")
            m = own.get(f"{stem}.lora_magnitude_vector.{TRAINED}.weight")
            merged[name] = updated(merged[name], a, b, scaling, m)
        return merged

    def scores(self, weights: dict[str, Tensor], sequence: Scored) -> Tensor:
        """`token_scores`; with a reward head the sequence's reward, (1, 1)."""
        return self.reward(weights, sequence) if SCORE in weights else self.token_scores(weights, sequence)

    def reward(self, weights: dict[str, Tensor], sequence: Scored) -> Tensor:
        """The head on the last token's final hidden state, (1, 1)."""
        kept: list[Tensor] = []
        ids = torch.as_tensor(sequence.ids, dtype=torch.int64)[None]
        plain = {name: weight for name, weight in weights.items() if name != SCORE}
        keep = self.model.get_decoder().register_forward_hook(lambda *call: kept.append(call[2].last_hidden_state))
        with keep, KeepDouble():
            torch.func.functional_call(self.model, plain, kwargs={"input_ids": ids, "use_cache": False})
        assert kept[0].dtype == torch.float64
        return kept[0][0, -1:] @ weights[SCORE].view(-1, 1)

    def token_scores(self, weights: dict[str, Tensor], sequence: Scored) -> Tensor:
        """Log-probability of each scored token and its statistics, (n, 1 + K) float64."""
        ids = torch.as_tensor(sequence.ids, dtype=torch.int64)[None]
        places = torch.as_tensor(sequence.places, dtype=torch.int64)
        takes = inspect.signature(self.model.forward).parameters
        only = {"logits_to_keep": places - 1} if "logits_to_keep" in takes else {}  # not all positions
        arguments = {"input_ids": ids[:, : int(places.max()) + 1], "use_cache": False, **only}
        with KeepDouble():
            logits = torch.func.functional_call(self.model, weights, kwargs=arguments).logits[0]
        logits = logits if only else logits[places - 1]
        assert logits.dtype == torch.float64
        return scores_of(logits, ids[0, places], self.statistics)

    def examples(self, flat: Tensor | None, examples: Sequence[Sequence[Scored]]) -> list[list[Tensor]]:
        """Scores of the tokens, or rewards, [example][sequence]."""
        weights = self.weights(flat)
        return [[self.scores(weights, sequence) for sequence in sequences] for sequences in examples]


def base_parameters(policy: Policy) -> int:
    """Number of weights of the base; each 4-bit weight counts."""
    states = quantised_states(policy.model)
    own = ((name, parameter) for name, parameter in policy.model.named_parameters() if is_base(name))
    return sum(states[name].shape.numel() if name in states else parameter.numel() for name, parameter in own)


def exact_model(policy: Policy, config: ModelConfig, statistics: tuple[str, ...] = ()) -> ExactModel:
    """The policy's weights in float64."""
    model = empty_model(load_model_config(config)).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # a grouped product has no float64
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    with policy.reference() if policy.untrained and policy.untrained.kept else nullcontext():
        fixed = _fixed(policy, f"{head}.weight")
    start, views = 0, {}
    for name, view in policy.flat.views.items():
        views[name] = slice(start, start + view.numel()), view.shape
        start += view.numel()
    whole = {name: name for name in views if policy.untrained or name == SCORE}
    if policy.untrained:
        own: Any = policy.causal_lm.get_output_embeddings()
        whole[f"{head}.weight"] = next(name for name, view in policy.flat.views.items() if view is own.weight)
    names = {id(module): name for name, module in policy.model.named_modules()}
    layers: dict[str, tuple[str, float]] = {}
    for layer in policy.lora_layers:
        stem, adapters = names[id(layer)], layer.lora_A
        name = f"{stem.removeprefix(PREFIX)}.weight"
        if policy.has_parent and PARENT in adapters:
            sides: list[Any] = [layer.lora_A[PARENT], layer.lora_B[PARENT]]
            a, b = (side.weight.detach().double().cpu() for side in sides)
            fixed[name] = updated(fixed[name], a, b, float(layer.scaling[PARENT]))
        if TRAINED in adapters:
            layers[name] = stem, float(layer.scaling[TRAINED])
    return ExactModel(model, fixed, views, layers, whole, statistics)


def _fixed(policy: Policy, head: str) -> dict[str, Tensor]:
    """The weights outside adapters by plain name, with that of the LM head: a tied model does not list it."""
    fixed = {head: policy.lm_head_weight.detach().double().cpu()}
    for name, parameter in policy.model.named_parameters():
        if is_base(name):
            plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            fixed[plain] = _dequantised(policy.model, name, parameter).detach().double().cpu()
    return fixed | {name: buffer.detach().cpu() for name, buffer in _saved_buffers(policy)}


def _saved_buffers(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the saved weights (a router's correction), floating ones in float64."""
    for stem, module in policy.causal_lm.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{stem}.{name}", buffer.double() if buffer.is_floating_point() else buffer


def _dequantised(model: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, bnb.nn.Linear4bit) and name.endswith(".weight"):
        return bnb.functional.dequantize_4bit(module.weight.data, quantised_state(module))
    return parameter
