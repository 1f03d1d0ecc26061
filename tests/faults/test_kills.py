"""SIGKILL at any instant: the run goes on from its newest checkpoint and ends as if nothing had been."""

import random
import shutil

import pytest

from benchmarks.faulting.actions import Hang, Kill
from benchmarks.faulting.calls import MICRO_BATCH, AtCall
from benchmarks.faulting.comparison import differences, litter, newest_good
from benchmarks.faulting.damage import flip
from benchmarks.faulting.operations import AtOperation, Record
from benchmarks.faulting.processes import lowlevel
from benchmarks.faulting.trials import expect, killed_at, killed_at_random


def test_at_random_instants(play, thorough):
    rng, hits, wanted = random.Random(play.case.method), 0, 5 if thorough else 2  # the benchmark takes hundreds
    for _ in range(8):
        hit, problems = killed_at_random(play, rng, 3)
        assert problems == []
        hits += hit
        if hits >= wanted:
            return
    pytest.fail(f"only {hits} of 24 kills came before the end")


def last_save(play) -> range:
    """Changes of the save that also deletes an older checkpoint, and one before and after it."""
    first, last = play.whole.saves()[-1]
    changes = play.whole.operations[first - 1 : last]
    assert any(change.startswith("rename .tmp-step") for change in changes)
    assert any(change.startswith("unlink .del-step") for change in changes)
    return range(first - 1, last + 2)


def test_between_any_two_file_operations_of_a_save(sft, thorough):
    for change in last_save(sft)[:: 3 if thorough else 6]:  # others in the slow test below, all in the benchmark
        assert killed_at(sft, change) == [], sft.whole.operations[change - 1]


@pytest.mark.slow
def test_between_file_operations_of_a_whole_run(play):
    changes = {*range(1, len(play.whole.operations) + 1, 32), *last_save(play)[1::4]}  # the benchmark takes all
    for change in sorted(changes):
        assert killed_at(play, change) == [], play.whole.operations[change - 1]


def replaced(play):
    """A folder whose newest checkpoint is damaged, so that its step is saved anew, and the changes of going on."""
    folder = play.stopped_at(3)
    flip(folder / "step-00000003" / "optimizer.safetensors", random.Random(0))
    trial = play.copy(folder)
    record = Record(trial.parent / "operations")
    assert play.run(trial, record).code == 0
    assert differences(trial, play.whole.print) == []
    changes = record.read()
    start = changes.index("rename step-00000003 .old-step-00000003")
    end = max(n for n, change in enumerate(changes) if change.startswith("unlink .old-step-00000003/"))
    return folder, range(start, end + 4), changes


def test_while_a_damaged_checkpoint_is_replaced(sft, thorough):
    folder, numbers, changes = replaced(sft)
    for change in numbers[:: 2 if thorough else 4]:
        assert killed_at(sft, change, of=folder, damage=True) == [], changes[change - 1]


def test_a_killed_save_over_a_good_checkpoint_leaves_a_good_one(sft, tmp_path):
    """Where nothing was wrong with the old one, killing its replacement must not cost it, at any point."""
    from benchmarks.faulting.saving import save_again

    made = save_again(tmp_path / "count", None)
    assert made.code == 0 and len(made.changes) > 15
    for change in range(1, len(made.changes) + 1):
        folder = tmp_path / str(change)
        assert save_again(folder, AtOperation(change, Kill())).code == -9
        assert save_again(folder, None, restore=True).code == 0
        assert newest_good(folder) == 1 and litter(folder) == [], made.changes[change - 1]


def test_a_half_deleted_checkpoint_is_never_chosen(sft):
    """The newest is half deleted by hand: the one before it is used, and the half one is replaced."""
    folder = sft.stopped_at(3)
    (folder / "step-00000003" / "adapter_config.json").unlink()
    shutil.copytree(folder / "step-00000003", folder / ".del-step-00000001")
    ended = sft.run(folder)
    assert "resumed from step-00000002" in ended.out
    assert expect(ended, 0) + sft.resumed(folder) == []


def test_a_second_process_is_refused_until_the_first_is_dead(sft):
    folder = sft.new()
    mark = folder.parent / "hangs"
    first = sft.start(folder, AtCall(MICRO_BATCH, (3,), Hang(mark)))
    try:
        first.wait_for(mark)
        second = lowlevel(sft.arguments(folder, "--resume"), folder.parent / "second")
        assert second.code == 2 and f"in use by pid {first.pid}" in second.err
    finally:
        first.kill()  # it hangs, and would hold pytest at its end
    assert first.wait().code == -9
    assert sft.lost(folder) + sft.resumed(folder) == []
