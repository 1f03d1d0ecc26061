"""The clock, against seconds that are made up."""

import time

import pytest
import torch

from lowlevel.timing.phases import OTHER, PhaseClock

CPU = torch.device("cpu")


class Seconds:
    """What `time.perf_counter` says; a test moves it on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds(monkeypatch):
    made = Seconds()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def test_every_second_belongs_to_one_phase(seconds):
    clock = PhaseClock(CPU)
    seconds.now += 1  # other
    with clock.during("outer"):
        seconds.now += 2
        with clock.during("inner"):
            seconds.now += 4
            with clock.during("outer"):
                seconds.now += 8
        seconds.now += 16
    seconds.now += 32  # other
    taken = clock.take()
    assert taken == {OTHER: 33.0, "outer": 26.0, "inner": 4.0}
    assert sum(taken.values()) == seconds.now - 100


def test_a_phase_that_is_switched_to_goes_on_until_the_next(seconds):
    clock = PhaseClock(CPU)
    assert clock.switch("first") == OTHER
    seconds.now += 1
    assert clock.switch("second") == "first" and clock.phase == "second"
    seconds.now += 2
    assert clock.take() == {OTHER: 0.0, "first": 1.0, "second": 2.0}


def test_what_was_taken_is_not_taken_again_and_the_phase_goes_on(seconds):
    clock = PhaseClock(CPU)
    clock.switch("a")
    seconds.now += 1
    clock.take()
    seconds.now += 2
    assert clock.take() == {"a": 2.0} and clock.phase == "a"


def test_an_error_ends_a_phase_too(seconds):
    clock = PhaseClock(CPU)
    with pytest.raises(RuntimeError), clock.during("a"):
        seconds.now += 1
        raise RuntimeError
    assert clock.phase == OTHER
    seconds.now += 2
    assert clock.take() == {OTHER: 2.0, "a": 1.0}


def test_on_a_gpu_its_work_counts_where_it_was_launched(seconds, monkeypatch):
    queue = []

    def wait():
        seconds.now += sum(queue)
        queue.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    clock = PhaseClock(torch.device("cuda"))
    with clock.during("launching"):
        queue.append(5)  # and the host goes on at once
    assert clock.take() == {OTHER: 0.0, "launching": 5.0}
    queue.append(3)
    assert PhaseClock(CPU).take() == {OTHER: 0.0} and queue  # a CPU waits for nothing
