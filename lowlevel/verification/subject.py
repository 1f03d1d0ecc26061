"""The subject of the checks: a policy, its method, and the examples of one step; how that step is run; the form of a
check, and its bounds by precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowlevel import loop
from lowlevel.batch.layout import PackedBatch
from lowlevel.config.online import SampledConfig
from lowlevel.config.schema import RunConfig
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.execution import Eager, Execution, WithFallback
from lowlevel.hashing import key32
from lowlevel.methods import Method
from lowlevel.model.dropout import CounterDropout
from lowlevel.model.policy import Policy
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.train_state import StepResult
from lowlevel.verification.exact import Scored, sequences_of


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


def largest(values: Tensor) -> float:
    """Largest absolute value; 0 if empty."""
    return float(values.detach().abs().max()) if values.numel() else 0.0


def relative(value: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """|value - expected| / max(|expected|, least) in the l2 norm, float64; the plain difference if that is 0."""
    expected = expected.detach().double().cpu()
    difference = float(torch.linalg.vector_norm(value.detach().double().cpu() - expected))
    return difference / (max(float(torch.linalg.vector_norm(expected)), least) or 1.0)


@dataclass(frozen=True)
class Subject:
    """The input of every check."""

    config: RunConfig
    tokenizer: ChatTokenizer
    policy: Policy
    method: Method
    examples: tuple[Any, ...]  # of one optimizer step
    step: int  # counted from 0
    mode: str  # how the run's steps are executed: eager, compiled or graphed
    hashes: dict[str, tuple[str, str]]  # what -> (found, expected)
    exact_parameters: int  # a base up to this size is also run in float64

    @property
    def bounds(self) -> Bounds:
        """Bounds of the run's precision."""
        return BOUNDS[self.policy.placement.precision]

    @cached_property
    def tied(self) -> list[bool]:
        """By example: whether it is one completion twice (online_dpo, equal rewards), with margin and gradient 0."""
        return [self.method.paired and np.array_equal(x.chosen_ids, x.rejected_ids) for x in self.examples]

    @cached_property
    def cancelled(self) -> float:
        """Norm of the step's gradient if tied pairs had a rejected completion of one token; 0 without any.

        Both sides of such a pair are of about this size and cancel up to rounding: errors are relative to it, at least.
        """
        if not any(self.tied):
            return 0.0
        pairs = zip(self.examples, self.tied, strict=True)
        cut = [replace(x, rejected_ids=x.rejected_ids[:1]) if tied else x for x, tied in pairs]
        return float(torch.linalg.vector_norm(self.run_step(examples=cut)[1]))

    @property
    def rewards(self) -> bool:
        """Whether a reward head reads the last token of each completion, and no LM head its tokens."""
        return self.policy.reward_head is not None

    def head_bound(self, largest_logit: float) -> float:
        """Bound on the error of a log-probability (nats) or reward, given its hidden state.

        A logit is rounded once to its dtype; its product and the log-sum-exp are accumulated in fp32.
        """
        dtype = torch.float32 if self.rewards else self.policy.lm_head_weight.dtype
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        return max(1.0, largest_logit) * (rounding + 8 * torch.finfo(torch.float32).eps)

    @property
    def temperature(self) -> float:
        """What the logits are divided by before the softmax: not 1 only in losses of sampled completions."""
        settings = self.method.config
        return settings.temperature if isinstance(settings, SampledConfig) else 1.0

    def sequences(self, example: Any) -> list[Scored]:
        """The plain sequences of an example, with their scored places."""
        return sequences_of(example, self.method.paired, self.rewards)

    @property
    def detaches(self) -> bool:
        """Whether parts of the loss, or the lengths of DoRA's rows, are without a gradient on purpose."""
        return self.method.spec.detaches or any(layer.lora_magnitude_vector for layer in self.policy.lora_layers)

    @property
    def mixes(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its micro-batch."""
        return self.method.paired and self.method.spec.mixes_pairs

    def values(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """The numeric columns that the loss reads, one number an example; float64, rounded to fp32 as in a batch."""
        rows = torch.tensor([x.values for x in examples], dtype=torch.float32).double()
        return {name: rows[:, i] for i, name in enumerate(self.method.columns)}

    def weights(self, examples: Sequence[Any]) -> list[Tensor] | None:
        """The weight of each scored token in the loss, by example, (n,) float64; None if there are none."""
        if self.method.paired or all(x.weights is None for x in examples):
            return None
        places = [sequences_of(x, paired=False)[0].places for x in examples]
        given = [np.ones(len(x.input_ids)) if x.weights is None else x.weights for x in examples]
        return [torch.from_numpy(w[p]).double() for w, p in zip(given, places, strict=True)]

    def batches(self, method: Method | None = None, examples: Sequence[Any] | None = None) -> list[PackedBatch]:
        """Micro-batches of the training path, on the device. Those of the whole step have its baseline (kto)."""
        made = (method or self.method).micro_batches(self.examples if examples is None else examples)
        if examples is None:
            made = [*loop.with_baseline(Eager(self.policy, method or self.method), made)]
        return [batch.to(self.policy.placement.device) for batch in made]

    def set_dropout(self, batch: PackedBatch) -> None:
        """Set the step's dropout key for the next passes."""
        self.policy.dropout.set_micro_batch(batch.dropout_keys, key32(self.config.train.seed, self.step))

    def sums(self, batch: PackedBatch, method: Method | None = None) -> dict[str, Tensor]:
        """`method.loss` without a gradient: loss and metrics, scalars in the path's own precision."""
        self.set_dropout(batch)
        with torch.no_grad():
            return (method or self.method).loss(self.policy, batch).named()

    def run_step(
        self,
        method: Method | None = None,
        examples: Sequence[Any] | None = None,
        *,
        scale: float | None = None,
        execution: Execution | None = None,
        batches: Sequence[PackedBatch] | None = None,
    ) -> tuple[StepResult, Tensor]:
        """`optimizer_step` without an update: its result, and the flat gradient (n,) fp32.

        By default in eager mode, with the first loss scale of a run; an `execution` brings its own method.
        """
        execution = execution or Eager(self.policy, method or self.method)
        made = batches or execution.method.micro_batches(self.examples if examples is None else examples)
        loss_scale = LossScale.for_precision(self.policy.placement.precision)
        if scale is not None:
            loss_scale = replace(loss_scale, scale=scale)
        still = torch.optim.SGD([self.policy.flat.weights], lr=0.0)  # the gradient stays and no weight moves
        seed, step = self.config.train.seed, self.step
        result = loop.optimizer_step(execution, still, made, loss_scale, seed=seed, step=step, max_grad_norm=math.inf)
        return result, self.policy.flat.grad.clone()

    def execution(self, note: list[str]) -> WithFallback:
        """The run's execution of a step; a fallback is noted."""
        return WithFallback(self.policy, self.method, self.mode, note.append)


def with_batches_of(method: Method, size: int) -> Method:
    """The method with `size` examples in a micro-batch, each in its own row (a pair: two rows)."""
    return replace(method, batch_size=size, packing=False, shape=None)


def packed(method: Method, rows: int) -> Method:
    """The method with packed examples, `rows` rows in a micro-batch and no dummy examples; pairs share their prompt."""
    return replace(method, batch_size=rows, packing=True, shape=None)


@contextmanager
def kept_weights(policy: Policy) -> Iterator[None]:
    """Restore the adapter's weights after the block, bit for bit; the copy is on the host: the peak stays."""
    kept = [policy.flat.weights.detach(), *([policy.moving.weights] if policy.moving else [])]
    before = [weights.to("cpu", copy=True) for weights in kept]
    try:
        yield
    finally:
        for weights, copy in zip(kept, before, strict=True):
            weights.copy_(copy)
        policy.flat.grad.zero_()


@contextmanager
def without_dropout(policy: Policy) -> Iterator[None]:
    """Probability 0 in every dropout module: the float64 model has no dropout."""
    modules = [module for module in policy.model.modules() if isinstance(module, CounterDropout)]
    before = [module.p for module in modules]
    for module in modules:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in zip(modules, before, strict=True):
            module.p = p


def b_views(policy: Policy) -> list[Tensor]:
    """The trained adapter's B, views of its flat weights; all 0 in a new adapter, which has no effect."""
    return [view for name, view in policy.flat.views.items() if ".lora_B." in name]


def remove_effect(policy: Policy) -> None:
    """B = 0, or the weights of the base."""
    for view in b_views(policy):
        view.zero_()
    if policy.untrained is not None:
        policy.untrained.restart()


def without_effect(policy: Policy) -> bool:
    """Whether the trained adapter is new (B = 0), or equal to a moving reference; or all weights are the base's."""
    if policy.untrained is not None:
        return policy.untrained.unchanged
    if policy.moving is not None:
        return torch.equal(policy.flat.weights, policy.moving.weights)
    return not any(bool(view.any()) for view in b_views(policy))


def fill_b(policy: Policy, seed: int = 0, size: float = 0.05) -> None:
    """Random B, so that each layer's update is about 0.6 `size` times its input: an effect that checks can see.

    Without an adapter every weight moves by a random tenth of `size` times its tensor's standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.flat.views.values() if policy.untrained else ():
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.add_(noise * weight.std(), alpha=0.1 * size)
        for view in b_views(policy):
            view.copy_(torch.randn(view.shape, generator=generator) * (size / math.sqrt(view.shape[1])))
