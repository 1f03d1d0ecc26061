"""`lowlevel time`: duration of a run's steps and of the phases of a step. Trains nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lowlevel.config.schema import RunConfig
from lowlevel.determinism import deterministic_mode
from lowlevel.durable import write_given_json
from lowlevel.errors import ConfigError, how_many
from lowlevel.execution import WithFallback
from lowlevel.model.dequantised import dequantize_as_set
from lowlevel.optim.train_state import peak_memory
from lowlevel.running.assembly import Inputs, check_start, choose_execution
from lowlevel.running.job import Job, build_job
from lowlevel.running.progress import lines_to
from lowlevel.running.rehearsal import largest_batch, rehearse
from lowlevel.running.run_record import announce
from lowlevel.table import table_of
from lowlevel.timing.steps import Step, Whole, mean_phases, take_steps, whole

WARM_UP = 3  # steps before the measured ones, in both parts
BOUNDARIES = "each boundary waits for the device; a run packs its rows ahead, in a thread"
NOT_DIVIDED = "a captured graph cannot be divided: its layers are compiled and launched one by one, so slower"
SHARED = "tokens as computed, without padding: the shared prompt of a pair counts once"


@dataclass(frozen=True)
class Timed:
    """The measurement; phases in milliseconds per step."""

    mode: str
    whole: Whole
    memory: dict[str, float]  # GiB; 0 on a CPU
    divided_mode: str
    phases: dict[str, float]
    divided_steps: int


def time_run(config: RunConfig, console: Console, *, steps: int, json_file: Path | None = None) -> Timed:
    """Take the first steps of a run twice, whole and divided into phases, and print both; saves no weights.

    `steps` steps are measured, after WARM_UP unmeasured ones. Raises as a run would.
    """
    if config.sampled:
        what = "sampling_seconds, rewarding_seconds and tokens_per_second of metrics.jsonl"
        raise ConfigError(f"lowlevel time does not sample: a run of {config.method} logs {what}")
    with tempfile.TemporaryDirectory() as scratch, deterministic_mode(config.train.deterministic):
        resolved, inputs = check_start(config, Path(scratch))
        job = build_job(resolved, inputs)
        dequantize_as_set(job.policy, resolved.train.dequantize_once)
        announce(console, resolved, inputs, job.policy, job.order)
        if config.dpo.reference_cache is not None:
            console.print("  dpo.reference_cache is left out: the reference pass is timed")
        timed, taken = _measure(job, choose_execution(resolved, inputs), steps, console)
    _print_whole(timed, steps, console)
    if config.method == "dpo":
        console.print(SHARED)
    _print_phases(timed, console)
    if json_file:
        write_given_json(json_file, _document(config, inputs, timed, taken))
    return timed


def _measure(job: Job, mode: str, steps: int, console: Console) -> tuple[Timed, dict[str, list[Step]]]:
    """Whole steps in the run's mode, then divided steps in the nearest mode that can be divided."""
    execution = WithFallback(job.policy, job.method, mode, lines_to(console))
    if job.policy.placement.device.type == "cuda":  # as at the start of a run: capture the largest graph first
        largest = largest_batch(job.method, job.inputs.data.train, job.order.rows_per_step)
        rehearse(job.policy, job.method, execution, job.optimizer, largest)
    undivided = take_steps(job, execution, WARM_UP + steps)
    mode, memory = execution.mode, peak_memory()
    if mode == "graphed":
        execution.use("compiled")  # and frees the graphs
        torch.cuda.empty_cache()
    divided = take_steps(job, execution, WARM_UP + steps, divide=True)
    measured = {"whole": undivided[WARM_UP:], "divided": divided[WARM_UP:]}
    phases, counted = mean_phases(measured["divided"]), sum(step.counts for step in measured["divided"])
    return Timed(mode, whole(measured["whole"]), memory, execution.mode, phases, counted), measured


def _print_whole(timed: Timed, steps: int, console: Console) -> None:
    one = timed.whole
    console.print(f"whole steps, {timed.mode}: {one.counted} of {steps}, after {WARM_UP} warm-up steps")
    cells = {
        "median ms": f"{one.median_ms:,.1f}",
        "p10": f"{one.p10_ms:,.1f}",
        "p90": f"{one.p90_ms:,.1f}",
        "tokens/s": f"{one.tokens_per_second:,.0f}",
        "supervised/s": f"{one.supervised_tokens_per_second:,.0f}",
        "padding": f"{one.padding_share:.1%}",
    }
    console.print(table_of([*cells], [[*cells.values()]]))
    for apart, what in (
        (one.set_up, "captured or compiled a new batch shape"),
        (one.repeated, "overflowed in fp16 and were repeated at half the loss scale"),
    ):
        if apart.count:
            console.print(f"not counted: {apart.count} that {what}, median {apart.median_ms:,.1f} ms")
    if timed.memory["peak_reserved_gib"]:
        allocated, reserved = timed.memory["peak_allocated_gib"], timed.memory["peak_reserved_gib"]
        console.print(f"peak {allocated:.2f} GiB allocated, {reserved:.2f} GiB reserved")


def _print_phases(timed: Timed, console: Console) -> None:
    total = sum(timed.phases.values())
    console.print(f"a step by phase, {timed.divided_mode}: means of {how_many(timed.divided_steps, 'steps')}")
    rows = [(name, f"{one:,.2f}", f"{one / total:.1%}") for name, one in timed.phases.items()]
    console.print(table_of(("<phase", "ms", "share"), [*rows, None, ("the whole step", f"{total:,.2f}", "100.0%")]))
    console.print(BOUNDARIES)
    if timed.mode == "graphed":
        console.print(NOT_DIVIDED)


def _document(config: RunConfig, inputs: Inputs, timed: Timed, taken: Mapping[str, list[Step]]) -> dict[str, Any]:
    """All printed numbers, and each step."""
    on_gpu = inputs.placement.device.type == "cuda"
    return {
        "method": config.method,
        "model": config.model.name,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "precision": inputs.placement.precision,
        "attention": inputs.attention.reason,
        "warm_up_steps": WARM_UP,
        **asdict(timed),
        "steps": {part: [_step(step) for step in steps] for part, steps in taken.items()},
    }


def _step(step: Step) -> dict[str, Any]:
    result = step.result
    return {
        "step": result.step,
        "ms": 1e3 * step.seconds,
        "phases_ms": {name: 1e3 * seconds for name, seconds in step.phases.items()},
        "set_up": step.set_up,
        "repeated": step.repeated,
        "tokens": result.num_tokens,
        "supervised_tokens": result.supervised_tokens,
        "positions": result.positions,
    }
