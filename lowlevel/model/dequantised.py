"""train.dequantize_once and its default: on a CPU if there is memory for the copy.

A CPU has no product with 4-bit weights: each pass dequantises them first. A copy gives the same bits on a CPU, which
tests check, so resuming with another amount of memory continues the same run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
from torch import nn

from lowlevel.model.linear import quantised_state, quantised_states
from lowlevel.model.placement import dtype_name
from lowlevel.model.policy import Policy, is_base

SHARE = 0.5  # of the available memory that the copy may take
CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def dequantize_as_set(policy: Policy, once: bool | None) -> None:
    """`dequantize_once`, if `once` says so; None: on a CPU with memory for it."""
    if once is None:
        once = policy.placement.device.type == "cpu" and 0 < _copy_bytes(policy) <= SHARE * available_memory()
    if once:
        dequantize_once(policy)


def describe(policy: Policy, once: bool | None) -> str | None:
    """A line about the 4-bit weights of a policy after `dequantize_as_set`; None on a GPU or without such weights."""
    if policy.placement.device.type != "cpu":
        return None
    left = _copy_bytes(policy)
    if left and once is None:
        why = f"a copy takes {left / 1e9:.2f} GB, more than half of the free {available_memory() / 1e9:.2f} GB"
        return f"4-bit, dequantised in each pass: {why}; train.dequantize_once = true makes it all the same"
    if left:
        return "4-bit, dequantised in each pass (train.dequantize_once)"
    copies = sum(layer.weight.nbytes for layer in _layers(policy) if not isinstance(layer, bnb.nn.Linear4bit))
    return f"4-bit, dequantised once: {copies / 1e9:.2f} GB in {dtype_name(policy.placement.dtype)}"


def available_memory(machine: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that processes can still take: of the machine, or of its container if that has less; 0 if not known."""
    try:
        lines = dict(line.split(":", 1) for line in machine.read_text(encoding="ascii").splitlines())
        found = [1024 * int(lines["MemAvailable"].split()[0])]
    except (OSError, ValueError, KeyError):
        return 0
    for limit, used in CGROUPS:
        try:
            found.append(int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):  # no such file; "max"
            continue
    return max(0, min(found))


def _layers(policy: Policy) -> list[nn.Linear]:
    return [cast(nn.Linear, layer.get_base_layer()) for layer in policy.lora_layers]


def _copy_bytes(policy: Policy) -> int:
    """Size of the dequantised weights of the adapted layers that are in 4 bits."""
    in_4_bits = [layer for layer in _layers(policy) if isinstance(layer, bnb.nn.Linear4bit)]
    return sum(quantised_state(layer).shape.numel() for layer in in_4_bits) * policy.placement.dtype.itemsize


def dequantize_once(policy: Policy) -> None:
    """Replace the 4-bit weights of the adapted layers by dequantised ones, with the same results."""
    for layer in policy.lora_layers:
        quantised = cast(Any, layer).base_layer
        if not isinstance(quantised, bnb.nn.Linear4bit):
            continue
        weight = bnb.functional.dequantize_4bit(quantised.weight.data, quantised_state(quantised))
        plain = nn.Linear(quantised.in_features, quantised.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(policy.placement.dtype), requires_grad=False)
        plain.bias = quantised.bias
        cast(Any, layer).base_layer = plain
        cast(Any, quantised.weight).module = None  # a cycle of bitsandbytes 0.50 would hold the 4-bit weight


def quantised_weights(policy: Policy) -> tuple[int, int]:
    """Number of the base's weights that were loaded in 4 bits, and of all, without input embedding and LM head.

    bitsandbytes only quantises linear layers. Layers that `dequantize_once` changed count as quantised.
    """
    base, quantised, total = policy.causal_lm, 0, 0
    embeddings = [*base.get_input_embeddings().parameters(), *base.get_output_embeddings().parameters()]
    left_out = {id(parameter) for parameter in embeddings}
    states = quantised_states(base)
    for name, parameter in base.named_parameters():
        if id(parameter) in left_out or not is_base(name):
            continue
        size = states[name].shape.numel() if name in states else parameter.numel()
        total += size
        quantised += size if name in states or name.endswith(".base_layer.weight") else 0
    return quantised, total
