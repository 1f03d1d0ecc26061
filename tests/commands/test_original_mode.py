"""DPO with adapter_mode "original": the run trains on a merged base of its own, which is checked when it goes on."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from plain_models import held_out_logps, peft_merge, plain_base
from safetensors.torch import load_file
from workspace import HELD_OUT, alter_adapter, metrics

from lowlevel.model.base import base_sha256
from lowlevel.running.training import RunObserver


@pytest.fixture(scope="module")
def original_mode(runs, cli, tmp_path_factory) -> dict:
    """adapter_mode "original": stopped at step 2, resumed, after that compared; the SFT run is a copy."""
    folder = tmp_path_factory.mktemp("original")
    runs.space.copy("sft", folder)
    model = {"adapter": str(folder / "sft"), "adapter_mode": "original"}
    data = {"eval_source": "holdout", "eval_limit": HELD_OUT}
    config = runs.space.write(
        "dpo", "dpo", folder=folder, model=model, data=data, train={"logging_steps": 1, "max_steps": 4}
    )
    progress = RunObserver.progress

    def stop(self, state, result):
        progress(self, state, result)
        if state.step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunObserver, "progress", stop)
        stopped = cli("dpo", config)
    assert stopped.code == 143, stopped.err
    return {
        "folder": folder / "dpo",
        "sft": folder / "sft",
        "config": config,
        "resumed": cli("dpo", config, "--resume"),
    }


def test_original_mode_trains_on_the_merged_base(runs, original_mode, tokenizer):
    assert original_mode["resumed"].code == 0, original_mode["resumed"].err
    assert "resumed from step-00000002" in original_mode["resumed"].out
    folder = original_mode["folder"]
    expected = peft_merge(runs.space.base, runs.sft / "adapter")
    for name, tensor in load_file(folder / "base" / "model.safetensors").items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-10.9, atol=2**-24)
    records = metrics(folder)
    first = records[0]
    assert (first["step"], first["eval_loss"]) == (0, pytest.approx(math.log(2), abs=1e-7))
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    reference = held_out_logps(plain_base(folder / "base"), tokenizer)
    for name in ("chosen", "rejected"):
        assert first[f"eval_logps/ref_{name}"] == pytest.approx(float(reference[name].mean()), rel=1e-5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["reference"] == "base"
    assert manifest["base"]["sha256"] == base_sha256(plain_base(folder / "base"))
    assert not (folder / "parent").exists()


def test_original_mode_refuses_another_adapter(original_mode, cli, tmp_path):
    copy = Path(shutil.copytree(original_mode["sft"], tmp_path / "sft"))
    alter_adapter(copy / "adapter")
    before = (original_mode["folder"] / "metrics.jsonl").read_bytes()
    said = cli("dpo", original_mode["config"], "--resume", "--model.adapter", copy)
    assert said.code == 2, said.out
    assert (original_mode["folder"] / "metrics.jsonl").read_bytes() == before


def test_original_mode_does_not_take_over_a_base_of_another_adapter(original_mode, cli, tmp_path):
    """What a run leaves that was killed before its first step: a merged base, and no run."""
    left = Path(shutil.copytree(original_mode["folder"] / "base", tmp_path / "run" / "base"))
    adapter = Path(shutil.copytree(original_mode["sft"], tmp_path / "sft"))
    alter_adapter(adapter / "adapter")
    command = ("dpo", original_mode["config"], "--train.output_dir", left.parent, "--train.max_steps", 1)
    said = cli(*command, "--model.adapter", adapter)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "is not the base with" in said.err
    assert cli(*command).code == 0


def test_original_mode_can_be_compared_and_used(original_mode, cli):
    folder = original_mode["folder"]
    said = cli("compare", folder, "--prompts", 1, "--max-new-tokens", 4)
    assert said.code == 0, said.err
    scores = json.loads((folder / "compare.json").read_text())["scores"]
    last = metrics(folder)[-1]
    assert list(scores) == ["base", "dpo"]
    assert scores["dpo"]["reward_accuracy"] == last["eval_rewards/accuracies"]
    assert cli("generate", folder, "--prompt", "a", "--max-new-tokens", 4).code == 0
