"""Losses without a reference run no reference pass; every new kind of loss is one number however a step is split."""

import helpers
import pytest

from lowlevel.losses import LOSSES
from lowlevel.model.policy import Policy

FREE = [name for name, spec in LOSSES.items() if spec.reference_free]
BOUND = 2e-6  # as in test_invariance.py


@pytest.mark.parametrize("name", FREE)
def test_there_is_no_reference_pass_and_no_reference_in_the_log(tiny_base, monkeypatch, name):
    policy = helpers.make_policy(tiny_base)
    monkeypatch.setattr(Policy, "reference", lambda self: pytest.fail("a reference pass"))
    result = helpers.step(policy, helpers.dpo(4, loss_type=name), helpers.ragged_pairs())
    assert not [key for key in result.metrics if "ref" in key]
    assert result.metrics["rewards/chosen"] == pytest.approx(0.1 * result.metrics["logps/chosen"])


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo", "f_js", "ld_dpo", "0.5*sigmoid + 0.2*nll + ipo"])
def test_a_step_does_not_depend_on_its_split(tiny_base, name):
    policy = helpers.make_policy(tiny_base, dropout=0.1)
    expected = None
    for size, options in ((8, {}), (2, {}), (1, {}), (8, {"packing": True})):
        method = helpers.dpo(size, loss_type=name, disable_dropout=False, **options)
        loss, gradient = helpers.loss_and_gradient(policy, method, helpers.ragged_pairs(longest=8))
        expected = expected or (loss, gradient)
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert helpers.drifts(gradient, expected[1])[0] <= BOUND
    assert expected[1].norm() > 0.01
