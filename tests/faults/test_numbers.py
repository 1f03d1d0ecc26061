"""Losses, gradients and weights that are no numbers, and memory that runs out: nothing is updated, nothing saved."""

import pytest

from benchmarks.faulting.calls import LOADING, MICRO_BATCH, NotFinite
from benchmarks.faulting.stage import Case
from benchmarks.faulting.trials import not_finite, out_of_memory


@pytest.fixture(scope="module")
def accumulating(request, stage):
    """3 micro-batches a step, 8-bit optimizer state."""
    return stage.play(Case(request.param, accumulation=3, rows=18, optim="paged_adamw_8bit", packing=False))


LOSS, GRADIENT = NotFinite("loss", 3, micro_batch=2), NotFinite("gradient", 2, float("inf"))
FAULTS = [
    *(pytest.param("sft", fault, id=f"sft-{fault.what}") for fault in (LOSS, GRADIENT, NotFinite("weights", 3))),
    pytest.param("dpo", GRADIENT, id="dpo-gradient"),
    pytest.param("dpo", LOSS, id="dpo-loss", marks=pytest.mark.slow),
    pytest.param("dpo", NotFinite("weights", 3), id="dpo-weights", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("accumulating", "fault"), FAULTS, indirect=["accumulating"])
def test_not_a_number(accumulating, fault):
    assert not_finite(accumulating, fault) == []


@pytest.mark.parametrize(("target", "number"), [(MICRO_BATCH, 1), (MICRO_BATCH, 3), (LOADING, 1)])
def test_out_of_memory(sft, target, number):
    assert out_of_memory(sft, target, number) == []
