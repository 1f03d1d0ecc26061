"""Group 6, accounting: the divisor of a step, the effect of each hyper-parameter, and the loss scale, which cancels."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch

from lowlevel.errors import how_many, one_line
from lowlevel.verification.evidence import Evidence
from lowlevel.verification.formulas import count_of, exact_losses
from lowlevel.verification.subject import Check, Subject, check, largest, relative, with_batches_of

GROUP = "accounting"
SCALES = {"fp32": (1.0, 1024.0), "fp16": (1024.0, 8192.0), "bf16": (1.0, 1024.0)}


def accounting_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """Dropout must be off."""
    checks = [_division(subject, evidence), _counts(subject, evidence), _loss_scale(subject)]
    if subject.method.spec.own and not subject.mixes:
        checks.append(_alone(subject, evidence))
    names = dict.fromkeys((*subject.method.spec.parameters, *subject.method.settings))  # these also have a z-loss
    return checks + [_parameter(subject, evidence, name) for name in names]


def _division(subject: Subject, evidence: Evidence) -> Check:
    """A step's logged loss against sum / count in float64: by the run's execution, and in ragged micro-batches."""
    expected = evidence.step_loss()
    notes: list[str] = []
    execution = subject.execution(notes)
    taken = [subject.run_step(execution=execution)[0] for _ in range(3 if subject.mode == "graphed" else 1)]
    execution.use("eager")
    if not subject.mixes:
        taken += [subject.run_step(with_batches_of(subject.method, n))[0] for n in (1, 3)]
    losses = [result.metrics["loss"] for result in taken]
    error = max(abs(loss - expected) for loss in losses) / (abs(expected) or 1.0)
    by_weight = " by weight" if subject.weights(subject.examples) else ""
    note = f"{expected:.7f} = sum / {subject.method.unit}{by_weight} of the step, float64"
    rounding = 0.3 * subject.head_bound(evidence.largest_logit)  # rms of an even spread
    bound = subject.bounds.layout_loss * 5 + evidence.loss_error(rounding) / (abs(expected) or 1.0)
    return check(GROUP, "step loss", error, bound, note)


def _counts(subject: Subject, evidence: Evidence) -> Check:
    result, _ = subject.run_step()
    count = count_of(evidence.logps)
    wrong = abs(result.supervised_tokens - evidence.tokens) + (abs(result.count - count) > 1e-9 * count)
    wrong += abs(len(result.rows) - len(subject.examples))
    examples, tokens = how_many(len(result.rows), "examples"), how_many(evidence.tokens, "supervised tokens")
    note = f"{examples}, {tokens}, divided by {result.count:,.10g}"
    return check(GROUP, "counts of the step", float(wrong), 0, note)


def _loss_scale(subject: Subject) -> Check:
    """The unscaled gradient at two loss scales."""
    scales = SCALES[subject.policy.placement.precision]
    gradients = [subject.run_step(scale=scale)[1] for scale in scales]
    error = relative(gradients[1], gradients[0], subject.cancelled)
    note = f"gradient at scale {scales[0]:g} and {scales[1]:g}, relative l2"
    return check(GROUP, "loss scale divided out", error, subject.bounds.layout_gradient, note)


def _alone(subject: Subject, evidence: Evidence) -> Check:
    """A user's own loss in float64: each example alone against all of the step together."""
    together = evidence.losses
    alone = [evidence.logps_of(slice(number, number + 1)) for number in range(len(subject.examples))]
    parts = [exact_losses(logps, subject.config) for logps in alone]
    error = largest(together - torch.cat(parts)) / (largest(together) or 1.0)
    bound, note = subject.bounds.closed, f"{how_many(len(parts), 'examples')}, float64, relative"
    if not error <= bound and subject.method.paired:
        note = "the loss of a pair depends on the other pairs: declare mixes_pairs=True"
    elif not error <= bound:
        note = "the loss of a token depends on other examples, and so on how micro-batches are made"
    return check(GROUP, "loss of an example alone = among others", error, bound, note)


def _parameter(subject: Subject, evidence: Evidence, name: str) -> Check:
    """Change one hyper-parameter: the loss must change as much as the formula says."""
    title, section = f"{name} reaches the loss", subject.method.name  # of online_dpo: dpo
    settings: Any = getattr(subject.config, section)
    found: Any = subject.method.settings.get(name)
    old = float(inspect.signature(subject.method.spec.function).parameters[name].default if found is None else found)
    new = 0.5 * old or 0.5  # allowed, and gives another loss
    if name == "label_smoothing":
        new = 0.25 if old < 0.2 else 0.1
    update = {name: new} if name in type(settings).model_fields else {"loss_kwargs": settings.loss_kwargs | {name: new}}
    changed = settings.model_copy(update=update)
    method = replace(subject.method, config=changed)
    try:
        found = sum(float(subject.sums(b, method)["loss"] - subject.sums(b)["loss"]) for b in subject.batches())
        losses = exact_losses(evidence.logps, subject.config.model_copy(update={section: changed}))
    except Exception as refused:
        if not subject.method.spec.own:
            raise
        return check(GROUP, title, 0.0, 0.0, f"the loss refuses {new:g}: {one_line(refused)}")
    expected = float((losses - evidence.losses).sum())
    size = float(losses.abs().sum())
    scale = (size if all(subject.tied) else abs(expected)) or 1.0
    bound = max(1e-3, subject.bounds.layout_loss * 10 * size / scale)
    note = f"{old:g} -> {new:g} changes the loss by {expected / len(losses):+.4g}, relative"
    if all(subject.tied):
        note = "not visible in this step: every pair is one completion twice, so all margins are 0"
    return check(GROUP, title, abs(found - expected) / scale, min(bound, 0.5), note)
