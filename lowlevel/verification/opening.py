"""What is verified: the newest weights of a run folder, or the start of a run file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowlevel.config.file import load_config
from lowlevel.config.schema import RunConfig
from lowlevel.losses import loss_spec
from lowlevel.methods import Method
from lowlevel.model.adapters import adapter_parameters, adapter_sha256, read_adapter_weights
from lowlevel.model.policy import PARENT, Policy, dequantize_once
from lowlevel.running.assembly import (
    Inputs,
    build_method,
    build_run_policy,
    check_start,
    choose_execution,
)
from lowlevel.running.reopening import Note, Reopened, reopen
from lowlevel.running.run_folder import RunFolder
from lowlevel.verification.subject import Subject


@dataclass(frozen=True)
class Opened:
    """What a path stands for: configuration and inputs with the weights to verify, and how to call them."""

    config: RunConfig
    inputs: Inputs
    weights: str
    run: Reopened | None = None  # None: a run file


def open_file(path: Path, overrides: Mapping[str, str], scratch: Path) -> Opened:
    """The start of a run file's run; a merged base is written to `scratch`.

    Raises:
        ConfigError, DataError, CheckpointError: as training would.
    """
    config, inputs = check_start(load_config(path, overrides), scratch)
    return Opened(config, inputs, "the run's start (B = 0); checks that need an adapter with an effect use a random B")


def open_folder(folder: RunFolder, note: Note) -> Opened:
    """A run's own parts; its newest adapter takes the place of the one that it began with.

    Raises:
        ConfigError, DataError, CheckpointError: no run folder, rows that changed since, damaged weights.
    """
    run = reopen(folder.path, note)
    adapter = folder.newest_adapter(note)
    if adapter is None:
        line = "those the run began with: it has not finished and saved none yet"
    elif adapter == folder.adapter:
        line = "final adapter"
    else:
        line = f"{adapter.name}, the newest checkpoint: the run has not finished"
    return Opened(run.config, run.inputs(adapter), line, run)


def make_subject(opened: Opened, examples: Sequence[Any], step: int, exact_parameters: int) -> Subject:
    """Load the model and put together what the checks read.

    Args:
        opened: as from `open_file` or `open_folder`.
        examples: of one optimizer step.
        step: that step, counted from 0.
        exact_parameters: a base of up to so many is also run in float64.
    """
    config, inputs = opened.config, opened.inputs
    policy = build_run_policy(config, inputs)
    hashes = _hashes(opened.run, policy) if opened.run else {}
    if config.train.dequantize_once:
        dequantize_once(policy)
    method = build_method(config, inputs.attention)
    mode = choose_execution(config, inputs)
    checkable = _checkable(config, method, tuple(examples))
    return Subject(config, inputs.tokenizer, policy, method, checkable, step, mode, hashes, exact_parameters)


def _checkable(config: RunConfig, method: Method, examples: tuple[Any, ...]) -> tuple[Any, ...]:
    """The examples; for a loss that sorts the pairs of a micro-batch those of the step's first micro-batch alone, since
    the float64 formulas see all pairs at once."""
    if config.method == "sft" or not loss_spec(config.dpo.loss_type).mixes_pairs:
        return examples
    rows = set(method.micro_batches(examples)[0].data_rows)
    return tuple(example for example in examples if example.row in rows)


def _hashes(run: Reopened, policy: Policy) -> dict[str, tuple[str, str]]:
    """What the manifest names, as it is here, and as it says: rows of the table, where other commands raise."""
    base = run.base_hashes(policy)
    hashes = {"base": base} if base else {}
    if run.parent:
        saved = read_adapter_weights(run.parent)
        own = adapter_parameters(policy.model, PARENT)
        same = all(bool((own[name].cpu() == tensor).all()) for name, tensor in saved.items())
        found = adapter_sha256(run.parent)
        hashes["frozen adapter"] = (found if same else "loaded otherwise", run.manifest["parent_adapter"])
    return hashes
