"""The two kernels under `token_logps`: twins against float64, the Triton code itself in Triton's interpreter."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import HALF, INTERPRETED, MODE, SINGLE, interpreted, logits_and_targets
from torch import Tensor

from lowlevel.kernels import vocabulary as ops

SHAPES = [(1, 1), (3, 1), (1, 7), (3, 7), (3, 4096), (1, 4097), (3, 12289)]

TWINS = (ops.logsumexp_and_target_reference, ops.grad_logits_reference_)
KERNELS = (ops._launch_logsumexp, ops._launch_grad_logits_)
both = pytest.mark.parametrize("functions", [KERNELS if INTERPRETED else TWINS], ids=[MODE])


def exact(logits: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse, target logit and g (onehot - softmax) in float64, each by its definition."""
    z = logits.double()
    shifted = (z - z.amax(dim=1, keepdim=True)).exp()
    lse = shifted.sum(dim=1).log() + z.amax(dim=1)
    onehot = torch.arange(z.shape[1]) == targets[:, None]
    return lse, z[onehot], grad.double()[:, None] * (onehot.double() - shifted / shifted.sum(dim=1, keepdim=True))


# ---- the two kernels and their twins ----


@both
def test_hand_values(functions: Any) -> None:
    """log(1 + e^-1 + e^-2 + e^-3) = 0.4402, so lse = 2.4402; softmax = 0.6439, 0.2369, 0.0871, 0.0321."""
    forward, backward = functions
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 2)
    targets = torch.tensor([0, 3])
    lse, target_logit = forward(logits, targets)
    assert lse.tolist() == pytest.approx([2.4401896985611953] * 2, abs=3e-7)
    assert target_logit.tolist() == [2.0, -1.0]
    grad = backward(logits, targets, lse, torch.tensor([1.0, -10.0]))
    assert grad is logits  # in place
    assert grad[0].tolist() == pytest.approx([0.3560857, -0.2368828, -0.0871443, -0.0320586], abs=2e-7)
    assert grad[1].tolist() == pytest.approx([6.439143, 2.368828, 0.871443, -9.679414], abs=2e-6)


@both
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("c", "v"), SHAPES)
def test_against_float64(functions: Any, c: int, v: int, dtype: torch.dtype) -> None:
    forward, backward = functions
    logits, targets = logits_and_targets(c, v, dtype)
    grad = torch.randn(c, generator=torch.Generator().manual_seed(1)) * 100
    expected = exact(logits, targets, grad)
    lse, target_logit = forward(logits, targets)
    assert (lse.dtype, target_logit.dtype, lse.shape) == (SINGLE, SINGLE, (c,))
    torch.testing.assert_close(lse.double(), expected[0], rtol=2e-7, atol=1e-6)
    assert torch.equal(target_logit.double(), expected[1])
    stored = backward(logits, targets, lse, grad)
    assert stored is logits and stored.dtype == dtype
    # fp16: half a unit in the last place, normal and subnormal; fp32: exp of a difference of numbers up to 30
    bounds = {"rtol": 2**-11 + 2e-6, "atol": 2**-25 + 2e-5} if dtype == HALF else {"rtol": 4e-6, "atol": 2e-5}
    torch.testing.assert_close(stored.double(), expected[2], **bounds)


@both
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("c", "v"), [(1, 1), (3, 7), (1, 4097), (3, 12289)])
def test_statistics_against_float64(functions: Any, c: int, v: int, dtype: torch.dtype) -> None:
    forward, backward = functions
    logits, targets = logits_and_targets(c, v, dtype)
    generator = torch.Generator().manual_seed(1)
    grad, of_p, uniform = (torch.randn(c, generator=generator) * scale for scale in (100, 50, 10))
    lse, _, gradient = exact(logits, targets, grad)
    p = (logits.double() - lse[:, None]).exp()
    needs = ("log_square_sum", "lse", "mean_logp")
    found = forward(logits, targets, needs)
    plain = forward(logits, targets)
    assert all(torch.equal(a, b) for a, b in zip(plain, found[:2], strict=True))
    assert torch.equal(found[3], found[0])
    torch.testing.assert_close(found[2].double(), p.square().sum(dim=1).log(), rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(found[4].double(), logits.double().mean(dim=1) - lse, rtol=1e-6, atol=3e-6)
    for name, values in zip(needs, found[2:], strict=True):  # one at a time: the other kernels
        torch.testing.assert_close(forward(logits, targets, (name,))[2], values, rtol=2e-7, atol=1e-6)
    expected = gradient + of_p.double()[:, None] * p + uniform.double()[:, None]
    stored = backward(logits, targets, plain[0], grad, of_p, uniform)
    bounds = {"rtol": 2**-11 + 2e-6, "atol": 2**-25 + 4e-5} if dtype == HALF else {"rtol": 4e-6, "atol": 4e-5}
    torch.testing.assert_close(stored.double(), expected, **bounds)


@both
@pytest.mark.parametrize("v", [1003, 4099])
def test_fp16_gradient_is_scaled_before_it_is_rounded(functions: Any, v: int) -> None:
    """A scale of 65,536 over 64 tokens: each entry is the float64 value rounded once, and no more of them are zero."""
    forward, backward = functions
    logits, targets = logits_and_targets(3, v, HALF)
    grad = torch.full((3,), -65536.0 / 64)
    ideal = exact(logits, targets, grad)[2]
    lost = exact(logits, targets, torch.ones(3))[2].half().double() * grad.double()[:, None]
    stored = backward(logits, targets, forward(logits, targets)[0], grad).double()
    torch.testing.assert_close(stored, ideal, rtol=2**-11 + 4e-6, atol=2**-25)
    zeros = [(tensor == 0).double().mean().item() for tensor in (stored, ideal.half(), lost)]
    assert zeros[0] <= zeros[1] + 2 / stored.numel()  # an entry at the rounding limit may fall on either side
    assert zeros[2] > zeros[1] + 0.3  # what rounding before the multiplication loses: the test can tell
    normal = ideal.abs() > 2**-14
    assert ((stored - ideal).abs() / ideal.abs())[normal].max() < 2**-11 + 4e-6 < 1e-3


@both
def test_gradient_beyond_fp16_is_inf_and_finite_input_never_gives_nan(functions: Any) -> None:
    forward, backward = functions
    logits = torch.tensor([[0.0, 0.0, -20.0], [65504.0, -65504.0, 0.0], [-65504.0, -65504.0, -65504.0]], dtype=HALF)
    targets = torch.tensor([0, 1, 2])
    lse, target_logit = forward(logits, targets)
    assert (target_logit - lse).tolist() == pytest.approx([-math.log(2), -131008.0, -math.log(3)], abs=4e-3)
    stored = backward(logits.clone(), targets, lse, torch.tensor([2e5, -1e38, 0.0]))
    assert stored[0].tolist() == [math.inf, -math.inf, pytest.approx(-2e5 * math.exp(-20) / 2, rel=1e-3)]
    assert stored[1].tolist() == [math.inf, -math.inf, 0.0]
    assert stored[2].tolist() == [0.0, 0.0, 0.0]
    edge = backward(logits.clone(), targets, lse, torch.tensor([131008.0, 0.0, 0.0]))  # g / 2 = 65,504: still finite
    assert edge[0, :2].tolist() == [65504.0, -65504.0]


@both
def test_logits_at_the_ends_of_fp32(functions: Any) -> None:
    """The lowest finite number is where the running maximum starts; -inf is a token of probability zero."""
    lowest = torch.finfo(SINGLE).min
    logits = torch.tensor([[lowest, lowest, lowest], [-math.inf, 1.0, -math.inf], [3e38, lowest, 3e38]])
    targets = torch.tensor([1, 1, 0])
    lse, target_logit = functions[0](logits, targets)
    assert lse.tolist() == pytest.approx([lowest, 1.0, 3e38], rel=1e-6)
    assert target_logit.tolist() == pytest.approx([lowest, 1.0, 3e38])
    assert functions[1](logits[1:2], targets[1:2], lse[1:2], torch.ones(1)).tolist() == [[0.0, 0.0, 0.0]]


@both
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_logits_that_are_not_finite_show(functions: Any, bad: float) -> None:
    for column in (0, 4098):
        logits, targets = logits_and_targets(3, 4099)
        logits[1, column] = bad
        lse, target_logit = functions[0](logits, targets)
        assert (target_logit - lse).isfinite().tolist() == [True, False, True]
        stored = functions[1](logits, targets, lse, torch.ones(3))
        assert stored.isfinite().all(dim=1).tolist() == [True, False, True]


@both
@pytest.mark.parametrize("bad", [-100, -1, 7, 8, 2**32 + 1, -(2**32) + 1])
def test_target_outside_the_vocabulary_is_nan_in_its_row_alone(functions: Any, bad: int) -> None:
    forward, backward = functions
    logits, targets = logits_and_targets(3, 7)
    grad = torch.ones(3)
    lse, target_logit = forward(logits, targets)
    kept = backward(logits.clone(), targets, lse, grad)
    targets[1] = bad
    again = forward(logits, targets)
    assert torch.equal(again[0], lse)
    assert again[1].isnan().tolist() == [False, True, False]
    stored = backward(logits, targets, lse, grad)
    assert torch.equal(stored[::2], kept[::2])
    assert stored[1].isnan().all()


@both
def test_strided_vectors(functions: Any) -> None:
    """What autograd hands on: the gradient of a sum is one number with stride 0."""
    forward, backward = functions
    logits, targets = logits_and_targets(3, 7)
    lse, _ = forward(logits, targets.repeat_interleave(2)[::2])
    expected = backward(logits.clone(), targets, lse, torch.full((3,), 2.0))
    stored = backward(logits, targets.repeat_interleave(2)[::2], lse[:, None].repeat(1, 2)[:, 0],
                      torch.tensor(2.0).expand(3))  # fmt: skip
    assert torch.equal(stored, expected)


@interpreted
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("c", "v"), SHAPES)
def test_interpreted_kernels_against_their_twins(c: int, v: int, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(c, v, dtype)
    grad = torch.randn(c, generator=torch.Generator().manual_seed(1)) * 1024
    lse, target_logit = ops._launch_logsumexp(logits, targets)
    twin = ops.logsumexp_and_target_reference(logits, targets)
    torch.testing.assert_close(lse, twin[0], rtol=2e-7, atol=1e-6)
    assert torch.equal(target_logit, twin[1])
    stored = ops._launch_grad_logits_(logits.clone(), targets, lse, grad)
    expected = ops.grad_logits_reference_(logits, targets, lse, grad)
    torch.testing.assert_close(stored, expected, rtol=1e-3 if dtype == HALF else 1e-6, atol=1e-7)


@interpreted
def test_interpreted_bf16() -> None:
    """The interpreter truncates where a GPU rounds: a whole unit in the last place, 2^-7."""
    logits, targets = logits_and_targets(3, 4099, torch.bfloat16)
    lse, _ = ops._launch_logsumexp(logits, targets)
    grad = torch.full((3,), 64.0)
    expected = exact(logits, targets, grad)
    torch.testing.assert_close(lse.double(), expected[0], rtol=2e-7, atol=1e-6)
    stored = ops._launch_grad_logits_(logits, targets, lse, grad)
    torch.testing.assert_close(stored.double(), expected[2], rtol=2**-7, atol=1e-6)


@interpreted
def test_interpreted_kernels_write_nothing_outside_their_block() -> None:
    buffer = torch.full((5, 4099), 7.0)
    targets = torch.tensor([4098, -100, 4099])
    block = buffer[1:4]
    lse, _ = ops._launch_logsumexp(block, targets)
    ops._launch_grad_logits_(block, targets, lse, torch.ones(3))
    assert (buffer[0] == 7).all() and (buffer[4] == 7).all() and (block != 7).all()


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: the kernels are run in its interpreter")
def test_kernels_in_the_interpreter(thorough: bool) -> None:
    """Without conftest.py, whose imports take as long as the tests; what calls these kernels, only with slow tests."""
    folder = Path(__file__).parent
    names = ("decoding", "dequantize_kernel", *(["fused_token_logps"] if thorough else []))
    files = [__file__, *(str(folder / f"test_{name}.py") for name in names)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", "-k", "interpreted", *files]
    paths = os.pathsep.join([str(folder), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert int(result.stdout.split(" passed")[0].split()[-1]) > (120 if thorough else 90), result.stdout[-400:]
    assert "skipped" not in result.stdout, result.stdout[-400:]
