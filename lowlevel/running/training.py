"""A training run from its configuration to its result: folder, lock, resume, signals, the loop, the final files."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from lowlevel.checkpoints.checkpoint import remove_litter
from lowlevel.config.schema import RunConfig
from lowlevel.determinism import deterministic_mode
from lowlevel.errors import CONTINUE, ConfigError, InterruptedRunError, OutOfMemoryError, how_many
from lowlevel.loop import train
from lowlevel.optim.train_state import StepResult
from lowlevel.ranks import Ranks, joined
from lowlevel.running.beginning import Checkpoint, Start
from lowlevel.running.callbacks import Callback
from lowlevel.running.endings import Interrupts, one_error, recorded_end
from lowlevel.running.forensics import explaining
from lowlevel.running.job import Engine, Job, build_job
from lowlevel.running.observer import RunObserver
from lowlevel.running.progress import TrainingProgress
from lowlevel.running.run_folder import RunFolder, run_lock
from lowlevel.running.run_record import announce, write_finish
from lowlevel.running.trackers import open_trackers

Result = TypeVar("Result")
Steps = Generator[StepResult, None, dict[str, Any]]


def run_steps(config: RunConfig, console: Console, **options: Any) -> Steps:
    """Train as configured; yield each step's result, return the summary. Leaving the loop early saves a checkpoint.

    Args:
        config: the resolved configuration.
        console: prints the progress.
        **options: resume, restart, allow_change, callbacks and details of `Start`.

    Raises:
        LowlevelError: a subclass with the exit code.
    """
    folder = RunFolder(Path(config.train.output_dir))
    silent = {"train.ddp_timeout": float(config.train.ddp_timeout)}  # seconds without a sign of life, and no hang
    silent |= {f"{config.method}.reward_timeout": config.sampled.reward_timeout} if config.sampled else {}
    with (
        joined(silent) as ranks,
        deterministic_mode(config.train.deterministic),
        Interrupts() as interrupts,
        ranks.together(interrupts, _recorder(folder, ranks)),
        one_error(folder, interrupts),
    ):
        console = console if ranks.first else Console(quiet=True)
        start = Start(folder, console, ranks, **options)
        if ranks.first:
            start.check_folder()
        continues = ranks.first and folder.holds_run() and start.resume
        prepared = None if continues else start.prepare(config)  # before a folder is made or discarded
        with _held(folder, ranks), one_error(folder, interrupts):
            with ranks.in_turn():
                if ranks.first:
                    remove_litter(folder.path)
                if ranks.first and start.restart and folder.holds_run():
                    folder.discard()
                config, inputs = start.merge_base(*(prepared or start.prepare(config)))
                found = start.checkpoint()
            try:
                job = build_job(config, inputs, ranks)
                return (yield from _steps(start, job, found, interrupts))
            except torch.cuda.OutOfMemoryError:
                raise OutOfMemoryError(_out_of_memory(config)) from None


@contextmanager
def _held(folder: RunFolder, ranks: Ranks) -> Iterator[None]:
    """The first rank holds the folder's lock and records how the run ends."""
    if not ranks.first:
        yield
        return
    with run_lock(folder.path), recorded_end(folder):
        yield


def _recorder(folder: RunFolder, ranks: Ranks) -> Callable[[int, str], None]:
    """Records a failure of several ranks: the first rank does, which holds the lock; if it is gone, another one."""

    def record(code: int, text: str) -> None:
        if ranks.first:
            folder.write_end("failed", code, text)
            return
        with suppress(ConfigError), run_lock(folder.path):
            folder.write_end("failed", code, text)

    return record


def returned(steps: Generator[object, None, Result]) -> Result:
    """Take all steps; what the generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


def run_training(config: RunConfig, console: Console, **options: Any) -> dict[str, Any]:
    """Run all steps of `run_steps` and return the summary; options and errors are the same."""
    return returned(run_steps(config, console, **options))


def _steps(start: Start, job: Job, found: Checkpoint | None, interrupts: Interrupts) -> Steps:
    folder, config, ranks = start.folder, job.config, job.ranks
    state = start.begin(job, found)
    engine = Engine(job, folder, start.console)
    announce(start.console, config, job.inputs, job.policy, job.order, ranks)
    with interrupts.compiling():
        engine.rehearse()
    opened: AbstractContextManager[Sequence[Callback]] = nullcontext(())
    explained: AbstractContextManager[None] = nullcontext()
    if ranks.first:
        opened = open_trackers(config, folder.path, start.note)
    if ranks.first and not ranks.sharded:  # it runs layers on this rank alone
        explained = explaining(job.policy, job.method, folder.path)
    with TrainingProgress(start.console, config.method, job.total_steps, state.step) as bar:
        with (
            opened as trackers,
            explained,
            engine.cached or nullcontext(),
            engine.tracer or nullcontext(),
            engine.online or nullcontext(),
        ):
            called = [*start.callbacks, *trackers] if ranks.first else []
            observer = RunObserver(folder, bar, engine, start.note, called)
            if engine.held_out and state.step == 0:
                observer.log({"step": 0, "epoch": 0.0, **engine.evaluate(0)})
            with interrupts.deferred():
                steps = train(
                    engine.cached or engine.execution,
                    job.optimizer,
                    state,
                    engine.batches,
                    (lambda: engine.evaluate(state.step)) if engine.held_out else None,
                    observer,
                    config.train,
                    total_steps=job.total_steps,
                    steps_per_epoch=job.order.steps_per_epoch,
                    ranks=ranks,
                    tracer=engine.tracer,
                    details=start.details,
                )
                try:
                    yield from steps
                except GeneratorExit:  # the caller left its loop over the steps
                    observer.save(state)
                    raise
    if (signum := ranks.stop_requested()) and state.step < job.total_steps:
        raise InterruptedRunError(f"stopped at step {state.step} of {job.total_steps} and saved; {CONTINUE}", signum)
    with interrupts.deferred():
        return write_finish(folder, job, state, engine.execution.mode, start.console) if ranks.first else {}


def _out_of_memory(config: RunConfig) -> str:
    train, peak = config.train, torch.cuda.max_memory_allocated() / 2**30
    if train.micro_batch_positions is not None:
        return (
            f"out of memory at {peak:.2f} GiB with {train.micro_batch_positions:,} positions at once; give a smaller "
            "train.memory_budget, or lower train.micro_batch_positions"
        )
    return (
        f"out of memory at {peak:.2f} GiB with {how_many(train.per_device_train_batch_size, 'rows')} of "
        f"{config.data.max_length} tokens; halve train.per_device_train_batch_size and double "
        "gradient_accumulation_steps, or lower data.max_length"
    )
