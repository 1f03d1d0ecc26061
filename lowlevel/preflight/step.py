"""One step of the built-in base on built-in rows, in eager mode and in this machine's default mode."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowlevel.config.file import config_from_tables
from lowlevel.config.schema import RunConfig
from lowlevel.optim.train_state import StepResult
from lowlevel.preflight.finding import Finding, fail, note, ok
from lowlevel.running.assembly import build_method, build_run_policy, check_inputs, choose_execution
from lowlevel.running.observer import MARGINS, all_ties
from lowlevel.verification.subject import BOUNDS as GRADIENT_BOUNDS
from lowlevel.verification.subject import Subject, relative

BOUNDS = {"fp32": 1e-5, "fp16": 2e-3}  # of loss and gradient norm, relative; as in tests/gpu
PASSES = 3  # warm-up, capture, replay
ROWS = 8


@dataclass(frozen=True)
class Taken:
    """A step: execution mode, result, and flat gradient (n,) fp32."""

    mode: str
    result: StepResult
    gradient: Tensor


def demo_config(method: str) -> RunConfig:
    """A step of eight built-in rows in micro-batches of one packed row each; a fresh adapter."""
    tables = {
        "method": method,
        "lora": {"r": 16},
        "data": {"limit": ROWS, "max_length": 128},
        "train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS},
    }
    return config_from_tables(tables, "doctor")


def one_step(method: str) -> Finding:
    """Loss and gradient of step 1 of `sft` or `dpo` in both modes; nothing is updated."""
    config = demo_config(method)
    inputs = check_inputs(config)
    policy = build_run_policy(config, inputs)
    chosen = build_method(config, inputs.attention)
    rows, mode = tuple(inputs.data.train), choose_execution(config, inputs)
    subject = Subject(config, inputs.tokenizer, policy, chosen, rows, 0, mode, {}, 0)
    eager = Taken("eager", *subject.run_step())
    fallen: list[str] = []
    execution = subject.execution(fallen)
    for _ in range(PASSES):
        result, gradient = subject.run_step(execution=execution)
    return judge(policy.placement.precision, eager, Taken(execution.mode, result, gradient), fallen)


def judge(precision: str, eager: Taken, own: Taken, fallen: list[str]) -> Finding:
    """Compare a step in the machine's default mode, or the one it fell back to, with the eager one.

    The precision, fp16 or fp32, sets the bounds; `fallen` has one line for each fallback.
    """
    numbers = [(one.result.metrics["loss"], one.result.grad_norm) for one in (own, eager)]
    apart = max(abs(one - other) / abs(other) for one, other in zip(*numbers, strict=True))
    turned = relative(own.gradient, eager.gradient)
    bound, gradient_bound = BOUNDS[precision], GRADIENT_BOUNDS[precision].gradient
    found = (
        f"{precision}; eager: {_numbers(eager.result)}; {own.mode}{' again' if own.mode == 'eager' else ''}: "
        f"{_numbers(own.result)}; {apart:.1e} apart (bound {bound:g}), the gradient itself {turned:.1e} "
        f"(bound {gradient_bound:g})"
    )
    if not (apart <= bound and turned <= gradient_bound):  # NaN fails both
        return fail(found, 'set train.execution = "eager", and run lowlevel verify on your own run file')
    moved = [one.result.metrics[MARGINS] for one in (eager, own) if not all_ties(one.result)]
    if moved:
        return fail(f"{found}; mean margin {moved[0]:.3g}, not 0", "the reference is not the policy at step 0")
    if MARGINS in eager.result.metrics:
        found += f"; reference equals policy: all {eager.result.count} margins are 0"
    return note(f"{found}; {fallen[0]}", "runs use that mode, which is slower") if fallen else ok(found)


def _numbers(result: StepResult) -> str:
    return f"loss {result.metrics['loss']:.4f}, gradient norm {result.grad_norm:.4f}"
