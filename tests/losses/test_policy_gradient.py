"""Losses and advantages of sampled completions against numbers of TRL 1.16 and of float64 arithmetic by hand."""

import math
from dataclasses import replace

import pytest
import torch

from lowlevel.losses.advantages import gae, group_relative, leave_one_out, whiten
from lowlevel.losses.policy_gradient import (
    POLICY_LOSSES,
    SampledLogps,
    aggregation,
    clipped_surrogate,
    clipped_value_loss,
    kl_penalty,
    ratios,
)

# Point Q: completions of 1 and 3 tokens with the advantages 1 and -1. A dummy token stands before each.
OLD, NEW, REF = [-1.0, -1.0, -2.0, -0.5], [-0.7, -0.9, -2.3, -0.5], [-1.2, -1.0, -1.8, -0.4]
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
REAL = [1, 3, 4, 5]


def point(old=OLD, new=NEW, ref=REF, advantages=(1.0, -1.0, -1.0, -1.0)):
    def padded(values, dummy):
        return torch.tensor([dummy, values[0], dummy, *values[1:]], dtype=torch.float64)

    ids, index = torch.tensor([2, 0, 2, 1, 1, 1]), torch.tensor([[1, 6, 6], [3, 4, 5]])
    lengths = torch.tensor([1, 3])
    return SampledLogps(
        padded(new, -3.0).requires_grad_(), padded(old, 0.0), padded(advantages, 0.0), padded(ref, -9.0), ids, index,
        lengths,
    )  # fmt: skip


def aggregated(losses, loss_type, rows=((0, 1), (1, 3)), max_length=4):
    """Sum of weighted losses over the completions (number, length) divided by the sum of their counts."""
    parts = {number: aggregation(POLICY_LOSSES[loss_type].average, length, max_length) for number, length in rows}
    own = point().sequence_ids.tolist()
    total = sum(losses[i] * parts[own[i]][0] for i in REAL if own[i] in parts)
    return total / sum(count for _, count in parts.values())


def loss_at(tokens, loss_type, **settings):
    spec = POLICY_LOSSES[loss_type]
    given = {name: value for name, value in settings.items() if name in spec.parameters}
    return aggregated(spec(tokens, given)[0], loss_type)


@pytest.mark.parametrize(
    ("loss_type", "settings", "expected"),
    [
        ("grpo", CLIP, -0.1558048469873921),
        ("dapo", CLIP, 0.4062927295189119),
        ("dr_grpo", CLIP, 0.20314636475945594),
        ("cispo", {"epsilon_high": 5.0}, -0.563408642133208),
        ("sapo", {}, -0.246207355203),
        ("grpo", {**CLIP, "importance_sampling_level": "sequence"}, -0.17224650748419112),
        ("dapo", {**CLIP, "importance_sampling_level": "sequence"}, 0.3816302387737133),
        ("grpo", {"epsilon": 0.2}, -0.1158048469873921),
        ("dapo", {"epsilon": 0.2}, 0.4262927295189119),
        ("dr_grpo", {"epsilon": 0.2}, 0.21314636475945594),
    ],
)
def test_point_q(loss_type, settings, expected):
    assert loss_at(point(), loss_type, **settings).item() == pytest.approx(expected, rel=1e-11)


def test_the_mean_of_sequence_sums_is_the_constant_aggregation_times_the_length():
    assert 4 * loss_at(point(), "dr_grpo", **CLIP).item() == pytest.approx(0.8125854590378238, rel=1e-12)


@pytest.mark.parametrize(("loss_type", "expected"), [("grpo", 0.0), ("dapo", 0.5), ("dr_grpo", 0.25)])
def test_on_policy_the_value_says_nothing(loss_type, expected):
    tokens = point(new=OLD)
    loss = loss_at(tokens, loss_type, **CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-15)
    assert tokens.token_logps.grad[[1, 3]].tolist() != [0, 0]


def test_the_gradient_of_grpo_at_q():
    tokens = point()
    loss_at(tokens, "grpo", **CLIP).backward()
    expected = [0, 0, 0, math.exp(0.1) / 6, 0, 1 / 6]  # -A r / length / completions, 0 where clipped and at dummies
    assert tokens.token_logps.grad.tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[3] == pytest.approx(0.184195153, rel=1e-8)


@pytest.mark.parametrize(("estimator", "expected"), [("k3", -0.15261603641439453), ("k3_ratio", -0.1521242032086248)])
def test_kl_at_q(estimator, expected):
    tokens = point()
    penalty = kl_penalty(tokens, estimator)
    losses = POLICY_LOSSES["grpo"](tokens, CLIP)[0] + 0.04 * penalty
    assert aggregated(losses, "grpo").item() == pytest.approx(expected, rel=1e-12)
    if estimator == "k3":
        by_token = [0.10653065971263342, 0.004837418035959579, 0.1487212707001282, 0.005170918075647624]
        assert penalty[REAL].tolist() == pytest.approx(by_token, rel=1e-12)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", 0.08228287850505189, 0.0),
        ("k2", 0.0787661708, 0.17793255068131275),
        ("k3", 0.08228287850505189, 0.2),
        ("k3_ratio", 0.08228287850505189, 0.17793255068131275),
    ],
)
def test_expected_value_and_gradient_of_a_kl_term(estimator, value, slope):
    """pi = (.7, .3) and ref = (.5, .5), in expectation over samples of pi: the gradient in the first logit."""
    logits = torch.tensor([math.log(0.7), math.log(0.3)], dtype=torch.float64, requires_grad=True)
    logps, ids = logits.log_softmax(0), torch.tensor([0, 1])
    half = torch.full((2,), math.log(0.5), dtype=torch.float64)
    tokens = SampledLogps(logps, logps.detach(), half, half, ids, ids[:, None], torch.ones(2))
    term = logps - half if estimator == "k1" else kl_penalty(tokens, estimator)
    expectation = (logps.detach().exp() * term).sum()
    expectation.backward()
    assert expectation.item() == pytest.approx(value, rel=1e-9)
    assert logits.grad.tolist() == pytest.approx([slope, -slope], rel=1e-9, abs=1e-15)


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    logits = torch.tensor([math.log(0.7), math.log(0.3)], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    penalty = (logps - math.log(0.5)).detach()  # a reward is a number
    (logps.detach().exp() * penalty * logps).sum().backward()
    assert logits.grad.tolist() == pytest.approx([0.17793255068131275, -0.17793255068131275], rel=1e-9)


@pytest.mark.parametrize(
    ("advantage", "ratio", "settings", "expected", "moves"),
    [
        (-1.0, 4.0, {}, 4.0, True),
        (-1.0, 4.0, {"delta": 3.0}, 3.0, False),  # dual clip
        (1.0, 1.5, {}, -1.2, False),
        (1.0, 1.5, {"epsilon_high": 0.28}, -1.28, False),
        (1.0, 0.5, {}, -0.5, True),
        (-1.0, 0.5, {}, 0.8, False),
    ],
)
def test_clip_cases(advantage, ratio, settings, expected, moves):
    tokens = point(old=[-3.0] * 4, new=[-3.0 + math.log(ratio)] * 4, advantages=[advantage] * 4)
    losses, metrics = clipped_surrogate(tokens, epsilon=0.2, **settings)
    losses[1].backward()
    assert losses[1].item() == pytest.approx(expected, rel=1e-12)
    assert bool(tokens.token_logps.grad[1]) == moves
    if "delta" not in settings:
        assert bool(metrics["clip_ratio/low_mean"][1] + metrics["clip_ratio/high_mean"][1]) != moves


def test_ratio_levels():
    tokens = point(new=[-0.7, -0.7, -2.1, -0.4])  # log-ratios of the second completion: .3, -.1, .1
    assert ratios(tokens, "sequence")[3:].tolist() == pytest.approx([1.1051709180756477] * 3, rel=1e-12)
    assert ratios(tokens, "sequence_sum")[3:].tolist() == pytest.approx([math.exp(0.3)] * 3, rel=1e-12)
    for level in ("sequence", "sequence_sum"):
        slopes = torch.autograd.grad(ratios(tokens, level)[3], tokens.token_logps)[0]
        size = 3 if level == "sequence" else 1
        assert slopes[3:].tolist() == pytest.approx([ratios(tokens, level)[3].item() / size] * 3, rel=1e-12)
        assert slopes[:3].tolist() == [0, 0, 0]


def test_a_completion_that_is_masked_leaves_sum_and_count():
    losses = clipped_surrogate(point(), **CLIP)[0]
    for loss_type, count in (("grpo", 1), ("dapo", 3), ("dr_grpo", 4)):
        alone = losses[3:].sum() / (3 if loss_type == "grpo" else 1) / count
        assert aggregated(losses, loss_type, rows=((1, 3),)).item() == pytest.approx(alone.item(), rel=1e-12)


HALF, QUARTERS = (1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("rewards", "settings", "first", "second"),
    [
        (HALF, {}, 0.5, -0.5),
        (HALF, {"scale_rewards": "group"}, 0.8658754297607016, -0.8658754297607016),
        (HALF, {"scale_rewards": "group", "eps": 1e-6}, 0.8660239037870368, -0.8660239037870368),
        (QUARTERS, {}, 0.75, -0.25),
        (QUARTERS, {"scale_rewards": "group"}, 1.4997000599880024, -0.4999000199960008),
        ((3.0, 3.0, 3.0, 3.0), {"scale_rewards": "group"}, 0.0, 0.0),
    ],
)
def test_group_relative_advantages(rewards, settings, first, second):
    found = group_relative(torch.tensor([rewards], dtype=torch.float64), **settings)[0]
    assert found[:2].tolist() == pytest.approx([first, second], rel=1e-14)


def test_the_deviation_of_the_batch_is_that_of_all_rewards():
    rewards = torch.tensor([HALF, QUARTERS], dtype=torch.float64)
    found = group_relative(rewards, scale_rewards="batch", eps=0.0)
    spread = math.sqrt((3 * (1 - 0.375) ** 2 + 5 * 0.375**2) / 7)
    assert found.flatten().tolist() == pytest.approx(
        [x / spread for x in (0.5, -0.5, -0.5, 0.5, 0.75, -0.25, -0.25, -0.25)], rel=1e-14
    )


@pytest.mark.parametrize(("rewards", "expected"), [(HALF, (2 / 3, -2 / 3)), (QUARTERS, (1.0, -1 / 3))])
def test_leave_one_out(rewards, expected):
    found = leave_one_out(torch.tensor([rewards], dtype=torch.float64))[0]
    assert found[:2].tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("advantages", [group_relative, leave_one_out])
def test_a_missing_reward_takes_no_part_in_its_group(advantages):
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, 0.0], [nan, nan, 2.0], [nan, nan, nan]], dtype=torch.float64)
    found = advantages(rewards)
    alone = advantages(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert found[0, [0, 2]].tolist() == alone[0].tolist()
    assert found[1, 2] == 0 and torch.equal(found.isnan(), rewards.isnan())


def test_gae_returns_and_the_clipped_value_loss():
    rewards, values = (torch.tensor(x, dtype=torch.float64) for x in ([0.0, 0, 1], [0.5, 0.4, 0.6]))
    advantages, returns = gae(rewards, values, gamma=1.0, lam=0.95)
    assert advantages.tolist() == pytest.approx([0.451, 0.58, 0.4], rel=1e-14)
    assert returns.tolist() == pytest.approx([0.951, 0.98, 1.0], rel=1e-14)
    discounted, _ = gae(rewards, values, gamma=0.9, lam=0.95)
    assert discounted[1].item() == pytest.approx(0.9 * 0.6 - 0.4 + 0.9 * 0.95 * 0.4, rel=1e-14)
    value = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    loss = clipped_value_loss(value, torch.tensor([0.5]), torch.tensor([1.0]), cliprange=0.2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.045, rel=1e-6) and value.grad.item() == 0  # the clipped term
    whitened = whiten(advantages)
    assert whitened.mean().item() == pytest.approx(0, abs=1e-15)
    assert whitened.std().item() == pytest.approx(1, rel=1e-6)


def test_dummies_and_missing_references_do_not_reach_the_loss():
    tokens = point()
    other = replace(tokens, token_logps=tokens.token_logps.detach() * torch.tensor([50.0, 1, -50, 1, 1, 1]))
    for level in ("token", "sequence", "sequence_sum"):
        one, two = (clipped_surrogate(t, importance_sampling_level=level)[0][REAL] for t in (tokens, other))
        assert torch.equal(one, two)
