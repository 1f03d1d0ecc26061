"""Verifying the newest weights of a run folder, or the start of a configuration's run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowlevel.config.schema import RunConfig
from lowlevel.determinism import deterministic_mode
from lowlevel.methods.choice import build_method
from lowlevel.model.adapters import adapter_parameters, adapter_sha256, read_adapter_weights
from lowlevel.model.dequantised import dequantize_as_set
from lowlevel.model.policy import PARENT, Policy
from lowlevel.running.assembly import Inputs, build_run_policy, check_start, choose_execution
from lowlevel.running.reopening import Reopened, step_examples
from lowlevel.verification.report import Report, run_checks
from lowlevel.verification.subject import Subject, without_effect

EXACT_PARAMETERS = 500_000_000


@dataclass(frozen=True)
class Opened:
    """Configuration and inputs, and the weights to verify."""

    config: RunConfig
    inputs: Inputs
    weights: str
    run: Reopened | None = None  # None: the start of a run
    adapter: Path | None = None  # of a run: the folder of these weights; None: its start


def open_start(config: RunConfig, scratch: Path) -> Opened:
    """The start of a configuration's run; a merged base is written to `scratch`. Raises as training would."""
    config, inputs = check_start(config, scratch)
    weights = "the run's start (B = 0); checks that need an adapter with an effect use a random B"
    if config.lora.init_lora_weights == "loftq":
        weights = "the run's start (from the quantisation error)"
    return Opened(config, inputs, weights)


def open_run(run: Reopened) -> Opened:
    """A run with its newest adapter. Raises for changed rows or another loss, and for damaged weights."""
    run.method()  # refuses another loss before anything is loaded
    adapter = run.folder.newest_adapter(run.note)
    none = "the run's start: it has not finished and saved no checkpoint yet"
    line = run.folder.words(adapter) if adapter else none
    return Opened(run.config, run.inputs(adapter), line, run, adapter)


def verify_run(opened: Reopened | Opened, *, step: int = 1, exact_parameters: int = EXACT_PARAMETERS) -> Report:
    """Recompute an optimizer step of a run, and compare; failed checks are in the report.

    Args:
        opened: a run from `lowlevel.running.reopening.reopen` (its newest weights), or from `open_start` (its start).
        step: optimizer step whose examples are taken, counted from 1.
        exact_parameters: a base of up to this many weights is also run in float64, on the CPU.

    Raises:
        ConfigError: no such step, or a loss that is not registered or fails in float64.
        DataError: the data is not what the run trained on.
        CheckpointError: damaged weights, or a base, adapter or loss that is not the run's.
    """
    opened = open_run(opened) if isinstance(opened, Reopened) else opened
    run_dir = opened.run.folder.path if opened.run else None
    examples = step_examples(opened.config, opened.inputs.data, step, run_dir=run_dir)
    with deterministic_mode(opened.config.train.deterministic):
        subject = make_subject(opened, examples, step - 1, exact_parameters)
        placement, moving = subject.policy.placement, subject.policy.moving
        equal = opened.adapter is not None and moving is not None and without_effect(subject.policy)
        return Report(
            method=subject.config.method,
            loss=subject.method.spec.name,
            step=step,
            data_rows=[example.row for example in subject.examples],
            weights=opened.weights + "; its moving reference equals it, so checks use a random B" * equal,
            device=str(placement.device),
            precision=placement.precision,
            execution=subject.mode,
            checks=run_checks(subject),
        )


def make_subject(opened: Opened, examples: Sequence[Any], step: int, exact_parameters: int) -> Subject:
    """Load the model; `step` is counted from 0, the rest as in `verify_run`."""
    config, inputs = opened.config, opened.inputs
    policy = build_run_policy(config, inputs)
    hashes = _hashes(opened.run, policy) if opened.run else {}
    if opened.run:
        opened.run.load_reference(policy, opened.adapter)
    dequantize_as_set(policy, config.train.dequantize_once)
    method = build_method(config, inputs.attention, inputs.data.train)
    if method.spec.mixes_pairs:
        rows = set(method.micro_batches(examples)[0].data_rows)  # one micro-batch: the float64 formulas mix all pairs
        examples = [example for example in examples if example.row in rows]
    mode = choose_execution(config, inputs)
    return Subject(config, inputs.tokenizer, policy, method, tuple(examples), step, mode, hashes, exact_parameters)


def _hashes(run: Reopened, policy: Policy) -> dict[str, tuple[str, str]]:
    """Hashes of base and frozen adapter: as found, and as in the manifest. Other commands raise if they differ."""
    base = run.base_hashes(policy)
    hashes = {"base": base} if base else {}
    if run.parent:
        saved = read_adapter_weights(run.parent)
        own = adapter_parameters(policy.model, PARENT)
        same = all(bool((own[name].cpu() == tensor).all()) for name, tensor in saved.items())
        found = adapter_sha256(run.parent)
        hashes["frozen adapter"] = (found if same else "loaded otherwise", run.manifest["parent_adapter"])
    return hashes
