"""Group 3, invariances: loss and gradient of a step do not depend on layout, recomputation or execution mode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import numpy as np
from torch import Tensor

from lowlevel.batch.layout import PackedBatch, build_batch
from lowlevel.batch.packing import ExampleLayout
from lowlevel.batch.replies import replies, segment
from lowlevel.batch.segments import Segment
from lowlevel.labels import IGNORED
from lowlevel.methods import Method
from lowlevel.optim.train_state import StepResult
from lowlevel.verification.evidence import Evidence
from lowlevel.verification.subject import Check, Subject, check, packed, relative, with_batches_of

GROUP = "invariances"
Step = tuple[StepResult, Tensor]  # a step's result and its flat gradient


def invariance_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """Loss and gradient of the same step, pairwise. Dropout stays on: its masks must not change either."""
    expected = subject.run_step(with_batches_of(subject.method, len(subject.examples)))
    checks = []
    for name, method in layouts(subject):
        checks += compare(subject, name, subject.run_step(method), expected)
    padded = subject.run_step(batches=[left_padded(subject)])
    checks += compare(subject, "left padding = right padding", padded, expected)
    with _checkpointing(subject, on=False):
        without = subject.run_step()
    with _checkpointing(subject, on=True):
        checks += compare(subject, "recomputed layers = kept", subject.run_step(), without)
    if subject.mode != "eager":
        checks += _execution_checks(subject, evidence)
    return checks


def layouts(subject: Subject) -> Iterator[tuple[str, Method]]:
    """Layouts to compare with one padded micro-batch. A loss that mixes pairs needs them in one micro-batch."""
    method, number = subject.method, len(subject.examples)
    yield "as the run has it", method
    if not subject.mixes:
        yield f"{number} x 1 = 1 x {number}", with_batches_of(method, 1)
        yield f"3 a micro-batch = 1 x {number}", with_batches_of(method, 3)
    name = "shared prompts = plain rows" if subject.config.sampled else "packed = padded"
    yield "shared prompt = two rows" if method.paired else name, packed(method, number)


def compare(
    subject: Subject, name: str, found: Step, expected: Step, *, other_kernels: float = 0.0, least: float = 0.0
) -> list[Check]:
    """Loss and gradient of two steps. `other_kernels`: error of the loss if the two passes round differently.

    `least`: the loss that errors are relative to, if its own size is less.
    """
    bounds, wanted = subject.bounds, expected[0].metrics["loss"]
    size = max(abs(wanted), least) or 1.0
    loss = abs(found[0].metrics["loss"] - wanted) / size
    gradient = relative(found[1], expected[1], subject.cancelled)
    return [
        check(GROUP, f"{name}: loss", loss, bounds.layout_loss + other_kernels / size, "relative"),
        check(GROUP, f"{name}: gradient", gradient, bounds.layout_gradient, "relative l2"),
    ]


def left_padded(subject: Subject) -> PackedBatch:
    """All examples in one micro-batch, one sequence a row, with the padding before it instead of behind it.

    The padding is a segment of tokens 0 that no token attends to and no loss reads.
    """
    examples, numbers, plain = subject.examples, count(), with_batches_of(subject.method, len(subject.examples))
    if isinstance(plain, ExampleLayout):
        rows = [row for x in examples for row in plain.segments(x, next(numbers))]
    else:
        rows = [segment([reply], numbers) for reply in replies(examples)]
    width = max(map(len, rows)) + 3  # so that the longest one is moved too
    padded = []
    for row in rows:
        zeros = np.zeros(width - len(row), np.int64)
        targets = np.full(len(zeros), IGNORED)
        padded.append([Segment(row.row, zeros, zeros, zeros, zeros + row.numbers[0], targets), row])
    values = [x.values for x in examples] if plain.columns else None
    (right,) = plain.micro_batches(examples)
    batch = build_batch(padded, pairs=plain.paired, values=values)
    return replace(batch, kl=right.kl, mismatched=right.mismatched).to(subject.policy.placement.device)


@contextmanager
def _checkpointing(subject: Subject, *, on: bool) -> Iterator[None]:
    layers = subject.policy.layers
    before, compiled = layers.recomputed, layers.compiled
    layers.recomputed = len(layers.layers) if on else 0
    layers.use(compiled=False)
    try:
        yield
    finally:
        layers.recomputed = before
        layers.use(compiled=compiled)


def _execution_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """The run's own execution, three times: it warms up, captures, and replays.

    Fused kernels round differently from eager ones. A pair's margin sums up to thousands of tokens, so the error of
    a forward pass in each token, times two passes, bounds the loss.
    """
    expected = subject.run_step()
    notes: list[str] = []
    execution = subject.execution(notes)
    for _ in range(3):
        found = subject.run_step(execution=execution)
    mode = execution.mode
    execution.use("eager")
    rounding = evidence.loss_error(math.sqrt(2) * subject.bounds.forward)
    checks = compare(subject, f"{subject.mode} = eager", found, expected, other_kernels=rounding)
    fell_back = "; ".join(notes) or f"ran {mode}"
    return [*checks, check(GROUP, f"runs {subject.mode}", float(mode != subject.mode), 0, fell_back)]
