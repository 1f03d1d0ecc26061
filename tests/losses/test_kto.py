"""KTO against numbers that were worked out by hand in float64, and its choice of mismatched completions."""

import pytest
import torch

from lowlevel.losses.kto import LabelledLogps, kto, mismatched


def losses(ratios, desirable, kl, dtype=torch.float64, **settings):
    ratios = torch.tensor(ratios, dtype=dtype)
    labels, kl = torch.tensor(desirable).bool(), torch.tensor(kl, dtype=dtype)
    return kto(LabelledLogps(ratios - 7, torch.full_like(ratios, -7), labels, kl), **{"beta": 0.1, **settings})


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.0, (0.47502081252106, 0.48750260351578967)),
        (0.3, (0.48250714233361025, 0.48001065984441815)),
        (-0.7, (0.47502081252106, 0.48750260351578967)),  # z0 = max(0, mean)
    ],
)
def test_hand_values(kl, expected):
    assert losses([1.0, -0.5], [1, 0], kl).tolist() == pytest.approx(expected, rel=1e-14)
    weighted = losses([1.0, -0.5], [1, 0], kl, desirable_weight=1.25, undesirable_weight=0.5)
    assert weighted.tolist() == pytest.approx((1.25 * expected[0], 0.5 * expected[1]), rel=1e-14)


def test_the_policy_that_is_its_reference_has_half():
    assert losses([0.0, 0.0], [1, 0], 0.0).tolist() == [0.5, 0.5]


def test_the_baseline_is_that_of_the_whole_step():
    ratios, labels, kl = (1.0, -0.5, 0.8, 0.3), (1, 0, 1, 0), (-0.4, 0.2, 0.6, 0.4)
    whole = losses(ratios, labels, sum(kl) / 4).mean()
    assert whole.item() == pytest.approx(0.48750556993137334, rel=1e-14)
    parts = [losses(ratios[i : i + 2], labels[i : i + 2], sum(kl[i : i + 2]) / 2) for i in (0, 2)]
    assert torch.cat(parts).mean().item() == pytest.approx(0.4875060362865574, rel=1e-14)  # what others train


def test_far_values_keep_their_digits_and_gradients():
    """1 - s(z) is 0 in fp32 from z = 17 on; s(-z) is exp(-z)."""
    ratios = torch.tensor([400.0, -400.0, 1e4, -1e4], requires_grad=True)
    rows = LabelledLogps(ratios, torch.zeros(4), torch.tensor([True, False, True, False]), torch.tensor(0.0))
    found = kto(rows, beta=0.1)
    assert found[:2].tolist() == pytest.approx([4.248354255291589e-18] * 2, rel=1e-5)
    found.sum().backward()
    assert ratios.grad[:2].tolist() == pytest.approx([-4.248354255291589e-19, 4.248354255291589e-19], rel=1e-5)
    assert bool(ratios.grad.isfinite().all())


@pytest.mark.parametrize(
    ("prompts", "pairs"),
    [
        ("", []),
        ("a", []),
        ("aaa", []),
        ("ab", [(0, 1), (1, 0)]),
        ("aab", [(0, 2), (1, 2), (2, 0)]),
        ("abca", [(0, 1), (1, 2), (2, 3), (3, 1)]),
    ],
)
def test_mismatched_completions(prompts, pairs):
    """The completion of the next row with another prompt, around the end; none if there is no other prompt."""
    assert mismatched(prompts) == pairs
