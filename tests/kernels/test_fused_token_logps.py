"""The fused `token_logps`, by the kernels' twins and, in Triton's interpreter, by the kernels; which calls it takes."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from interpreter import HALF, INTERPRETED, MODE, SINGLE, interpreted, logits_and_targets
from measures import Sizes, kept_for_backward
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowlevel import losses
from lowlevel.kernels import chunk_rows, token_logps
from lowlevel.kernels import vocabulary as ops
from lowlevel.kernels.token_logps import _FusedTokenScores, _is_fast


def make(n: int, v: int, d: int = 16, dtype: torch.dtype = SINGLE, head: torch.dtype | None = None) -> Any:
    generator = torch.Generator().manual_seed(n * 7919 + v)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(v, d, generator=generator, dtype=torch.float64) * 0.5).to(head or dtype)
    return hidden.requires_grad_(), weight, torch.randint(0, v, (n,), generator=generator)


def fused(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """The fast path, whatever the device: with the twins on a CPU, with the kernels where `through_kernels` is used."""
    return _FusedTokenScores.apply(hidden, weight, targets, chunk_size, ())[0]


def values_and_gradient(function: Any, inputs: Any, grad: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    logps = function(*inputs, *args, **options)
    return logps, torch.autograd.grad(logps, inputs[0], grad)[0]


@pytest.fixture(params=[INTERPRETED], ids=[MODE])
def through_kernels(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the fused function runs the kernels (in the interpreter's process) or the twins."""
    if INTERPRETED:
        monkeypatch.setattr(ops, "_kernels_take", lambda logits: True)
    return INTERPRETED


@pytest.mark.parametrize("chunk_size", [1, 5, 17, 1024])
@pytest.mark.parametrize(("n", "v"), [(1, 1), (3, 7), (17, 1003)])
def test_fused_equals_the_losses_in_fp32(n: int, v: int, chunk_size: int, through_kernels: bool) -> None:
    inputs = make(n, v)
    grad = torch.randn(n, generator=torch.Generator().manual_seed(1))
    ours = values_and_gradient(fused, inputs, grad, chunk_size)
    expected = values_and_gradient(losses.token_logps, inputs, grad)
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("needs", [("lse",), ("mean_logp",), ("mean_logp", "log_square_sum", "lse")], ids=" ".join)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_fused_statistics_against_float64_with_a_loss_scale(
    dtype: torch.dtype, needs: tuple[str, ...], through_kernels: bool
) -> None:
    hidden, weight, targets = make(65, 1003, 12, dtype)
    grad = torch.full((65,), -65536.0 / 65)

    def scored(scores: Any, leaf: Tensor) -> list[Tensor]:
        """The square of one statistic and a multiple of another: their incoming gradients differ by token."""
        logps, *statistics = scores
        parts = [(logps * grad).sum(), *((values.square() * grad).sum() for values in statistics)]
        return [logps.detach(), *statistics, torch.autograd.grad(sum(parts), leaf)[0]]

    exact = hidden.detach().double().requires_grad_()
    logps, statistics = losses.token_scores_reference(exact, weight.double(), targets, needs)
    expected = scored((logps, *statistics.values()), exact)
    ours = scored(_FusedTokenScores.apply(hidden, weight, targets, 16, needs), hidden)
    for actual, wanted in zip(ours[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=5e-3 if dtype == HALF else 1e-5)
    assert (ours[-1].double() - expected[-1]).norm() < (2e-3 if dtype == HALF else 1e-5) * expected[-1].norm()


@pytest.mark.parametrize(("dtype", "head"), [(HALF, HALF), (SINGLE, HALF), (HALF, SINGLE)])
def test_fused_against_float64_with_a_loss_scale(dtype: Any, head: Any, through_kernels: bool) -> None:
    """Logits below 8 are rounded by at most 2^-9 = 2e-3, so 5e-3 a token; gradients to fp16's 2^-11 and these."""
    inputs = make(65, 1003, 12, dtype, head)
    cast = inputs[0].detach().to(head)
    assert (cast @ inputs[1].T).abs().max() < 8.5
    grad = torch.full((65,), -65536.0 / 65)
    precise = (cast.double().requires_grad_(), inputs[1].double(), inputs[2])
    expected = values_and_gradient(losses.token_logps_reference, precise, grad.double())
    ours = values_and_gradient(fused, inputs, grad, 16)
    assert [tensor.dtype for tensor in ours] == [SINGLE, dtype]
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=0, atol=5e-3)
    error = ours[1].double() - expected[1]
    assert (error.norm() / expected[1].norm()).item() < 2e-3
    assert abs(error.mean().item()) < 1e-4 * expected[1].abs().mean().item()  # no drift


def test_fused_gradient_overflows_to_inf(through_kernels: bool) -> None:
    hidden = torch.zeros(3, 4, dtype=HALF, requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    grad = torch.tensor([1e6, 1.0, 1.0])
    _, stored = values_and_gradient(fused, (hidden, torch.eye(4, dtype=HALF), targets), grad, 2)
    assert not stored[0].isfinite().any() and stored[1:].isfinite().all()


def test_incoming_gradient_beyond_fp16_stays_in_fp32(through_kernels: bool) -> None:
    """p = e^8 / (e^8 + 3), so 1 - p = 1.0054e-3: a gradient of 1e5, which fp16 cannot hold, gives 100.5."""
    hidden = torch.tensor([[8.0, 0.0, 0.0, 0.0]] * 3, dtype=HALF, requires_grad=True)
    inputs = (hidden, torch.eye(4, dtype=HALF), torch.zeros(3, dtype=torch.int64))
    _, stored = values_and_gradient(fused, inputs, torch.tensor([1e5, 1e5, 1.0]), 2)
    assert stored[0].tolist() == stored[1].tolist() == pytest.approx([100.54, -33.51, -33.51, -33.51], rel=1e-3)


def test_fused_ignores_autocast(through_kernels: bool) -> None:
    inputs = make(17, 101)
    plain = values_and_gradient(fused, inputs, torch.ones(17), 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (inputs[0] @ inputs[1].T).dtype == torch.bfloat16  # it is on
        inside = values_and_gradient(fused, inputs, torch.ones(17), 5)
        logps = fused(*inputs, 5)
    outside = torch.autograd.grad(logps.sum(), inputs[0])[0]
    assert all(torch.equal(actual, expected) for actual, expected in zip(inside, plain, strict=True))
    assert torch.equal(outside, plain[1])


def test_fused_takes_any_strides(through_kernels: bool) -> None:
    hidden, weight, targets = make(17, 101)
    expected = values_and_gradient(fused, (hidden, weight, targets), torch.ones(17), 5)
    targets = targets.repeat_interleave(2)[::2]
    strided = (hidden.detach().T.contiguous().T.requires_grad_(), weight.T.contiguous().T, targets)
    assert not any(tensor.is_contiguous() for tensor in strided)
    logps = fused(*strided, 5)
    (gradient,) = torch.autograd.grad(logps.sum(), strided[0])  # an incoming gradient of stride 0
    torch.testing.assert_close((logps, gradient), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(HALF, 2e-3), (SINGLE, 1e-6)])
def test_fused_gradient_of_a_trained_weight(dtype: torch.dtype, bound: float, through_kernels: bool) -> None:
    hidden, weight, targets = make(65, 101, 12, dtype)
    grad = torch.linspace(-3, 5, 65)
    exact = weight.double().requires_grad_()
    logps = losses.token_logps_reference(hidden.detach().double(), exact, targets)
    (expected,) = torch.autograd.grad(logps, exact, grad.double())
    (found,) = torch.autograd.grad(fused(hidden, weight.requires_grad_(), targets, 16), weight, grad)
    assert found.dtype == dtype and (found.double() - expected).norm() < bound * expected.norm()


def test_fused_is_differentiable_once() -> None:
    inputs = make(3, 7)
    (gradient,) = torch.autograd.grad(fused(*inputs, 2).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), inputs[0])


def test_fused_keeps_hidden_weight_targets_and_lse() -> None:
    kept = kept_for_backward(lambda: fused(*make(257, 101, 4), 16))
    assert kept == [(257, 4), (101, 4), (257,), (257,)]


def test_fused_makes_no_fp32_logits_and_no_host_sync(through_kernels: bool) -> None:
    n, v, d, chunk_size = 65, 101, 1, 16
    inputs = make(n, v, d, HALF)
    with Sizes() as sizes:
        fused(*inputs, chunk_size).sum().backward()
    assert sizes.by_dtype[HALF] == chunk_size * v
    assert sizes.by_dtype[SINGLE] == (n if through_kernels else chunk_size * v)  # N: log-probabilities; twins are plain
    assert sizes.syncs == 0


@pytest.mark.parametrize(
    ("v", "itemsize", "rows"),
    [(32000, 2, 512), (32000, 4, 256), (49152, 2, 320), (256000, 2, 64), (10**7, 4, 64), (1, 2, 2**24)],
)
def test_chunk_rows(v: int, itemsize: int, rows: int) -> None:
    assert chunk_rows(v, itemsize) == rows
    assert rows == 64 or rows * v * itemsize <= 32 * 2**20


# Which path a call takes


@pytest.mark.parametrize("options", [{}, {"chunk_size": 5}])
def test_on_a_cpu_the_losses_compute_it(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_FusedTokenScores, "apply", None)
    inputs, grad = make(17, 101, dtype=HALF), torch.ones(17)
    ours = values_and_gradient(token_logps, inputs, grad, **options)
    expected = values_and_gradient(losses.token_logps, inputs, grad, **options)
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(ours, expected, strict=True))
    assert token_logps(*make(0, 7)).shape == (0,)
    weight = inputs[1].requires_grad_()
    assert torch.autograd.grad(token_logps(*inputs, **options).sum(), weight)[0].shape == weight.shape


def test_errors_are_the_losses_own() -> None:
    hidden, weight, targets = make(3, 1003)
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_logps(hidden, weight, torch.tensor([0, -100, 1]))
    with pytest.raises(ValueError, match=r"hidden must be \(N, D\)"):
        token_logps(hidden[None], weight, targets)
    with pytest.raises(ValueError, match=r"targets must be \(3,\) int64"):
        token_logps(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="chunk_size must be at least 1 row, got 0"):
        token_logps(hidden, weight, targets, chunk_size=0)


def cuda(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*shape, device="cuda", dtype=dtype)


def test_which_calls_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors, which have shapes and devices and no memory."""
    asked = []
    monkeypatch.setattr(ops, "usable", lambda *key: bool(asked.append(key) or True))
    with FakeTensorMode():
        h, w, t = cuda(5, 8), cuda(7, 8), cuda(5, dtype=torch.int64)
        half_and_full = [(cuda(5, 8, dtype=SINGLE), cuda(7, 8, dtype=torch.bfloat16)), (h, cuda(7, 8, dtype=SINGLE))]
        assert _is_fast(h, w, t, None) and all(_is_fast(*pair, t, 1) for pair in half_and_full)
        assert asked[0] == (w.device, HALF, 7)
        asked.clear()
        slow = {
            "CPU": (torch.empty(5, 8), torch.empty(7, 8), torch.empty(5, dtype=torch.int64), None),
            "two devices": (h, w, torch.empty(5, dtype=torch.int64), None),
            "float64": (h, cuda(7, 8, dtype=torch.float64), t, None),
            "no rows": (cuda(0, 8), w, cuda(0, dtype=torch.int64), None),
            "no words": (h, cuda(0, 8), t, None),
            "wrong width": (h, cuda(7, 9), t, None),
            "wrong targets": (h, w, cuda(4, dtype=torch.int64), None),
            "int32 targets": (h, w, cuda(5, dtype=torch.int32), None),
            "chunk": (h, w, t, 0),
            "3-D": (cuda(1, 5, 8), w, t, None),
            "integers": (cuda(5, 8, dtype=torch.int32), w, t, None),
        }
        for reason, arguments in slow.items():
            assert not _is_fast(*arguments), reason
        assert not asked  # Triton is asked about none of them
        trained = w.requires_grad_()
        with torch.no_grad():  # the reference pass of a run that trains the head: the same path as its policy pass
            assert _is_fast(h, trained, t, None)
        assert _is_fast(h, trained, t, None)


def test_refusal_is_one_warning_and_then_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse() -> None:
        calls.append(1)
        raise RuntimeError("ptxas:\n  no such\tarchitecture " + "x" * 500)

    monkeypatch.setattr(ops, "kernels", refuse)
    ops.usable.cache_clear()
    key = (torch.device("cpu"), HALF, 7)
    with pytest.warns(UserWarning) as caught:
        assert not ops.usable(*key)
    (warning,) = [str(item.message) for item in caught]
    assert warning.startswith(
        "plain torch instead of Triton's kernels on cpu in torch.float16: RuntimeError: ptxas: no"
    )
    assert "\n" not in warning and len(warning) < 400
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ops.usable(*key)
        monkeypatch.setattr(ops, "_kernels_take", lambda logits: ops.usable(*key))
        logits, targets = logits_and_targets(3, 7, HALF)
        pair = ops.logsumexp_and_target(logits, targets)
        stored = ops.grad_logits_(logits.clone(), targets, pair[0], torch.ones(3))
    assert len(calls) == 1
    assert torch.equal(pair[0], ops.logsumexp_and_target_reference(logits, targets)[0])
    assert torch.equal(stored, ops.grad_logits_reference_(logits, targets, pair[0], torch.ones(3)))
    ops.usable.cache_clear()


def test_a_refusal_sends_token_logps_to_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "usable", lambda *key: False)
    with FakeTensorMode():
        assert not _is_fast(cuda(5, 8), cuda(7, 8), cuda(5, dtype=torch.int64), None)


@interpreted
def test_interpreted_kernels_are_usable() -> None:
    ops.usable.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.usable(torch.device("cpu"), HALF, 7)
    ops.usable.cache_clear()


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_triton_is_not_imported_before_it_is_needed_and_may_be_missing() -> None:
    """None in sys.modules makes `import triton` an ImportError."""
    code = """
import sys, warnings
import torch
before = set(sys.modules)
import lowlevel.kernels
from lowlevel.kernels import vocabulary
assert "triton" not in sys.modules, "imported with the package"
new = {name for name in set(sys.modules) - before if not name.startswith("lowlevel")}
sys.modules["triton"] = None
hidden, weight = torch.eye(4), torch.eye(4)
assert lowlevel.kernels.token_logps(hidden, weight, torch.arange(4)).shape == (4,)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert not vocabulary.usable(torch.device("cpu"), torch.float16, 4)
print([str(item.message) for item in caught], sorted(new))
"""
    output = run_python(code)
    assert "ModuleNotFoundError: import of triton halted" in output or "ImportError" in output, output
