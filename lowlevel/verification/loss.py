"""Group 1, the loss: the training path against float64. The error of the loss (from the same hidden states) and that of
the forward pass (the whole model in float64) are separate checks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowlevel.losses import LabelledLogps, PairLogps, PairRewards, TokenLogps
from lowlevel.verification.evidence import Evidence, flat64, reference64
from lowlevel.verification.exact import HeadScores
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


def _found(evidence: Evidence, name: str) -> Tensor:
    """A sum of `method.loss` by example, (P,) float64."""
    return torch.stack([sums[name].double().cpu() for sums in evidence.sums])


def _completion_checks(evidence: Evidence, exact: Mapping[str, Tensor], bound: float, unit: str) -> list[Check]:
    """The sums over completions; `exact`: by their names in `method.loss`, (P,) each."""
    errors: dict[str, float] = {}
    for name, values in exact.items():
        who = "reference" if "ref_" in name else "policy"
        errors[who] = max(errors.get(who, 0.0), largest(_found(evidence, name) - values))
    note = f"{len(evidence.sums)} {unit}"
    return [check(GROUP, f"completion log-probability, {who}", error, bound, note) for who, error in errors.items()]


def _loss_check(subject: Subject, evidence: Evidence, unit: str, bound: float) -> Check:
    """The loss of each pair or example, if what it reads is off by `bound`."""
    bound = evidence.steepest() * bound + 4 * EPS * max(1.0, largest(evidence.losses))
    error = largest(_found(evidence, "loss") - evidence.losses)
    return check(GROUP, f"loss of {unit}", error, bound, subject.method.spec.name)


def _token_checks(subject: Subject, evidence: Evidence, token: float, longest: int) -> list[Check]:
    logps, losses = evidence.logps, evidence.losses
    assert isinstance(logps, TokenLogps)
    zeros = torch.zeros(len(logps.lengths), dtype=torch.float64)
    totals, sums = (zeros.index_add(0, logps.sequence_ids, values.double()) for values in (losses, logps.token_logps))
    error, steepest = largest(_found(evidence, "loss") - totals), evidence.steepest()
    bound = _sum_bound(steepest * token, longest, max(largest(totals), steepest * largest(sums)))
    return [check(GROUP, "summed loss of an example", error, bound, subject.method.spec.name)]


def _pair_checks(subject: Subject, evidence: Evidence, token: float, longest: int) -> list[Check]:
    logps, beta = evidence.logps, subject.config.dpo.beta
    assert isinstance(logps, PairLogps)
    named = {"logps/chosen": logps.chosen_logps, "logps/rejected": logps.rejected_logps}
    if subject.method.has_reference:
        named |= {"logps/ref_chosen": logps.ref_chosen_logps, "logps/ref_rejected": logps.ref_rejected_logps}
    bound = _sum_bound(token, longest, max(map(largest, named.values())))
    checks = _completion_checks(evidence, named, bound, "pairs")
    margins = beta * logps.deltas
    if subject.method.spec.averages:
        assert logps.chosen_lengths is not None and logps.rejected_lengths is not None
        margins = beta * (logps.chosen_logps / logps.chosen_lengths - logps.rejected_logps / logps.rejected_lengths)
    error = largest(_found(evidence, "rewards/margins") - margins)
    checks.append(check(GROUP, "margin of a pair", error, 4 * beta * bound))
    if subject.mixes:
        return checks  # a pair alone has another loss than among others: the step's loss is in `accounting`
    return [*checks, _loss_check(subject, evidence, "a pair", bound)]


def _labelled_checks(subject: Subject, evidence: Evidence, token: float, longest: int) -> list[Check]:
    rows = evidence.logps
    assert isinstance(rows, LabelledLogps) and evidence.kl is not None
    bound, exact = _sum_bound(token, longest, max(map(largest, (rows.logps, rows.ref_logps)))), dict[str, Tensor]()
    for label, has in (("desirable", rows.desirable), ("undesirable", ~rows.desirable)):
        exact |= {f"logps/{label}": rows.logps * has, f"logps/ref_{label}": rows.ref_logps * has}
    checks = _completion_checks(evidence, exact, bound, "examples")
    error = largest(evidence.kl.double().cpu() - rows.kl)
    note = f"mean log-ratio of the step's mismatched completions, {float(rows.kl[0]):+.6f}"
    checks.append(check(GROUP, "baseline of the step", error, 2 * bound, note))
    return [*checks, _loss_check(subject, evidence, "an example", 2 * bound)]


def _reward_checks(subject: Subject, evidence: Evidence, reward: float, longest: int) -> list[Check]:
    pairs = evidence.logps
    assert isinstance(pairs, PairRewards)
    named = {"rewards/chosen": pairs.chosen, "rewards/rejected": pairs.rejected, "rewards/margins": pairs.margins}
    bound = 2 * reward + 4 * EPS * max(map(largest, named.values()))
    error = max(largest(_found(evidence, name) - exact) for name, exact in named.items())
    rewards = check(GROUP, "rewards and margin of a pair", error, 2 * bound, f"pairs: {len(evidence.sums)}")
    return [rewards, _loss_check(subject, evidence, "a pair", bound)]


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
