"""A training run as a person starts it: folder, lock, resume, signals, the loop, and what is written at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.order import DataOrder
from lowlevel.batch.prefetch import Prefetched
from lowlevel.checkpoints.checkpoint import newest_verified, remove_litter
from lowlevel.checkpoints.training_state import restore_state, save_state
from lowlevel.config.schema import RunConfig
from lowlevel.determinism import deterministic_mode
from lowlevel.durable import write_json
from lowlevel.errors import ConfigError, InterruptedRunError, OutOfMemoryError
from lowlevel.execution import Method, WithFallback
from lowlevel.loop import check_evaluation, evaluate_examples, train
from lowlevel.model.base import base_sha256
from lowlevel.model.policy import Policy, dequantize_once
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer
from lowlevel.optim.train_state import StepResult, TrainState
from lowlevel.reference_cache import CachedReference, reference_identity, with_blanks, with_content
from lowlevel.running.adapter_sources import check_bases
from lowlevel.running.assembly import (
    Inputs,
    build_method,
    build_run_policy,
    check_run,
    choose_execution,
    identity,
    read_merged_adapter,
    with_merged_base,
)
from lowlevel.running.endings import one_error, recorded_end
from lowlevel.running.failure_folder import explaining
from lowlevel.running.first_step import check_first_step, starts_as_reference
from lowlevel.running.interrupts import Interrupts
from lowlevel.running.observer import RunObserver
from lowlevel.running.progress import TrainingProgress, lines_to
from lowlevel.running.rehearsal import largest_batch, rehearse
from lowlevel.running.result import check_result_is_saved, remove_result
from lowlevel.running.resuming import (
    check_differences,
    differences,
    is_written,
    read_changes,
    recorded_changes,
    versions,
)
from lowlevel.running.run_folder import RunFolder, run_lock
from lowlevel.running.run_record import announce, write_finish, write_start
from lowlevel.tracing import Tracer, drop_after


def run_training(
    config: RunConfig,
    console: Console,
    *,
    resume: bool = False,
    restart: bool = False,
    allow_change: Sequence[str] = (),
) -> dict[str, Any]:
    """Train as configured and return the summary.

    Args:
        config: the resolved configuration.
        console: where progress goes.
        resume: go on from the newest verified checkpoint.
        restart: discard the run that the folder holds.
        allow_change: keys that may differ from that checkpoint (lowlevel/running/resuming.py).

    Raises:
        LowlevelError: of the kind whose exit code fits.
    """
    folder = RunFolder(Path(config.train.output_dir))
    with deterministic_mode(config.train.deterministic), Interrupts() as interrupts, one_error(folder, interrupts):
        goes_on = folder.holds_run() and resume
        if folder.holds_run() and not (resume or restart):
            raise ConfigError(
                f"{folder.path} holds a run: add --resume to go on, --restart to discard it, or set train.output_dir"
            )
        prepared = None if goes_on else _prepared(config, folder)  # bad input makes no folder, and discards none
        with run_lock(folder.path), recorded_end(folder), one_error(folder, interrupts):
            remove_litter(folder.path)
            if restart:
                folder.discard()
            config, inputs = prepared or _prepared(config, folder)
            if config.model.adapter_mode == "original" and inputs.parent:
                for note in check_bases({"model.adapter": inputs.parent}, {"name": config.model.name}):
                    console.print(f"note: {note}", markup=False)
                config, inputs = with_merged_base(config, inputs, folder)
            found = _checkpoint(folder, console, allow_change) if resume else None
            try:
                return _train_in(folder, _build(config, inputs), console, found, allow_change, interrupts)
            except torch.cuda.OutOfMemoryError:
                raise OutOfMemoryError(_out_of_memory(config)) from None


def _prepared(config: RunConfig, folder: RunFolder) -> tuple[RunConfig, Inputs]:
    """The configuration with its plan in it, and the inputs, with all that can be checked without the model."""
    config = folder.resolved(config)
    config, inputs = check_run(config)
    _make_folder(config.dpo.reference_cache, "dpo.reference_cache")
    if Path(config.model.name) == folder.base:
        inputs = replace(inputs, merged_adapter=read_merged_adapter(folder))
    return config, inputs


def _make_folder(path: str | None, key: str) -> None:
    if path is None:
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be made: {error.strerror}") from None


def _checkpoint(folder: RunFolder, console: Console, allow_change: Sequence[str]) -> tuple[Path, dict[str, Any]] | None:
    found = newest_verified(folder.path, lines_to(console))
    if found is None:
        if allow_change:
            raise ConfigError(f"--allow-change: {folder.path} has no checkpoint yet that anything could differ from")
        console.print("no checkpoint yet: starting from step 0")
    return found


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


@dataclass(frozen=True)
class Job:
    """The parts of a run. `origin` is what its checkpoints say of where they come from."""

    config: RunConfig
    inputs: Inputs
    method: Method
    policy: Policy
    optimizer: torch.optim.Optimizer
    order: DataOrder
    total_steps: int
    origin: dict[str, dict[str, Any]]

    @property
    def manifest(self) -> dict[str, Any]:
        """Base, adapters, data and reference by hash."""
        return self.origin["identity"]


def _build(config: RunConfig, inputs: Inputs) -> Job:
    """Load the model and put everything together."""
    order = DataOrder.of(config, len(inputs.data.train))
    policy = build_run_policy(config, inputs)
    optimizer = build_optimizer(policy.flat.weights, config.train)
    base_hash = base_sha256(policy.model)
    origin = {"identity": identity(config, inputs, policy, base_hash), "versions": versions(inputs.placement)}
    return Job(config, inputs, build_method(config, inputs.attention), policy, optimizer, order,
               order.total_steps(config.train), origin)  # fmt: skip


def _begin(
    folder: RunFolder,
    job: Job,
    found: tuple[Path, dict[str, Any]] | None,
    allow_change: Sequence[str],
    console: Console,
) -> TrainState:
    """The state of a new run, or of the checkpoint `found`; the folder says which.

    Raises:
        ConfigError, DataError: the run is not the checkpoint's, and that was not allowed; or going on would lose a
            result.
    """
    if found is None:
        check_result_is_saved(folder)
        write_start(folder, job.config, job.inputs, job.manifest, 0)
        _drop_later(folder, -1)  # of a run that ended before its first checkpoint
        return TrainState(LossScale.for_precision(job.inputs.placement.precision))
    step, saved = found[1]["step"], folder.read_config()
    later = read_changes(folder, since=step)
    changes = differences(saved, found[1], job.config, job.manifest, job.origin["versions"], later)
    check_differences(changes, allow_change, step, folder, job.inputs.data)
    written = not changes and is_written(folder, job.config, job.manifest)
    state = restore_state(job.policy, job.optimizer, *found)
    state.judge_patience(job.config.train.early_stopping_patience)  # --allow-change may have changed it
    if state.step < job.total_steps and not state.stopped_early:
        check_result_is_saved(folder)
        folder.write_status("running", state.step)
        remove_result(folder)
    for change in changes:
        console.print(f"allowed: {change}", markup=False)
    with recorded_changes(folder, step, changes):
        if written:
            folder.write_status("running", step)
        else:
            write_start(folder, job.config, job.inputs, job.manifest, step)
    _drop_later(folder, state.step)
    console.print(f"resumed from {found[0].name}")
    return state


def _train_in(
    folder: RunFolder,
    job: Job,
    console: Console,
    found: tuple[Path, dict[str, Any]] | None,
    allow_change: Sequence[str],
    interrupts: Interrupts,
) -> dict[str, Any]:
    config, policy, method, order = job.config, job.policy, job.method, job.order
    sources = {"model.adapter": job.inputs.parent, "lora.init_from": job.inputs.init_from}
    for note in check_bases(sources, job.manifest["base"]):
        console.print(f"note: {note}", markup=False)
    state = _begin(folder, job, found, allow_change, console)
    if config.train.dequantize_once:
        dequantize_once(policy)
    announce(console, config, job.inputs, policy, method, job.total_steps, order)
    execution, cached = _execution(job, console)
    examples = job.inputs.data.train
    lay_out = with_content(method.micro_batches) if cached else method.micro_batches
    batches = Prefetched(lambda step: lay_out([examples[i] for i in order.step_rows(step)]), job.total_steps)
    tracer = Tracer(config, policy, method, folder.trace) if config.trace.every or config.trace.steps else None

    def write_checkpoint(state: TrainState) -> None:
        if tracer:
            tracer.flush()
        save_state(folder.path, policy, job.optimizer, state, config, job.origin)
        if cached:
            cached.flush()

    if job.inputs.placement.device.type == "cuda":
        largest = largest_batch(method, examples, order.rows_per_step)
        largest = with_blanks(largest) if cached else largest
        write_json(folder.path / "memory.json", rehearse(policy, method, execution, job.optimizer, largest))
    held_out = evaluation_batches(method, config, job.inputs)

    def evaluate() -> dict[str, float]:
        scores = execution.until_it_runs(lambda: evaluate_examples(policy, method, held_out, prefix="eval_"))
        check_evaluation(scores, state.step, held_out)
        return scores

    def judge_first(result: StepResult) -> None:
        line = starts_as_reference(config) and check_first_step(result, config, job.inputs.placement.precision)
        if line:
            console.print(line, markup=False)

    with TrainingProgress(console, config.method, job.total_steps, state.step) as bar:
        observer = RunObserver(folder, bar, write_checkpoint, interrupts, judge_first)
        with explaining(policy, method, folder.path), cached or nullcontext(), tracer or nullcontext():
            if held_out and state.step == 0:
                observer.log({"step": 0, "epoch": 0.0, **evaluate()})
            with interrupts.deferred():
                train(cached or execution, job.optimizer, state, batches, evaluate if held_out else None, observer,
                      config.train, total_steps=job.total_steps, steps_per_epoch=order.steps_per_epoch,
                      tracer=tracer)  # fmt: skip
    if interrupts.signum and state.step < job.total_steps:
        raise InterruptedRunError(
            f"stopped at step {state.step} of {job.total_steps} and saved; go on with --resume", interrupts.signum
        )
    with interrupts.deferred():
        return write_finish(folder, config, policy, state, order, execution.mode, console)


def _drop_later(folder: RunFolder, step: int) -> None:
    """Remove what an earlier attempt wrote of steps after `step`."""
    folder.drop_metrics_after(step)
    drop_after(folder.trace, step)
    folder.drop_failure()


def _execution(job: Job, console: Console) -> tuple[WithFallback, CachedReference | None]:
    """How micro-steps run, and the same behind a cache of reference numbers, if there is one."""
    mode = choose_execution(job.config, job.inputs)
    execution = WithFallback(job.policy, job.method, mode, lines_to(console))
    if job.config.dpo.reference_cache is None:
        return execution, None
    reference = reference_identity(job.policy, job.manifest["base"]["sha256"], job.manifest["parent_adapter"])
    folder = Path(job.config.dpo.reference_cache)
    return execution, CachedReference(execution, job.policy, folder, reference, lines_to(console))


def evaluation_batches(method: Method, config: RunConfig, inputs: Inputs) -> list[PackedBatch]:
    """Held-out rows as micro-batches, in their own order."""
    size = config.rows_per_step
    rows: Sequence[Any] = inputs.data.evaluation
    return [batch for start in range(0, len(rows), size) for batch in method.micro_batches(rows[start : start + size])]
