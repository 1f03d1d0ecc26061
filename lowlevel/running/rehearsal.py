"""Runs the largest micro-batch before the first step, so that it fails at once if memory is short, and measures it.

The largest graph is thereby captured first, and the smaller ones reuse its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lowlevel.batch.layout import PackedBatch
from lowlevel.execution import WithFallback
from lowlevel.methods import Method
from lowlevel.model.linear import quantised_states
from lowlevel.model.policy import REFERENCE, Policy, is_base
from lowlevel.ranks import here

PASSES = 2  # the first compiles or warms up, the second is like all later ones


def largest_batch(method: Method, examples: Sequence[Any], count: int) -> PackedBatch:
    """The largest micro-batch that a step of `count` examples can have, padded to the method's capacity."""
    longest = sorted(examples, key=method.size, reverse=True)[:count]
    if method.packing and method.shape:
        full = -(-method.shape.capacity // 8) * 8
        method = replace(method, shape=replace(method.shape, positions=full))
    return max(method.micro_batches(longest), key=lambda batch: (batch.input_ids.numel(), batch.num_scored))


def rehearse(
    policy: Policy, method: Method, execution: WithFallback, optimizer: torch.optim.Optimizer, batch: PackedBatch
) -> dict[str, Any]:
    """Run a micro-batch forward and backward as in a step, and return the memory use in bytes.

    Does not change the weights; the gradient is zero afterwards. The optimizer state is a component of its own: it is
    paged, and the allocator does not count it.
    """
    moved = batch.to(policy.placement.device)
    report: dict[str, Any] = {"positions": batch.input_ids.numel(), "components": components(policy, optimizer)}
    report |= execution.until_it_runs(lambda: _phases(policy, method, moved))
    # Frees the workspaces of this stream: steps run in another one, and no captured graph uses these.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(PASSES):
        execution.until_it_runs(lambda: execution.run(moved, 0.0, 0))
    torch.cuda.synchronize()
    report["phases"]["a whole micro-step"] = torch.cuda.max_memory_allocated()
    policy.flat.grad.zero_()
    free, total = torch.cuda.mem_get_info()
    return {**report, "reserved": torch.cuda.memory_reserved(), "device_used": total - free}


def _phases(policy: Policy, method: Method, batch: PackedBatch) -> dict[str, Any]:
    """Bytes allocated before a forward and backward pass, after the forward, and at the peak of each."""
    policy.dropout.set_micro_batch(batch.dropout_keys, 0)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sums = method.loss(policy, batch)  # kept until the end, as in a step
    kept, forward = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sums.loss.backward()
    phases = {"forward and loss": forward, "backward": torch.cuda.max_memory_allocated()}
    return {"phases": phases, "allocated": before, "kept_for_backward": kept}


def components(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes allocated outside a step, by kind."""
    sizes = {"base weights": 0, "quantisation constants": 0, "embeddings, LM head, norms": 0}
    sizes |= {"frozen adapter": 0, "moving reference": 0}
    states = quantised_states(policy.model)
    for name, parameter in policy.model.named_parameters():
        if policy.untrained:
            sizes["reference weights"] = policy.untrained.nbytes
        elif name in states:
            sizes["base weights"] += here(parameter).nbytes
            constants = states[name].as_dict(packed=False).values()
            sizes["quantisation constants"] += sum(c.nbytes for c in constants if isinstance(c, torch.Tensor))
        elif not is_base(name):
            other = "moving reference" if f".{REFERENCE}." in name else "frozen adapter"
            sizes[other] += 0 if name in policy.flat.views else parameter.nbytes
        elif ".base_layer." in name:
            sizes["base weights"] += here(parameter).nbytes
        elif parameter.device == policy.placement.device:
            sizes["embeddings, LM head, norms"] += here(parameter).nbytes
    sizes["trained weights" if policy.untrained else "trained adapter"] = policy.flat.weights.nbytes
    sizes["gradient"] = policy.flat.grad.nbytes
    state = [value for values in optimizer.state.values() for value in values.values()]
    sizes["optimizer state"] = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
    return {name: size for name, size in sizes.items() if size}
