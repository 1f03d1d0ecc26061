"""Losses without a reference run no reference pass; every new kind of loss is one number however a step is split."""

import helpers
import pytest
import torch

from lowlevel.losses import LOSSES, dpo_loss
from lowlevel.model.policy import Policy

FREE = [name for name, spec in LOSSES.items() if spec.reference_free]
BOUND = 2e-6  # as in test_invariance.py


@pytest.mark.parametrize("name", FREE)
def test_there_is_no_reference_pass_and_no_reference_in_the_log(tiny_base, monkeypatch, name):
    policy = helpers.make_policy(tiny_base)
    monkeypatch.setattr(Policy, "reference", lambda self: pytest.fail("a reference pass"))
    result = helpers.step(policy, helpers.dpo(4, loss_type=name), helpers.ragged_pairs())
    assert not [key for key in result.metrics if "ref" in key]
    if not LOSSES[name].averages:
        assert result.metrics["rewards/chosen"] == pytest.approx(0.1 * result.metrics["logps/chosen"])


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo", "2*simpo", "simpo + 0.2*nll", "simpo + cpo"])
def test_rewards_are_of_what_the_loss_compares(name):
    """beta p/n of SimPO (arXiv 2405.14734) and ORPO, beta p of CPO: -10 over 4 tokens against -12 over 5, beta 0.1."""
    chosen, rejected, zero = (torch.tensor([value], dtype=torch.float64) for value in (-10, -12, 0))
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([5])}
    rewards = (-1.0, -1.2) if "cpo" in name else (-0.25, -0.24)
    beta = {} if name == "orpo" else {"beta": 0.1}
    found = dpo_loss(chosen, rejected, zero, zero, loss_type=name, **beta, **lengths)
    assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == pytest.approx(rewards)
    assert found.margins.item() == pytest.approx(rewards[0] - rewards[1])


def test_the_logged_accuracy_of_simpo_is_that_of_averages(tiny_base):
    policy, pairs = helpers.make_policy(tiny_base), helpers.ragged_pairs()
    result = helpers.step(policy, helpers.dpo(4, loss_type="simpo"), pairs)
    (batch,) = helpers.dpo(len(pairs)).micro_batches(pairs)
    averages = torch.stack(helpers.completion_logps(policy, batch)) / batch.lengths.view(2, -1)
    margins = (averages[0] - averages[1]).detach()
    assert result.metrics["rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
    assert result.metrics["rewards/margins"] == pytest.approx(0.1 * float(margins.mean()), abs=1e-6)


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
