"""The vocabulary kernels and the fused `token_logps` on a GPU; elsewhere these tests say why they did not run."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlevel import losses
from lowlevel.kernels import chunk_rows, token_logps, token_scores
from lowlevel.kernels import vocabulary as ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda", 0)
HALF, SINGLE, BF16 = torch.float16, torch.float32, torch.bfloat16
UNIT = {HALF: (2**-11, 2**-25), BF16: (2**-8, 0.0), SINGLE: (0.0, 0.0)}  # half a unit: relative, and below the normals
APPROXIMATE = 2e-5  # ex2.approx of a rounded difference of logits up to 60 apart, and the error of lse itself


@pytest.fixture(autouse=True)
def no_warnings_and_no_losses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A test that fell back to plain torch would show nothing: here a fallback is an error."""
    monkeypatch.setattr(losses, "token_scores", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="plain torch instead")
        yield


def has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


dtypes = pytest.mark.parametrize(
    "dtype", [HALF, SINGLE, pytest.param(BF16, marks=pytest.mark.skipif(not has_bf16(), reason="needs bf16"))]
)


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = SINGLE) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, device=CUDA) * scale).to(dtype)


def random_targets(c: int, v: int) -> Tensor:
    targets = torch.randint(0, v, (c,), generator=torch.Generator(CUDA).manual_seed(c + v), device=CUDA)
    targets[0] = v - 1
    return targets


def assert_gradient(stored: Tensor, logits: Tensor, targets: Tensor, grad: Tensor) -> None:
    """g (onehot - softmax) in float64, rounded once; at the target 1 - p cancels, so there the bound is absolute."""
    relative, subnormal = UNIT[stored.dtype]
    onehot = torch.nn.functional.one_hot(targets, logits.shape[1]).double()
    ideal = grad.double()[:, None] * (onehot - logits.double().softmax(dim=1))
    bound = (relative + APPROXIMATE) * ideal.abs() + subnormal + onehot * grad.double().abs()[:, None] * 5e-6
    excess = ((stored.double() - ideal).abs() - bound).max().item()
    assert excess <= 1e-12, f"{excess:.3e} above the bound"


@dtypes
@pytest.mark.parametrize(("c", "v"), [(1, 1), (3, 7), (3, 4096), (5, 4097), (3, 32003), (64, 32000), (257, 1003)])
def test_kernels_against_twins_and_float64(c: int, v: int, dtype: torch.dtype) -> None:
    logits, targets = random(c, v, scale=5, dtype=dtype), random_targets(c, v)
    assert ops._kernels_take(logits)
    lse, target_logit = ops.logsumexp_and_target(logits, targets)
    twin = ops.logsumexp_and_target_reference(logits, targets)
    torch.testing.assert_close(lse, twin[0], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(dim=1), rtol=1e-6, atol=3e-6)
    assert torch.equal(target_logit, twin[1])
    grad = random(c, seed=1, scale=1024)
    before = logits.clone()
    stored = ops.grad_logits_(logits, targets, lse, grad)
    assert stored is logits
    assert_gradient(stored, before, targets, grad)
    assert_gradient(ops.grad_logits_reference_(before.clone(), targets, lse, grad), before, targets, grad)


def test_gradient_overflow_is_inf_and_never_nan() -> None:
    logits = torch.tensor([[0.0, 0.0, -20.0], [65504.0, -65504.0, 0.0]], dtype=HALF, device=CUDA)
    targets = torch.tensor([0, 1], device=CUDA)
    lse, target_logit = ops.logsumexp_and_target(logits, targets)
    assert (target_logit - lse).tolist() == pytest.approx([-math.log(2), -131008.0], abs=4e-3)
    stored = ops.grad_logits_(logits, targets, lse, torch.tensor([2e5, -1e38], device=CUDA))
    assert stored[:, :2].tolist() == [[math.inf, -math.inf], [math.inf, -math.inf]]
    assert not stored.isnan().any()


@pytest.mark.parametrize("bad", [-100, -1, 1003, 2**32 + 1])
def test_target_outside_the_vocabulary_is_nan_in_its_row_alone(bad: int) -> None:
    hidden, weight, targets = inputs(17, 1003, 64)
    targets[3] = bad
    logps = token_logps(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    others = torch.arange(17, device=CUDA) != 3
    assert torch.equal(logps.isfinite(), others)
    assert torch.equal(gradient.isfinite().all(dim=1), others)


def test_offsets_beyond_2_to_the_31() -> None:
    v = 32003
    c = 2**31 // v + 9
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB free: 4 GiB of logits and what else is there")
    logits = torch.empty(c, v, dtype=HALF, device=CUDA).normal_(generator=torch.Generator(CUDA).manual_seed(0))
    last, targets = logits[-4:].clone(), random_targets(c, v)
    lse, target_logit = ops.logsumexp_and_target(logits, targets)
    twin = ops.logsumexp_and_target_reference(last, targets[-4:])
    torch.testing.assert_close((lse[-4:], target_logit[-4:]), twin, rtol=1e-6, atol=3e-6)
    ops.grad_logits_(logits, targets, lse, torch.full((c,), 1024.0, device=CUDA))
    assert_gradient(logits[-4:], last, targets[-4:], torch.full((4,), 1024.0, device=CUDA))


# ---- the fused function ----


def inputs(n: int, v: int, d: int, dtype: torch.dtype = HALF, head: torch.dtype | None = None) -> Any:
    """Logits with a standard deviation of 1.7."""
    hidden = random(n, d, dtype=dtype).requires_grad_()
    return hidden, random(v, d, seed=1, scale=math.sqrt(3 / d), dtype=head or dtype), random_targets(n, v)


def values_and_gradient(function: Any, args: Any, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    logps = function(*args, **options)
    return logps.detach(), torch.autograd.grad(logps, args[0], grad)[0]


@pytest.mark.parametrize("chunk_size", [None, 100])
@pytest.mark.parametrize(("n", "v", "d"), [(777, 1003, 256), (65, 32003, 64), (1100, 32000, 64), (1, 7, 8)])
@pytest.mark.parametrize(("dtype", "head"), [(HALF, HALF), (SINGLE, HALF), (SINGLE, SINGLE)])
def test_fused_against_the_reference_with_a_loss_scale(
    n: int, v: int, d: int, dtype: torch.dtype, head: torch.dtype, chunk_size: int | None
) -> None:
    hidden, weight, targets = inputs(n, v, d, dtype, head)
    grad = torch.full((n,), -65536.0 / max(n, 64), device=CUDA)
    ours = values_and_gradient(token_logps, (hidden, weight, targets), grad, chunk_size=chunk_size)
    assert [tensor.dtype for tensor in ours] == [SINGLE, dtype]
    exact = hidden.detach().to(head).double().requires_grad_()
    expected = values_and_gradient(losses.token_logps_reference, (exact, weight.double(), targets), grad.double())
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=0, atol=1e-2 if head == HALF else 2e-5)
    error = (ours[1].double() - expected[1]).norm() / expected[1].norm()
    assert error < (3e-3 if head == HALF else 1e-5), f"relative error of the gradient {error:.2e}"
    assert ((ours[1] == 0).double().mean() - (expected[1].to(dtype) == 0).double().mean()) < 1e-3


@pytest.mark.parametrize(("n", "v", "d"), [(777, 1003, 256), (1100, 32000, 64)])
@pytest.mark.parametrize(("head", "bound"), [(HALF, 3e-3), (SINGLE, 1e-5)])
def test_fused_gradient_of_a_trained_weight(n: int, v: int, d: int, head: torch.dtype, bound: float) -> None:
    hidden, weight, targets = inputs(n, v, d, head, head)
    grad = torch.linspace(-300, 500, n, device=CUDA)
    exact = weight.double().requires_grad_()
    logps = losses.token_logps_reference(hidden.detach().double(), exact, targets)
    (expected,) = torch.autograd.grad(logps, exact, grad.double())
    (found,) = torch.autograd.grad(token_logps(hidden, weight.requires_grad_(), targets), weight, grad)
    assert found.dtype == head and (found.double() - expected).norm() < bound * expected.norm()


NEEDS = [("lse",), ("mean_logp",), ("log_square_sum",), ("mean_logp", "log_square_sum", "lse")]


def scores_and_gradient(function: Any, args: Any, needs: tuple[str, ...], grad: Tensor) -> list[Tensor]:
    """The square of each statistic: its incoming gradient differs by token."""
    logps, statistics = function(*args, needs)
    total = logps @ grad
    for values in statistics.values():
        total = total + values.square() @ grad
    return [logps.detach(), *(v.detach() for v in statistics.values()), torch.autograd.grad(total, args[0])[0]]


@dtypes
@pytest.mark.parametrize("needs", NEEDS, ids=" ".join)
@pytest.mark.parametrize(("n", "v", "d"), [(777, 1003, 256), (1100, 32000, 64), (1, 7, 8)])
def test_fused_statistics_with_a_loss_scale(n: int, v: int, d: int, needs: tuple[str, ...], dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(n, v, d, dtype)
    grad = torch.full((n,), -65536.0 / max(n, 64), device=CUDA)
    ours = scores_and_gradient(token_scores, (hidden, weight, targets), needs, grad)
    exact = hidden.detach().double().requires_grad_()
    reference = losses.token_scores_reference
    expected = scores_and_gradient(reference, (exact, weight.double(), targets), needs, grad.double())
    values, gradients = {HALF: (2e-2, 4e-3), BF16: (1e-1, 3e-2), SINGLE: (3e-5, 2e-5)}[dtype]
    for actual, wanted in zip(ours[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=values)
    error = (ours[-1].double() - expected[-1]).norm() / expected[-1].norm()
    assert error < gradients, f"relative error of the gradient {error:.2e}"
    assert torch.equal(ours[0], token_logps(hidden, weight, targets))  # the same bits with and without statistics


def test_fused_statistics_in_a_cuda_graph() -> None:
    args, grad = inputs(777, 1003, 256), random(777, seed=2, scale=100)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = scores_and_gradient(token_scores, args, NEEDS[-1], grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scores_and_gradient(token_scores, args, NEEDS[-1], grad)
    graph.replay()
    assert all(torch.equal(found, expected) for found, expected in zip(captured, eager, strict=True))


def test_fused_without_grad_gives_the_same_bits() -> None:
    """A reference pass under no_grad and the policy pass: DPO's margins are zero at step 0."""
    args = inputs(777, 1003, 256)
    with torch.no_grad():
        reference = token_logps(*args)
    assert torch.equal(token_logps(*args), reference)


def test_fused_ignores_autocast() -> None:
    args, grad = inputs(777, 1003, 256, SINGLE), torch.ones(777, device=CUDA)
    plain = values_and_gradient(token_logps, args, grad)
    with torch.autocast("cuda", dtype=HALF):
        inside = values_and_gradient(token_logps, args, grad)
    assert all(torch.equal(actual, expected) for actual, expected in zip(inside, plain, strict=True))


def test_fused_takes_any_strides() -> None:
    hidden, weight, targets = inputs(257, 1003, 64, SINGLE)
    expected = values_and_gradient(token_logps, (hidden, weight, targets), torch.ones(257, device=CUDA))
    strided = hidden.detach().T.contiguous().T.requires_grad_()
    logps = token_logps(strided, weight.T.contiguous().T, targets.repeat_interleave(2)[::2], chunk_size=100)
    (gradient,) = torch.autograd.grad(logps.sum(), strided)  # an incoming gradient of stride 0
    torch.testing.assert_close((logps.detach(), gradient), expected, rtol=1e-4, atol=1e-5)


def test_fused_peak_memory_is_one_chunk_of_logits_in_fp16() -> None:
    n, v, d = 4096, 32000, 256
    args, grad = inputs(n, v, d), torch.ones(n, device=CUDA)
    values_and_gradient(token_logps, args, grad)  # compiles, and takes cuBLAS's workspace
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    values_and_gradient(token_logps, args, grad)
    peak = torch.cuda.max_memory_allocated() - base
    chunk = chunk_rows(v, 2) * v * 2
    assert chunk <= peak < 1.5 * chunk  # a second buffer, or one in fp32, would make it twice
    assert peak < n * v * 4 / 10


def test_fused_never_waits_for_the_gpu() -> None:
    args, grad = inputs(777, 1003, 256), torch.ones(777, device=CUDA)
    values_and_gradient(token_logps, args, grad, chunk_size=100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values_and_gradient(token_logps, args, grad, chunk_size=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fused_in_a_cuda_graph_gives_the_same_bits() -> None:
    (hidden, weight, targets), upstream = inputs(777, 1003, 256), random(777, seed=2, scale=100)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            values_and_gradient(token_logps, (hidden, weight, targets), upstream, chunk_size=100)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = values_and_gradient(token_logps, (hidden, weight, targets), upstream, chunk_size=100)
    for seed in (3, 4):
        with torch.no_grad():
            hidden.copy_(random(777, 256, seed=seed))
        targets.copy_(targets.roll(seed))
        graph.replay()
        first = [tensor.clone() for tensor in captured]
        graph.replay()
        eager = values_and_gradient(token_logps, (hidden, weight, targets), upstream, chunk_size=100)
        for again, once, outside in zip(captured, first, eager, strict=True):
            assert torch.equal(again, once)
            assert torch.equal(once, outside)
