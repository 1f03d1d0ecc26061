"""AdamW on the flat buffer (paged, in 32 or 8 bits, from bitsandbytes; or torch's own), its schedule and its state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowlevel.config.schema import TrainConfig
from lowlevel.errors import CheckpointError

BETAS = (0.9, 0.999)
EPSILON = 1e-8
FACTOR = "lr_factor"  # of a parameter group: its learning rate relative to that of the schedule
GROUPS = ("flat", "flat_B")  # names of the groups in a checkpoint


def build_optimizer(
    weights: nn.Parameter, config: TrainConfig, parts: Sequence[tuple[nn.Parameter, float]] = ()
) -> Optimizer:
    """One optimizer over one flat parameter; torch's memory statistics do not count paged (managed) state.

    `parts`: views that make up `weights`, each with a factor of the learning rate; by default all has one rate.
    """
    groups = [
        {"params": [part], "lr": config.learning_rate * factor, FACTOR: factor}
        for part, factor in parts or ((weights, 1.0),)
    ]
    settings: dict[str, Any] = {"betas": BETAS, "eps": EPSILON, "weight_decay": config.weight_decay}
    if config.optim == "adamw":
        return torch.optim.AdamW(groups, **settings)
    import bitsandbytes as bnb

    kinds = {"paged_adamw_32bit": bnb.optim.PagedAdamW32bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Pp]aged.*")  # a CPU has no device memory to page from
        optimizer: Any = kinds[config.optim](groups, **settings)
        # Allocate the state now, so that checkpoints are copied into it and paged memory stays paged. `load_state_dict`
        # of bitsandbytes 0.50 would replace it with ordinary device tensors.
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
        for number, group in enumerate(optimizer.param_groups):
            optimizer.init_state(group, group["params"][0], number, 0)
    return optimizer


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step, in each group times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(FACTOR, 1.0)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of step `step` (from 0) as in transformers: linear warm-up from 0, then constant, linear or cosine."""
    warmup = config.warmup_steps or math.ceil(total_steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    shapes = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * max(0.0, shapes[config.lr_scheduler_type])


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of the optimizer's state on the CPU, "flat::<name>"; step counts become int64 tensors.

    With LoRA+, "flat" is the state of every A and "flat_B" that of every B.
    """
    states = [optimizer.state.get(group["params"][0], {}) for group in optimizer.param_groups]
    return {
        f"{group}::{name}": (value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else torch.tensor(value))
        for group, state in zip(GROUPS, states, strict=False)
        for name, value in state.items()
    }


def load_optimizer_tensors(optimizer: Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Restore `optimizer_tensors` in place. Raises CheckpointError if names, shapes or dtypes differ."""
    parts = [group["params"][0] for group in optimizer.param_groups]
    if isinstance(optimizer, torch.optim.AdamW) and not optimizer.state:
        for part in parts:
            zeros = {name: torch.zeros_like(part) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[part] = {"step": torch.tensor(0.0), **zeros}
    own = {f"{group}::{name}": (optimizer.state[part], name)
           for group, part in zip(GROUPS, parts, strict=False) for name in optimizer.state[part]}  # fmt: skip
    if own.keys() != saved.keys():
        raise CheckpointError(f"optimizer state: tensors differ: {', '.join(sorted(own.keys() ^ saved.keys())[:5])}")
    for key, (state, name) in own.items():
        value, tensor = state[name], saved[key]
        if isinstance(value, Tensor):
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise CheckpointError(f"optimizer state {name}: {tuple(tensor.shape)} {tensor.dtype} does not fit")
            value.copy_(tensor)
        else:
            state[name] = int(tensor)
