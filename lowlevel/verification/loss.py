"""Group 1, the loss: the training path's numbers against float64, so that the error splits into that of the loss (from
the same hidden states) and that of the forward pass (the whole model in float64)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowlevel.losses import loss_spec
from lowlevel.verification.check import Check, check, head_bound, largest
from lowlevel.verification.evidence import Evidence, flat64
from lowlevel.verification.formulas import pair_losses, slopes
from lowlevel.verification.subject import Subject
from lowlevel.verification.truth import HeadScores

GROUP = "loss"
EPS = torch.finfo(torch.float32).eps


def loss_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """Token, completion, example; then the forward pass. Dropout must be off."""
    scores = [*evidence.policy, *(evidence.reference or [])]
    tokens = max(largest(one.path - one.exact) for one in scores)
    bound = head_bound(evidence.largest_logit, subject.policy.lm_head_weight.dtype)
    note = f"{evidence.tokens:,} tokens, nats, from the same hidden states"
    checks = [check(GROUP, "token log-probability", tokens, bound, note)]
    longest = max(len(sequence.places) for example in evidence.sequences for sequence in example)
    if evidence.reference is None:
        totals = torch.stack([one.exact.sum() for one in evidence.policy])
        error = largest(torch.stack([s["loss"].double().cpu() for s in evidence.sums]) + totals)
        checks.append(check(GROUP, "summed loss of an example", error, _sum_bound(bound, longest, largest(totals))))
    else:
        checks += _pair_checks(subject, evidence, bound, longest)
    return checks + _forward_checks(subject, evidence)


def _sum_bound(token: float, longest: int, total: float) -> float:
    """Independent roundings of `longest` tokens, and of their sum in fp32."""
    return 2 * token * math.sqrt(longest) + 4 * EPS * total


def _pair_checks(subject: Subject, evidence: Evidence, token: float, longest: int) -> list[Check]:
    logps = evidence.logps()
    named = {
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
        "logps/ref_chosen": logps.ref_chosen,
        "logps/ref_rejected": logps.ref_rejected,
    }
    found = {key: torch.stack([s[key].double().cpu() for s in evidence.sums]) for key in (*named, "loss")}
    bound = _sum_bound(token, longest, max(map(largest, named.values())))
    errors = {
        "completion log-probability, policy": ("logps/chosen", "logps/rejected"),
        "completion log-probability, reference": ("logps/ref_chosen", "logps/ref_rejected"),
    }
    checks = [
        check(GROUP, name, max(largest(found[key] - named[key]) for key in keys), bound, f"{len(logps.chosen)} pairs")
        for name, keys in errors.items()
    ]
    margins = torch.stack([s["rewards/margins"].double().cpu() for s in evidence.sums])
    expected = subject.config.dpo.beta * logps.delta
    checks.append(check(GROUP, "margin of a pair", largest(margins - expected), 4 * subject.config.dpo.beta * bound))
    loss_type = subject.config.dpo.loss_type
    if loss_spec(loss_type).mixes_pairs:
        return checks  # a pair alone has another loss than among others: the step's loss is in `accounting`
    losses = pair_losses(logps, subject.config.dpo)
    steepest = largest(torch.stack([part.abs() for part in slopes(logps, subject.config.dpo)]).sum(0))
    loss_bound = steepest * bound + 4 * EPS * max(1.0, largest(losses))
    return [*checks, check(GROUP, "loss of a pair", largest(found["loss"] - losses), loss_bound, loss_type)]


def _forward_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """The part of the error that the hidden states bring."""
    if evidence.model is None:
        return []
    sequences = evidence.sequences[: evidence.exact]
    models: list[tuple[str, Tensor | None, list[HeadScores]]] = [("policy", flat64(subject), evidence.policy)]
    if evidence.reference is not None:
        models.append(("reference", None, evidence.reference))
    checks = []
    for name, flat, scores in models:
        with torch.no_grad():
            exact = evidence.model.examples(flat, sequences)
        errors = torch.cat([_errors(torch.cat(tokens), one.exact) for tokens, one in zip(exact, scores, strict=False)])
        note = f"the whole model in float64, {len(sequences)} of {len(subject.examples)} examples, rms of tokens"
        rms = float(errors.square().mean().sqrt())
        checks.append(check(GROUP, f"forward pass, {name}", rms, subject.bounds.forward, note))
        worst = f"{len(errors):,} tokens"
        checks.append(check(GROUP, f"its worst token, {name}", largest(errors), subject.bounds.worst_token, worst))
    return checks


def _errors(expected: Tensor, found: Tensor) -> Tensor:
    """By token; infinite where other tokens are scored than the example says."""
    return found - expected if found.shape == expected.shape else torch.full_like(expected, math.inf)
