"""`lowlevel verify`: one step of a run, recomputed; a table of errors and bounds, and exit code 1 where one fails."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lowlevel.config import RunConfig, load_config
from lowlevel.data.prepare import PreparedData
from lowlevel.determinism import deterministic_mode
from lowlevel.durable import write_json
from lowlevel.errors import CheckpointError, ConfigError, DataError, LowlevelError
from lowlevel.losses import LOSSES
from lowlevel.model.adapters import adapter_parameters, adapter_sha256, read_adapter_weights
from lowlevel.model.base import base_sha256
from lowlevel.model.policy import PARENT, Policy, dequantize_once
from lowlevel.order import DataOrder
from lowlevel.running.adapter_sources import find_adapter
from lowlevel.running.assembly import (
    Inputs,
    build_method,
    build_run_policy,
    check_inputs,
    choose_execution,
    with_merged_base,
    with_plan,
)
from lowlevel.running.run_folder import RunFolder
from lowlevel.verification.check import Check
from lowlevel.verification.report import as_json, print_checks, run_checks
from lowlevel.verification.subject import Method, Subject

EXACT_PARAMETERS = 500_000_000


class VerificationError(LowlevelError):
    """A check failed."""

    exit_code = 1


@dataclass(frozen=True)
class Loaded:
    """What a path stands for: configuration and inputs with the weights to verify, and how to call them."""

    config: RunConfig
    inputs: Inputs
    weights: str


def verify_run(
    path: Path,
    console: Console,
    *,
    batch: int = 1,
    overrides: Mapping[str, str] | None = None,
    json_file: Path | None = None,
    exact_parameters: int = EXACT_PARAMETERS,
) -> list[Check]:
    """Verify one step of a run folder or run file, and print and write the result.

    Args:
        path: a run folder (its newest weights), or a run file (the start of the run).
        console: where the table goes.
        batch: optimizer step whose micro-batches are taken, counted from 1.
        overrides: flags over a run file, "section.key" -> text.
        json_file: where the result is written; None: verify.json in the run folder, nothing for a run file.
        exact_parameters: bases of up to so many weights are also run in float64, on the CPU.

    Raises:
        VerificationError: a check failed.
        ConfigError: neither folder nor file, or no such step.
        DataError: the data is not what the run trained on.
        CheckpointError: damaged weights, or a base or adapter that is not the run's.
    """
    if json_file and not json_file.parent.is_dir():
        raise ConfigError(f"--json {json_file}: no such folder")
    folder = RunFolder(path) if path.is_dir() else None
    with tempfile.TemporaryDirectory() as scratch:
        loaded = _from_folder(folder, console) if folder else _from_file(path, overrides or {}, Path(scratch))
        examples = step_of(loaded.config, loaded.inputs.data, batch)
        with deterministic_mode(loaded.config.train.deterministic):
            subject = _subject(loaded, folder, tuple(examples), batch - 1, exact_parameters)
            _announce(path, loaded, batch, subject, console)
            checks = run_checks(subject)
    print_checks(checks, console)
    target = json_file or (folder.path / "verify.json" if folder else None)
    if target:
        write_json(target, _document(subject, loaded.weights, batch, checks))
    failed = [one for one in checks if not one.ok]
    if failed:
        names = "; ".join(f"{one.group}: {one.name} {one.measured:.3g} > {one.bound:.3g}" for one in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise VerificationError(f"{len(failed)} of {len(checks)} checks failed: {names}{more}")
    console.print(f"all {len(checks)} checks hold")
    return checks


def _announce(path: Path, loaded: Loaded, batch: int, subject: Subject, console: Console) -> None:
    placement = subject.policy.placement
    console.print(
        f"verify {path}: {loaded.config.method}, step {batch}, {len(subject.examples)} examples, "
        f"{placement.precision} on {placement.device}, {subject.mode}\nweights: {loaded.weights}",
        markup=False,
    )


def step_of(config: RunConfig, data: PreparedData, step: int) -> list[Any]:
    """The examples of optimizer step `step`, counted from 1.

    Raises:
        ConfigError: the run has fewer steps.
    """
    order = DataOrder.of(config, len(data.train))
    total = order.total_steps(config.train)
    if not 1 <= step <= total:
        raise ConfigError(f"--batch {step}: the run has the steps 1 to {total}")
    return [data.train[i] for i in order.step_rows(step - 1)]


def _from_file(path: Path, overrides: Mapping[str, str], scratch: Path) -> Loaded:
    config = load_config(path, overrides)
    inputs = check_inputs(config)
    if config.train.memory_budget is not None:
        config = with_plan(config, inputs)
    if config.model.adapter_mode == "original" and inputs.parent:
        config, inputs = with_merged_base(config, inputs, RunFolder(scratch))
    return Loaded(config, inputs, "the run's start; B, which is 0 there, is random where it would prove nothing")


def _from_folder(folder: RunFolder, console: Console) -> Loaded:
    """The run's own parts; its newest adapter takes the place of the one that it began with."""
    config, manifest = folder.read_config(), folder.read_manifest()
    adapter = folder.newest_adapter(console.print)
    if adapter:
        line = f"{adapter.name}, the newest checkpoint: the run has not finished"
        line = "final adapter" if adapter == folder.adapter else line
    else:
        adapter = find_adapter(config.lora.init_from, "lora.init_from")
        line = "those the run began with: it has not finished and saved none yet"
    parent = folder.parent if folder.parent.exists() else None
    own = {"adapter": str(parent) if parent else None}
    shape = {"init_from": str(adapter) if adapter else None}
    model = config.model.model_copy(update=own)
    inputs = check_inputs(config.model_copy(update={"model": model, "lora": config.lora.model_copy(update=shape)}))
    if inputs.data.report.train.fingerprint != manifest["data_sha256"]:
        raise DataError(f"{config.data.source}: not the rows that {folder.path} trained on")
    return Loaded(config.model_copy(update={"model": model}), inputs, line)


def _subject(
    loaded: Loaded, folder: RunFolder | None, examples: tuple[Any, ...], step: int, exact_parameters: int
) -> Subject:
    config, inputs = loaded.config, loaded.inputs
    policy = build_run_policy(config, inputs)
    hashes = _hashes(folder, inputs, policy) if folder else {}
    if config.train.dequantize_once:
        dequantize_once(policy)
    method: Any = build_method(config, inputs.attention)
    chosen: Method = method
    mode = choose_execution(config, inputs)
    examples = _checkable(config, chosen, examples)
    return Subject(config, inputs.tokenizer, policy, chosen, examples, step, mode, hashes, exact_parameters)


def _checkable(config: RunConfig, method: Method, examples: tuple[Any, ...]) -> tuple[Any, ...]:
    """The examples; for a loss that sorts the pairs of a micro-batch those of the step's first micro-batch alone, since
    the float64 formulas see all pairs at once."""
    if config.method == "sft" or not LOSSES[config.dpo.loss_type].mixes_pairs:
        return examples
    rows = set(method.micro_batches(examples)[0].data_rows)
    return tuple(example for example in examples if example.row in rows)


def _hashes(folder: RunFolder, inputs: Inputs, policy: Policy) -> dict[str, tuple[str, str]]:
    """What the manifest names, as it is here; a base in another precision has another hash."""
    manifest = folder.read_manifest()
    hashes = {}
    if str(inputs.placement.dtype).removeprefix("torch.") == manifest["base"]["dtype"]:
        hashes["base"] = (base_sha256(policy.model), manifest["base"]["sha256"])
    if manifest["parent_adapter"]:
        if inputs.parent is None:
            raise CheckpointError(f"{folder.parent} is missing: the frozen adapter that this run stands on")
        saved = read_adapter_weights(inputs.parent)
        own = adapter_parameters(policy.model, PARENT)
        same = all(bool((own[name].cpu() == tensor).all()) for name, tensor in saved.items())
        found = adapter_sha256(inputs.parent)
        hashes["frozen adapter"] = (found if same else "loaded otherwise", manifest["parent_adapter"])
    return hashes


def _document(subject: Subject, weights: str, batch: int, checks: list[Check]) -> dict[str, Any]:
    placement = subject.policy.placement
    return {
        "method": subject.config.method,
        "step": batch,
        "data_rows": [example.row for example in subject.examples],
        "weights": weights,
        "device": str(placement.device),
        "precision": placement.precision,
        "execution": subject.mode,
        "ok": all(one.ok for one in checks),
        "checks": as_json(checks),
    }
