"""The chunked `token_logps` against its twin on full logits and against float64: values, gradients, dtypes, memory."""

import math
from typing import Any

import pytest
import torch
from measures import Sizes, kept_for_backward
from torch import Tensor

from lowlevel.losses import (
    masked_cross_entropy,
    token_logps,
    token_logps_reference,
    token_scores,
    token_scores_reference,
)
from lowlevel.losses.token_logps import STATISTICS

Inputs = tuple[Tensor, Tensor, Tensor]


def make(n: int, v: int, d: int = 16, dtype: torch.dtype = torch.float32, head: torch.dtype | None = None) -> Inputs:
    generator = torch.Generator().manual_seed(n * 7919 + v)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(v, d, generator=generator, dtype=torch.float64) * 0.5).to(head or dtype)
    targets = torch.randint(0, v, (n,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def gradients(function: Any, inputs: Inputs, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and the gradients in hidden and weight for an incoming gradient."""
    logps = function(*inputs, **options)
    return logps, *torch.autograd.grad(logps, inputs[:2], grad)


def test_hand_value() -> None:
    """One row, identity head: the logits are the hidden state. log(1 + e^-1 + e^-2 + e^-3) = 0.440..."""
    hidden = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    logps = token_logps(hidden, torch.eye(4, dtype=torch.float64), torch.tensor([0]))
    assert logps.item() == pytest.approx(-0.4401896985611953, abs=1e-15)
    uniform = token_logps(torch.ones(2, 3), torch.zeros(32000, 3), torch.tensor([0, 31999]))
    assert uniform.tolist() == pytest.approx([-10.373491181781864] * 2, abs=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 5, 256, 1024])
@pytest.mark.parametrize("v", [7, 1003])
@pytest.mark.parametrize("n", [1, 3, 17, 1025])
def test_twin_in_fp32(n: int, v: int, chunk_size: int) -> None:
    inputs = make(n, v)
    grad = torch.randn(n, generator=torch.Generator().manual_seed(1))
    ours = gradients(token_logps, inputs, grad, chunk_size=chunk_size)
    twin = gradients(token_logps_reference, inputs, grad)
    assert ours[0].dtype == torch.float32
    for actual, expected in zip(ours, twin, strict=True):
        # sums over N rows in another order: 1e-6 of the tensor's size, not of an entry that may cancel to nothing
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * max(1.0, expected.abs().max().item()))


def test_default_chunk_size_against_the_twin_and_against_masked_cross_entropy() -> None:
    hidden, weight, targets = make(1025, 7)
    logps = token_logps(hidden, weight, targets)
    torch.testing.assert_close(logps, token_logps_reference(hidden, weight, targets), rtol=1e-6, atol=1e-6)
    labels = torch.cat([torch.tensor([-100]), targets])[None]  # shifted back by one
    logits = torch.cat([hidden @ weight.T, torch.zeros(1, 7)])[None]
    assert -logps.sum().item() == pytest.approx(masked_cross_entropy(logits, labels)[0].item(), rel=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_gradcheck_in_float64(chunk_size: int) -> None:
    hidden, weight, targets = make(5, 7, d=3, dtype=torch.float64)

    def function(h: Tensor, w: Tensor) -> Tensor:
        return token_logps(h, w, targets, chunk_size=chunk_size)

    assert function(hidden, weight).dtype == torch.float64
    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_only_wanted_gradients_are_computed() -> None:
    hidden, weight, targets = make(17, 7)
    expected = gradients(token_logps, (hidden, weight, targets), torch.ones(17), chunk_size=5)
    logps = token_logps(hidden, weight.detach(), targets, chunk_size=5)
    assert torch.equal(torch.autograd.grad(logps.sum(), hidden)[0], expected[1])
    logps = token_logps(hidden.detach(), weight, targets, chunk_size=5)
    assert torch.equal(torch.autograd.grad(logps.sum(), weight)[0], expected[2])
    with torch.no_grad():
        assert torch.equal(token_logps(hidden, weight, targets, chunk_size=5), expected[0])


# ---- statistics of the distribution, from the same chunk ----

WEIGHTS = {"lse": 0.7, "mean_logp": -1.3, "log_square_sum": 5.0}


def scored(function: Any, inputs: Inputs, needs: tuple[str, ...], grad: Tensor, **options: Any) -> list[Tensor]:
    """Log-probabilities, statistics, and the gradients of a sum in which each has another factor."""
    logps, statistics = function(*inputs, needs, **options)
    assert tuple(statistics) == needs
    total = logps.double() @ grad.double()
    for name, values in statistics.items():
        total = total + WEIGHTS[name] * (values.double() @ grad.double())
    return [logps, *statistics.values(), *torch.autograd.grad(total, inputs[:2])]


NEEDS = [("lse",), ("mean_logp",), ("log_square_sum",), ("log_square_sum", "mean_logp", "lse")]


def test_hand_values_of_the_statistics() -> None:
    """Logits (2, 1, 0, -1): p = (.6439, .2369, .0871, .0321); the sum of squares is .4793; the mean of z is 1/2."""
    hidden = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    for function in (token_scores, token_scores_reference):
        _, found = function(hidden, torch.eye(4, dtype=torch.float64), torch.tensor([0]), tuple(STATISTICS))
        p = [math.exp(z - 2.4401896985611953) for z in (2, 1, 0, -1)]
        assert found["lse"].item() == pytest.approx(2.4401896985611953, abs=1e-15)
        assert found["mean_logp"].item() == pytest.approx(0.5 - 2.4401896985611953, abs=1e-15)
        assert found["log_square_sum"].item() == pytest.approx(math.log(sum(x * x for x in p)), abs=1e-15)
        assert not found["log_square_sum"].requires_grad
        (slopes,) = torch.autograd.grad(found["lse"].sum() + 2 * found["mean_logp"].sum(), hidden)
        assert slopes[0].tolist() == pytest.approx([x + 2 * (0.25 - x) for x in p], abs=1e-15)


@pytest.mark.parametrize("needs", NEEDS, ids=" ".join)
@pytest.mark.parametrize("chunk_size", [1, 5, 1024])
def test_statistics_against_full_logits_in_fp32(needs: tuple[str, ...], chunk_size: int) -> None:
    inputs = make(17, 1003)
    grad = torch.randn(17, generator=torch.Generator().manual_seed(1))
    ours = scored(token_scores, inputs, needs, grad, chunk_size=chunk_size)
    twin = scored(token_scores_reference, inputs, needs, grad)
    for actual, expected in zip(ours, twin, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6 * max(1.0, expected.abs().max().item()))
    assert torch.equal(ours[0], token_logps(*inputs, chunk_size=chunk_size))


@pytest.mark.parametrize("needs", NEEDS[:2] + [("mean_logp", "lse")], ids=" ".join)
def test_statistics_gradcheck_in_float64(needs: tuple[str, ...]) -> None:
    hidden, weight, targets = make(5, 7, d=3, dtype=torch.float64)

    def function(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        logps, statistics = token_scores(h, w, targets, needs, chunk_size=2)
        return logps, *statistics.values()

    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_statistics_in_fp16_against_float64_with_a_loss_scale() -> None:
    inputs, needs = make(65, 1003, d=12, dtype=torch.float16), tuple(STATISTICS)
    grad = torch.full((65,), -65536.0 / 65)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs[:2])
    expected = scored(token_scores_reference, (*exact, inputs[2]), needs, grad.double())
    ours = scored(token_scores, inputs, needs, grad, chunk_size=16)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 4 + [torch.float16] * 2
    for actual, wanted in zip(ours[:4], expected[:4], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=5e-3)
    for actual, wanted in zip(ours[4:], expected[4:], strict=True):
        assert ((actual.double() - wanted).norm() / wanted.norm()).item() < 2e-3


def test_statistics_make_no_full_logits_and_no_host_sync() -> None:
    with Sizes() as sizes:
        logps, statistics = token_scores(*make(257, 101, 4), tuple(STATISTICS), chunk_size=16)
        (logps.sum() + statistics["lse"].sum() + statistics["mean_logp"].sum()).backward()
    assert sizes.largest == 16 * 101 and sizes.syncs == 0


def test_no_rows() -> None:
    for function in (token_logps, token_logps_reference):
        inputs = make(0, 7)
        logps, grad_hidden, grad_weight = gradients(function, inputs, torch.zeros(0))
        assert (logps.shape, logps.dtype, grad_hidden.shape) == ((0,), torch.float32, (0, 16))
        assert torch.equal(grad_weight, torch.zeros_like(inputs[1]))


def test_fp16_against_float64_with_a_loss_scale() -> None:
    """Logits below 8 are rounded by at most 2^-9 = 2e-3, so 5e-3 a token; gradients to fp16's 2^-11 and these."""
    inputs = make(65, 1003, d=12, dtype=torch.float16)
    assert (inputs[0] @ inputs[1].T).abs().max() < 8.5
    grad = torch.full((65,), -65536.0 / 65)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs[:2])
    expected = gradients(token_logps_reference, (*exact, inputs[2]), grad.double())
    ours = gradients(token_logps, inputs, grad, chunk_size=16)
    assert [tensor.dtype for tensor in ours] == [torch.float32, torch.float16, torch.float16]
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=0, atol=5e-3)
    for actual, wanted in zip(ours[1:], expected[1:], strict=True):
        assert ((actual.double() - wanted).norm() / wanted.norm()).item() < 2e-3
        assert abs((actual.double() - wanted).mean().item()) < 1e-4 * wanted.abs().mean().item()  # no drift


def test_fp16_stores_no_more_zeros_than_rounding_makes() -> None:
    """An identity head makes grad_hidden the gradient of the logits: g (onehot - p), rounded once."""
    n, v, grad = 17, 1003, torch.full((17,), -65536.0 / 64)
    logits = (torch.randn(n, v, generator=torch.Generator().manual_seed(3)) * 5).half().requires_grad_()
    targets = torch.arange(n)
    logps = token_logps(logits, torch.eye(v, dtype=torch.float16), targets, chunk_size=4)
    (stored,) = torch.autograd.grad(logps, logits, grad)
    onehot = torch.nn.functional.one_hot(targets, v).double()
    unscaled = onehot - logits.detach().double().softmax(dim=1)
    ideal = grad.double()[:, None] * unscaled
    torch.testing.assert_close(stored.double(), ideal, rtol=1e-3, atol=6e-8)
    share = [(tensor == 0).double().mean().item() for tensor in (stored, ideal.half(), unscaled.half())]
    assert share[0] <= share[1] + 2 / (n * v)  # an entry at the rounding limit may fall on either side
    assert share[2] > share[1] + 0.3  # what a store before the multiplication loses: the test can tell


@pytest.mark.parametrize(
    ("dtype", "head"),
    [(torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
    + [(torch.float64, torch.float32), (torch.float32, torch.float64)],
)
def test_products_run_in_the_dtype_of_the_weight(dtype: torch.dtype, head: torch.dtype) -> None:
    inputs = make(17, 101, dtype=dtype, head=head)
    grad = torch.ones(17, dtype=torch.promote_types(head, torch.float32))
    ours = gradients(token_logps, inputs, grad, chunk_size=5)
    assert [tensor.dtype for tensor in ours] == [grad.dtype, dtype, head]
    cast = gradients(token_logps, (inputs[0].detach().to(head).requires_grad_(), *inputs[1:]), grad, chunk_size=5)
    assert torch.equal(ours[0], cast[0])
    assert torch.equal(ours[1], cast[1].to(dtype))
    assert torch.equal(ours[2], cast[2])


@pytest.mark.parametrize("function", [token_logps, token_logps_reference])
def test_autocast_changes_nothing(function: Any) -> None:
    inputs = make(17, 101)
    plain = gradients(function, inputs, torch.ones(17), chunk_size=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (inputs[0] @ inputs[1].T).dtype == torch.bfloat16  # it is on
        logps = function(*inputs, chunk_size=5)
        inside = torch.autograd.grad(logps, inputs[:2], torch.ones(17), retain_graph=True)
    outside = torch.autograd.grad(logps, inputs[:2], torch.ones(17))
    assert torch.equal(logps, plain[0])
    # the twin's backward belongs to autograd, and does see an autocast that is on around backward()
    for grads in (outside, inside) if function is token_logps else (outside,):
        assert all(torch.equal(actual, expected) for actual, expected in zip(grads, plain[1:], strict=True))


def measure(function: Any, inputs: Inputs, **options: Any) -> Sizes:
    with Sizes() as sizes:
        function(*inputs, **options).sum().backward()
    return sizes


def test_no_tensor_of_full_logits_and_no_host_sync() -> None:
    n, v, d, chunk_size = 257, 101, 4, 16
    hidden, weight, targets = make(n, v, d)
    ours = measure(token_logps, (hidden, weight, targets), chunk_size=chunk_size)
    assert ours.largest == chunk_size * v  # and N x D = 1028, V x D = 404 are smaller
    assert ours.syncs == 0
    assert measure(token_logps_reference, (hidden, weight, targets)).largest == n * v  # the measurement works


def test_only_hidden_weight_targets_and_lse_are_kept() -> None:
    hidden, weight, targets = make(257, 101, 4)
    kept = kept_for_backward(lambda: token_logps(hidden, weight, targets, chunk_size=16))
    assert kept == [(257, 4), (101, 4), (257,), (257,)]


def test_extreme_logits_stay_finite() -> None:
    """Logits of +-30,000 (fp16's range): the log-probability is the difference of logits, the gradient one-hot."""
    hidden = torch.tensor([[30000.0, -30000.0]], dtype=torch.float16).requires_grad_()
    for target, expected, slope in ((0, 0.0, 0.0), (1, -60000.0, 1.0)):
        logps = token_logps(hidden, torch.eye(2, dtype=torch.float16), torch.tensor([target]))
        assert logps.item() == expected
        assert torch.autograd.grad(logps.sum(), hidden)[0].tolist() == [[-slope, slope]]


@pytest.mark.parametrize("function", [token_logps, token_logps_reference])
def test_misuse_is_an_error(function: Any) -> None:
    hidden, weight, targets = make(3, 1003)
    for bad in (-100, -1, 1003):  # V > 100, so that indexing from the end would find a token for -100
        with pytest.raises(RuntimeError, match="out of bounds"):
            function(hidden, weight, torch.tensor([0, bad, 1]))
    with pytest.raises(ValueError, match=r"hidden must be \(N, D\)"):
        function(hidden[None], weight, targets)
    with pytest.raises(ValueError, match=r"\(3, 16\) and \(1003, 15\)"):
        function(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"targets must be \(3,\) int64"):
        function(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match="int32"):
        function(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="chunk_size must be at least 1 row, got 0"):
        function(hidden, weight, targets, chunk_size=0)


def test_second_derivatives_are_refused() -> None:
    hidden, weight, targets = make(3, 7)
    (grad,) = torch.autograd.grad(token_logps(hidden, weight, targets).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), hidden)


def test_probabilities_sum_to_one() -> None:
    hidden, weight, _ = make(1, 101)
    logps = token_logps(hidden.expand(101, -1), weight, torch.arange(101), chunk_size=10)
    assert math.fsum(logps.detach().double().exp().tolist()) == pytest.approx(1.0, abs=1e-6)
