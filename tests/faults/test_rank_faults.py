"""Two ranks, one of which is stopped, killed, hangs or fails: both end, one of them says why, and the run goes on."""

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest

from benchmarks.faulting.actions import Hang, Kill, OutOfMemory, Signal
from benchmarks.faulting.calls import LOADING, MICRO_BATCH, STEP, AtCall, NotFinite
from benchmarks.faulting.comparison import differences, fingerprint, litter, logged, newest_good
from benchmarks.faulting.processes import ENVIRONMENT
from lowlevel.errors import CONTINUE


def made(stage, method):
    """A case, its run of two ranks, and what that amounts to."""
    from benchmarks.faulting.ranks import Together
    from benchmarks.faulting.stage import Case

    play = stage.play(Case(method, accumulation=3, rows=22, packing=False, evaluates=method == "dpo"))
    folder = play.new()
    ended = Together(play, folder).wait()
    assert [one.code for one in ended] == [0, 0], ended
    return play, folder, fingerprint(folder)


@pytest.fixture(scope="module")
def whole(stage):
    return made(stage, "sft")


def run(play, folder, faults=None):
    """Start or resume with two ranks; exit codes, and what was said as an error."""
    from benchmarks.faulting.ranks import Together

    ended = Together(play, folder, faults).wait()
    lines = [line for one in ended for line in one.err.splitlines() if "error:" in line or "stopped" in line]
    assert not any("Traceback" in one.said for one in ended)
    return [one.code for one in ended], lines


def status(folder):
    return json.loads((folder / "run-status.json").read_text())


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_run_is_that_of_one_rank(stage, whole, method):
    play, folder, found = whole if method == "sft" else made(stage, method)
    assert found["state"]["step"] == 4
    assert len(logged(folder)) == len(logged(play.whole.folder)) >= 4
    for two, one in zip(logged(folder), logged(play.whole.folder), strict=True):
        assert two == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in one.items()}
    assert json.loads((folder / "environment.json").read_text())["ranks"] == 2


def test_trace_and_reference_cache_hold_all_micro_batches(stage, tmp_path):
    """The first rank writes the trace of all; each rank adds its micro-batches to the cache."""
    from benchmarks.faulting.ranks import Together
    from benchmarks.faulting.stage import Case

    play = stage.play(Case("dpo", accumulation=3, rows=12, packing=False))
    cache = ("--dpo.reference_cache", str(tmp_path / "cache"))
    more, folders = ("--trace.every", "1", *cache), [play.new(), play.new()]
    assert [one.code for one in Together(play, folders[1], more=more).wait()] == [0, 0]
    alone = play.run(folders[0], more=more)
    assert alone.code == 0 and "6 micro-batches found, 0 computed" in alone.out
    one, two = (pd.read_parquet(folder / "trace").sort_values(["step", "row"]) for folder in folders)
    pd.testing.assert_frame_equal(two, one, rtol=1e-5, atol=1e-5)


FAULTS = {  # by rank: the fault, the exit codes, and words of the one message
    "killed": (1, AtCall(STEP, (3,), Kill()), [1, -9], "rank 1 was killed at step 3"),
    "first killed": (0, AtCall(STEP, (3,), Kill()), [-9, 1], "rank 0 was killed at step 3"),
    "stopped": (1, AtCall(STEP, (2,), Signal(signal.SIGTERM)), [143, 143], "stopped at step 2 of 4 and saved"),
    "out of memory": (1, AtCall(MICRO_BATCH, (4,), OutOfMemory()), [6, 6], "rank 1 failed at step 3: out of memory"),
    "NaN": (1, NotFinite("loss", 3), [5, 5], "step 3: loss is nan on rank 1"),
}
MORE = {
    "failed to load": (1, AtCall(LOADING, (1,), OutOfMemory()), [6, 6], "rank 1 failed before the first step: out of"),
    "first failed": (0, AtCall(MICRO_BATCH, (4,), OutOfMemory()), [6, 6], "error: out of memory"),
    "other weights": (1, NotFinite("weights", 3, 0.5), [1, 1], "step 3: the weights of rank 1 differ"),
}


@pytest.mark.parametrize("fault", [*FAULTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_one_message_and_the_same_run_afterwards(whole, fault, thorough):
    play, _, found = whole
    rank, what, codes, words = (FAULTS | MORE)[fault]
    folder = play.new()
    ended, said = run(play, folder, {rank: what})
    assert (ended, len(said)) == (codes, 1) and words in said[0], (ended, said)
    if fault != "failed to load":
        assert litter(folder) == [] and newest_good(folder) == 2
        now = status(folder)
        assert now["state"] == ("stopped" if fault == "stopped" else "failed")
        assert words.removeprefix("error: ") in now["error"] and now["exit"] == max(codes)
    if thorough or "killed" in fault or fault == "stopped":
        assert run(play, folder) == ([0, 0], [])
        assert differences(folder, found) == [] and litter(folder) == []


def test_a_hang_ends_after_the_timeout(whole, tmp_path):
    play, _, found = whole
    folder = play.new()
    ended, said = run(play, folder, {1: AtCall(STEP, (3,), Hang(tmp_path / "sign"))})
    assert ended == [1, -9] and len(said) == 1
    assert f"rank 1 hangs at step 3: no answer for 4 s (train.ddp_timeout); {CONTINUE}" in said[0]
    assert status(folder)["state"] == "failed"


@pytest.mark.slow
def test_sigterm_to_torchrun(whole):
    """Through the real launcher, which starts Python twice."""
    play, folder = whole[0], whole[0].new()
    environment = {**os.environ, **ENVIRONMENT}
    command = [sys.executable, "-m", "lowlevel", *play.arguments(folder, "--gpus", "2")]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    with subprocess.Popen([*command, "--train.num_train_epochs", "400"], **told) as process:
        next(line for line in process.stdout if line.startswith("step 2/"))
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[0]
    assert process.returncode == 143 and said.count("and saved; continue with: lowlevel sft") == 1, said
    assert "--gpus 2" in said and status(folder)["state"] == "stopped" and litter(folder) == []


@pytest.mark.parametrize("first", [1, 2])
def test_another_number_of_ranks_goes_on_with_the_run(whole, first):
    play, folder_of_two, _ = whole
    stop = AtCall(STEP, (2,), Signal(signal.SIGTERM))
    folder = play.new()
    if first == 2:
        assert run(play, folder, {1: stop})[0] == [143, 143]
        assert play.run(folder).code == 0
    else:
        assert play.run(folder, stop, more=()).code == 143
        assert run(play, folder) == ([0, 0], [])
    for now, then in zip(logged(folder), logged(folder_of_two), strict=True):
        assert now == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in then.items()}
