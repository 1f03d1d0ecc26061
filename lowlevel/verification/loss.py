"""Group 1, the loss: the training path against float64. The error of the loss (from the same hidden states) and that of
the forward pass (the whole model in float64) are separate checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowlevel.losses import LabelledLogps, PairLogps, PairRewards, TokenLogps
from lowlevel.verification.evidence import Evidence, flat64, reference64
from lowlevel.verification.exact import HeadScores
from lowlevel.verification.formulas import exact_losses
from lowlevel.verification.subject import Check, Subject, check, largest

GROUP = "loss"
EPS = torch.finfo(torch.float32).eps


def loss_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """Token, completion, example; then the forward pass. Dropout must be off."""
    scores = [*evidence.policy, *(evidence.reference or [])]
    tokens = max(largest(one.path - one.exact) for one in scores)
    bound = subject.head_bound(evidence.largest_logit)
    name, what = ("reward", "completions") if subject.rewards else ("token log-probability", "tokens, nats")
    checks = [check(GROUP, name, tokens, bound, f"{evidence.tokens:,} {what}, from the same hidden states")]
    longest = max(len(sequence.places) for example in evidence.sequences for sequence in example)
    of_method = {"sft": _token_checks, "dpo": _pair_checks, "kto": _labelled_checks, "reward": _reward_checks}
    checks += of_method[subject.method.name](subject, evidence, bound, longest)
    return checks + _forward_checks(subject, evidence)


def _sum_bound(token: float, longest: int, total: float) -> float:
    """Independent rounding errors of `longest` tokens, and of their sum in fp32."""
    return 2 * token * math.sqrt(longest) + 4 * EPS * total


def _token_checks(subject: Subject, evidence: Evidence, token: float, longest: int) -> list[Check]:
    logps, losses = evidence.logps, exact_losses(evidence.logps, subject.config)
    assert isinstance(logps, TokenLogps)
    zeros = torch.zeros(len(logps.lengths), dtype=torch.float64)
    totals, sums = (zeros.index_add(0, logps.sequence_ids, values.double()) for values in (losses, logps.token_logps))
    error = largest(torch.stack([s["loss"].double().cpu() for s in evidence.sums]) - totals)
    steepest = evidence.steepest(subject.config)
    bound = _sum_bound(steepest * token, longest, max(largest(totals), steepest * largest(sums)))
    return [check(GROUP, "summed loss of an example", error, bound, subject.spec.name)]


def _pair_checks(subject: Subject, evidence: Evidence, token: float, longest: int) -> list[Check]:
    logps, beta = evidence.logps, subject.config.dpo.beta
    assert isinstance(logps, PairLogps)
    named = {"logps/chosen": logps.chosen_logps, "logps/rejected": logps.rejected_logps}
    if subject.method.has_reference:
        named |= {"logps/ref_chosen": logps.ref_chosen_logps, "logps/ref_rejected": logps.ref_rejected_logps}
    keys = (*named, "loss", "rewards/margins")
    found = {key: torch.stack([s[key].double().cpu() for s in evidence.sums]) for key in keys}
    bound = _sum_bound(token, longest, max(map(largest, named.values())))
    checks = []
    for who, prefix in (("policy", "logps/"), ("reference", "logps/ref_"))[: len(named) // 2]:
        error = max(largest(found[key] - named[key]) for key in (f"{prefix}chosen", f"{prefix}rejected"))
        note = f"{len(logps.chosen_logps)} pairs"
        checks.append(check(GROUP, f"completion log-probability, {who}", error, bound, note))
    margins = beta * logps.deltas
    if subject.spec.averages:
        assert logps.chosen_lengths is not None and logps.rejected_lengths is not None
        margins = beta * (logps.chosen_logps / logps.chosen_lengths - logps.rejected_logps / logps.rejected_lengths)
    error = largest(found["rewards/margins"] - margins)
    checks.append(check(GROUP, "margin of a pair", error, 4 * beta * bound))
    if subject.mixes:
        return checks  # a pair alone has another loss than among others: the step's loss is in `accounting`
    losses = exact_losses(logps, subject.config)
    loss_bound = evidence.steepest(subject.config) * bound + 4 * EPS * max(1.0, largest(losses))
    return [*checks, check(GROUP, "loss of a pair", largest(found["loss"] - losses), loss_bound, subject.spec.name)]


def _labelled_checks(subject: Subject, evidence: Evidence, token: float, longest: int) -> list[Check]:
    rows, losses = evidence.logps, exact_losses(evidence.logps, subject.config)
    assert isinstance(rows, LabelledLogps) and evidence.kl is not None
    bound, checks = _sum_bound(token, longest, max(map(largest, (rows.logps, rows.ref_logps)))), []
    for who, prefix, exact in (("policy", "logps/", rows.logps), ("reference", "logps/ref_", rows.ref_logps)):
        found = torch.stack([s[f"{prefix}desirable"] + s[f"{prefix}undesirable"] for s in evidence.sums])  # one is 0
        error, note = largest(found.double().cpu() - exact), f"{len(losses)} examples"
        checks.append(check(GROUP, f"completion log-probability, {who}", error, bound, note))
    error = largest(evidence.kl.double().cpu() - rows.kl)
    note = f"mean log-ratio of the step's mismatched completions, {float(rows.kl[0]):+.6f}"
    checks.append(check(GROUP, "baseline of the step", error, 2 * bound, note))
    error = largest(torch.stack([s["loss"].double().cpu() for s in evidence.sums]) - losses)
    loss_bound = evidence.steepest(subject.config) * 2 * bound + 4 * EPS * max(1.0, largest(losses))
    return [*checks, check(GROUP, "loss of an example", error, loss_bound, subject.spec.name)]


def _reward_checks(subject: Subject, evidence: Evidence, reward: float, longest: int) -> list[Check]:
    pairs, losses = evidence.logps, exact_losses(evidence.logps, subject.config)
    assert isinstance(pairs, PairRewards)
    named = {"rewards/chosen": pairs.chosen, "rewards/rejected": pairs.rejected, "rewards/margins": pairs.margins}
    found = {key: torch.stack([s[key].double().cpu() for s in evidence.sums]) for key in (*named, "loss")}
    bound = 2 * reward + 4 * EPS * max(map(largest, named.values()))
    error = max(largest(found[key] - named[key]) for key in named)
    checks = [check(GROUP, "rewards and margin of a pair", error, 2 * bound, f"{len(losses)} pairs")]
    loss_bound = evidence.steepest(subject.config) * bound + 4 * EPS * max(1.0, largest(losses))
    return [*checks, check(GROUP, "loss of a pair", largest(found["loss"] - losses), loss_bound, subject.spec.name)]


def _forward_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """The error of the hidden states."""
    if evidence.model is None:
        return []
    sequences = evidence.sequences[: evidence.exact]
    models: list[tuple[str, Tensor | None, list[HeadScores]]] = [("policy", flat64(subject), evidence.policy)]
    if evidence.reference is not None:
        models.append(("reference", reference64(subject), evidence.reference))
    checks = []
    for name, flat, scores in models:
        with torch.no_grad():
            exact = evidence.model.examples(flat, sequences)
        pairs = [(torch.cat(tokens), one.exact) for tokens, one in zip(exact, scores, strict=False)]
        # infinite if the scored tokens are not those of the example
        errors = torch.cat([b - a if a.shape == b.shape else torch.full_like(a, math.inf) for a, b in pairs])
        note = f"the whole model in float64, {len(sequences)} of {len(subject.examples)} examples, rms of tokens"
        rms = float(errors.square().mean().sqrt())
        checks.append(check(GROUP, f"forward pass, {name}", rms, subject.bounds.forward, note))
        note = f"{len(errors):,} tokens"
        checks.append(check(GROUP, f"its worst token, {name}", largest(errors), subject.bounds.worst_token, note))
    return checks
