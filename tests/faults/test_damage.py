"""Damage to checkpoints: noticed, said, and gone round; where nothing good is left, the run ends and says why."""

import random

import pytest

from benchmarks.faulting.calls import Unreadable
from benchmarks.faulting.damage import DAMAGES, FILES
from benchmarks.faulting.stage import Case
from benchmarks.faulting.trials import all_damaged, expect, hurt


@pytest.fixture(scope="module")
def stopped(stage):
    """By method: a run with three checkpoints, stopped at the third step of four."""
    plays = {method: stage.play(Case(method, train=(("save_total_limit", 3),))) for method in ("sft", "dpo")}
    return {method: (play, play.stopped_at(3)) for method, play in plays.items()}


# The benchmark has all kinds of damage to all files for both.
@pytest.mark.parametrize(("method", "number"), [*(("sft", n) for n in range(len(DAMAGES))), ("dpo", 0)])
def test_each_kind_of_damage(stopped, method, number):
    file = (number + 2) % len(FILES)  # a flipped bit in the optimizer's state, and so on
    what, problems = hurt(*stopped[method], number + len(DAMAGES) * file, random.Random(number))
    assert problems == []
    assert DAMAGES[number].__name__ in what


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_more_damage(stopped, method):
    for number in range(0, len(DAMAGES) * len(FILES), 5):
        what, problems = hurt(*stopped[method], number, random.Random(number))
        assert problems == [], what


@pytest.mark.parametrize(("method", "number"), [*(("sft", n) for n in range(len(FILES))), ("dpo", 0)])
def test_no_good_one_left(stopped, method, number):
    assert all_damaged(*stopped[method], number, random.Random(number)) == []


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_bad_sector(stopped, method):
    """A file that is there and cannot be read is damage too."""
    play, before = stopped[method]
    folder = play.copy(before)
    ended = play.run(folder, Unreadable("step-00000003/optimizer.safetensors"))
    assert expect(ended, 0) == []
    assert "skipped a damaged checkpoint" in ended.out and "resumed from step-00000002" in ended.out
