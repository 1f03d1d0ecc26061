"""What a run leaves in its folder and says while it trains."""

import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from plain_models import plain_base
from safetensors.torch import load_file
from workspace import HELD_OUT, metrics

from lowlevel.config.file import load_config
from lowlevel.model.base import base_sha256
from lowlevel.running.plots import plot_loss

BASE_KEYS = ["step", "loss", "grad_norm", "learning_rate", "loss_scale", "skipped_steps", "epoch", "num_tokens",
             "supervised_tokens", "tokens_per_second", "padding_share", "peak_allocated_gib",
             "peak_reserved_gib"]  # fmt: skip
DPO_KEYS = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")] + [
    f"logps/{name}" for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")
]
RESULT_FILES = {
    *("adapter_config.json", "adapter_model.safetensors", "README.md", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}
RUN_FILES = {"config.toml", "environment.json", "data_report.json", "manifest.json", "metrics.jsonl", "run-status.json",
             "run.lock", "summary.json", "loss.png", "data_rows.safetensors", "adapter",
             "step-00000003", "step-00000006"}  # fmt: skip


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_run_folder(runs, method, drawn, tmp_path):
    folder: Path = getattr(runs, method)
    parent = {"parent", "stacked"} if method == "dpo" else set()
    written = {"compare.json", "verify.json"}  # by commands of other tests on the same run
    assert {path.name for path in folder.iterdir()} - written == RUN_FILES | parent
    for name in {"adapter", "stacked"} & {path.name for path in folder.iterdir()}:
        assert {path.name for path in (folder / name).iterdir()} == RESULT_FILES
    assert load_config(folder / "config.toml") == load_config(folder.with_suffix(".toml"))
    status = json.loads((folder / "run-status.json").read_text())
    assert status == {"state": "finished", "step": 6, "checkpoint": "step-00000006", "exit": 0, "error": None}
    summary = json.loads((folder / "summary.json").read_text())
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch"} <= set(
        summary
    )
    assert summary["train_samples_per_second"] == pytest.approx(summary["train_steps_per_second"] * 22 / 6)  # 5 x 4 + 2
    assert summary["epoch"] == pytest.approx(6 / 5)  # 18 rows: 5 steps an epoch
    assert f"finished: 6 steps in {summary['train_runtime']:.1f} s, mean loss {summary['train_loss']:.4f}, " in (
        runs.said[method].out
    )
    plot_loss(metrics(folder), tmp_path / "loss.png", title="with the curves of a run")
    png = (tmp_path / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (600 * {"sft": 1, "dpo": 4}[method], 432)  # panels
    environment = json.loads((folder / "environment.json").read_text())
    assert {"python", "torch", "transformers", "peft", "bitsandbytes", "device", "precision"} <= set(environment)
    assert (environment["torch"].split("+")[0], environment["device"]) == (torch.__version__.split("+")[0], "cpu")
    report = json.loads((folder / "data_report.json").read_text())
    assert (report["train"]["rows_kept"], report["evaluation"]["rows_kept"]) == (18, HELD_OUT)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_manifest(runs, method):
    folder: Path = getattr(runs, method)
    manifest = json.loads((folder / "manifest.json").read_text())
    base = {"name": "tiny", "revision": None, "dtype": "float32", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True}  # fmt: skip
    assert {key: manifest["base"][key] for key in base} == base
    assert manifest["base"]["sha256"] == base_sha256(plain_base(runs.space.base))
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert manifest["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert manifest["reference"] == {"sft": None, "dpo": "base + parent adapter"}[method]
    if method == "dpo":
        names = ("parent/adapter_model.safetensors", "../sft/adapter/adapter_model.safetensors")
        first, second = ((folder / name).read_bytes() for name in names)
        assert first == second
        assert len(manifest["parent_adapter"]) == 64


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_metrics(runs, method):
    folder: Path = getattr(runs, method)
    names = ["loss"] + DPO_KEYS * (method == "dpo")
    logged = [record for record in metrics(folder) if "loss" in record]
    evaluated = [record for record in metrics(folder) if "eval_loss" in record]
    assert [record["step"] for record in logged] == [2, 4, 6]
    assert [record["step"] for record in evaluated] == [0, 3, 6]
    for record in logged:
        assert set(record) == set(BASE_KEYS) | set(names)
        assert all(math.isfinite(value) for value in record.values())
    for record in evaluated:
        held_out = [*names, *["perplexity"] * (method == "sft")]
        assert set(record) == {"step", "epoch"} | {f"eval_{name}" for name in held_out}
    assert (logged[0]["learning_rate"], logged[0]["loss_scale"]) == (
        pytest.approx(1e-2 * math.cos(math.pi / 12) ** 2),
        1,
    )
    assert logged[-1]["num_tokens"] > logged[-1]["supervised_tokens"] > 0
    for step in (2, 4, 6):
        assert f"step {step}/6  loss " in runs.said[method].out


def test_no_path_but_that_of_the_base_leaves_with_the_adapter(runs, merged):
    for folder in (runs.sft / "adapter", runs.dpo / "adapter", runs.dpo / "parent", merged):
        for file in [*folder.glob("*.json"), *folder.glob("*.toml"), *folder.glob("*.jinja")]:
            text = file.read_text(encoding="utf-8")
            if file.name == "adapter_config.json":
                text = text.replace(f'"base_model_name_or_path": "{runs.space.base}"', "")
            for path in (str(runs.space.folder), str(Path.home()) + "/", os.getcwd() + "/", "/tmp/"):
                assert path not in text, file
        for file in folder.glob("*.safetensors"):
            assert str(runs.space.folder).encode() not in file.read_bytes()


def test_the_run_says_what_it_trains(runs):
    out = runs.said["dpo"].out
    for text in ("4-bit nf4 base, fp32 on CPU", "sdpa with an explicit mask: the run is on a CPU", "dropout off",
                 "18 examples, 6 steps of 2 x 2", "(frozen); loss sigmoid, beta 0.1"):  # fmt: skip
        assert text in out
    assert "dropout 0.1" in runs.said["sft"].out


@pytest.mark.parametrize("key", ["model.name", "model.adapter", "lora.init_from"])
def test_a_run_does_not_write_into_what_it_starts_from(runs, cli, tmp_path, key):
    """With --restart it would even delete the adapter that it starts from."""
    source = shutil.copytree(runs.space.base if key == "model.name" else runs.sft, tmp_path / "source")
    before = sorted(file.name for file in source.rglob("*"))
    shape = {"r": None, "lora_alpha": None} if key == "lora.init_from" else {}
    config = runs.space.write("next", "dpo", folder=tmp_path, lora=shape)
    given = source if key == "model.name" else source / "adapter"
    for place in (given, *([source] if key != "model.name" else [])):
        said = cli("dpo", config, "--restart", f"--{key}", given, "--train.output_dir", place)
        assert said.code == 2 and f"train.output_dir {place} is the folder of {key}" in said.err, said.err
    assert sorted(file.name for file in source.rglob("*")) == before


def test_a_file_is_no_run_folder(runs, cli, tmp_path):
    (tmp_path / "file").write_text("x")
    said = cli("sft", runs.space.write("next", "sft", folder=tmp_path), "--train.output_dir", tmp_path / "file")
    assert (said.code, said.err) == (
        2,
        f"error: train.output_dir {tmp_path / 'file'} is a file, expected the name of a folder\n",
    )
