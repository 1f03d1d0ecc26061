"""SIGTERM and SIGINT wherever they may come: saved at a step's end, or nothing to save; a second one ends at once."""

import signal

import pytest

from benchmarks.faulting.actions import Signal
from benchmarks.faulting.calls import EVALUATION, LOADING, MICRO_BATCH, PREPARATION, AtCall
from benchmarks.faulting.comparison import newest_good
from benchmarks.faulting.operations import AtFile, AtOperation
from benchmarks.faulting.stage import Case
from benchmarks.faulting.trials import expect, signalled

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.fixture(scope="module", params=["sft", "dpo"])
def evaluating(request, stage):
    """3 micro-batches a step, 3 steps, an evaluation before, after step 2 and at the end."""
    return stage.play(Case(request.param, accumulation=3, rows=16, evaluates=True, packing=False))


def test_at_each_micro_batch(evaluating, thorough):
    """The first and the last one of a step among them."""
    assert evaluating.whole.steps == 3
    for number in (1, 2, 3, 4, 5, 6, 7) if thorough and evaluating.case.method == "sft" else (1, 6):
        kind = INT if number % 2 else TERM
        assert signalled(evaluating, AtCall(MICRO_BATCH, (number,), Signal(kind)), kind) == [], number


def test_the_step_that_was_begun_is_saved(sft):
    folder = sft.new()
    ended = sft.run(folder, AtCall(MICRO_BATCH, (3,), Signal(TERM)), more=())
    assert expect(ended, 143) == [] and newest_good(folder) == 3


@pytest.mark.slow  # tests/training/test_endings.py has these places within one process
@pytest.mark.parametrize("number", [TERM, INT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("target", [PREPARATION, LOADING])
def test_before_the_first_step(sft, target, number):
    assert signalled(sft, AtCall(target, (1,), Signal(number)), number) == []


def test_in_an_evaluation(evaluating, thorough):
    for which in (1, 2, 3) if thorough else (2,):
        assert signalled(evaluating, AtCall(EVALUATION, (which,), Signal(TERM)), TERM) == [], which


def test_in_a_save(sft, thorough):
    places = (r"rename \.tmp-step-00000002 .*", r"tensors write .*/optimizer\.safetensors", r"unlink \.del-step-.*")
    for place in places if thorough else places[:1]:
        assert signalled(sft, AtFile(place, Signal(TERM)), TERM) == [], place


def test_twice_in_training(evaluating):
    fault = AtCall(MICRO_BATCH, (2, 3), Signal(TERM))
    assert signalled(evaluating, fault, TERM, twice=True) == []


def test_twice_in_a_save(sft, thorough):
    """The second one ends the process in the middle of the save, of which nothing is to be seen."""
    for offset in (2, 8, 14) if thorough else (8,):
        first = sft.whole.saves()[1][0] + offset
        assert signalled(sft, AtOperation(first, Signal(INT), first + 1), INT, twice=True) == [], offset
