"""Losses, gradients and weights that are no numbers, and memory that runs out: nothing is updated, nothing saved."""

import pytest

from benchmarks.faulting.calls import LOADING, MICRO_BATCH, NotFinite
from benchmarks.faulting.stage import Case
from benchmarks.faulting.trials import not_finite, out_of_memory


@pytest.fixture(scope="module")
def accumulating(request, stage):
    """3 micro-batches a step, 8-bit optimizer state."""
    return stage.play(Case(request.param, accumulation=3, rows=18, optim="paged_adamw_8bit", packing=False))


FAULTS = NotFinite("loss", 3, micro_batch=2), NotFinite("gradient", 2, float("inf")), NotFinite("weights", 3)
QUICK = ("sft-loss", "sft-weights")


@pytest.mark.parametrize(
    ("accumulating", "fault"),
    [
        pytest.param(method, fault, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for method in ("sft", "dpo")
        for fault in FAULTS
        for name in [f"{method}-{fault.what}"]
    ],
    indirect=["accumulating"],
)
def test_not_a_number(accumulating, fault):
    assert not_finite(accumulating, fault) == []


@pytest.mark.parametrize(("target", "number"), [(MICRO_BATCH, 1), (MICRO_BATCH, 3), (LOADING, 1)])
def test_out_of_memory(sft, target, number):
    assert out_of_memory(sft, target, number) == []
