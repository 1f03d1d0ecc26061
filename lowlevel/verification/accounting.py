"""Groups 3 and 6, a whole step.

invariances    loss and gradient of a step do not depend on layout, recomputation or execution mode
accounting     the divisor of a step, the effect of each hyper-parameter, and the loss scale, which cancels
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch, Segment, build_batch, pair_rows, sft_segment
from lowlevel.errors import one_line
from lowlevel.labels import IGNORED
from lowlevel.methods import Method
from lowlevel.methods.reward import reward_segments
from lowlevel.verification.evidence import Evidence
from lowlevel.verification.formulas import count_of, exact_losses
from lowlevel.verification.subject import Check, Subject, check, largest, packed, relative, with_batches_of

ACCOUNTING, INVARIANCES = "accounting", "invariances"
SCALES = {"fp32": (1.0, 1024.0), "fp16": (1024.0, 8192.0), "bf16": (1.0, 1024.0)}


def accounting_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """Dropout must be off."""
    checks = [_division(subject, evidence), _counts(subject, evidence), _loss_scale(subject)]
    if subject.spec.own and not subject.mixes:
        checks.append(_alone(subject, evidence))
    names = dict.fromkeys((*subject.spec.parameters, *subject.method.settings))  # these also have a z-loss
    return checks + [_parameter(subject, evidence, name) for name in names]


def _division(subject: Subject, evidence: Evidence) -> Check:
    """A step's logged loss against sum / count in float64: by the run's execution, and in ragged micro-batches."""
    expected = evidence.step_loss(subject)
    notes: list[str] = []
    execution = subject.execution(notes)
    taken = [subject.run_step(execution=execution)[0] for _ in range(3 if subject.mode == "graphed" else 1)]
    execution.use("eager")
    if not subject.mixes:
        taken += [subject.run_step(with_batches_of(subject.method, n))[0] for n in (1, 3)]
    losses = [result.metrics["loss"] for result in taken]
    error = max(abs(loss - expected) for loss in losses) / (abs(expected) or 1.0)
    by_weight = " by weight" if evidence.weights else ""
    note = f"{expected:.7f} = sum / {subject.method.unit}{by_weight} of the step, float64"
    rounding = 0.3 * subject.head_bound(evidence.largest_logit)  # rms of an even spread
    bound = subject.bounds.layout_loss * 5 + evidence.loss_error(rounding, subject.config) / (abs(expected) or 1.0)
    return check(ACCOUNTING, "step loss", error, bound, note)


def _counts(subject: Subject, evidence: Evidence) -> Check:
    result, _ = subject.run_step()
    count = count_of(evidence.logps)
    wrong = abs(result.supervised_tokens - evidence.tokens) + (abs(result.count - count) > 1e-9 * count)
    wrong += abs(len(result.rows) - len(subject.examples))
    examples, tokens = len(result.rows), f"{evidence.tokens:,} supervised tokens"
    note = f"{examples} examples, {tokens}, divided by {result.count:,.10g}"
    return check(ACCOUNTING, "counts of the step", float(wrong), 0, note)


def _loss_scale(subject: Subject) -> Check:
    """The unscaled gradient at two loss scales."""
    scales = SCALES[subject.policy.placement.precision]
    gradients = [subject.run_step(scale=scale)[1] for scale in scales]
    error = relative(gradients[1], gradients[0])
    note = f"gradient at scale {scales[0]:g} and {scales[1]:g}, relative l2"
    return check(ACCOUNTING, "loss scale divided out", error, subject.bounds.layout_gradient, note)


def _alone(subject: Subject, evidence: Evidence) -> Check:
    """A user's own loss in float64: each example alone against all of the step together."""
    together = exact_losses(evidence.logps, subject.config)
    alone = [evidence.logps_of(slice(number, number + 1)) for number in range(len(subject.examples))]
    parts = [exact_losses(logps, subject.config) for logps in alone]
    error = largest(together - torch.cat(parts)) / (largest(together) or 1.0)
    bound, note = subject.bounds.closed, f"{len(parts)} examples, float64, relative"
    if not error <= bound and subject.paired:
        note = "the loss of a pair depends on the other pairs: declare mixes_pairs=True"
    elif not error <= bound:
        note = "the loss of a token depends on other examples, and so on how micro-batches are made"
    return check(ACCOUNTING, "loss of an example alone = among others", error, bound, note)


def _parameter(subject: Subject, evidence: Evidence, name: str) -> Check:
    """Change one hyper-parameter: the loss must change as much as the formula says."""
    title, section = f"{name} reaches the loss", subject.config.method
    settings: Any = subject.config.own
    found = subject.method.settings.get(name)
    old = float(inspect.signature(subject.spec.function).parameters[name].default if found is None else found)
    new = 0.5 * old or 0.5  # allowed, and gives another loss
    if name == "label_smoothing":
        new = 0.25 if old < 0.2 else 0.1
    update = {name: new} if name in type(settings).model_fields else {"loss_kwargs": settings.loss_kwargs | {name: new}}
    changed = settings.model_copy(update=update)
    method = replace(subject.method, config=changed)
    try:
        found = sum(
            float(subject.sums(batch, method)["loss"] - subject.sums(batch)["loss"]) for batch in subject.batches()
        )
        losses = exact_losses(evidence.logps, subject.config.model_copy(update={section: changed}))
    except Exception as refused:
        if not subject.spec.own:
            raise
        return check(ACCOUNTING, title, 0.0, 0.0, f"the loss refuses {new:g}: {one_line(refused)}")
    expected = float((losses - exact_losses(evidence.logps, subject.config)).sum())
    size = float(losses.abs().sum())
    error = abs(found - expected) / (abs(expected) or 1.0)
    bound = max(1e-3, subject.bounds.layout_loss * 10 * size / (abs(expected) or 1.0))
    note = f"{old:g} -> {new:g} changes the loss by {expected / len(losses):+.4g}, relative"
    return check(ACCOUNTING, title, error, min(bound, 0.5), note)


def invariance_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """Loss and gradient of the same step, pairwise. Dropout stays on: its masks must not change either."""
    expected = _step(subject, with_batches_of(subject.method, len(subject.examples)))
    checks = []
    for name, method in _layouts(subject):
        checks += _compare(subject, name, _step(subject, method), expected)
    padded = _step(subject, batches=[left_padded(subject)])
    checks += _compare(subject, "left padding = right padding", padded, expected)
    with _checkpointing(subject, on=False):
        without = _step(subject)
    with _checkpointing(subject, on=True):
        checks += _compare(subject, "recomputed layers = kept", _step(subject), without)
    if subject.mode != "eager":
        checks += _execution_checks(subject, evidence)
    return checks


def _layouts(subject: Subject) -> Iterator[tuple[str, Method]]:
    """Layouts to compare with one padded micro-batch. A loss that mixes pairs needs them in one micro-batch."""
    method, number = subject.method, len(subject.examples)
    yield "as the run has it", method
    if not subject.mixes:
        yield f"{number} x 1 = 1 x {number}", with_batches_of(method, 1)
        yield f"3 a micro-batch = 1 x {number}", with_batches_of(method, 3)
    yield "shared prompt = two rows" if subject.paired else "packed = padded", packed(method, number)


def _step(
    subject: Subject, method: Method | None = None, batches: list[PackedBatch] | None = None
) -> tuple[float, Tensor]:
    result, gradient = subject.run_step(method, batches=batches)
    return result.metrics["loss"], gradient


def _compare(
    subject: Subject, name: str, found: tuple[float, Tensor], expected: tuple[float, Tensor], other_kernels: float = 0.0
) -> list[Check]:
    """`other_kernels`: error of the loss if the two passes round differently."""
    bounds, size = subject.bounds, abs(expected[0]) or 1.0
    loss = abs(found[0] - expected[0]) / size
    return [
        check(INVARIANCES, f"{name}: loss", loss, bounds.layout_loss + other_kernels / size, "relative"),
        check(INVARIANCES, f"{name}: gradient", relative(found[1], expected[1]), bounds.layout_gradient, "relative l2"),
    ]


def left_padded(subject: Subject) -> PackedBatch:
    """All examples in one micro-batch, one sequence a row, with the padding before it instead of behind it.

    The padding is a segment of tokens 0 that no token attends to and no loss reads.
    """
    rows: list[Segment] = []
    for number, example in enumerate(subject.examples):
        if subject.rewards:
            rows += reward_segments(example, number, shared=False)
        elif subject.paired:
            ids = (example.prompt_ids, example.chosen_ids, example.rejected_ids)
            rows += pair_rows(example.row, number, *ids)
        else:
            rows.append(sft_segment(example.row, number, example.input_ids, example.labels, example.weights))
    width = max(map(len, rows)) + 3  # so that the longest one is moved too
    padded = []
    for row in rows:
        zeros = np.zeros(width - len(row), np.int64)
        padded.append([Segment(row.row, row.number, zeros, zeros, zeros, np.full(len(zeros), IGNORED)), row])
    values = [x.values for x in subject.examples] if subject.method.columns else None
    (plain,) = with_batches_of(subject.method, len(subject.examples)).micro_batches(subject.examples)
    batch = build_batch(padded, pairs=subject.paired, values=values)
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
    expected = _step(subject)
    notes: list[str] = []
    execution = subject.execution(notes)
    for _ in range(3):
        result, gradient = subject.run_step(execution=execution)
    mode = execution.mode
    execution.use("eager")
    rounding = evidence.loss_error(math.sqrt(2) * subject.bounds.forward, subject.config)
    found = result.metrics["loss"], gradient
    checks = _compare(subject, f"{subject.mode} = eager", found, expected, rounding)
    fell_back = "; ".join(notes) or f"ran {mode}"
    return [*checks, check(INVARIANCES, f"runs {subject.mode}", float(mode != subject.mode), 0, fell_back)]
