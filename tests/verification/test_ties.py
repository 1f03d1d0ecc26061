"""A step of online DPO whose pairs are one completion twice: margins and gradient are 0."""

from dataclasses import replace

import pytest
import torch

from lowlevel.verification.evidence import gather
from lowlevel.verification.gradients import gradient_checks
from lowlevel.verification.invariances import invariance_checks
from lowlevel.verification.subject import fill_b, relative


@pytest.fixture(scope="module")
def tied(make):
    subject = make("dpo", lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    fill_b(subject.policy)
    return replace(subject, examples=tuple(replace(x, rejected_ids=x.chosen_ids) for x in subject.examples))


@pytest.mark.parametrize("exact", [True, False])
def test_rounding_is_no_failure(tied, exact):
    evidence = gather(tied if exact else replace(tied, exact_parameters=0))
    checks = [*gradient_checks(tied, evidence), *(invariance_checks(tied, evidence) if exact else [])]
    assert len(checks) > 2 and not [one for one in checks if not one.ok]


def test_the_gradient_of_a_tie_is_zero_and_not_rounding(tied):
    assert not tied.run_step()[1].any()
    mixed = replace(
        tied, examples=(replace(tied.examples[0], rejected_ids=tied.examples[0].rejected_ids[:1]), *tied.examples[1:])
    )
    assert mixed.run_step()[1].any()


def test_a_tie_with_a_gradient_fails(tied):
    """The gradient that cancels is that of one side: a hundredth of it left over is far above the bound."""
    one_side = replace(tied, examples=tuple(replace(x, rejected_ids=x.rejected_ids[:1]) for x in tied.examples))
    left = 0.01 * one_side.run_step()[1]
    assert all(tied.tied) and not any(one_side.tied) and one_side.cancelled == 0
    assert relative(left, torch.zeros_like(left), tied.cancelled) == pytest.approx(0.01, rel=1e-4)
    assert 0.01 > tied.bounds.gradient
