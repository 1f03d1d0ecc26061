"""Damage to checkpoints: noticed, said, and gone round; where nothing good is left, the run ends and says why."""

import random

import pytest

from benchmarks.faulting.calls import Unreadable
from benchmarks.faulting.damage import DAMAGES, FILES
from benchmarks.faulting.stage import Case
from benchmarks.faulting.trials import all_damaged, expect, hurt


@pytest.fixture(scope="module", params=["sft", "dpo"])
def three(request, stage):
    """A run with three checkpoints, stopped at the third step of four."""
    play = stage.play(Case(request.param, train=(("save_total_limit", 3),)))
    return play, play.stopped_at(3)


@pytest.mark.parametrize("number", range(len(DAMAGES)), ids=lambda number: DAMAGES[number].__name__)
def test_each_kind_of_damage(stage, three, number):
    play, stopped = three
    rng = random.Random(number)
    file = (number + 2) % len(FILES)  # a flipped bit in the optimizer's state, and so on
    if play.case.method == "dpo" and number % 4:
        pytest.skip("the benchmark has all kinds for both")
    what, problems = hurt(play, stopped, number + len(DAMAGES) * file, rng)
    assert problems == []
    assert DAMAGES[number].__name__ in what


@pytest.mark.slow
def test_more_damage(three):
    play, stopped = three
    for number in range(0, len(DAMAGES) * len(FILES), 5):
        what, problems = hurt(play, stopped, number, random.Random(number))
        assert problems == [], what


@pytest.mark.parametrize("number", range(len(FILES)), ids=FILES)
def test_no_good_one_left(three, number):
    play, stopped = three
    if play.case.method == "dpo" and number:
        pytest.skip("sft has each file")
    assert all_damaged(play, stopped, number, random.Random(number)) == []


def test_a_bad_sector(three):
    """A file that is there and cannot be read is damage too."""
    play, stopped = three
    folder = play.copy(stopped)
    ended = play.run(folder, Unreadable("step-00000003/optimizer.safetensors"))
    assert expect(ended, 0) == []
    assert "skipped a damaged checkpoint" in ended.out and "resumed from step-00000002" in ended.out
