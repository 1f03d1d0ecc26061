"""Saves and restores the state of a run: trained adapter, optimizer state, counters, and the identity of the run.

A checkpoint needs no generator state, because data order and dropout are pure functions of the seed and the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from lowlevel.checkpoints.checkpoint import checkpoints, save_checkpoint
from lowlevel.config.schema import RunConfig
from lowlevel.errors import CheckpointError
from lowlevel.model.adapters import (
    REFERENCE_WEIGHTS,
    VALUE_WEIGHTS,
    adapter_sha256,
    adapter_tensors,
    load_adapter_weights,
    load_value_head,
    read_adapter_weights,
    save_adapter,
    weights_file,
)
from lowlevel.model.base import public_name
from lowlevel.model.policy import REFERENCE, TRAINED, VALUE, Policy
from lowlevel.optim.optimizer import load_optimizer_tensors, optimizer_tensors
from lowlevel.optim.train_state import TrainState


def save_state(
    run_dir: Path, policy: Policy, optimizer: Optimizer, state: TrainState, config: RunConfig, origin: Mapping[str, Any]
) -> None:
    """Write a checkpoint of everything that training changes, with `origin` in its manifest. Raises CheckpointError."""
    smallest, largest = torch.aminmax(policy.flat.weights)  # unlike isfinite() without a buffer; propagates NaN
    if not bool(torch.isfinite(smallest) & torch.isfinite(largest)):
        raise CheckpointError(f"step {state.step}: adapter weights are not finite; not saved, older checkpoints stay")

    def write_files(target: Path) -> None:
        save_adapter(policy.model, TRAINED, target, public_name(config.model.name), start=policy.start)
        save_file(optimizer_tensors(optimizer), target / "optimizer.safetensors")
        if policy.moving is not None:
            save_file(adapter_tensors(policy.model, REFERENCE), target / REFERENCE_WEIGHTS)
        if policy.value_head is not None:
            save_file({VALUE: policy.value_head.detach().cpu().contiguous()}, target / VALUE_WEIGHTS)

    payload = {"state": state.to_json(), **origin}
    save_checkpoint(run_dir, state.step, write_files, payload, keep=config.train.save_total_limit)


def restore_state(policy: Policy, optimizer: Optimizer, path: Path, payload: Mapping[str, Any]) -> TrainState:
    """Load weights and optimizer state from a verified checkpoint, and return its counters. Raises CheckpointError."""
    if (policy.moving is not None) != (path / REFERENCE_WEIGHTS).exists():
        has = "no moving reference" if policy.moving else "a moving reference"
        raise CheckpointError(f"{path} holds {has}: dpo.ref_model_sync_steps cannot be set or removed when resuming")
    load_adapter_weights(policy.model, TRAINED, read_adapter_weights(path), str(path / weights_file(path)))
    restore_reference(policy, path)
    if policy.value_head is not None:
        load_value_head(policy.value_head, path)
    load_optimizer_tensors(optimizer, load_file(path / "optimizer.safetensors"))
    try:
        return TrainState.from_json(payload["state"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its counters are from another version: {error}") from None


def restore_reference(policy: Policy, path: Path) -> None:
    """Load a moving reference from a verified checkpoint. Raises CheckpointError."""
    if policy.moving is not None:
        tensors = read_adapter_weights(path, REFERENCE_WEIGHTS)
        load_adapter_weights(policy.model, REFERENCE, tensors, str(path / REFERENCE_WEIGHTS))


def checkpoint_with_reference(run_dir: Path, adapter: Path) -> Path:
    """The checkpoint with the trained weights of `adapter`, itself or another: only checkpoints hold the reference.

    Raises CheckpointError if there is none.
    """
    weights = adapter_sha256(adapter)
    for path in (adapter, *checkpoints(run_dir)):
        if (path / REFERENCE_WEIGHTS).exists() and adapter_sha256(path) == weights:
            return path
    raise CheckpointError(f"{adapter}: the moving reference of its step is in no checkpoint of {run_dir}")
