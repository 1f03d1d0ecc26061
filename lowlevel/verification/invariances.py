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
from lowlevel.batch.replies import replies, segment
from lowlevel.batch.segments import Segment, pair_rows, sft_segment
from lowlevel.labels import IGNORED
from lowlevel.methods import KTO, Method
from lowlevel.methods.reward import reward_segments
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
        checks += _compare(subject, name, subject.run_step(method), expected)
    padded = subject.run_step(batches=[left_padded(subject)])
    checks += _compare(subject, "left padding = right padding", padded, expected)
    with _checkpointing(subject, on=False):
        without = subject.run_step()
    with _checkpointing(subject, on=True):
        checks += _compare(subject, "recomputed layers = kept", subject.run_step(), without)
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


def _compare(subject: Subject, name: str, found: Step, expected: Step, other_kernels: float = 0.0) -> list[Check]:
    """`other_kernels`: error of the loss if the two passes round differently."""
    bounds, wanted = subject.bounds, expected[0].metrics["loss"]
    size = abs(wanted) or 1.0
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
    examples, numbers = subject.examples, count()
    rows: list[Segment]
    if isinstance(subject.method, KTO):
        rows = [segment([reply], numbers) for reply in replies(examples)]
    elif subject.rewards:
        rows = [row for x in examples for row in reward_segments(x, next(numbers), shared=False)]
    elif subject.method.paired:
        ids = [(x.row, next(numbers), x.prompt_ids, x.chosen_ids, x.rejected_ids) for x in examples]
        rows = [row for parts in ids for row in pair_rows(*parts)]
    else:
        rows = [sft_segment(x.row, next(numbers), x.input_ids, x.labels, x.weights) for x in examples]
    width = max(map(len, rows)) + 3  # so that the longest one is moved too
    padded = []
    for row in rows:
        zeros = np.zeros(width - len(row), np.int64)
        numbers, targets = zeros + row.numbers[0], np.full(len(zeros), IGNORED)
        padded.append([Segment(row.row, zeros, zeros, zeros, numbers, targets), row])
    values = [x.values for x in subject.examples] if subject.method.columns else None
    (plain,) = with_batches_of(subject.method, len(subject.examples)).micro_batches(subject.examples)
    batch = build_batch(padded, pairs=subject.method.paired, values=values)
    return replace(batch, kl=plain.kl, mismatched=plain.mismatched).to(subject.policy.placement.device)


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
    checks = _compare(subject, f"{subject.mode} = eager", found, expected, rounding)
    fell_back = "; ".join(notes) or f"ran {mode}"
    return [*checks, check(GROUP, f"runs {subject.mode}", float(mode != subject.mode), 0, fell_back)]
