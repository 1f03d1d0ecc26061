"""Micro-batches that a thread lays out one step ahead."""

import threading
import time

import pytest

from lowlevel.batch.prefetch import Prefetched


def test_prefetched_batches_are_the_same_and_come_from_a_thread_one_step_ahead():
    made = []

    def make(step):
        made.append((step, threading.current_thread().name))
        return [step]

    batches = Prefetched(make, 4)
    assert batches(0) == [0]
    for _ in range(100):
        if len(made) == 2:
            break
        time.sleep(0.01)
    assert made[1][0] == 1 and made[1][1].startswith("batches") and made[0][1] == threading.current_thread().name
    assert [batches(step) for step in (1, 2, 3)] == [[1], [2], [3]]
    assert sorted(step for step, _ in made) == [0, 1, 2, 3]  # no step twice, and none beyond the last


def test_an_error_in_making_a_batch_comes_with_its_step():
    def make(step):
        if step == 1:
            raise ValueError("row 7 is bad")
        return [step]

    batches = Prefetched(make, 3)
    batches(0)
    with pytest.raises(ValueError, match="row 7 is bad"):
        batches(1)
