"""A training run as a person starts it: folder, lock, resume, signals, the loop, and what is written at the end."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lowlevel.assembly import (
    Inputs,
    build_method,
    build_run_policy,
    check_inputs,
    choose_execution,
    identity,
    with_merged_base,
    with_plan,
)
from lowlevel.checkpoint import newest_verified, remove_litter, run_lock, write_json
from lowlevel.config import RunConfig
from lowlevel.errors import ConfigError, InterruptedRunError, LowlevelError, OutOfMemoryError
from lowlevel.execution import WithFallback
from lowlevel.failure_folder import explaining
from lowlevel.layout import PackedBatch
from lowlevel.loop import evaluate_examples, train
from lowlevel.loss_scale import LossScale
from lowlevel.method import Method
from lowlevel.metrics import TrainState
from lowlevel.model.adapters import save_adapter
from lowlevel.model.merging import write_stacked_adapter
from lowlevel.model.policy import TRAINED, Policy, dequantize_once
from lowlevel.observer import RunObserver
from lowlevel.optimizer import build_optimizer
from lowlevel.order import DataOrder
from lowlevel.plots import plot_loss
from lowlevel.prefetch import Prefetched
from lowlevel.progress import TrainingProgress
from lowlevel.reference_cache import CachedReference, reference_identity, with_blanks, with_content
from lowlevel.rehearsal import largest_batch, rehearse
from lowlevel.run_folder import RunFolder, environment, refuse_changes
from lowlevel.tracing import Tracer, drop_after
from lowlevel.training_state import restore_state, save_state


def run_training(config: RunConfig, console: Console, *, resume: bool = False, restart: bool = False) -> dict[str, Any]:
    """Train as configured and return the summary.

    Args:
        config: the resolved configuration.
        console: where progress goes.
        resume: go on from the newest verified checkpoint.
        restart: discard the run that the folder holds.

    Raises:
        LowlevelError: of the kind whose exit code fits.
    """
    folder = RunFolder(Path(config.train.output_dir))
    if folder.holds_run() and not (resume or restart):
        raise ConfigError(
            f"{folder.path} holds a run: add --resume to go on, --restart to discard it, or set train.output_dir"
        )
    inputs = check_inputs(config)
    if config.train.memory_budget is not None:
        config = with_plan(config, inputs)
    with run_lock(folder.path):
        remove_litter(folder.path)
        if restart:
            folder.discard()
        if config.model.adapter_mode == "original" and inputs.parent:
            config, inputs = with_merged_base(config, inputs, folder)
        found = newest_verified(folder.path, console.print) if resume else None
        if found:
            refuse_changes(config, folder)
        try:
            return _train_in(folder, config, inputs, console, found)
        except torch.cuda.OutOfMemoryError:
            error: LowlevelError = OutOfMemoryError(_out_of_memory(config))
            folder.write_end("failed", error)
            raise error from None
        except LowlevelError as failure:
            state = "preempted" if isinstance(failure, InterruptedRunError) else "failed"
            folder.write_end(state, failure)
            raise


def _out_of_memory(config: RunConfig) -> str:
    train, peak = config.train, torch.cuda.max_memory_allocated() / 2**30
    if train.micro_batch_positions is not None:
        return (
            f"out of memory at {peak:.2f} GiB with {train.micro_batch_positions:,} positions at once; give a smaller "
            "train.memory_budget, or lower train.micro_batch_positions"
        )
    return (
        f"out of memory at {peak:.2f} GiB with {train.per_device_train_batch_size} rows of {config.data.max_length} "
        "tokens; halve train.per_device_train_batch_size and double gradient_accumulation_steps, or lower "
        "data.max_length"
    )


def _train_in(
    folder: RunFolder, config: RunConfig, inputs: Inputs, console: Console, found: tuple[Path, dict[str, Any]] | None
) -> dict[str, Any]:
    examples, method = inputs.data.train, build_method(config, inputs.attention)
    rows_per_step = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    order = DataOrder(len(examples), rows_per_step, config.train.seed, config.train.data_order == "shuffled")
    total_steps = config.train.max_steps or math.ceil(order.steps_per_epoch * config.train.num_train_epochs - 1e-9)
    policy = build_run_policy(config, inputs)
    optimizer = build_optimizer(policy.flat.weights, config.train)
    state = TrainState(LossScale.for_precision(inputs.placement.precision))
    manifest = identity(config, inputs, policy)
    if found:
        state = restore_state(policy, optimizer, *found, manifest)
        console.print(f"resumed from {found[0].name}")
    else:
        _write_start(folder, config, inputs, manifest)
    _drop_later(folder, state.step if found else -1)  # -1: of a run that ended before its first checkpoint
    if config.train.dequantize_once:
        dequantize_once(policy)
    _announce(console, config, inputs, policy, method, total_steps, order)

    execution, cached = _execution(policy, method, config, inputs, manifest, console)
    lay_out = with_content(method.micro_batches) if cached else method.micro_batches
    batches = Prefetched(lambda step: lay_out([examples[i] for i in order.step_rows(step)]), total_steps)

    tracer = Tracer(config, policy, method, folder.trace) if config.trace.every or config.trace.steps else None

    def write_checkpoint(state: TrainState) -> None:
        if tracer:
            tracer.flush()
        save_state(folder.path, policy, optimizer, state, config, manifest)
        if cached:
            cached.flush()

    if inputs.placement.device.type == "cuda":
        largest = largest_batch(method, examples, rows_per_step)
        largest = with_blanks(largest) if cached else largest
        write_json(folder.path / "memory.json", rehearse(policy, method, execution, optimizer, largest))
    held_out = evaluation_batches(method, config, inputs)
    evaluate = (lambda: evaluate_examples(policy, method, held_out, prefix="eval_")) if held_out else None
    with TrainingProgress(console, config.method, total_steps, state.step) as bar:
        observer = RunObserver(folder, bar, write_checkpoint)
        explained = explaining(policy, method, folder.path)
        with observer.signals(), explained, cached or nullcontext(), tracer or nullcontext():
            if evaluate and state.step == 0:
                observer.log({"step": 0, "epoch": 0.0, **evaluate()})
            train(
                policy,
                method,
                optimizer,
                state,
                batches,
                evaluate,
                observer,
                config.train,
                total_steps=total_steps,
                steps_per_epoch=order.steps_per_epoch,
                execution=cached or execution,
                tracer=tracer,
            )
    if observer.signum and state.step < total_steps:
        raise InterruptedRunError(
            f"stopped at step {state.step} of {total_steps} and saved; go on with --resume", observer.signum
        )
    return _finish(folder, config, policy, state, order, console)


def _drop_later(folder: RunFolder, step: int) -> None:
    """Remove what an earlier attempt wrote of steps after `step`."""
    folder.drop_metrics_after(step)
    drop_after(folder.trace, step)
    folder.drop_failure()


def _execution(
    policy: Policy, method: Method, config: RunConfig, inputs: Inputs, manifest: dict[str, Any], console: Console
) -> tuple[WithFallback, CachedReference | None]:
    """How micro-steps run, and the same behind a cache of reference numbers, if there is one."""
    execution = WithFallback(policy, method, choose_execution(config, inputs), console.print)
    if config.dpo.reference_cache is None:
        return execution, None
    reference = reference_identity(policy, manifest["base"]["sha256"], manifest["parent_adapter"])
    folder = Path(config.dpo.reference_cache)
    return execution, CachedReference(execution, policy, folder, reference, console.print)


def evaluation_batches(method: Method, config: RunConfig, inputs: Inputs) -> list[PackedBatch]:
    """Held-out rows as micro-batches, in their own order."""
    size = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    rows = inputs.data.evaluation
    return [batch for start in range(0, len(rows), size) for batch in method.micro_batches(rows[start : start + size])]


def _write_start(folder: RunFolder, config: RunConfig, inputs: Inputs, manifest: dict[str, Any]) -> None:
    device: dict[str, Any] = {"device": "cpu", "precision": inputs.placement.precision}
    if inputs.placement.device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        device |= {"device": torch.cuda.get_device_name(), "compute_capability": capability, "cuda": torch.version.cuda}
    folder.write_config(config)
    write_json(folder.path / "environment.json", environment(device))
    write_json(folder.path / "data_report.json", inputs.data.report.to_json())
    write_json(folder.path / "manifest.json", manifest)
    if inputs.parent:
        shutil.copytree(inputs.parent, folder.parent, dirs_exist_ok=True, ignore=_only_adapter_files)
    folder.write_status("running", 0)


def _only_adapter_files(directory: str, names: list[str]) -> set[str]:
    return {name for name in names if not name.startswith("adapter_")}


def _announce(
    console: Console,
    config: RunConfig,
    inputs: Inputs,
    policy: Policy,
    method: Method,
    total_steps: int,
    order: DataOrder,
) -> None:
    train_config, placement = config.train, inputs.placement
    device = torch.cuda.get_device_name() if placement.device.type == "cuda" else "CPU"
    batch, accumulation = train_config.per_device_train_batch_size, train_config.gradient_accumulation_steps
    p = config.lora.lora_dropout
    off = config.method == "dpo" and config.dpo.disable_dropout
    base = f"4-bit {config.model.bnb_4bit_quant_type}" if config.model.load_in_4bit else "unquantised"
    dropout = "off (dpo.disable_dropout)" if off else f"{p:g}"
    console.print(
        f"{config.method}: {config.model.name}, {base} base, {placement.precision} on {device}\n"
        f"  attention  {inputs.attention.reason}\n"
        f"  adapter    {policy.flat.weights.numel():,} trainable parameters, dropout {dropout}\n"
        f"  data       {order.num_rows:,} examples, {total_steps:,} steps of {batch} x {accumulation}"
    )
    if config.method == "dpo":
        reference = f"base + {config.model.adapter} (frozen)" if inputs.parent else "base"
        console.print(f"  reference  {reference}; loss {config.dpo.loss_type}, beta {config.dpo.beta:g}")


def _finish(
    folder: RunFolder, config: RunConfig, policy: Policy, state: TrainState, order: DataOrder, console: Console
) -> dict[str, Any]:
    save_adapter(policy.model, TRAINED, folder.adapter, config.model.name)
    if folder.parent.exists():
        write_stacked_adapter(folder.parent, folder.adapter, folder.stacked)
    summary = {
        "train_runtime": state.seconds,
        "train_samples_per_second": state.examples / state.seconds,
        "train_steps_per_second": state.step / state.seconds,
        "train_loss": state.total.means()["loss"],
        "epoch": state.step / order.steps_per_epoch,
        "num_tokens": state.num_tokens,
        "skipped_steps": state.loss_scale.skipped_steps,
    }
    write_json(folder.path / "summary.json", summary)
    plot_loss(folder.read_metrics(), folder.path / "loss.png", title=f"{config.method}: {folder.path.name}")
    folder.write_status("finished", state.step, exit_code=0)
    shown = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch")
    console.print("{" + ", ".join(f"'{key}': {summary[key]:.4f}" for key in shown) + "}")
    console.print(f"adapter saved to {folder.adapter}")
    return summary
