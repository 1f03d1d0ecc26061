"""Group 2, gradients: of the loss formula, of `token_logps`, and of a whole step through the adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lowlevel.losses import token_logps_reference
from lowlevel.methods.kto import KTO
from lowlevel.verification.evidence import Evidence, flat64, head_scores_of, logps_of, mean_logratio, reference64
from lowlevel.verification.exact import sequences_of
from lowlevel.verification.formulas import count_of, exact_losses, gradients, slopes, tokens_of, with_tokens
from lowlevel.verification.subject import Check, Subject, check, kept_weights, largest, relative

GROUP = "gradients"
DIRECTIONS = 3
STEP = 1e-4  # of the adapter's norm: central differences in float64 err by about 1e-8 of the derivative
COARSE_STEP = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-2}  # the difference must exceed the rounding of the values
COARSE_BOUND = {"fp32": 1e-2, "fp16": 1e-1, "bf16": 5e-1}
MOST_TOKENS = 1000  # of one step, each moved up and down


def gradient_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """Dropout must be off."""
    plain = subject.method.spec.name == "cross_entropy" and not subject.method.statistics  # -log p: nothing to compare
    checks = [] if plain else _formula_checks(subject, evidence)
    checks.append(_hidden_check(subject, evidence))
    if evidence.model is None:
        return [*checks, _coarse_check(subject, evidence)]
    return checks + _exact_checks(subject, evidence)


def _formula_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """The loss function as `method.loss` calls it, at the real token log-probabilities in fp32.

    Its gradient is compared with the closed form or with autograd in float64, and that of a user's own loss also with
    central differences of its value: they find a backward pass that does not belong to the value. So is that of every
    token loss.
    """
    logps = evidence.logps
    tokens, reference = tokens_of(logps)
    single = None if reference is None else reference.float()
    found = gradients(logps, tokens.float(), single, cast("Any", subject.method).losses)
    expected = slopes(logps, subject.config)
    closed = subject.method.name == "dpo" and subject.config.dpo.loss_type == "sigmoid"
    form = "-beta sigma(-x)" if closed else f"{subject.method.spec.name}, autograd in float64"
    size = max(map(largest, expected)) or 1.0
    error = max(largest(a.double() - b) for a, b in zip(found, expected, strict=True)) / size
    name = f"loss in the {'rewards' if subject.rewards else 'log-probabilities'}"
    checks = [check(GROUP, name, error, subject.bounds.closed, f"against {form}, relative")]
    if subject.method.unit != "tokens" and not subject.method.spec.own:
        return checks
    if subject.method.spec.detaches:
        return [*checks, left_out()]
    return [*checks, _difference_check(subject, evidence, found[0], size)]


def left_out() -> Check:
    """Says why there are no central differences."""
    note = "parts are without a gradient on purpose (a loss's detaches=True; the lengths of DoRA's rows)"
    return Check(GROUP, "central differences not compared: detaches", math.nan, math.inf, True, note)


def _difference_check(subject: Subject, evidence: Evidence, found: Tensor, size: float) -> Check:
    """Central differences of a loss, one number of a token at a time; `found` is its gradient, as `tokens_of`, fp32."""
    logps = evidence.logps
    tokens, reference = tokens_of(logps)
    double = evidence.losses.dtype == torch.float64
    h, bound = (1e-5, subject.bounds.closed) if double else (2e-2, COARSE_BOUND["fp32"])
    places = torch.linspace(0, tokens.numel() - 1, min(tokens.numel(), MOST_TOKENS)).long()
    errors = []
    for place in places.tolist():
        moved = [tokens.clone(), tokens.clone()]
        moved[0].view(-1)[place] += h
        moved[1].view(-1)[place] -= h
        up, down = (exact_losses(with_tokens(logps, one, reference), subject.config) for one in moved)
        errors.append(abs(float((up - down).sum()) / (2 * h) - float(found.flatten()[place])))
    note = f"{subject.method.spec.name}, {len(places):,} of {tokens.numel():,} numbers of tokens, float64, relative"
    if not double:
        note += "; the loss computes in fp32: keep the dtype of its tensors"
    if not max(errors) / size <= bound:
        note += "; if parts are without a gradient on purpose, declare detaches=True"
    return check(GROUP, "loss, central differences", max(errors) / size, bound, note)


def _hidden_check(subject: Subject, evidence: Evidence) -> Check:
    """d sum(g logp) / d hidden of `token_logps`, against autograd on full float64 logits.

    A logit's rounding error d changes its token's probability, and so the gradient, by a factor e^d.
    """
    policy, errors = subject.policy, []
    generator = torch.Generator().manual_seed(0)
    policy.dropout.disable()
    for batch in subject.batches():
        with torch.no_grad():
            hidden = policy.scored_hidden_states(batch)
        incoming = torch.randn(len(hidden), generator=generator).to(hidden.device)
        part = slice(0, 512)  # rows whose float64 logits fit anywhere
        targets = batch.scored_targets[part]
        own = hidden[part].detach().clone().requires_grad_()
        exact = hidden[part].detach().double().requires_grad_()
        (policy.scores(own, targets)[0] * incoming[part]).sum().backward()
        if policy.reward_head is None:
            scores = token_logps_reference(exact, policy.lm_head_weight.double(), targets)
        else:
            scores = (exact @ policy.reward_head.detach().double().T).squeeze(1)
        (scores * incoming[part]).sum().backward()
        assert own.grad is not None and exact.grad is not None
        errors.append(largest(own.grad.double() - exact.grad) / largest(exact.grad))
    policy.flat.grad.zero_()
    name, note = "token log-probability in the hidden state", "token_logps against full float64 logits, relative"
    if subject.rewards:
        name, note = "reward in the hidden state", "relative"
    return check(GROUP, name, max(errors), max(subject.bounds.hidden, subject.head_bound(evidence.largest_logit)), note)


def _exact_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """`float64_checks` of a step of pairs or plain examples."""
    examples = list(subject.examples)[: evidence.exact]
    _, gradient = subject.run_step(examples=examples)
    assert evidence.model is not None
    model, sequences = evidence.model, evidence.sequences[: evidence.exact]
    with torch.no_grad():
        has_reference = evidence.reference is not None
        reference = model.examples(reference64(subject), sequences) if has_reference else None
    values = subject.values(examples)
    if isinstance(subject.method, KTO):
        others = [sequences_of(example, False) for example in subject.method.mismatched(examples)]
        with torch.no_grad():  # z0 has no gradient
            kl = mean_logratio(*(model.examples(flat, others) for flat in (flat64(subject), None)))
        values["kl"] = kl.expand(len(examples))

    def mean_loss(flat: Tensor) -> Tensor:
        logps = logps_of(subject, examples, model.examples(flat, sequences), reference, values)
        return exact_losses(logps, subject.config).sum() / count_of(logps)

    return float64_checks(subject, mean_loss, gradient, f"examples: {len(examples)}")


def float64_checks(subject: Subject, loss: Callable[[Tensor], Tensor], gradient: Tensor, examples: str) -> list[Check]:
    """A step's flat gradient (n,) against autograd of `loss` in float64, and central differences in random directions.

    `loss`: of the adapter's weights (n,), float64. `examples` is for the note.
    """
    weights, gradient = flat64(subject), gradient.double().cpu()
    leaf = weights.clone().requires_grad_()
    (exact,) = torch.autograd.grad(loss(leaf), leaf)
    note, error = f"{examples}, weights: {len(weights):,}, relative l2", relative(gradient, exact, subject.cancelled)
    checks = [check(GROUP, "step, float64 autograd", error, subject.bounds.gradient, note)]
    if subject.detaches:
        return [*checks, left_out()]
    errors, scale = [], max(float(torch.linalg.vector_norm(exact)), subject.cancelled) or 1.0
    for seed in range(DIRECTIONS):
        generator = torch.Generator().manual_seed(1000 + seed)
        direction = torch.randn(len(weights), generator=generator, dtype=torch.float64)
        direction /= torch.linalg.vector_norm(direction)
        h = STEP * float(torch.linalg.vector_norm(weights))
        with torch.no_grad():
            slope = float(loss(weights + h * direction) - loss(weights - h * direction)) / (2 * h)
        errors.append(abs(float(gradient @ direction) - slope) / scale)
    note = f"{DIRECTIONS} random directions, in parts of the gradient's norm"
    return [*checks, check(GROUP, "step, central differences", max(errors), subject.bounds.gradient, note)]


def _coarse_check(subject: Subject, evidence: Evidence) -> Check:
    """Central differences along the gradient itself, the losses summed in float64 from the run's hidden states.

    Extrapolated from steps h and h/2 (Richardson): a loss can curve strongly within such a coarse step.
    """
    precision = subject.policy.placement.precision
    if subject.detaches:
        return left_out()
    flat = subject.policy.flat.weights
    _, gradient = subject.run_step()
    norm = torch.linalg.vector_norm(gradient)

    def loss_at(distance: float) -> float:
        with kept_weights(subject.policy):
            with torch.no_grad():
                flat.add_(gradient, alpha=distance / (float(norm) or 1.0))
            policy, reference = head_scores_of(subject, subject.examples)
        return replace(evidence, policy=policy, reference=reference).step_loss()

    h = COARSE_STEP[precision] * float(torch.linalg.vector_norm(flat.detach()))
    whole, half = ((loss_at(step) - loss_at(-step)) / (2 * step) for step in (h, h / 2))
    slope = (4 * half - whole) / 3
    note = "along the gradient; the base is too large for float64 (--exact-parameters)"
    error = abs(slope - float(norm)) / (max(float(norm), subject.cancelled) or 1.0)
    return check(GROUP, "step, central differences", error, COARSE_BOUND[precision], note)
