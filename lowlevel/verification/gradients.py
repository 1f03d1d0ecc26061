"""Group 2, gradients: of the loss formula, of `token_logps`, and of a whole step through the adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from lowlevel import kernels
from lowlevel.losses import token_logps_reference
from lowlevel.losses.preference import PairLogps
from lowlevel.methods import dpo
from lowlevel.verification.check import Check, check, head_bound, largest, relative
from lowlevel.verification.evidence import Evidence, flat64
from lowlevel.verification.formulas import slopes
from lowlevel.verification.subject import Subject
from lowlevel.verification.truth import exact_loss, head_scores

GROUP = "gradients"
DIRECTIONS = 3
STEP = 1e-4  # of the adapter's norm: central differences in float64 err by about 1e-8 of the derivative
COARSE_STEP = 2e-2  # where only the run's own precision is there: the difference must stand out of its rounding
COARSE_BOUND = {"fp32": 1e-2, "fp16": 1e-1, "bf16": 5e-1}


def gradient_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """Dropout must be off."""
    checks = [_formula_check(subject, evidence)] if evidence.reference is not None else []
    checks.append(_hidden_check(subject, evidence))
    if evidence.model is None:
        return [*checks, _coarse_check(subject)]
    return checks + _exact_checks(subject, evidence)


def _formula_check(subject: Subject, evidence: Evidence) -> Check:
    """`dpo_loss` as `method.loss` calls it, at the real log-probabilities in fp32, against closed form or float64."""
    method = subject.method
    assert isinstance(method, dpo.DPO)
    logps = evidence.logps()
    leaves = [
        value.float().requires_grad_() for value in (logps.chosen, logps.rejected, logps.ref_chosen, logps.ref_rejected)
    ]
    pairs = PairLogps(leaves[0], leaves[1], leaves[2], leaves[3], logps.chosen_lengths, logps.rejected_lengths)
    output = dpo.preference_loss(method.config)(pairs)
    grads = torch.autograd.grad(output.losses.sum(), leaves, allow_unused=True)
    found = torch.stack([torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)])
    expected = torch.stack(slopes(logps, subject.config.dpo))
    form = "-beta sigma(-x)" if subject.config.dpo.loss_type == "sigmoid" else "autograd in float64"
    error = largest(found.double() - expected) / (largest(expected) or 1.0)
    return check(GROUP, "loss in the four log-probabilities", error, subject.bounds.closed, f"against {form}, relative")


def _hidden_check(subject: Subject, evidence: Evidence) -> Check:
    """d sum(g logp) / d hidden of `token_logps`, against autograd on full float64 logits.

    A logit that is rounded by d moves its token's probability, which is what the gradient is made of, by a factor e^d.
    """
    policy, errors = subject.policy, []
    generator = torch.Generator().manual_seed(0)
    policy.dropout.disable()
    for batch in subject.batches():
        with torch.no_grad():
            hidden = policy.scored_hidden_states(batch)
        incoming = torch.randn(len(hidden), generator=generator).to(hidden.device)
        part = slice(0, 512)  # rows whose float64 logits fit anywhere
        weight, targets = policy.lm_head_weight, batch.scored_targets[part]
        own = hidden[part].detach().clone().requires_grad_()
        exact = hidden[part].detach().double().requires_grad_()
        (kernels.token_logps(own, weight, targets) * incoming[part]).sum().backward()
        (token_logps_reference(exact, weight.double(), targets) * incoming[part]).sum().backward()
        assert own.grad is not None and exact.grad is not None
        errors.append(largest(own.grad.double() - exact.grad) / largest(exact.grad))
    note = "token_logps against full float64 logits, relative"
    bound = max(subject.bounds.hidden, head_bound(evidence.largest_logit, policy.lm_head_weight.dtype))
    return check(GROUP, "token log-probability in the hidden state", max(errors), bound, note)


def _exact_checks(subject: Subject, evidence: Evidence) -> list[Check]:
    """A step's flat gradient against float64 autograd, and its slope in random directions against differences."""
    examples = list(subject.examples)[: evidence.exact]
    _, gradient = subject.run_step(examples=examples)
    gradient = gradient.double().cpu()
    assert evidence.model is not None
    model, sequences = evidence.model, evidence.sequences[: evidence.exact]
    with torch.no_grad():
        reference = model.examples(None, sequences) if evidence.reference is not None else None

    def mean_loss(flat: Tensor) -> Tensor:
        total, count = exact_loss(model.examples(flat, sequences), reference, subject.config.dpo)
        return total / count

    weights = flat64(subject)
    leaf = weights.clone().requires_grad_()
    (exact,) = torch.autograd.grad(mean_loss(leaf), leaf)
    note = f"{len(weights):,} weights, {len(examples)} examples, relative l2"
    checks = [check(GROUP, "step, float64 autograd", relative(gradient, exact), subject.bounds.gradient, note)]
    errors = []
    for seed in range(DIRECTIONS):
        direction = _direction(subject, seed)
        h = STEP * float(torch.linalg.vector_norm(weights))
        with torch.no_grad():
            slope = float(mean_loss(weights + h * direction) - mean_loss(weights - h * direction)) / (2 * h)
        errors.append(abs(float(gradient @ direction) - slope) / float(torch.linalg.vector_norm(exact)))
    note = f"{DIRECTIONS} random directions, in parts of the gradient's norm"
    return [*checks, check(GROUP, "step, central differences", max(errors), subject.bounds.gradient, note)]


def _direction(subject: Subject, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    direction = torch.randn(subject.policy.flat.weights.numel(), generator=generator, dtype=torch.float64)
    return direction / torch.linalg.vector_norm(direction)


def _coarse_check(subject: Subject) -> Check:
    """Central differences along the gradient itself, the losses summed in float64 from the run's hidden states."""
    policy = subject.policy
    _, gradient = subject.run_step()
    norm = torch.linalg.vector_norm(gradient)
    weights = policy.flat.weights.detach().clone()
    h = COARSE_STEP * float(torch.linalg.vector_norm(weights))
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            policy.flat.weights.copy_(weights + sign * h * gradient / norm)
        losses.append(_step_loss(subject))
    with torch.no_grad():
        policy.flat.weights.copy_(weights)
    slope = (losses[0] - losses[1]) / (2 * h)
    note = "along the gradient; the base is too large for float64 (--exact-parameters)"
    error = abs(slope - float(norm)) / float(norm)
    return check(GROUP, "step, central differences", error, COARSE_BOUND[policy.placement.precision], note)


def _step_loss(subject: Subject) -> float:
    scores: list[list[Tensor]] = []
    references: list[list[Tensor]] = []
    for example in subject.examples:
        (batch,) = subject.batches(examples=[example])
        sides = (1, 2) if subject.preference else (0,)
        own = head_scores(subject.policy, batch)
        scores.append([own.exact[own.sides == side] for side in sides])
        if subject.preference:
            with subject.policy.reference():
                other = head_scores(subject.policy, batch)
            references.append([other.exact[other.sides == side] for side in sides])
    total, count = exact_loss(scores, references or None, subject.config.dpo)
    return float(total) / count
