"""The reward model's loss and its calibration against numbers worked out by hand in float64."""

import math

import pytest
import torch

from lowlevel.losses.reward import PairRewards, bradley_terry, calibration, head_rewards, ranked
from lowlevel.methods.reward import check_columns


def loss(chosen, rejected, centre=0.0, **values):
    sides = [torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected)]
    columns = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
    return float(bradley_terry(PairRewards(*sides, values=columns), center_rewards_coefficient=centre))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (loss(1.0, -0.5), 0.2014132779827524),
        (loss(1.0, -0.5, margin=1.0), 0.47407698418010663),
        (loss(1.0, -0.5, chosen_score=4.0, rejected_score=3.0), 0.47407698418010663),
        (loss(1.0, -0.5, score_chosen=0.0, score_rejected=1.0), math.log1p(math.exp(-2.5))),
        (loss(1.0, -0.5, 0.01), 0.2039132779827524),
        (loss(0.3, 0.3), math.log(2)),
        (loss(-1e4, 0.0), 1e4),  # without overflow
    ],
)
def test_hand_values(found, expected):
    assert found == pytest.approx(expected, rel=1e-14)


def test_the_gradient_of_the_margin_and_of_centring():
    """dL/dr+ = -s(-(d - m)) + 2 c (r+ + r-); dL/dr- has the first term negated."""
    chosen, rejected = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (1.0, -0.5))
    pairs = PairRewards(chosen, rejected, values={"margin": torch.tensor([1.0], dtype=torch.float64)})
    bradley_terry(pairs, center_rewards_coefficient=0.01).backward()
    slope = 1 / (1 + math.exp(0.5))
    assert float(chosen.grad) == pytest.approx(-slope + 0.01, rel=1e-13)
    assert float(rejected.grad) == pytest.approx(slope + 0.01, rel=1e-13)


def test_the_head_computes_in_its_own_dtype():
    hidden = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]], dtype=torch.bfloat16)
    found = head_rewards(hidden, torch.tensor([[0.1, 0.01, 0.001]]))
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx([0.123, -0.0095])


def test_a_tie_counts_one_half():
    assert ranked(torch.tensor([0.1, 0.0, -0.1])).tolist() == [1.0, 0.5, 0.0]


def test_calibration():
    """s(ln 3) = 3/4: of four such pairs three are right, so the confidence is that of the outcome."""
    third = math.log(3)
    fitting = calibration(torch.tensor([third, third, third, -third], dtype=torch.float64))
    assert fitting == pytest.approx({"brier": (3 / 16 + 9 / 16) / 4, "calibration_error": 0.0}, abs=1e-12)
    over = calibration(torch.tensor([third, -third, 0.0, 0.0], dtype=torch.float64))  # 3/4 sure, half right
    assert over == pytest.approx({"brier": (1 / 16 + 9 / 16 + 1 / 2) / 4, "calibration_error": 0.125}, abs=1e-12)
    sure = calibration(torch.tensor([60.0, -60.0]))  # s(60) = 1 is in the last bin
    assert sure == pytest.approx({"brier": 0.5, "calibration_error": 0.5})


def test_only_columns_of_a_margin_are_read():
    check_columns(())
    check_columns(("rejected_score", "chosen_score"))
    for columns in (("quality",), ("margin", "quality"), ("chosen_score",)):
        with pytest.raises(ValueError, match="a rated margin is"):
            check_columns(columns)
