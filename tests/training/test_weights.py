"""Weighted tokens: sum(w l) / sum(w) over the whole step in every layout; weights of 1 change no bit."""

from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch

from lowlevel.batch.layout import Shape
from lowlevel.verification.subject import packed

BOUND = 1e-6


def weighted(examples, *, ones=False):
    """Each example with another weight for each third of its tokens; one example has none."""
    made = [replace(x, weights=np.full(len(x.input_ids), 1, np.float32)) for x in examples]
    if not ones:
        generator = np.random.default_rng(0)
        made = [replace(x, weights=generator.uniform(0.05, 3, len(x.input_ids)).astype(np.float32)) for x in made]
    return [replace(made[0], weights=None), *made[1:]]


def layouts(**config):
    yield from (helpers.sft(size, **config) for size in (8, 4, 2, 1))
    yield helpers.sft(8, packing=True, **config)
    yield helpers.sft(1, packing=True, **config)
    yield replace(helpers.sft(2, packing=True, row_length=200, **config), shape=Shape(64, 8, 64, 400))  # dummy tokens


LOSSES = [{}, {"loss_type": "smoothed_cross_entropy", "z_loss_weight": 0.01}]


@pytest.mark.parametrize("config", LOSSES, ids=["cross_entropy", "smoothed"])
def test_a_weighted_step_does_not_depend_on_its_layout(tiny_base, config):
    policy, examples = helpers.make_policy(tiny_base, dropout=0.1), weighted(helpers.ragged_examples())
    expected = None
    for method in layouts(**config):
        result = helpers.step(policy, method, examples)
        found = {**result.metrics, "count": result.count}
        gradient = policy.flat.grad.clone()
        expected = expected or (found, gradient)
        assert found == pytest.approx(expected[0], rel=BOUND)
        assert max(helpers.drifts(gradient, expected[1])) <= BOUND
    plain = helpers.step(policy, helpers.sft(**config), helpers.ragged_examples())
    assert plain.loss != pytest.approx(expected[0]["loss"], rel=1e-3)


def test_the_loss_is_the_weighted_mean_over_the_whole_step(tiny_base):
    """By hand from the unweighted tokens' losses."""
    policy, examples = helpers.make_policy(tiny_base), weighted(helpers.ragged_examples())
    result = helpers.step(policy, helpers.sft(2), examples)
    total = weight = 0.0
    for example in examples:
        (batch,) = helpers.sft().micro_batches([replace(example, weights=None)])
        policy.dropout.disable()
        with torch.no_grad():
            losses = -policy.token_logps(batch).double()
        given = np.ones(len(example.labels)) if example.weights is None else example.weights.astype(np.float64)
        of_tokens = given[1:][example.labels[1:] != -100]
        total, weight = total + float(losses @ torch.from_numpy(of_tokens)), weight + of_tokens.sum()
    assert result.count == pytest.approx(weight, rel=1e-12)
    assert result.loss == pytest.approx(total / weight, rel=BOUND)
    assert result.supervised_tokens == sum(int((x.labels[1:] != -100).sum()) for x in examples)


def test_weights_of_one_change_no_bit(tiny_base):
    policy, examples = helpers.make_policy(tiny_base, dropout=0.1), helpers.ragged_examples()
    for method in layouts():
        plain = helpers.loss_and_gradient(policy, method, examples)
        ones = helpers.loss_and_gradient(policy, method, weighted(examples, ones=True))
        assert plain[0] == ones[0] and torch.equal(plain[1], ones[1])


def test_twice_all_weights_is_the_same_step(tiny_base):
    policy, examples = helpers.make_policy(tiny_base), weighted(helpers.ragged_examples())[1:]
    once = helpers.loss_and_gradient(policy, packed(helpers.sft(), 2), examples)
    twice = [replace(x, weights=2 * x.weights) for x in examples]
    found = helpers.loss_and_gradient(policy, packed(helpers.sft(), 2), twice)
    assert found[0] == pytest.approx(once[0], rel=BOUND) and max(helpers.drifts(found[1], once[1])) <= BOUND
