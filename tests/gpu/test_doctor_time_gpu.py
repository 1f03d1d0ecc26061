"""`doctor` and `time` on a GPU, where there are kernels to compare, graphs to capture and a device to wait for."""

import json

import pytest
import tomli_w
import torch
from workspace import run

from lowlevel.preflight import device, numerics
from lowlevel.timing import phases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_doctor_finds_nothing_that_would_fail(tmp_path):
    said = run("doctor", "--out", tmp_path, "--json", tmp_path / "doctor.json")
    assert (said.code, said.err) == (0, ""), said.out
    found = {one["what"]: one for one in json.loads((tmp_path / "doctor.json").read_text())["findings"]}
    assert torch.cuda.get_device_name() in found["device"]["found"]
    assert found["execution"]["found"].startswith("graphed")
    for step in ("sft step", "dpo step"):
        assert "fp16; eager: loss" in found[step]["found"] and "; graphed: loss" in found[step]["found"]
    assert "all 8 margins are 0" in found["dpo step"]["found"]


def test_the_parts_that_a_cpu_only_stands_in_for():
    for check in (device.device, device.compiler, numerics.four_bit, numerics.triton_kernels, numerics.optimizer):
        assert check().verdict != "FAIL", check()
    assert all(name in numerics.triton_kernels().found for name in numerics.KERNELS)
    assert "paged memory" in numerics.optimizer().found


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_graphed_steps_and_their_phases(tmp_path, method):
    tables = {
        "method": method,
        "data": {"limit": 200, "max_length": 128},
        "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "adamw"},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tables))
    said = run("time", tmp_path / "run.toml", "--steps", 24, "--json", tmp_path / "time.json")
    assert (said.code, said.err) == (0, ""), said.out
    timed = json.loads((tmp_path / "time.json").read_text())
    assert (timed["mode"], timed["divided_mode"]) == ("graphed", "compiled")
    counted = [step["ms"] for step in timed["steps"]["whole"] if not (step["set_up"] or step["repeated"])]
    captured = [step["ms"] for step in timed["steps"]["whole"] if step["set_up"]]
    assert len(counted) == timed["whole"]["counted"] and len(captured) == timed["whole"]["set_up"]["count"]
    assert not captured or min(captured) > timed["whole"]["median_ms"]
    assert timed["whole"]["median_ms"] < sum(timed["phases"].values())  # a graph launches its kernels at once
    assert timed["phases"][phases.BACKWARD] > timed["phases"][phases.LAYOUT]
    assert (phases.REFERENCE in timed["phases"]) == (method == "dpo")
    assert timed["memory"]["peak_allocated_gib"] > 0
