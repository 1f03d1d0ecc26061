"""Runs that are stopped in every step they have: equal to those that are not, tensor by tensor and line by line."""

import pytest
from safetensors.numpy import load_file

from benchmarks.faulting.calls import Overflows
from benchmarks.faulting.comparison import differences, logged
from benchmarks.faulting.stage import Case
from benchmarks.faulting.trials import stopped_after
from lowlevel.checkpoints.checkpoint import checkpoints

# 18 steps in 3 epochs, the last step of an epoch with fewer rows
LONG = {1: {"rows": 11, "epochs": 3.0}, 3: {"accumulation": 3, "rows": 33, "epochs": 3.0}}


def test_another_seed_is_another_run(sft):
    """Or the comparison would compare nothing."""
    folder = sft.new()
    assert sft.run(folder, more=("--train.seed", "7")).code == 0
    different = differences(folder, sft.whole.print)
    assert any("lora_A" in name for name in different) and any("state1" in name for name in different)
    assert {"logged line 1", "state"} <= set(different)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "accumulation", "optim"),
    [
        ("sft", 3, "paged_adamw_8bit"),
        ("dpo", 1, "paged_adamw_32bit"),
        ("sft", 1, "paged_adamw_32bit"),
        ("dpo", 3, "paged_adamw_8bit"),
    ],
)
def test_stopped_in_every_step(stage, method, accumulation, optim):
    play = stage.play(Case(method, optim=optim, **LONG[accumulation]))
    assert play.whole.steps == 18
    state = load_file(checkpoints(play.whole.folder)[0] / "optimizer.safetensors")
    assert state["flat::state1"].dtype == ("uint8" if optim.endswith("8bit") else "float32")
    assert stopped_after(play, range(1, play.whole.steps)) == []


def test_stopped_in_three_of_18_steps(stage):
    """In the first one, at an epoch's end, and in the last step but one."""
    play = stage.play(Case("sft", optim="paged_adamw_8bit", **LONG[3]))
    state = load_file(checkpoints(play.whole.folder)[0] / "optimizer.safetensors")
    assert state["flat::state1"].dtype == "uint8"
    assert stopped_after(play, (1, 12, 17)) == []


def test_stopped_in_every_step_of_a_short_run(stage):
    play = stage.play(Case("dpo", evaluates=True, rows=3, epochs=3.0))
    assert play.whole.steps == 6 and any("eval_loss" in line for line in logged(play.whole.folder))
    assert stopped_after(play, range(1, play.whole.steps)) == []


OVERFLOWS = Overflows(limits=((0, 2.0**16), (1, 2.0**15), (5, 2.0**13)))


@pytest.mark.parametrize("method", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_loss_scale_that_falls_and_grows_between_stops(stage, method):
    play = stage.play(Case(method, rows=9, epochs=2.0, always=(OVERFLOWS,)))
    scales = [line["loss_scale"] for line in logged(play.whole.folder)]
    assert scales[0] == 2.0**16 and len(set(scales)) > 2, "it fell"
    assert any(later > earlier for earlier, later in zip(scales, scales[1:], strict=False)), "it grew"
    skipped = [line["skipped_steps"] for line in logged(play.whole.folder)]
    assert skipped[2] > 0 and skipped[-1] > skipped[4], "overflows early and late"
    assert stopped_after(play, range(1, play.whole.steps)) == []
