"""The slopes of a preference loss in its rewards, which traces and inspections call weights: by finite differences."""

import pytest
import torch

from lowlevel.config.offline import DPOConfig
from lowlevel.losses import LOSSES
from lowlevel.losses.dpo import PairLogps
from lowlevel.methods.dpo import preference_loss, reward_slopes

EXTRA = {"cdpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.2}, "exo_pair": {"label_smoothing": 0.01}}
OF_SUMS = [name for name, spec in LOSSES.items() if not (spec.needs_tokens or spec.needs_margin or spec.statistics)]
BETA, STEP = 0.3, 1e-4


def sample(*, reference_free: bool = False) -> PairLogps:
    """Five pairs in float64: no two margins, log-ratios or lengths are alike, and none is near a kink."""
    chosen, rejected, ref_chosen, ref_rejected = (
        torch.tensor(values, dtype=torch.float64)
        for values in (
            [-10.0, -21.5, -7.25, -30.0, -14.0],
            [-12.5, -20.0, -9.0, -26.5, -15.25],
            [0.0] * 5 if reference_free else [-11.0, -19.0, -8.5, -30.75, -13.5],
            [0.0] * 5 if reference_free else [-11.5, -21.75, -7.0, -28.0, -15.0],
        )
    )
    return PairLogps(
        chosen, rejected, ref_chosen, ref_rejected, torch.tensor([4, 9, 2, 12, 7]), torch.tensor([5, 8, 3, 10, 6])
    )


def lengths(config: DPOConfig, pairs: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    """What a reward divides the log-ratio by: the tokens, or 1."""
    both = pairs.chosen_lengths, pairs.rejected_lengths
    return both if LOSSES[config.loss_type].averages else tuple(map(torch.ones_like, both))


def total(config: DPOConfig, pairs: PairLogps, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> float:
    """The summed loss where the rewards are these, and all else is that of `pairs`."""
    chosen, rejected = lengths(config, pairs)
    moved = PairLogps(
        pairs.ref_chosen_logps + chosen_rewards * chosen / config.beta,
        pairs.ref_rejected_logps + rejected_rewards * rejected / config.beta,
        *(pairs.ref_chosen_logps, pairs.ref_rejected_logps, pairs.chosen_lengths, pairs.rejected_lengths),
    )
    return float(preference_loss(config)(moved).losses.sum())


@pytest.mark.parametrize("name", OF_SUMS)
def test_slopes_are_those_of_finite_differences(name):
    beta = {"beta": BETA} if "beta" in LOSSES[name].parameters else {}
    config, pairs = (
        DPOConfig(loss_type=name, **beta, **EXTRA.get(name, {})),
        sample(reference_free=LOSSES[name].reference_free),
    )
    found = reward_slopes(config, pairs)
    ratios = zip((pairs.chosen_logratios, pairs.rejected_logratios), lengths(config, pairs), strict=True)
    rewards = [config.beta * ratio / length for ratio, length in ratios]
    for side in (0, 1):
        assert not found[side].requires_grad
        for i in range(5):
            nudged = [[reward.clone() for reward in rewards] for _ in range(2)]
            nudged[0][side][i] += STEP
            nudged[1][side][i] -= STEP
            expected = (total(config, pairs, *nudged[0]) - total(config, pairs, *nudged[1])) / (2 * STEP)
            assert float(found[side][i]) == pytest.approx(expected, rel=1e-5, abs=1e-7), (side, i)


def test_slopes_of_the_sigmoid_loss_in_closed_form():
    pairs = sample()
    chosen, rejected = reward_slopes(DPOConfig(beta=BETA), pairs)
    expected = 1 / (1 + torch.exp(BETA * pairs.deltas))
    assert torch.allclose(chosen, -expected) and torch.allclose(rejected, expected)


def test_the_slopes_leave_no_gradient_behind_and_need_none():
    pairs = sample()
    pairs.chosen_logps.requires_grad_()
    with torch.no_grad():
        chosen, _ = reward_slopes(DPOConfig(), pairs)
    assert pairs.chosen_logps.grad is None and chosen.dtype == torch.float64
