"""Group 4, the reference: the same weights without the trained adapter, and no other difference."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowlevel.batch.layout import PackedBatch
from lowlevel.model.dropout import CounterDropout
from lowlevel.model.placement import dtype_name
from lowlevel.verification.subject import Check, Subject, check, fill_b, kept_weights, largest, remove_effect

GROUP = "reference"


class Kernels(TorchDispatchMode):
    """Names of the attention operators that run within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and record its name."""
        name = str(func).removeprefix("aten.").removesuffix(".default")
        if "attention" in name or "softmax" in name:
            self.names.add(name.lstrip("_"))
        return func(*args, **(kwargs or {}))


def reference_checks(subject: Subject) -> list[Check]:
    """Dropout stays on: it must not reach the reference."""
    if not subject.method.has_reference:
        return []
    batches = subject.batches()
    checks = [_log_ratios(subject, batches), *_passes(subject, batches), _dropout(subject, batches[0])]
    return checks + _kernels(subject, batches[0])


def _log_ratios(subject: Subject, batches: list[PackedBatch]) -> Check:
    """With B = 0 policy and reference are the same function: equal bits, through `method.loss` and in each pass.

    A moving reference gets the policy's weights.
    """
    ratios = []
    with kept_weights(subject.policy), torch.no_grad():
        remove_effect(subject.policy)
        if subject.policy.moving:
            subject.policy.moving.weights.copy_(subject.policy.flat.weights)
        for example in subject.examples:
            (batch,) = subject.batches(examples=[example])
            sums = subject.sums(batch)
            ratios += [sums[name.replace("ref_", "")] - sums[name] for name in sums if name.startswith("logps/ref_")]
            ratios += [sums[name] for name in sums if name.startswith("rewards/") and name != "rewards/accuracies"]
        ratios += [_logps(subject, batch, reference=False) - _logps(subject, batch) for batch in batches]
    note = f"{(1 + subject.method.paired) * len(subject.examples)} completions, B = 0, log-ratios and rewards"
    return check(GROUP, "log-ratios at step 0", max(map(largest, ratios)), 0, note)


def _logps(subject: Subject, batch: PackedBatch, *, reference: bool = True) -> Tensor:
    subject.set_dropout(batch)
    with torch.no_grad(), subject.policy.reference() if reference else nullcontext():
        return batch.sequence_sums(subject.policy.token_logps(batch))


def _passes(subject: Subject, batches: list[PackedBatch]) -> list[Check]:
    """Two passes are equal; the trained adapter's weights and the step's dropout key do not reach them."""
    policy = subject.policy
    first = [_logps(subject, batch) for batch in batches]
    second = [_logps(subject, batch) for batch in batches]
    with kept_weights(policy):
        fill_b(policy, seed=7)
        blind = [_logps(subject, batch) for batch in batches]
    keyed = []
    for batch in batches:
        policy.dropout.set_micro_batch(batch.dropout_keys, 12345)
        with policy.reference():
            keyed.append(batch.sequence_sums(policy.token_logps(batch)))
    pairs = {"two passes": second, "another trained adapter": blind, "another dropout key": keyed}
    return [
        check(GROUP, f"unchanged by: {name}", max(largest(a - b) for a, b in zip(first, other, strict=True)), 0, "nats")
        for name, other in pairs.items()
    ]


def _dropout(subject: Subject, batch: PackedBatch) -> Check:
    """In the reference pass dropout has no key, and each dropout module returns its input."""
    policy, dropping = subject.policy, []
    modules = [module for module in policy.model.modules() if isinstance(module, CounterDropout)]

    def look(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output is not inputs[0]:
            dropping.append(module)

    subject.set_dropout(batch)
    with ExitStack() as hooks, policy.reference():
        for module in modules:
            hooks.enter_context(module.register_forward_hook(look))
        keyed = policy.dropout.token_keys is not None
        policy.token_logps(batch)
    note = f"{len(modules)} dropout modules, key {'set' if keyed else 'off'}, {len(dropping)} dropped"
    return check(GROUP, "dropout off", float(len(dropping) + keyed), 0, note)


def _kernels(subject: Subject, batch: PackedBatch) -> list[Check]:
    """Attention operators and dtype of the hidden states, in a policy pass with gradients and in the reference's."""
    policy, seen = subject.policy, []
    compiled = policy.layers.compiled
    policy.layers.use(compiled=False)
    for reference in (False, True):
        subject.set_dropout(batch)
        with Kernels() as kernels, policy.reference() if reference else nullcontext():
            hidden = policy.scored_hidden_states(batch)
        seen.append((kernels.names, hidden.dtype))
    policy.layers.use(compiled=compiled)
    names, dtype = ", ".join(sorted(seen[0][0])), dtype_name(seen[0][1])
    return [
        check(GROUP, "same attention kernel", float(len(seen[0][0] ^ seen[1][0])), 0, names or "none seen"),
        check(GROUP, "same dtype", float(seen[0][1] != seen[1][1]), 0, dtype),
    ]


def frozen_checks(subject: Subject, names: list[str], before: Tensor, base: tuple[str, str]) -> list[Check]:
    """Weights that the other checks must not have changed.

    `names`, `before`: trainable parameters and adapter weights (n,) before; `base`: hash of the base before and now.
    """
    now, views = subject.policy.trainable_names(), subject.policy.flat.views
    wrong = len({*now} ^ {*names}) + len({*now} ^ {*views})
    checks = [
        check("weights", f"{what} as in the manifest", float(found != expected), 0, found[:12])
        for what, (found, expected) in subject.hashes.items()
    ]
    return [
        *checks,
        check("weights", "base unchanged by steps", float(base[0] != base[1]), 0, base[1][:12]),
        check("weights", "trainable set", float(wrong), 0, f"{len(now)} tensors"),
        check("weights", "adapter unchanged by checks", float(not torch.equal(before, subject.policy.flat.weights)), 0),
    ]
