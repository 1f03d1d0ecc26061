"""What must hold for any numbers: gradients, identities, limits, extremes, precision; every setting is read."""

import math
from typing import Any

import pytest
import torch
from measures import Sizes
from torch import Tensor

from lowlevel.losses import LOSSES, dpo_loss

SHIFT_INVARIANT = {
    "sigmoid", "cdpo", "robust", "hinge", "ipo_sum", "exo_pair", "aot", "aot_unpaired", "discopop",
}  # fmt: skip
LOGISTIC = {"sigmoid", "cdpo", "robust", "aot", "aot_unpaired", "sigmoid_norm", "dpop"}
SUMS = [name for name, spec in LOSSES.items() if not (spec.needs_tokens or spec.needs_margin or spec.statistics)]
SMOOTHED = [name for name, spec in LOSSES.items() if "label_smoothing" in spec.parameters]


def settings(name: str) -> dict[str, Any]:
    """A legal call: label_smoothing where the loss has it, lengths of 5 and 8 tokens where it needs them."""
    return {"loss_type": name} | ({"label_smoothing": 0.1} if "label_smoothing" in LOSSES[name].parameters else {})


def losses_at(name: str, a: Tensor, b: Tensor, **changes: Any) -> Tensor:
    """Losses for log-ratios a, b (P,) over a reference of -40 and -50, lengths 5 and 8."""
    lengths = {"chosen_lengths": torch.full(a.shape, 5), "rejected_lengths": torch.full(a.shape, 8)}
    ref_chosen, ref_rejected = torch.full_like(a, -40.0), torch.full_like(b, -50.0)
    call = {**settings(name), **lengths, **changes}
    return dpo_loss(ref_chosen + a, ref_rejected + b, ref_chosen, ref_rejected, **call).losses


def random_logratios(pairs: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, pairs, generator=generator, dtype=torch.float64) * 4
    return draws[0], draws[1]


@pytest.mark.parametrize("name", SUMS)
def test_gradcheck(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logps = [(-20 + 4 * torch.randn(4, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    lengths = {"chosen_lengths": torch.tensor([3, 1, 7, 4]), "rejected_lengths": torch.tensor([5, 2, 6, 9])}

    def function(*tensors: Tensor) -> Tensor:
        return dpo_loss(*tensors, **settings(name), **lengths).losses

    assert torch.autograd.gradcheck(function, logps)


@pytest.mark.parametrize("name", sorted(LOGISTIC))
def test_policy_equal_to_reference_gives_log_2(name: str) -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(losses_at(name, zero, zero), torch.full_like(zero, math.log(2)), rtol=0, atol=1e-15)


def test_sigmoid_is_antisymmetric_up_to_x() -> None:
    a, b = random_logratios()
    torch.testing.assert_close(losses_at("sigmoid", a, b) - losses_at("sigmoid", b, a), -0.1 * (a - b))


@pytest.mark.parametrize("name", SUMS)
def test_shift_of_both_logratios(name: str) -> None:
    """A constant on a and on b (say, a reference that is off by a constant) drops out of losses of a - b alone."""
    a, b = random_logratios()
    moved = (losses_at(name, a + 3, b + 3) - losses_at(name, a, b)).abs()
    if name in SHIFT_INVARIANT:
        assert moved.max() < 1e-12
    else:
        assert moved.max() > 1e-3


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_robust_is_unbiased_over_flipped_labels(eps: float) -> None:
    a, b = random_logratios()
    kept, flipped = (losses_at("robust", *pair, label_smoothing=eps) for pair in ((a, b), (b, a)))
    torch.testing.assert_close((1 - eps) * kept + eps * flipped, losses_at("sigmoid", a, b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cdpo", "robust"])
def test_no_smoothing_collapses_to_sigmoid(name: str) -> None:
    a, b = random_logratios()
    torch.testing.assert_close(losses_at(name, a, b, label_smoothing=0.0), losses_at("sigmoid", a, b), rtol=0, atol=0)


def test_other_collapses_to_sigmoid_and_ipo_sum() -> None:
    a, b = random_logratios()
    ones = {"chosen_lengths": torch.ones(5), "rejected_lengths": torch.ones(5)}
    dpo = losses_at("sigmoid", a, b)
    torch.testing.assert_close(losses_at("sigmoid_norm", a, b, **ones), dpo)
    torch.testing.assert_close(losses_at("ipo", a, b, **ones), losses_at("ipo_sum", a, b))
    torch.testing.assert_close(losses_at("rpo", a, b, rpo_alpha=0.0), dpo)
    torch.testing.assert_close(losses_at("dpop", a, b, dpop_lambda=0.0), dpo)
    torch.testing.assert_close(losses_at("dpop", a.abs(), b), losses_at("sigmoid", a.abs(), b))  # a >= 0: no penalty
    ordered_a, ordered_b = a.sort().values, b.sort().values
    torch.testing.assert_close(
        losses_at("aot_unpaired", a, b, label_smoothing=0.0), losses_at("sigmoid", ordered_a, ordered_b)
    )


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "robust", "sigmoid_norm", "dpop"])
def test_beta_to_zero_gives_log_2(name: str) -> None:
    a, b = random_logratios()
    torch.testing.assert_close(losses_at(name, a, b, beta=1e-12), torch.full_like(a, math.log(2)), rtol=0, atol=1e-8)


def test_discopop_gradient_at_the_start_points_the_wrong_way() -> None:
    """dL/dx = (1 - log 2)/(4 tau) - 3/4 at x = 0, positive for tau = 0.05."""
    for tau, expected in ((0.05, 0.7842640972002735), (1.0, (1 - math.log(2)) / 4 - 0.75)):
        a = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        loss = losses_at("discopop", a, torch.zeros_like(a), beta=1.0, discopop_tau=tau)
        assert torch.autograd.grad(loss.sum(), a)[0].item() == pytest.approx(expected, abs=1e-12)


EXTREMES = [(5e3, -5e3), (-5e3, 5e3), (1e4, 0.0), (0.0, 1e4), (-1e4, 0.0), (0.0, -1e4), (1e4, 1e4), (-1e4, -1e4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SUMS)
def test_extremes_are_finite(name: str, dtype: torch.dtype) -> None:
    """x = +-1000 at beta = 0.1, split between a and b in every way."""
    for tau in (0.05, 1.0) if name == "discopop" else (None,):
        a, b = (torch.tensor(column, dtype=dtype, requires_grad=True) for column in zip(*EXTREMES, strict=True))
        losses = losses_at(name, a, b, discopop_tau=tau)
        gradients = torch.autograd.grad(losses.sum(), (a, b), allow_unused=True, materialize_grads=True)
        assert all(tensor.isfinite().all() for tensor in (losses, *gradients))


def test_extremes_have_the_right_value_and_slope() -> None:
    a = torch.tensor([5e3, -5e3], dtype=torch.float64, requires_grad=True)
    for name, values, slopes in (
        ("sigmoid", [0.0, 1000.0], [0.0, -0.1]),
        ("hinge", [0.0, 1001.0], [0.0, -0.1]),
        ("discopop", [0.0, 1000.0], [0.0, -0.1]),  # m = 1 resp. 0: e^-1000, and -ls(-1000). TRL 1.16: NaN
        ("apo_zero", [0.0, 2.0], [0.0, 0.0]),
    ):
        losses = losses_at(name, a, -a.detach())
        assert losses.tolist() == pytest.approx(values, abs=1e-12)
        assert torch.autograd.grad(losses.sum(), a)[0].tolist() == pytest.approx(slopes, abs=1e-12)


@pytest.mark.parametrize("x", [-80.0, -20.0, -1.0, -0.03, 0.0, 0.04, 2.0, 50.0])
@pytest.mark.parametrize("tau", [0.05, 0.5, 1.0])
def test_stable_discopop_is_the_printed_formula_where_that_one_is_finite(x: float, tau: float) -> None:
    sigmoid = 1 / (1 + math.exp(-x / tau)) if x / tau > -700 else 0.0
    printed = (1 - sigmoid) * math.log1p(math.exp(-x)) + sigmoid * math.exp(-x)
    a = torch.tensor([x], dtype=torch.float64)
    loss = losses_at("discopop", a, torch.zeros_like(a), beta=1.0, discopop_tau=tau)
    assert loss.item() == pytest.approx(printed, rel=1e-12)


@pytest.mark.parametrize("name", SUMS)
def test_an_empty_batch_and_an_empty_completion(name: str) -> None:
    empty = torch.zeros(0, requires_grad=True)
    losses = losses_at(name, empty, empty)
    losses.sum().backward()
    assert losses.shape == (0,)
    zeros = {"chosen_lengths": torch.tensor([0]), "rejected_lengths": torch.tensor([0])}
    assert losses_at(name, torch.zeros(1), torch.zeros(1), **zeros).isfinite().all()


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
    + [(torch.float64, torch.float64)],
)
def test_precision_is_at_least_fp32(given: torch.dtype, expected: torch.dtype) -> None:
    logps = [torch.tensor([value], dtype=given) for value in (-10.0, -12.0, -11.0, -11.5)]
    output = dpo_loss(*logps)
    assert {output.losses.dtype, output.chosen_rewards.dtype, output.margins.dtype} == {expected}
    assert output.losses.item() == pytest.approx(0.6209570477895321, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, parameter) for name in SUMS for parameter in LOSSES[name].parameters]
)
def test_every_parameter_is_read(name: str, parameter: str) -> None:
    a, b = torch.tensor([-1.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    other = {"dpop_lambda": 3.0}.get(parameter, 0.3)
    assert (losses_at(name, a, b, **{parameter: other}) - losses_at(name, a, b)).abs().item() > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_the_docstring_shows_the_formula_and_the_paper(name: str) -> None:
    spec = LOSSES[name]
    text = " ".join(str(spec.function.__doc__).split())
    assert f"`{spec.formula}`" in text
    assert spec.paper in text


@pytest.mark.parametrize("name", SUMS)
def test_no_host_sync(name: str) -> None:
    a, b = (tensor.requires_grad_() for tensor in random_logratios())
    with Sizes() as found:
        losses_at(name, a, b).sum().backward()
    assert found.syncs == 0
    with Sizes() as found:
        a.sum().item()
    assert found.syncs == 1  # the detector does detect
