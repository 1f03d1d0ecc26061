"""Group 6, accounting: what a step divides by, that each hyper-parameter has an effect, that the loss scale cancels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowlevel.losses import loss_spec
from lowlevel.methods.dpo import DPO
from lowlevel.verification.check import Check, check, head_bound, relative
from lowlevel.verification.evidence import Evidence
from lowlevel.verification.formulas import pair_losses
from lowlevel.verification.subject import Subject, with_batches_of

GROUP = "accounting"
SCALES = {"fp32": (1.0, 1024.0), "fp16": (1024.0, 8192.0), "bf16": (1.0, 1024.0)}


def accounting_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """Dropout must be off."""
    checks = [_division(subject, evidence), _counts(subject, evidence), _loss_scale(subject)]
    if subject.preference:
        checks += [_parameter(subject, evidence, name) for name in loss_spec(subject.config.dpo.loss_type).parameters]
    return checks


def _division(subject: Subject, evidence: Evidence) -> Check:
    """A step's logged loss against sum / count in float64: by the run's execution, and in ragged micro-batches."""
    expected = evidence.step_loss(subject)
    notes: list[str] = []
    execution = subject.execution(notes)
    losses = [
        subject.run_step(execution=execution)[0].metrics["loss"] for _ in range(3 if subject.mode == "graphed" else 1)
    ]
    execution.use("eager")
    if not (subject.preference and loss_spec(subject.config.dpo.loss_type).mixes_pairs):
        losses += [subject.run_step(with_batches_of(subject.method, n))[0].metrics["loss"] for n in (1, 3)]
    error = max(abs(loss - expected) for loss in losses) / (abs(expected) or 1.0)
    note = f"{expected:.7f} = sum / {'pairs' if subject.preference else 'tokens'} of the step, float64"
    rounding = 0.3 * head_bound(evidence.largest_logit, subject.policy.lm_head_weight.dtype)  # rms of an even spread
    bound = subject.bounds.layout_loss * 5 + evidence.loss_error(rounding, subject.config.dpo) / (abs(expected) or 1.0)
    return check(GROUP, "step loss", error, bound, note)


def _counts(subject: Subject, evidence: Evidence) -> Check:
    result, _ = subject.run_step()
    count = len(subject.examples) if subject.preference else evidence.tokens
    wrong = abs(result.count - count) + abs(result.supervised_tokens - evidence.tokens)
    wrong += abs(len(result.rows) - len(subject.examples))
    note = f"{len(result.rows)} examples, {result.supervised_tokens:,} supervised tokens, divided by {result.count:,}"
    return check(GROUP, "counts of the step", float(wrong), 0, note)


def _loss_scale(subject: Subject) -> Check:
    """The unscaled gradient at two loss scales."""
    scales = SCALES[subject.policy.placement.precision]
    gradients = [subject.run_step(scale=scale)[1] for scale in scales]
    error = relative(gradients[1], gradients[0])
    note = f"gradient at scale {scales[0]:g} and {scales[1]:g}, relative l2"
    return check(GROUP, "loss scale divided out", error, subject.bounds.layout_gradient, note)


def _parameter(subject: Subject, evidence: Evidence, name: str) -> Check:
    """Change one hyper-parameter: the loss must change, and by as much as the formula says."""
    method = subject.method
    assert isinstance(method, DPO)
    old = getattr(method.config, name)
    new = _another(name, old)
    changed: Any = method.config.model_copy(update={name: new})
    batches = subject.batches()
    found = sum(
        float(subject.sums(batch, replace(method, config=changed))["loss"] - subject.sums(batch)["loss"])
        for batch in batches
    )
    logps = evidence.logps()
    losses = [pair_losses(logps, config) for config in (changed, subject.config.dpo)]
    expected = float((losses[0] - losses[1]).sum())
    size = float(losses[0].abs().sum())
    error = abs(found - expected) / (abs(expected) or 1.0)
    bound = max(1e-3, subject.bounds.layout_loss * 10 * size / (abs(expected) or 1.0))
    note = f"{_shown(old)} -> {new:g} changes the loss by {expected / len(subject.examples):+.4g}, relative"
    return check(GROUP, f"{name} reaches the loss", error, min(bound, 0.5), note)


DEFAULTS = {"discopop_tau": 0.05, "dpop_lambda": 50.0, "rpo_alpha": 1.0}  # of what may be left out


def _another(name: str, value: float | None) -> float:
    """A value that is allowed and gives another loss."""
    if name == "label_smoothing":
        return 0.25 if value is None or value < 0.2 else 0.1
    return 0.5 * (value or DEFAULTS[name])


def _shown(value: float | None) -> str:
    return "default" if value is None else f"{value:g}"
