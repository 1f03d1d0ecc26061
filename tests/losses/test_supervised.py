"""The token losses against numbers from elsewhere, and what their settings refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowlevel.config.file import config_from_tables
from lowlevel.errors import ConfigError
from lowlevel.losses import SFT_LOSSES, SupervisedLoss, TokenLogps, token_scores
from lowlevel.methods.choice import check_loss
from lowlevel.perplexity import PERPLEXITIES, perplexities

LOGITS = [[2.0, 1.0, 0.0, -1.0]]  # lse = 2.4401896985611953, p = .6439, .2369, .0871, .0321
P = [math.exp(z - 2.4401896985611953) for z in LOGITS[0]]


def evaluate(logits: Any, targets: list[int], loss_type: str, **settings: Any) -> tuple[Tensor, Tensor]:
    """The losses (N,) of logits (N, V) through an identity head, and the gradient of their sum in the logits."""
    loss = SupervisedLoss.of(loss_type, **settings)
    hidden = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    head = torch.eye(hidden.shape[1], dtype=torch.float64)
    logps, statistics = token_scores(hidden, head, torch.tensor(targets), loss.statistics)
    losses = loss(TokenLogps(logps, torch.arange(len(logps)), torch.ones(len(logps)), statistics=statistics))[0]
    return losses, torch.autograd.grad(losses.sum(), hidden)[0]


NLL, LSE = 0.4401896985611953, 2.4401896985611953
VALUES = [
    ("cross_entropy", {}, NLL, [P[0] - 1, *P[1:]]),
    # .9 * .4402 + .1 * (2.4402 - .5); d/dz = p - (.9 onehot + .1 / 4)
    ("smoothed_cross_entropy", {}, 0.5901896985611953, [P[0] - 0.925, *(p - 0.025 for p in P[1:])]),
    ("smoothed_cross_entropy", {"label_smoothing": 0.3}, 0.8901896985611953,
     [P[0] - 0.775, *(p - 0.075 for p in P[1:])]),
    ("dft", {}, P[0] * NLL, [P[0] * (P[0] - 1), *(P[0] * p for p in P[1:])]),
    ("cross_entropy", {"z_loss_weight": 0.5}, NLL + 0.5 * LSE**2,
     [P[0] - 1 + LSE * P[0], *(p * (1 + LSE) for p in P[1:])]),
    ("dft", {"z_loss_weight": 0.5}, P[0] * NLL + 0.5 * LSE**2, None),
]  # fmt: skip


@pytest.mark.parametrize(("loss_type", "settings", "value", "gradient"), VALUES)
def test_hand_values(loss_type: str, settings: dict[str, float], value: float, gradient: list[float] | None) -> None:
    losses, slopes = evaluate(LOGITS, [0], loss_type, **settings)
    assert losses.tolist() == pytest.approx([value], abs=1e-14)
    assert gradient is None or slopes[0].tolist() == pytest.approx(gradient, abs=1e-14)


def test_every_loss_has_a_hand_value() -> None:
    assert {name for name, *_ in VALUES} == set(SFT_LOSSES)


@pytest.mark.parametrize("eps", [0.1, 0.7])
def test_label_smoothing_is_torchs(eps: float) -> None:
    logits = torch.randn(50, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    targets = list(range(50))
    expected = cross_entropy(logits, torch.tensor(targets), reduction="none", label_smoothing=eps)
    losses, _ = evaluate(logits.tolist(), targets, "smoothed_cross_entropy", label_smoothing=eps)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)


REFUSED = [
    ({"label_smoothing": 0.1}, "'cross_entropy' does not use label_smoothing .*used by 'smoothed_cross_entropy'"),
    ({"loss_type": "dft", "label_smoothing": 0.1}, "'dft' does not use label_smoothing"),
    ({"loss_kwargs": {"gamma": 1}}, "does not use gamma .*used by no loss"),
    ({"loss_type": "label_smoothing"}, "unknown loss_type 'label_smoothing'.*smoothed_cross_entropy"),
    ({"loss_type": "smoothed_cross_entropy", "label_smoothing": 1.0}, "label_smoothing"),
    ({"z_loss_weight": -0.1}, "z_loss_weight"),
]


@pytest.mark.parametrize(("section", "message"), REFUSED, ids=str)
def test_what_is_refused_before_a_model_is_loaded(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_loss(config_from_tables({"sft": section}, "run.toml"))


def test_what_costs_nothing_is_not_computed() -> None:
    needs = {name: SupervisedLoss.of(name).statistics for name in SFT_LOSSES}
    assert needs == {"cross_entropy": (), "smoothed_cross_entropy": ("mean_logp",), "dft": ()}
    assert SupervisedLoss.of("smoothed_cross_entropy", z_loss_weight=1e-4).statistics == ("mean_logp", "lse")


def test_perplexity_by_length() -> None:
    """Means of 1 nat over 64 tokens, 2 over 65 and 66, 3 over 2000; of all: (64 + 262 + 6000) / 2195."""
    found = perplexities([-64.0, -130.0, -6000.0, -132.0], [64, 65, 2000, 66])
    expected = {"": 6326 / 2195, "/1-64": 1, "/65-256": 2, "/1025+": 3}
    assert found == {f"perplexity{name}": pytest.approx(math.exp(nats)) for name, nats in expected.items()}
    assert found.keys() <= set(PERPLEXITIES)
    assert perplexities([-2.0, -4.0], [1, 2]) == {"perplexity": pytest.approx(math.exp(2))}
    assert perplexities([-1e6], [1]) == {"perplexity": math.exp(700)}
