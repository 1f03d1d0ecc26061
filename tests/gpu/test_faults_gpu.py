"""Whole runs on a GPU in deterministic mode: twice the same, stopped and resumed, overflowing, out of memory."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from workspace import make_workspace, metrics, run, stop_at

import lowlevel.optim.loss_scale
import lowlevel.running.job
from benchmarks.faulting.comparison import differences, fingerprint, logged
from lowlevel.checkpoints.checkpoint import checkpoints, newest_verified
from lowlevel.determinism import ENVIRONMENT, FIXED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
STEPS = 6
TRAIN = {"deterministic": True, "save_steps": 1, "save_total_limit": 9, "logging_steps": 1, "max_steps": STEPS}
os.environ.setdefault(ENVIRONMENT, FIXED[0])  # cuBLAS reads it once, and other tests come first


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("gpu faults"))


@pytest.fixture(autouse=True)
def alone():
    """Nothing compiled and no memory kept by an earlier run: what a new process finds."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def write(space, name, method, **train):
    dpo = {"dpo": {"disable_dropout": False}} if method == "dpo" else {}
    return space.write(name, method, train={**TRAIN, **train}, **dpo)


def play(space, name, method, *more, folder=None, **train):
    """A run in this process; its folder and what it said."""
    said = run(method, write(space, name, method, **train), *more)
    return space.folder / name, said


@pytest.fixture(scope="module", params=["sft", "dpo"])
def whole(request, space):
    """An uninterrupted run: method, folder, fingerprint."""
    torch._dynamo.reset()
    folder, said = play(space, f"whole-{request.param}", request.param)
    assert said.code == 0, said.err
    assert "failed" not in said.out, "it ran graphed"
    return request.param, folder, fingerprint(folder)


def in_a_new_process(step: int, *arguments: object) -> subprocess.CompletedProcess:
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(step), *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != ENVIRONMENT}
    return subprocess.run(
        command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240, check=False
    )


def test_the_same_run_in_another_process(space, whole):
    """T1."""
    method, _, expected = whole
    ended = in_a_new_process(0, method, write(space, f"again-{method}", method))
    assert ended.returncode == 0, ended.stderr
    assert differences(space.folder / f"again-{method}", expected) == []


def test_another_seed_is_another_run(space, whole):
    """Or the comparison would compare nothing."""
    method, _, expected = whole
    folder, _ = play(space, f"seed-{method}", method, seed=7)
    assert any("lora_A" in name for name in differences(folder, expected))


@pytest.mark.parametrize("step", range(1, STEPS))
def test_stopped_and_resumed(space, whole, step, monkeypatch):
    """T2: in every step."""
    method, _, expected = whole
    name = f"stopped-{method}-{step}"
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        folder, said = play(space, name, method)
    assert said.code == 143 and f"stopped at step {step}" in said.err
    torch._dynamo.reset()
    _, said = play(space, name, method, "--resume")
    assert said.code == 0 and f"resumed from step-{step:08d}" in said.out, said.err
    assert differences(folder, expected) == []


def test_stopped_and_resumed_in_new_processes_with_paged_state(space, whole):
    """T2 and T20: the state is paged again, and the peak is what it was."""
    method, folder, expected = whole
    name = f"processes-{method}"
    file = write(space, name, method)
    assert in_a_new_process(3, method, file).returncode == 143
    resumed = in_a_new_process(0, method, file, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert differences(space.folder / name, expected) == []
    ended = in_a_new_process(0, method, write(space, f"peak-{method}", method))
    assert ended.returncode == 0
    uninterrupted = metrics(space.folder / f"peak-{method}")[-1]["peak_allocated_gib"]
    assert metrics(space.folder / name)[-1]["peak_allocated_gib"] == pytest.approx(uninterrupted, rel=0.01)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_resumed_runs_state_is_paged(space, optim, monkeypatch):
    """T20, with an adapter large enough to be paged (bitsandbytes pages from 100,000 elements)."""
    name, settings = f"paged-{optim}", {"optim": optim}
    sections = {"lora": {"r": 64}, "train": {**TRAIN, **settings}}
    file, seen = space.write(name, "sft", **sections), []
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run("sft", file).code == 143
    build = lowlevel.running.job.build_optimizer
    monkeypatch.setattr(lowlevel.running.job, "build_optimizer", lambda *a: seen.append(build(*a)) or seen[-1])
    assert run("sft", file, "--resume").code == 0
    ((state,),) = (optimizer.state.values() for optimizer in seen)
    assert state["state1"].numel() >= 100_000
    assert state["state1"].is_paged and state["state2"].is_paged and state["step"] == STEPS


@pytest.mark.parametrize("step", [1, 4])
def test_overflows_before_and_after_the_resume(space, step, monkeypatch):
    """T10: real ones: the scale starts far too high, and grows again soon."""
    monkeypatch.setattr(lowlevel.optim.loss_scale, "GROWTH_INTERVAL", 1)
    monkeypatch.setattr(lowlevel.optim.loss_scale.LossScale.__init__, "__defaults__", (2.0**36, True, 0, 0, 0))
    monkeypatch.setattr(lowlevel.optim.loss_scale, "MAX_SKIPS_IN_A_ROW", 30)
    expected, said = play(space, f"overflows-{step}", "sft")
    assert said.code == 0, said.err
    skipped = [line["skipped_steps"] for line in logged(expected)]
    assert skipped[0] > 3 and skipped[-1] > skipped[0], f"overflows early and late: {skipped}"
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        folder, said = play(space, f"overflows-stopped-{step}", "sft")
        assert said.code == 143
    _, said = play(space, f"overflows-stopped-{step}", "sft", "--resume")
    assert said.code == 0 and differences(folder, fingerprint(expected)) == []


def test_resumed_under_a_memory_budget(space, monkeypatch):
    expected, said = play(space, "budget", "dpo", memory_budget="4GiB")
    assert said.code == 0, said.err
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        folder, said = play(space, "budget-stopped", "dpo", memory_budget="4GiB")
        assert said.code == 143
    _, said = play(space, "budget-stopped", "dpo", "--resume", memory_budget="4GiB")
    assert said.code == 0, said.err
    assert differences(folder, fingerprint(expected)) == []


def test_out_of_memory_names_the_setting_and_leaves_the_checkpoint_good(space, whole, monkeypatch):
    """T19: a real one, in the dry run of the largest batch."""
    method, _, expected = whole
    name = f"oom-{method}"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        folder, said = play(space, name, method)
        assert said.code == 143
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    total = torch.cuda.get_device_properties(0).total_memory
    in_use = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((in_use + 4 * 2**20) / total)
    try:
        _, said = play(space, name, method, "--resume")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said.code == 6, said.err
    assert "out of memory at" in said.err and "per_device_train_batch_size" in said.err
    found = newest_verified(folder, pytest.fail)
    assert found and found[1]["step"] == 3 and len(checkpoints(folder)) == 3
    torch._dynamo.reset()
    _, said = play(space, name, method, "--resume")
    assert said.code == 0, said.err
    assert differences(folder, expected) == []
