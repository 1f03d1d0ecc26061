"""The small computations: their constants worked out elsewhere, and that a broken library is found by them."""

from types import SimpleNamespace

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from lowlevel.kernels import dequantize, host_rows, vocabulary
from lowlevel.model.placement import Placement
from lowlevel.preflight import numerics

CPU = Placement(torch.device("cpu"), "fp32")
# The sixteen values of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def test_the_expected_error_of_nf4():
    """In float64, from the table of values alone: the nearest one to each weight over its block's largest."""
    weights = np.random.default_rng(0).standard_normal((20_000, 64))
    largest = np.abs(weights).max(axis=1, keepdims=True)
    nearest = NF4[np.abs((weights / largest)[..., None] - NF4).argmin(axis=-1)] * largest
    error = np.linalg.norm(nearest - weights) / np.linalg.norm(weights)
    assert abs(error - numerics.NF4_ERROR) < numerics.NF4_TOLERANCE / 2


# 4-bit weights


def broken(monkeypatch, change, *, only_ragged=False):
    """bitsandbytes whose dequantised weights are changed."""

    def dequantize_4bit(packed, state):
        twin = numerics.dequantize_reference(dequantize.Quantised.of(packed, state), state.dtype)
        return twin if only_ragged and not state.shape[1] % 64 else change(twin)

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", dequantize_4bit)


def test_four_bit_weights_as_they_should_be(monkeypatch):
    broken(monkeypatch, lambda twin: twin)
    assert numerics.four_bit().verdict == "ok"


def test_rows_that_are_no_multiple_of_the_block(monkeypatch):
    broken(monkeypatch, lambda twin: twin.roll(1), only_ragged=True)
    answer = numerics.four_bit()
    assert answer.verdict == "note" and "not a multiple of 64 are read wrongly" in answer.found
    assert "load_in_4bit = false" in answer.advice


@pytest.mark.parametrize("change", [lambda twin: 0.9 * twin, lambda twin: twin.roll(1), lambda twin: twin * np.nan])
def test_four_bit_weights_that_are_wrong(monkeypatch, change):
    broken(monkeypatch, change)
    answer = numerics.four_bit()
    assert answer.verdict == "FAIL" and "not by 9.2%" in answer.found


def test_another_error_than_nf4s_is_found(monkeypatch):
    """fp4 reads its own codes rightly and loses more."""
    quantize = bnb.functional.quantize_4bit
    monkeypatch.setattr(bnb.functional, "quantize_4bit",
                        lambda values, quant_type, **more: quantize(values, quant_type="fp4", **more))  # fmt: skip
    assert numerics.four_bit().verdict == "FAIL"


# Kernels


def launched(monkeypatch, *, softmax=lambda x: x, gradient=lambda x: x, weights=lambda x: x):
    """Have the kernels' place taken by their twins, and their results changed."""
    monkeypatch.setattr(vocabulary, "usable", lambda *_: True)
    monkeypatch.setattr(dequantize, "usable", lambda *_: True)
    monkeypatch.setattr(vocabulary, "_kernels_take", lambda logits: True)
    monkeypatch.setattr(dequantize, "_kernel_takes", lambda weight, dtype: True)
    monkeypatch.setattr(vocabulary, "_launch_logsumexp",
                        lambda *a: tuple(map(softmax, vocabulary.logsumexp_and_target_reference(*a))))  # fmt: skip
    monkeypatch.setattr(vocabulary, "_launch_grad_logits_", lambda *a: gradient(vocabulary.grad_logits_reference_(*a)))
    monkeypatch.setattr(dequantize, "_launch", lambda *a: weights(numerics.dequantize_reference(*a)))


def test_on_a_cpu_there_are_twins():
    answer = numerics.triton_kernels()
    assert answer.verdict == "ok" and answer.found.startswith("torch twins")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_kernels_that_equal_their_twins(monkeypatch, precision):
    launched(monkeypatch)
    answer = numerics.compare_kernels(Placement(torch.device("cpu"), precision))
    assert answer.verdict == "ok" and all(name in answer.found for name in numerics.KERNELS)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("part", "name", "error"), [
    ("softmax", "log-sum-exp", 1e-4), ("gradient", "softmax gradient", 2e-2), ("weights", "4-bit weights", 2**-6),
    ("softmax", "log-sum-exp", float("nan")),
])  # fmt: skip
def test_a_kernel_that_differs_is_named(monkeypatch, part, name, error, precision):
    launched(monkeypatch, **{part: lambda x: x * (1 + error)})
    answer = numerics.compare_kernels(Placement(torch.device("cpu"), precision))
    assert answer.verdict == "FAIL" and answer.found.startswith(f"{name} is off by")


def test_rows_on_the_host_that_differ(monkeypatch):
    launched(monkeypatch)
    monkeypatch.setattr(numerics, "host_rows", lambda table, index: host_rows.host_rows_reference(table, index + 0) * 2)
    assert numerics.compare_kernels(CPU).found.startswith("rows on the host is off by")


def test_kernels_that_do_not_compile_are_a_note_with_the_reason(monkeypatch):
    """As it is here: Triton has no driver for a CPU. On a GPU without Triton `host_rows` cannot run at all."""
    monkeypatch.setattr(numerics, "host_rows", None)
    vocabulary.usable.cache_clear()
    dequantize.usable.cache_clear()
    answer = numerics.compare_kernels(CPU)
    assert answer.verdict == "note" and answer.found.startswith("torch twins for log-sum-exp")
    assert "plain torch instead of Triton's kernels" in answer.found


# The optimizer


def test_one_update_of_the_optimizer():
    answer = numerics.optimizer()
    assert answer.verdict == "ok" and answer.found.startswith("paged_adamw_32bit, in main memory")


@pytest.mark.parametrize("make", [
    lambda weights, config: torch.optim.SGD([weights], lr=config.learning_rate),
    lambda weights, config: torch.optim.AdamW([weights], lr=config.learning_rate, weight_decay=0.1),
    lambda weights, config: torch.optim.SGD([weights], lr=0.0),
])  # fmt: skip
def test_an_update_that_is_wrong(monkeypatch, make):
    monkeypatch.setattr(numerics, "build_optimizer", make)
    assert numerics.optimizer().verdict == "FAIL"


def test_what_tells_paged_state():
    state = torch.zeros(3)
    assert not numerics.is_paged(state)
    state.is_paged = True  # as bitsandbytes marks it
    assert numerics.is_paged(state)
    assert not numerics.is_paged(SimpleNamespace(is_paged=False))
