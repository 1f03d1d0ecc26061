"""Rules of single checks: what errors of tokens do to a step's loss, against random errors; where a BOS stands."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lowlevel.verification.evidence
from lowlevel.verification.evidence import gather
from lowlevel.verification.exact import head_scores
from lowlevel.verification.masking import Read, _bos
from lowlevel.verification.report import fill_b
from lowlevel.verification.subject import check, kept_weights, without_dropout

NATS = 1e-3


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_losss_error_is_that_of_random_errors(name, request):
    subject = request.getfixturevalue(name)
    with kept_weights(subject.policy), without_dropout(subject.policy):
        fill_b(subject.policy)
        evidence = gather(subject)
    expected = evidence.loss_error(NATS)
    generator = torch.Generator().manual_seed(0)

    def moved(scores):
        noise = NATS * torch.randn(scores.exact.shape, generator=generator, dtype=torch.float64)
        return replace(scores, exact=scores.exact + noise)

    errors = []
    for _ in range(400):
        policy = [moved(one) for one in evidence.policy]
        reference = None if evidence.reference is None else [moved(one) for one in evidence.reference]
        errors.append(replace(evidence, policy=policy, reference=reference).step_loss())
    found = (torch.tensor(errors) - evidence.step_loss()).square().mean().sqrt()
    assert found == pytest.approx(expected, rel=0.15)  # 400 draws: 3.5 % of chance


@pytest.mark.parametrize(("name", "passes"), [("sft", 1), ("dpo", 2)])
def test_an_example_is_scored_once_under_each_model(name, passes, request, monkeypatch):
    subject, seen = request.getfixturevalue(name), []
    monkeypatch.setattr(lowlevel.verification.evidence, "head_scores", lambda *a: seen.append(1) or head_scores(*a))
    evidence = gather(subject)
    assert len(seen) == passes * len(subject.examples)
    assert (evidence.reference is None) == (name == "sft")


def test_twice_the_error_of_tokens_is_twice_that_of_the_loss(sft):
    evidence = gather(sft)
    once = evidence.loss_error(NATS)
    assert evidence.loss_error(2 * NATS) == pytest.approx(2 * once)
    assert once == pytest.approx(NATS / evidence.tokens**0.5)


@pytest.mark.parametrize(
    ("ids", "holds"),
    [([1, 5, 2], True), ([1, 5, 2, 1, 6, 2], True), ([1, 1, 5], False), ([5, 1, 2], False), ([1], True)],
)
def test_one_bos_stands_at_the_start(ids, holds):
    """Templates like Llama 2's write it before each turn."""
    read = Read(0, 0, np.arange(len(ids)), np.array(ids), np.array(ids))
    subject = SimpleNamespace(tokenizer=SimpleNamespace(bos_id=1))
    assert _bos(subject, [read]).ok == holds


@pytest.mark.parametrize(
    ("measured", "bound", "ok"),
    [(0.0, 0, True), (1e-9, 0, False), (0.5, 0.5, True), (0.6, 0.5, False), (math.nan, 1.0, False),
     (math.inf, math.inf, False)],
)  # fmt: skip
def test_only_a_finite_number_within_the_bound_holds(measured, bound, ok):
    assert check("group", "name", measured, bound).ok is ok
